"""Ollama's models at our table: every option sent, no prompt cut, every failure told in two sentences.

Builds on `langchain_ollama.ChatOllama`; adds what a fair comparison needs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGenerationChunk
from langchain_ollama import ChatOllama
from pydantic import PrivateAttr, model_validator

from rag_kit.data.chunker import conservative_count
from rag_kit.errors import ModelError
from rag_kit.models.memory import load
from rag_kit.models.options import GenerationOptions
from rag_kit.models.parity import RawPrompt, begins_itself, raw_prompt, tokenizer_of
from rag_kit.models.render import text_of
from rag_kit.models.textstream import ThinkSplitter
from rag_kit.ollama import CONNECT_S, SEVERABLE, client, explaining

READ_S = 300.0  # a cold model may need minutes to its first token
LINES_BEYOND = 256
CONTEXT_STEPS = (4096, 8192, 16384, 32768, 65536, 131072)  # few values: a new num_ctx reloads the model


class OllamaLanguageModel(ChatOllama):
    """A model that an Ollama server serves, under the same options as the local ones.

    With `same_base` it gets the prompt that this base's renderer makes, and the tokens that the server counts
    are checked. Raises ServiceError where the server refuses, hangs, breaks off or lacks the model, and
    ModelError for a prompt that its context may not hold, or that the server cut.
    """

    options: GenerationOptions = GenerationOptions()
    timeout: float = READ_S
    same_base: Path | None = None  # the folder of that base
    _shown: dict[str, Any] = PrivateAttr(default_factory=dict)
    _loaded: bool = PrivateAttr(default=False)

    @model_validator(mode="before")
    @classmethod
    def _standard_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Accept LangChain's standard parameters, and keep every proxy away from the server."""
        options = values.get("options") or GenerationOptions()
        stop = values.pop("stop", None)
        values["options"] = options.updated(
            temperature=values.pop("temperature", None),
            max_new_tokens=values.pop("max_tokens", None),
            stop=tuple(stop) if stop else None,
        )
        read = values.get("timeout") or READ_S
        timeout = httpx.Timeout(read, connect=CONNECT_S)
        values["client_kwargs"] = {
            "trust_env": False,
            "timeout": timeout,
            **(values.get("client_kwargs") or {}),
        }
        values["sync_client_kwargs"] = {**SEVERABLE, **(values.get("sync_client_kwargs") or {})}
        return values

    @cached_property
    def server(self) -> str:
        """The address of the server."""
        return self.base_url or "http://localhost:11434"

    @property
    def headers(self) -> dict[str, str]:
        """What goes with every request: the stand-in's key, or nothing."""
        return dict((self.client_kwargs or {}).get("headers") or {})

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        return (pair for pair in super().__repr_args__() if pair[0] != "client_kwargs")  # holds a key

    def load(self) -> None:
        """Bring the model into the server's memory, once for this object; raises ServiceError."""
        if not self._loaded:
            load(self.server, self.model, self.headers, self.options.num_ctx or CONTEXT_STEPS[0])
            self._loaded = True

    def describe(self, model: str | None = None) -> Any:
        """Return what the server says of the model (`/api/show`): template, capabilities, sizes."""
        name = model or self.model
        if name not in self._shown:
            with explaining(self.server, name, self.headers):
                self._shown[name] = client(self.server, headers=self.headers).show(name)
        return self._shown[name]

    def context_length(self, model: str | None = None) -> int | None:
        """Return the tokens that the model's context can hold, None where the server does not say."""
        sizes = self.describe(model).modelinfo or {}
        return next((int(size) for key, size in sizes.items() if key.endswith(".context_length")), None)

    def can_think(self, model: str | None = None) -> bool | None:
        """Whether the model can reason before it answers; None where the server is too old to say."""
        capabilities = self.describe(model).capabilities
        return None if capabilities is None else "thinking" in capabilities

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        params = super()._get_ls_params(stop=stop, **kwargs)
        named = {"ls_model_name": kwargs.get("model") or self.model}
        sampled = {"ls_temperature": self.options.temperature, "ls_max_tokens": self.options.max_new_tokens}
        return {**params, **named, **sampled}

    def _chat_params(
        self, messages: list[BaseMessage], stop: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        options: GenerationOptions = kwargs.pop("options", None) or self.options
        options = options.updated(stop=tuple(stop) if stop else None)
        model = kwargs.get("model") or self.model
        prompt: RawPrompt | None = kwargs.pop("prompt", None)
        tokens = len(prompt.rendered.ids) if prompt else _tokens(messages)
        thinking = self.can_think(model)
        kwargs["reasoning"] = None if thinking is None else bool(thinking and options.think)
        context = options.num_ctx or self._num_ctx(tokens + options.max_new_tokens, model)
        sent = {
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k,
            "min_p": options.min_p,
            "repeat_penalty": options.repetition_penalty,
            "repeat_last_n": context,  # prompt and answer, as transformers has it; not every version takes -1
            "typical_p": 1.0,  # a Modelfile may set these three
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "num_predict": options.max_new_tokens,
            "seed": options.seed,
            "stop": list(options.stop),
            "num_ctx": context,
        }
        params = super()._chat_params(messages, None, options=sent, **kwargs)
        if prompt:
            kept = ("model", "stream", "think", "options", "keep_alive")
            return {name: params[name] for name in kept} | {"prompt": prompt.text, "raw": True}
        return params

    def _raw(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]
    ) -> tuple[_Raw, dict[str, Any]]:
        """Return what reads the answer to our own prompt, and the request."""
        assert self.same_base is not None
        begins = begins_itself(self.describe(kwargs.get("model")).modelinfo or {})
        think = (kwargs.get("options") or self.options).think
        prompt = raw_prompt(tokenizer_of(self.same_base), messages, begins=begins, think=think)
        return _Raw(prompt), self._chat_params(messages, stop, prompt=prompt, **kwargs)

    def _num_ctx(self, needed: int, model: str) -> int:
        """Return the least step that surely holds prompt and answer: the server cuts silently."""
        limit = self.context_length(model)
        if limit is not None and needed > limit:
            raise ModelError("ollama_prompt_too_long", tokens=needed, model=model, limit=limit)
        step = next((step for step in CONTEXT_STEPS if step >= needed), needed)
        return step if limit is None else min(step, limit)

    def _create_chat_stream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, **kwargs: Any
    ) -> Iterator[Mapping[str, Any] | str]:
        whole = _Whole(kwargs.get("options") or self.options)
        with explaining(self.server, kwargs.get("model") or self.model, self.headers):
            if self.same_base and self._client:
                raw, asked = self._raw(messages, stop, kwargs)
                parts: Iterator[Any] = map(raw.read, self._client.generate(**asked))
            else:
                parts = super()._create_chat_stream(messages, stop, **kwargs)
            for part in parts:
                whole.check(part)
                yield part
            whole.end()

    async def _acreate_chat_stream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, **kwargs: Any
    ) -> AsyncIterator[Mapping[str, Any] | str]:
        whole = _Whole(kwargs.get("options") or self.options)
        with explaining(self.server, kwargs.get("model") or self.model, self.headers):
            if self.same_base and self._async_client:
                raw, asked = self._raw(messages, stop, kwargs)
                parts: AsyncIterator[Any] = raw.aread(await self._async_client.generate(**asked))
            else:
                parts = super()._acreate_chat_stream(messages, stop, **kwargs)
            async for part in parts:
                whole.check(part)
                yield part
            whole.end()

    # `reasoning` here means: keep what arrives as reasoning. What is asked for is decided by capability.
    def _iterate_over_stream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        think = ThinkSplitter()
        for chunk in super()._iterate_over_stream(messages, stop, **kwargs | {"reasoning": True}):
            yield _without_think_marks(chunk, think)

    async def _aiterate_over_stream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        think = ThinkSplitter()
        async for chunk in super()._aiterate_over_stream(messages, stop, **kwargs | {"reasoning": True}):
            yield _without_think_marks(chunk, think)


class _Whole:
    """Watches that a streamed reply comes to its end, and that it has one."""

    def __init__(self, options: GenerationOptions) -> None:
        self._left = LINES_BEYOND + 2 * options.max_new_tokens  # a line carries a token or more
        self._done = False

    def check(self, part: Mapping[str, Any] | str) -> None:
        self._left -= 1
        self._done = self._done or (not isinstance(part, str) and bool(part.get("done")))
        if self._left < 0:
            raise httpx.RemoteProtocolError("the stream goes on beyond num_predict")

    def end(self) -> None:
        if not self._done:
            raise httpx.RemoteProtocolError("the stream ended without its last line")


class _Raw:
    """Reads the answer to a raw prompt as a chat's; at its end the tokens counted are checked."""

    def __init__(self, prompt: RawPrompt) -> None:
        self._prompt, self._think = prompt, ThinkSplitter(prompt.rendered.thinks)

    def read(self, part: Mapping[str, Any]) -> dict[str, Any]:
        told = {name: value for name, value in dict(part).items() if value is not None}
        reasoning, text = self._think.feed(told.pop("response", ""))
        reasoning = told.pop("thinking", "") + reasoning
        if told.get("done"):
            held = self._think.flush()
            reasoning, text = reasoning + held[0], text + held[1]
            told["prompt_hash"] = self._prompt.rendered.hash
            told["degraded"] = self._prompt.checked(told.get("prompt_eval_count"))
        return told | {"message": {"role": "assistant", "content": text, "thinking": reasoning}}

    async def aread(self, parts: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[dict[str, Any]]:
        async for part in parts:
            yield self.read(part)


def _tokens(messages: Sequence[BaseMessage]) -> int:
    """Return at least as many tokens as a chat has in any model."""
    return sum(conservative_count(text_of(message)) + 16 for message in messages)


def _without_think_marks(chunk: ChatGenerationChunk, think: ThinkSplitter) -> ChatGenerationChunk:
    """Older servers send reasoning as `<think>` text: move it where newer ones put it."""
    reasoning, text = think.feed(chunk.text)
    if (chunk.generation_info or {}).get("done"):
        held_reasoning, held_text = think.flush()
        reasoning, text = reasoning + held_reasoning, text + held_text
    if reasoning or text != chunk.text:
        known = chunk.message.additional_kwargs.get("reasoning_content", "")
        extra = {"reasoning_content": known + reasoning} if known + reasoning else {}
        message = chunk.message.model_copy(update={"content": text, "additional_kwargs": extra})
        return ChatGenerationChunk(message=message, generation_info=chunk.generation_info)
    return chunk
