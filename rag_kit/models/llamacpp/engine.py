"""The llama.cpp engine as models see it: ids and adapters in, text and log-probabilities out.

The work is done by an engine process over the fastest faithful file of the base; an adapter joins it as a
GGUF, a pinned one is merged and has a process of its own. Knows HTTP; knows nothing of chat or prompts.
"""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import finalize

import httpx
import numpy as np

from rag_kit.errors import ModelError
from rag_kit.models.llamacpp.adapter_gguf import adapter_gguf
from rag_kit.models.llamacpp.gguf import read_gguf
from rag_kit.models.llamacpp.process import EngineProcess
from rag_kit.models.llamacpp.serving import pinned_file, serving_file
from rag_kit.models.render import end_ids
from rag_kit.ollama import SEVERABLE

if TYPE_CHECKING:
    from rag_kit.models.adapters import Adapter
    from rag_kit.models.base import Base
    from rag_kit.models.engine import Generation
    from rag_kit.models.options import GenerationOptions

logger = logging.getLogger("rag_kit.models")

READ_S = 300.0  # a long prompt on a slow machine
PINNED = "pinned:"
CONTEXT = 4096  # tokens at first: each adapter's cache takes the memory of a whole context


class LlamaCppEngine:
    """A base served by llama.cpp, with adapters that are chosen per request.

    `serving` says which file is served and why; `process` is the engine process of base and adapters.
    """

    name = "llama.cpp"

    def __init__(self, base: Base, cache_dir: Path | None, reason: str = "") -> None:
        from transformers import AutoTokenizer, GenerationConfig

        assert base.gguf is not None
        start = time.perf_counter()
        self.base, self.reason, self._cache_dir = base, reason, cache_dir
        self.serving = serving_file(base.gguf, cache_dir, logger.info)
        self.context_length = int(read_gguf(self.serving.path).sized("context_length", CONTEXT))
        self.process = self._process(self.serving.path, "base")
        self._pinned: dict[str, tuple[str, EngineProcess]] = {}
        self._holders: Counter[str] = Counter()
        finalize(self, _stop, self.process, self._pinned)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False)
        self.end_ids = end_ids(self.tokenizer, GenerationConfig.from_pretrained(base.folder))
        self._lock = threading.Lock()
        self.load_s = time.perf_counter() - start

    @property
    def dtype(self) -> str:
        """The block type of the file that is served, such as `Q8_0`."""
        return self.serving.kind

    def memory_bytes(self) -> int:
        """Return the bytes of the files in memory: the base's, the adapters', merged ones."""
        files = [self.process.gguf, *self.process.adapters.values()]
        return sum(file.stat().st_size for file in [*files, *(one.gguf for _, one in self._pinned.values())])

    @contextmanager
    def holding(self, adapter: Adapter | None, *, pinned: bool = False) -> Iterator[str | None]:
        """Have `adapter` served for the block; yields its key, None for the base itself."""
        if adapter is None or not pinned:
            yield None if adapter is None else self._join(adapter)
            return
        key = self._pin(adapter)
        try:
            yield key
        finally:
            with self._lock:
                self._holders[key] -= 1
                newest = {name: key for key, (name, _) in self._pinned.items()}
                for old, (name, process) in list(self._pinned.items()):
                    if newest[name] != old and not self._holders[old]:  # it was trained anew meanwhile
                        del self._pinned[old]
                        process.stop()

    def _join(self, adapter: Adapter) -> str:
        assert self.base.gguf is not None
        path = adapter_gguf(adapter, self.base.gguf, self._cache_dir)
        with self._lock:
            if self.process.adapters.get(adapter.name) != path:
                self.process.set_adapters({**self.process.adapters, adapter.name: path})
        return adapter.name

    def _pin(self, adapter: Adapter) -> str:
        assert self.base.gguf is not None
        key = PINNED + adapter.key
        with self._lock:
            if key not in self._pinned:
                merged = pinned_file(self.base.gguf, adapter, self._cache_dir, logger.info)
                self._pinned[key] = adapter.name, self._process(merged.path, f"base+{adapter.name}")
            self._holders[key] += 1
        return key

    def _process(self, file: Path, name: str) -> EngineProcess:
        return EngineProcess(file, name=name, context=min(CONTEXT, self.context_length)).start()

    def _make_room(self, key: str | None, tokens: int) -> None:
        """Have contexts of `tokens` at least, by a second child where they are smaller."""
        process = self._pinned[key][1] if key in self._pinned else self.process
        with self._lock:
            context = process.context or CONTEXT
            while context < tokens:
                context *= 2
            if context != process.context:
                process.set_adapters(process.adapters, min(context, self.context_length))

    @contextmanager
    def _client(self, key: str | None) -> Iterator[tuple[httpx.Client, str | None]]:
        """Yield a client of the process that serves `key`, and the adapter to name there."""
        process = self._pinned[key][1] if key in self._pinned else self.process
        timeout = httpx.Timeout(READ_S, connect=5.0)
        how: dict[str, Any] = {"headers": process.headers, "trust_env": False, "timeout": timeout}
        try:
            with httpx.Client(base_url=process.url, **how, **SEVERABLE) as client:
                yield client, key if process is self.process else None
        except httpx.HTTPError as error:
            raise process.lost(error) from error

    def _post(self, route: str, key: str | None, **body: Any) -> dict[str, Any]:
        with self._client(key) as (client, adapter):
            reply = client.post(route, json={"adapter": adapter, **body})
        return _checked(reply)

    def stream(
        self, ids: Sequence[int], adapter: str | None, options: GenerationOptions, state: Generation
    ) -> Generator[str]:
        """Yield the text that follows `ids`, in pieces; whoever closes the generator stops llama.cpp.

        Raises ModelError where the prompt and `max_new_tokens` do not fit the context.
        """
        limit = min(options.num_ctx or self.context_length, self.context_length)
        if len(ids) + options.max_new_tokens > limit:
            raise ModelError("prompt_too_long", tokens=len(ids), new=options.max_new_tokens, limit=limit)
        start = time.perf_counter()
        self._make_room(adapter, options.num_ctx or len(ids) + options.max_new_tokens)
        try:
            with self._client(adapter) as (client, name):
                body: dict[str, Any] = {"ids": list(ids), "adapter": name, "cache": state.cache}
                body |= {"options": self._sent(options)}
                with client.stream("POST", "/engine/generate", json=body) as reply:
                    if not reply.is_success:
                        reply.read()
                        _checked(reply)
                    for line in reply.iter_lines():
                        part = json.loads(line)
                        if "error" in part:
                            raise ModelError("engine_said", reason=part["error"])
                        if "done_reason" in part:
                            state.output_tokens, state.finish_reason = part["eval_count"], part["done_reason"]
                            state.cached = part["cached"]
                            return
                        state.output_tokens += part["tokens"]
                        if state.first_token_s is None:
                            state.first_token_s = time.perf_counter() - start
                        yield part["text"]
                        if state.cancelled.is_set():
                            return
                        if state.timeout and time.perf_counter() - start > state.timeout:
                            state.finish_reason = "timeout"
                            return
        finally:
            state.total_s = time.perf_counter() - start

    def _sent(self, options: GenerationOptions) -> dict[str, Any]:
        """Return every option under llama.cpp's name; what Ollama has and we have not is off."""
        return {
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "min_p": options.min_p,
            "repeat_penalty": options.repetition_penalty,
            "repeat_last_n": self.context_length,  # prompt and answer, as transformers has it
            "seed": options.seed,
            "num_predict": options.max_new_tokens,
            "num_ctx": options.num_ctx,
            "ignore_eos": not self.end_ids,
        }

    def next_logprobs(self, ids: Sequence[int], adapter: str | None) -> np.ndarray:
        """Return the log-probabilities of the token after `ids`, shape (vocabulary,)."""
        told = self._post("/engine/next", adapter, ids=list(ids))
        return np.frombuffer(base64.b64decode(told["logprobs"]), dtype="<f4")

    def score(self, ids: Sequence[int], answer: Sequence[int], adapter: str | None) -> np.ndarray:
        """Return the log-probability of each token of `answer` after `ids`, shape (len(answer),)."""
        told = self._post("/engine/score", adapter, ids=list(ids), answer=list(answer))
        return np.array(told["logprobs"], dtype=np.float32)


def _checked(reply: httpx.Response) -> dict[str, Any]:
    told: dict[str, Any] = reply.json()
    if not reply.is_success:
        raise ModelError("engine_said", reason=told.get("error", reply.status_code))
    return told


def _stop(process: EngineProcess, pinned: dict[str, tuple[str, EngineProcess]]) -> None:
    for one in (process, *(one for _, one in pinned.values())):
        one.stop()
