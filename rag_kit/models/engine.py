"""What an engine is, which of the two runs a base here, and why.

`transformers` (with PEFT) runs every base and trains it; `llama.cpp` runs a GGUF of it several times faster
on a CPU. Knows the choice; knows nothing of how either one computes.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rag_kit.errors import ModelError, message
from rag_kit.models.device import may_have_cuda

if TYPE_CHECKING:
    import numpy as np

    from rag_kit.models.adapters import Adapter
    from rag_kit.models.base import Base
    from rag_kit.models.options import GenerationOptions
    from rag_kit.settings import Settings

EngineName = Literal["auto", "llama.cpp", "transformers"]


@dataclass
class Generation:
    """What one request's generation came to.

    `finish_reason` is `stop`, `length`, `timeout` (after `timeout` seconds) or `cancelled`. `cache` lets
    llama.cpp go on from what it still holds of the prompt, `cached` tokens; without it an answer repeats to
    the bit.
    """

    timeout: float | None = None
    cache: bool = False
    finish_reason: str = "cancelled"
    output_tokens: int = 0
    cached: int = 0
    first_token_s: float | None = None
    total_s: float = 0.0
    cancelled: threading.Event = field(default_factory=threading.Event)


class Engine(Protocol):
    """One base in memory with any number of adapters; `dtype` is the number or block type of its weights.

    `end_ids` end an answer, and nothing does where they are taken away.
    """

    name: str
    reason: str
    base: Base
    tokenizer: Any
    end_ids: tuple[int, ...]
    context_length: int
    load_s: float

    @property
    def dtype(self) -> str:
        """The number or block type of the weights, such as `float32` or `Q8_0`."""
        ...

    def memory_bytes(self) -> int:
        """Return the bytes of all weights in memory, adapters included."""
        ...

    def holding(self, adapter: Adapter | None, *, pinned: bool = False) -> AbstractContextManager[str | None]:
        """Have `adapter` in memory for the block; yields its key, None for the base itself."""
        ...

    def stream(
        self, ids: Sequence[int], adapter: str | None, options: GenerationOptions, state: Generation
    ) -> Generator[str]:
        """Yield the text that follows `ids`, in pieces; fills `state`; raises ModelError."""
        ...

    def next_logprobs(self, ids: Sequence[int], adapter: str | None) -> np.ndarray:
        """Return the log-probabilities (natural, before sampling) of the token after `ids`, (vocabulary,)."""
        ...

    def score(self, ids: Sequence[int], answer: Sequence[int], adapter: str | None) -> np.ndarray:
        """Return the log-probability of each token of a given `answer` after `ids`, (len(answer),)."""
        ...


def choose_engine(base: Base, settings: Settings, asked: str | None = None) -> tuple[str, str]:
    """Return the engine's name and why: `asked`, else ENGINE; `auto` takes llama.cpp on a CPU with a GGUF.

    Raises ModelError where llama.cpp is asked for and no GGUF of the base is at hand.
    """
    name = asked or settings.engine
    if name == "llama.cpp" and base.gguf is None:
        raise ModelError("engine_no_gguf", base=base.name)
    if name != "auto":
        return name, message("engine_asked", engine=name)
    if settings.enable_quantization or settings.enable_fp16:
        return "transformers", message("engine_weights_asked")
    if base.gguf is None:
        return "transformers", message("engine_needs_gguf")
    if not find_spec("xllamacpp"):
        return "transformers", message("engine_not_installed")
    if settings.device == "cuda":
        return "transformers", message("engine_gpu")  # which says it where there is none
    if settings.device == "auto" and may_have_cuda():
        import torch

        if torch.cuda.is_available():
            return "transformers", message("engine_gpu")
    return "llama.cpp", message("engine_gguf", path=base.gguf.name)
