"""The way to an Ollama server: a client that no proxy stands before, and its failures in two sentences.

Knows addresses and errors; knows nothing of chat or embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import ollama

from rag_kit.errors import ServiceError

CONNECT_S, LOOK_S = 5.0, 10.0


def client(base_url: str, timeout: float | None = None) -> ollama.Client:
    """Return a client of `base_url` that waits at most `timeout` seconds for bytes, by default LOOK_S."""
    timeout = timeout or LOOK_S
    limits = httpx.Timeout(timeout, connect=min(CONNECT_S, timeout))
    return ollama.Client(host=base_url, trust_env=False, timeout=limits)


def list_models(base_url: str) -> list[str]:
    """Return the names of the models at `base_url`; raises ServiceError where it does not answer."""
    with explaining(base_url, "-"):
        return [str(entry.model) for entry in client(base_url).list().models]


@contextmanager
def explaining(base_url: str, model: str) -> Iterator[None]:
    """Turn what the client raises into a ServiceError that names the server, the model and a remedy."""
    try:
        yield
    except ollama.ResponseError as error:
        if error.status_code == 404:
            known = ", ".join(_known_models(base_url)) or "-"
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


def _known_models(base_url: str) -> list[str]:
    try:
        return [str(entry.model) for entry in client(base_url).list().models]
    except (ollama.ResponseError, httpx.HTTPError, ConnectionError, ValueError):
        return []


def _short(text: object) -> str:
    return " ".join(str(text).split())[:200]
