"""What llama.cpp is started with: one slot an adapter, each with a whole context; nothing kept unasked.

Knows llama.cpp's parameters and this machine; knows nothing of requests.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rag_kit.models.llamacpp.gguf import Gguf

BATCH = 512  # tokens of a prompt between two looks at whether it was called off
SLOTS = 4  # caches that are kept: each takes the memory of a whole context from the start


def parameters(
    gguf: Gguf, context: int, slots: int, adapters: Mapping[str, Path], threads: int
) -> tuple[Any, str]:
    """Return llama.cpp's parameters and the key of its port; no adapter is applied unless asked for."""
    import xllamacpp  # type: ignore[import-not-found, import-untyped, unused-ignore]

    params, key = xllamacpp.CommonParams(), secrets.token_urlsafe(32)
    params.model.path = str(gguf.path)
    params.port, params.api_keys, params.ui = 0, [key], False  # on 127.0.0.1, and free
    # A context of its own for each slot: in a common one (kv_unified) log-probabilities move with what lies
    # beside them (0.4 in Q8_0), and every token looks at all of it.
    params.n_ctx, params.n_parallel, params.kv_unified = context * slots, slots, False
    params.n_batch = params.n_ubatch = BATCH
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_ram_mib = 0  # nothing is kept from one prompt to the next
    params.ctx_shift = params.fit_params = params.warmup = False
    params.verbosity = 2
    params.lora_adapters, params.lora_init_without_apply = [_unused(path) for path in adapters.values()], True
    # Vectors come from the same model and context: a second one in this process would halve both.
    params.embedding = True
    if gguf.sized("pooling_type") is None:  # the last token has seen the whole text
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_LAST
    return params, key


def _unused(path: Path) -> Any:
    import xllamacpp

    info = xllamacpp.CommonAdapterLoraInfo()
    info.path, info.scale = str(path), 0.0
    return info


def slots_for(gguf: Gguf, context: int, wanted: int) -> int:
    """Return how many caches to keep: at most SLOTS, and no more than fit into half of the free memory."""
    import psutil

    room = psutil.virtual_memory().available // 2 // max(1, gguf.cache_bytes(context))
    return max(1, min(SLOTS, wanted, room))
