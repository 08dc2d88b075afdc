"""Ollama's memory: what this process brought into it, and what goes out again when memory is short.

Only what this process loaded is ever unloaded; a model of somebody else that may have to go is named.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rag_kit.errors import message
from rag_kit.ollama import client, explaining, loaded_models

if TYPE_CHECKING:
    from rag_kit.ollama import Headers

logger = logging.getLogger("rag_kit.models")

LOAD_S = 300.0  # a large model comes from a slow disk
ROOM = 1.2  # weights, and what is computed beside them
_ours: dict[tuple[str, str], Headers] = {}
_lock = threading.Lock()


def load(base_url: str, model: str, headers: Headers, num_ctx: int) -> None:
    """Bring `model` into the memory of the server at `base_url` where it is not; raises ServiceError."""
    there = loaded_models(base_url, headers)
    name = model if ":" in model else f"{model}:latest"
    if name in there:
        return
    with explaining(base_url, model, headers):
        sizes = {
            str(entry.model): entry.size or 0 for entry in client(base_url, headers=headers).list().models
        }
        needed = int(sizes.get(name, 0))
        gone = make_room(needed, keep=name)
        others = [one for one in there if one not in gone and (base_url, one) not in _ours]
        if others and _is_here(base_url) and _short(needed):
            told = {"url": base_url, "model": name, "others": ", ".join(others)}
            logger.warning("%s", message("ollama_may_evict", **told))
        client(base_url, LOAD_S, headers).generate(model, options={"num_ctx": num_ctx})
    with _lock:
        _ours[base_url, name] = headers


def make_room(needed: int, keep: str = "") -> list[str]:
    """Unload what this process loaded into this machine's servers, if `needed` bytes lack; return names."""
    gone = []
    with _lock:
        loaded = [one for one in _ours if one[1] != keep and _is_here(one[0])]
        for base_url, name in loaded if loaded and _short(needed) else ():
            with explaining(base_url, name, _ours[base_url, name]):
                client(base_url, headers=_ours[base_url, name]).generate(name, keep_alive=0)
            del _ours[base_url, name]
            gone.append(name)
    if gone:
        logger.warning("%s", message("ollama_unloaded", models=", ".join(gone), needed=needed / 1e9))
    return gone


def _short(needed: int) -> bool:
    import psutil

    return needed > 0 and psutil.virtual_memory().available < needed * ROOM


def _is_here(base_url: str) -> bool:
    return urlsplit(base_url).hostname in ("localhost", "127.0.0.1", "::1")
