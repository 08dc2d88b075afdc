"""Who answers in Ollama's place: Ollama itself, or on the embedded profile our own engine, the stand-in.

The stand-in serves the embedded base where *nothing* listens at OLLAMA_BASE_URL. It is called `stand-in`
wherever its answers are shown; a server that is there and fails is never replaced by it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rag_kit.errors import ServiceError
from rag_kit.ollama import probe

if TYPE_CHECKING:
    from rag_kit.settings import Settings

STAND_IN = "stand-in"
State = Literal["running", "stand-in", "absent", "down"]

_engine: Any = None
_lock = threading.Lock()


@dataclass(frozen=True)
class OllamaServer:
    """Where to send what is meant for Ollama: `url`, and `headers` that go with every request."""

    url: str
    headers: dict[str, str] = field(default_factory=dict, repr=False)  # the stand-in's hold its key
    state: State = "running"
    reason: str = ""


def ollama_state(settings: Settings) -> tuple[State, str]:
    """Return who would answer for Ollama now, and its version or what is wrong; starts nothing."""
    state, reason = probe(settings.ollama_base_url)
    if state == "absent" and settings.rag_kit_profile == "embedded":
        return "stand-in", reason
    return state, reason


def find_ollama(settings: Settings, model: str = "") -> OllamaServer:
    """Return the server for Ollama's `model`; starts the stand-in (one to two seconds) where it is its turn.

    The stand-in asked for by its name answers also where Ollama has come meanwhile, so that what began
    with it ends with it. `state` `absent` or `down` says that the models of `url` cannot answer now.
    Raises what keeps the stand-in from starting.
    """
    state, reason = ollama_state(settings)
    by_name = model.removesuffix(":latest") == STAND_IN and settings.rag_kit_profile == "embedded"
    if state != "stand-in" and not by_name:
        return OllamaServer(settings.ollama_base_url, {}, state, reason)
    engine = _stand_in(settings)
    return OllamaServer(engine.url, engine.headers, "stand-in", reason)


def resolve(reference: str, settings: Settings) -> str:
    """Return the reference that answers now: OLLAMA_MODEL is `ollama:stand-in` where that stands in.

    Raises ServiceError for another Ollama model where nothing listens that could have it.
    """
    provider, _, name = reference.partition(":")
    if provider != "ollama" or not name or ollama_state(settings)[0] != "stand-in":
        return reference
    if name.removesuffix(":latest") not in (settings.ollama_model.removesuffix(":latest"), STAND_IN):
        raise ServiceError("ollama_absent", url=settings.ollama_base_url, model=name, stand_in=STAND_IN)
    return f"ollama:{STAND_IN}"


def answering(reference: str, settings: Settings) -> str:
    """Return what `resolve` does; a reference that cannot answer now stays as it is."""
    try:
        return resolve(reference, settings)
    except ServiceError:
        return reference


def _stand_in(settings: Settings) -> Any:
    """Return the process's one stand-in, started at the first call."""
    from rag_kit.embedded import base_gguf
    from rag_kit.models.llamacpp.process import EngineProcess

    global _engine
    with _lock:
        if _engine is None:
            _engine = EngineProcess(base_gguf(settings.cache_dir), name=STAND_IN)
        return _engine.start()
