"""llama.cpp itself, through xllamacpp: token ids in, tokens out, one request after the other.

Knows llama.cpp's own port on loopback, behind a key of its own: only there can text be tokenised, and only
there does a closed connection end a prompt that is still being read. A prompt is computed anew, so that a
greedy answer repeats to the bit, unless the cache is asked for. Every request names the scale of every
adapter: one that is not named keeps its own, and an unknown one is the base. Knows nothing of Ollama's wire.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rag_kit.errors import AdapterNotFoundError, ModelError
from rag_kit.models.llamacpp.gguf import Gguf
from rag_kit.models.llamacpp.link import Link, Part, refuse
from rag_kit.models.llamacpp.parameters import parameters, slots_for
from rag_kit.models.llamacpp.scoring import likeliest, score
from rag_kit.models.marks import marks, pieces

if TYPE_CHECKING:
    import numpy as np

USER_DEFINED = 4  # a kind of token in a GGUF


class Runner:
    """One model of llama.cpp and its adapters, loaded when first needed; `tokens` counts all that it made."""

    def __init__(
        self, gguf: Gguf, context: int | None = None, adapters: Mapping[str, Path] = MappingProxyType({})
    ) -> None:
        self.gguf, self.context, self.adapters = gguf, gguf.context(context), dict(adapters)
        self.slots = slots_for(gguf, self.context, len(adapters) + 1)
        self.requests = self.tokens = 0
        self._slot: dict[str | None, int] = {}  # whose cache lies where, the least recently used first
        self._lock = asyncio.Lock()
        self._loading: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._server: Any = None
        self._link: Link
        self._begin: list[int] = []
        self._forced: Part = {}
        tokens, kinds = (gguf.metadata.get(f"tokenizer.ggml.{key}", []) for key in ("tokens", "token_type"))
        self._vocabulary = len(tokens)
        # llama.cpp recognises these in foreign text too (Qwen's `<tool_call>`)
        named = [name for name, kind in zip(tokens, kinds, strict=False)
                 if kind == USER_DEFINED and re.fullmatch(r"<\S+>", name)]  # fmt: skip
        self._named = re.compile("|".join(map(re.escape, named)) or "(?!)")

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._server is not None

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[int]:
        """Wait until nobody else is served, with the model loaded; yields the nanoseconds of loading."""
        async with self._lock:
            start = time.perf_counter_ns()
            self._loading = self._loading or asyncio.ensure_future(self._load())
            try:
                await asyncio.shield(self._loading)  # who leaves now leaves the loading to the next one
            except Exception:
                self._loading = None
                raise
            yield time.perf_counter_ns() - start

    async def load(self) -> None:
        """Have the model in memory."""
        async with self.turn():
            pass

    async def unload(self) -> None:
        """Free the model's memory, once nobody is served."""
        async with self._lock:
            if self._loading is not None:
                self._leaving = asyncio.ensure_future(self._unload(self._loading))
                self._loading = None
            if self._leaving is not None:
                await asyncio.shield(self._leaving)

    async def _load(self) -> None:
        if self._leaving is not None:  # whoever asked for it may have gone
            await asyncio.wait([self._leaving])
        import xllamacpp  # type: ignore[import-not-found, import-untyped, unused-ignore]

        params, key = parameters(self.gguf, self.context, self.slots, self.adapters, threads())
        server = await asyncio.to_thread(xllamacpp.Server, params)
        self._link, self._slot = Link(server.listening_address, key), {}
        # A server that is deleted before its loop runs hangs: have it do something first.
        await self._post("/completion", prompt=[0], n_predict=1, **self._as(None))
        held = [one["path"] for one in await self._link.ask("/lora-adapters")]
        assert held == [str(path) for path in self.adapters.values()], (
            "llama.cpp counts the adapters otherwise"
        )
        self._begin = (await self._post("/tokenize", content="", add_special=True))["tokens"][:1]
        # where this token, which is whole, is forced, all is told that is not where half a character comes
        whole = (await self._post("/tokenize", content="a", add_special=False))["tokens"][0]
        self._forced = {"logit_bias": [[whole, 1000.0]]}
        self._server = server

    async def _unload(self, loading: asyncio.Task[None]) -> None:
        await asyncio.wait([loading])
        if self._server is not None:
            await asyncio.to_thread(setattr, self, "_server", None)  # which joins llama.cpp's threads

    async def _post(self, route: str, **body: Any) -> Any:
        return await self._link.ask(route, body)

    def check(self, adapter: str | None) -> None:
        """Raise AdapterNotFoundError where no such adapter is served; None is the base."""
        if adapter is not None and adapter not in self.adapters:
            known = ", ".join(self.adapters) or "-"
            raise AdapterNotFoundError("engine_no_adapter", adapter=adapter, known=known)

    def _as(self, adapter: str | None) -> Part:
        """Return what makes llama.cpp answer as `adapter`, where its cache lies."""
        self.check(adapter)
        slot = self._slot.pop(adapter, None)
        if slot is None:
            full = len(self._slot) == self.slots
            slot = self._slot.pop(next(iter(self._slot))) if full else len(self._slot)
        self._slot[adapter] = slot
        scales = [{"id": at, "scale": float(name == adapter)} for at, name in enumerate(self.adapters)]
        return {"id_slot": slot, "lora": scales}

    async def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Return the ids of `text`; control tokens are recognised in it only if `special`."""
        cuts = [] if special else [found.start() + 1 for found in self._named.finditer(text)]
        ids: list[int] = []
        for start, end in pairwise([0, *cuts, len(text)]):
            asked = {"content": text[start:end], "add_special": False, "parse_special": special}
            ids += (await self._post("/tokenize", **asked))["tokens"] if start < end else []
        return ids

    def begun(self, ids: list[int]) -> list[int]:
        """Return `ids` with the token that begins every text of this model, once."""
        return ids if ids[: len(self._begin)] == self._begin else self._begin + ids

    async def render(self, messages: Sequence[tuple[str, str]], name: str) -> list[int]:
        """Return the ids of (role, content) pairs by the file's chat template, the contents encoded apart.

        Raises ModelError where the file has no template, or it refuses the messages.
        """
        if self.gguf.template is None:
            raise ModelError("engine_no_template", model=name, path=self.gguf.path)
        contents = [content for _, content in messages]
        marked = zip(messages, marks(contents), strict=True)
        asked = {"messages": [{"role": role, "content": mark} for (role, _), mark in marked]}
        try:
            prompt = await self._post(
                "/apply-template", **asked, chat_template_kwargs={"enable_thinking": False}
            )
        except ModelError as error:
            raise ModelError("template_refused", base=name, reason=error.values["reason"]) from error
        ids: list[int] = []
        for text, of in pieces(prompt["prompt"], contents):
            ids += await self.tokenize(text, special=of < 0)
        return self.begun(ids)

    async def generate(
        self, ids: list[int], sampling: Part, adapter: str | None = None, *, cache: bool = False
    ) -> AsyncGenerator[Part]:
        """Yield `text`, the number of `tokens` that it took and, of one, its `id`; at last the usage.

        A token that ends amid a character is told together with the one that completes it. Whoever closes
        the generator stops llama.cpp.
        """
        self.requests += 1
        asked = {**sampling, "prompt": ids, "stream": True, "cache_prompt": cache, **self._as(adapter)}
        made = 0
        async with aclosing(self._link.events("/completion", asked)) as parts:
            async for part in parts:
                new, made = part["tokens_predicted"] - made, part["tokens_predicted"]
                self.tokens += new
                if part["stop"]:
                    timings = part["timings"]
                    reason = "length" if part["stop_type"] == "limit" else "stop"
                    usage = _usage(reason, len(ids), timings["prompt_ms"], made, timings["predicted_ms"])
                    yield usage | {"cached": timings["cache_n"]}
                    return
                yield {"text": part["content"], "tokens": new, "id": part["tokens"][0] if new == 1 else None}
        refuse({"message": "its answer has no end"})

    async def steps(
        self, ids: list[int], sampling: Part, top: int, adapter: str | None = None, *, cache: bool = False
    ) -> AsyncGenerator[Part]:
        """Yield each token: `id`, `text`, and its `top` rivals' log-probabilities before sampling.

        llama.cpp has no log-probabilities for a token that ends amid a character, so tokens are asked for
        one by one, and there another one is forced, before which the same are told. The token that ends
        the answer is told too; a stop string ends it uncut.
        """
        self.requests += 1
        sampling = {**sampling, **self._as(adapter)}
        made: list[int] = []
        text, reason, times = "", "length", [time.perf_counter()]
        while len(made) < sampling["n_predict"] and reason == "length":
            asked = {**sampling, "prompt": ids + made, "n_predict": 1, "n_probs": top, "return_tokens": True}
            asked["seed"] += len(made) if asked["seed"] >= 0 else 0
            # the first step computes the prompt, also when it is forced: with all but the last token at
            # hand, that one alone would come out a little different
            asked["cache_prompt"] = cache or bool(made)
            told = await self._post("/completion", **asked)
            logs = told.get("completion_probabilities")
            logs = (
                logs or (await self._post("/completion", **asked | self._forced))["completion_probabilities"]
            )
            made += told["tokens"]
            self.tokens += 1
            before, ends = text, told["stop_type"] == "eos"
            if not ends:
                text = (await self._post("/detokenize", tokens=made))["content"].rstrip("\ufffd")
            if ends or any(stop in text for stop in sampling["stop"]):
                reason = "stop"
            times.append(time.perf_counter())
            pairs = [(one["id"], one["logprob"]) for one in logs[0]["top_logprobs"]]
            yield {"text": text[len(before) :], "tokens": 1, "id": made[-1], "top": pairs}
        spent = [(times[at] - times[0]) * 1e3 for at in (1, -1)]
        yield _usage(reason, len(ids), spent[0], len(made), spent[1] - spent[0])

    async def next(self, ids: list[int], adapter: str | None, *, cache: bool = False) -> np.ndarray:
        """Return the log-probabilities of the token after `ids`, before sampling: float32, by token id."""
        import numpy as np

        self.requests += 1
        asked = {"prompt": ids, "cache_prompt": cache, **self._forced, **self._as(adapter)}
        found = await likeliest(self._link, asked, self._vocabulary)
        logs = np.full(self._vocabulary, -np.inf, dtype="<f4")
        logs[list(found)] = list(found.values())
        return logs

    async def score(self, ids: list[int], answer: list[int], adapter: str | None) -> list[float]:
        """Return the log-probability of each token of `answer`, before sampling, where it follows `ids`."""
        self.requests += 1
        self.tokens += len(answer)
        asked = self._forced | self._as(adapter)
        return await score(self._link, ids, answer, self._vocabulary, asked)

    async def embed(self, ids: list[list[int]]) -> list[list[float]]:
        """Return one vector of length 1 for each list of ids."""
        self.requests += 1
        found = await self._post("/embeddings", input=ids)
        return [one["embedding"][0] for one in sorted(found, key=lambda one: one["index"])]

    async def busy(self) -> bool:
        """Whether llama.cpp itself is at work: the truth behind a request that was called off.

        Asked more than once a second, it puts off the end of a prompt that is still being read.
        """
        return self.loaded and any(slot["is_processing"] for slot in await self._link.ask("/slots"))


def threads() -> int:
    """Return the threads to compute with: OMP_NUM_THREADS, else the physical cores of this process."""
    import psutil

    asked = os.environ.get("OMP_NUM_THREADS", "")
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(psutil.cpu_count(logical=False) or allowed, allowed)
    return int(asked) if asked.isdecimal() and int(asked) else cores


def _usage(reason: str, prompt: int, prompt_ms: float, tokens: int, ms: float) -> Part:
    """Name what a generation came to as Ollama does, in nanoseconds."""
    read = {"prompt_eval_count": prompt, "prompt_eval_duration": round(prompt_ms * 1e6)}
    return {"done_reason": reason, **read, "eval_count": tokens, "eval_duration": round(ms * 1e6)}
