"""The way to an Ollama server: its address, its models, and its failures in two sentences.

No proxy stands before the client. Knows nothing of chat or embeddings.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
import ollama

from rag_kit.errors import ServiceError

CONNECT_S, LOOK_S = 5.0, 10.0
PROBE_S = 2.0  # a server at hand says its version at once, however busy its models are
Headers = Mapping[str, str]


@dataclass(frozen=True)
class OllamaModel:
    """A model that a server has; sizes in bytes, `context` in tokens, None where it does not say.

    `adapter`: made by a Modelfile with ADAPTER. `loaded`: bytes in memory now, None when not loaded.
    """

    name: str
    size: int | None
    quantization: str
    parameters: str
    family: str
    context: int | None
    capabilities: tuple[str, ...] | None
    template: str
    adapter: bool
    loaded: int | None
    digest: str


class Line:
    """The connections that one thread has open to Ollama, so that another thread can cut them.

    A generator that waits for the next token cannot be closed from outside; its socket can.
    """

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._cut = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note every connection that this thread opens in the block."""
        before = _line.set(self)
        try:
            yield
        finally:
            _line.reset(before)

    def cut(self) -> None:
        """End what waits on these connections now, and refuse new ones."""
        with self._lock:
            self._cut = True
            for connection in self._sockets:
                with suppress(OSError):  # it has ended by itself
                    connection.shutdown(socket.SHUT_RDWR)
            self._sockets.clear()

    def _note(self, event: str, info: Mapping[str, Any]) -> None:
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            with self._lock:
                self._sockets.append(info["return_value"].get_extra_info("socket"))
            if self._cut:
                self.cut()


_line: ContextVar[Line | None] = ContextVar("line", default=None)


def _trace(request: httpx.Request) -> None:
    if line := _line.get():
        request.extensions["trace"] = line._note


# A connection that was kept would serve a later request without being noted again.
SEVERABLE: dict[str, Any] = {
    "event_hooks": {"request": [_trace]},
    "limits": httpx.Limits(max_keepalive_connections=0),
}


def client(base_url: str, timeout: float | None = None, headers: Headers | None = None) -> ollama.Client:
    """Return a client of `base_url` that waits at most `timeout` seconds for bytes, by default LOOK_S."""
    timeout = timeout or LOOK_S
    limits = httpx.Timeout(timeout, connect=min(CONNECT_S, timeout))
    sent = dict(headers or {})
    return ollama.Client(host=base_url, trust_env=False, timeout=limits, headers=sent, **SEVERABLE)


def probe(base_url: str) -> tuple[Literal["running", "absent", "down"], str]:
    """Return what stands at `base_url`, and its version or what is wrong with it.

    `absent`: nothing listens, the connection was refused. `down`: something is there and fails, or the
    address leads nowhere.
    """
    parts = urlsplit(base_url)
    place = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    try:
        socket.create_connection(place, PROBE_S).close()
        secure = parts.scheme == "https"  # loading certificates takes longer than asking
        reply = httpx.get(f"{base_url}/api/version", timeout=PROBE_S, trust_env=False, verify=secure)
        if reply.status_code != 200:
            return "down", f"HTTP {reply.status_code}"
        return "running", str(reply.json()["version"])
    except ConnectionRefusedError:
        return "absent", "connection refused"
    except (OSError, httpx.HTTPError) as error:
        return "down", _short(error) or type(error).__name__
    except (ValueError, LookupError, TypeError):
        return "down", "its reply is not Ollama's"


def list_models(base_url: str, headers: Headers | None = None) -> list[str]:
    """Return the names of the models at `base_url`; raises ServiceError where it does not answer."""
    return list(digests(base_url, headers))


def digests(base_url: str, headers: Headers | None = None) -> dict[str, str | None]:
    """Return the digest of every model at `base_url`; raises ServiceError where it does not answer."""
    with explaining(base_url, "-", headers):
        return {str(e.model): e.digest for e in client(base_url, headers=headers).list().models}


def models(base_url: str, headers: Headers | None = None) -> list[OllamaModel]:
    """Return the models at `base_url` with what `/api/tags`, `/api/ps` and `/api/show` say of them.

    One that was removed meanwhile is left out; raises ServiceError where the server does not answer.
    """
    asked, found = client(base_url, headers=headers), []
    with explaining(base_url, "-", headers):
        loaded = loaded_models(base_url, headers)
        for entry in asked.list().models:
            try:
                shown = asked.show(str(entry.model))
            except ollama.ResponseError as error:
                if error.status_code == 404:
                    continue
                raise
            details = entry.details or shown.details
            sizes = shown.modelinfo or {}
            found.append(
                OllamaModel(
                    name=str(entry.model),
                    size=entry.size,
                    quantization=getattr(details, "quantization_level", None) or "",
                    parameters=getattr(details, "parameter_size", None) or "",
                    family=getattr(details, "family", None) or "",
                    context=next(
                        (int(n) for key, n in sizes.items() if key.endswith(".context_length")), None
                    ),
                    capabilities=None if shown.capabilities is None else tuple(shown.capabilities),
                    template=shown.template or "",
                    adapter=bool(re.search(r"^ADAPTER\s", shown.modelfile or "", re.MULTILINE)),
                    loaded=loaded.get(str(entry.model)),
                    digest=entry.digest or "",
                )
            )
    return found


def loaded_models(base_url: str, headers: Headers | None = None) -> dict[str, int]:
    """Return the models in the server's memory now, with their bytes."""
    with explaining(base_url, "-", headers):
        running = client(base_url, headers=headers).ps().models
        return {str(entry.model or entry.name): int(entry.size or 0) for entry in running}


@contextmanager
def explaining(base_url: str, model: str, headers: Headers | None = None) -> Iterator[None]:
    """Turn what the client raises into a ServiceError that names the server, the model and a remedy."""
    try:
        yield
    except ollama.ResponseError as error:
        if error.status_code == 404:
            known = ", ".join(_known_models(base_url, headers)) or "-"
            raise ServiceError("ollama_no_model", url=base_url, model=model, known=known) from error
        # an error line in the midst of a stream carries no status
        reason = _short(error.error)
        reason = reason if error.status_code < 0 else f"{error.status_code} {reason}".strip()
        raise ServiceError("ollama_failed", url=base_url, model=model, reason=reason) from error
    except httpx.TimeoutException as error:
        raise ServiceError("ollama_unreachable", url=base_url, reason=type(error).__name__) from error
    except (httpx.ConnectError, ConnectionError) as error:
        raise ServiceError("ollama_unreachable", url=base_url, reason="connection refused") from error
    except (httpx.TransportError, ValueError) as error:
        reason = _short(error) or type(error).__name__
        raise ServiceError("ollama_broke_off", url=base_url, model=model, reason=reason) from error


def _known_models(base_url: str, headers: Headers | None = None) -> list[str]:
    try:
        return [str(entry.model) for entry in client(base_url, headers=headers).list().models]
    except (ollama.ResponseError, httpx.HTTPError, ConnectionError, ValueError):
        return []


def _short(text: object) -> str:
    return " ".join(str(text).split())[:200]
