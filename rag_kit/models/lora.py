"""`LoRALanguageModel`: one base, any number of adapters, as a LangChain chat model.

`model` names what answers, `base`, `lora` (the default adapter) or `lora:NAME`, for the object and, as
a keyword of `invoke` or `stream`, for one request. Knows chat and text; what computes is an engine's affair.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from typing import Any
from weakref import WeakValueDictionary

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from pydantic import Field, PrivateAttr

from rag_kit.errors import ModelError
from rag_kit.models.adapters import Adapter, default_adapter, named_adapter
from rag_kit.models.base import Base, resolve_base
from rag_kit.models.device import choose_device
from rag_kit.models.engine import Engine, EngineName, Generation, choose_engine
from rag_kit.models.options import GenerationOptions
from rag_kit.models.render import Rendered, render
from rag_kit.models.textstream import StopStrings, ThinkSplitter
from rag_kit.models.transformers_engine import TransformersEngine
from rag_kit.settings import Settings, get_settings

_engines: WeakValueDictionary[tuple[Any, ...], Any] = WeakValueDictionary()
_latest: list[Any] = []
_engines_lock = threading.Lock()


def engine_for(base: Base, settings: Settings, asked: str | None = None) -> Engine:
    """Return the engine that holds `base` in memory, loading it at first use; shared by all models.

    `asked` goes before the setting ENGINE. One base stays in memory: another goes with the last model that
    uses it. Raises what `choose_engine` raises, and why the base cannot be loaded.
    """
    name, reason = choose_engine(base, settings, asked)
    if name == "llama.cpp":
        key: tuple[Any, ...] = (name, base.gguf, settings.cache_dir)
    else:
        device = choose_device(settings)
        key = (name, base.folder, device)
    with _engines_lock:
        engine = _engines.get(key)
        if engine is None:
            _latest.clear()  # before the next one is loaded, so that both need not fit
            if name == "llama.cpp":
                from rag_kit.models.llamacpp.engine import LlamaCppEngine

                engine = LlamaCppEngine(base, settings.cache_dir, reason)
            else:
                engine = TransformersEngine(base, device, reason)
            _engines[key] = engine
        _latest[:] = [engine]
        chosen: Engine = engine
        return chosen


class LoRALanguageModel(BaseChatModel):
    """A local base model with its LoRA adapters.

    `engine` is `llama.cpp`, `transformers` or `auto`. A `pinned` adapter is merged for llama.cpp and answers
    at the base's speed; `keep_prompt` lets llama.cpp go on from the part of a prompt that it still holds;
    `forced` takes an adapter of another base too, where its tensors fit. Values left None come from the
    settings. Raises ModelError for an unknown reference, an adapter of another base, or a prompt that does
    not fit; AdapterNotFoundError where there is no adapter.
    """

    model: str = "lora"
    base: str | None = None
    engine: EngineName | None = None
    pinned: bool = False
    keep_prompt: bool = False
    forced: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = None
    stop: list[str] | None = None
    num_ctx: int | None = None
    think: bool | None = None
    timeout: float | None = None
    settings: Settings = Field(default_factory=get_settings, exclude=True, repr=False)
    _base: Base | None = PrivateAttr(default=None)
    _backend: Engine | None = PrivateAttr(default=None)

    @property
    def _llm_type(self) -> str:
        return "rag-kit-lora"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model": self.model, "base": self.base, "options": repr(self.options())}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        params = super()._get_ls_params(stop=stop, **kwargs)
        return {**params, "ls_provider": "rag-kit", "ls_model_name": kwargs.get("model") or self.model}

    def options(self) -> GenerationOptions:
        """Return the options of a request that says nothing else."""
        return GenerationOptions.from_settings(self.settings).updated(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            max_new_tokens=self.max_tokens,
            seed=self.seed,
            stop=tuple(self.stop or ()),
            num_ctx=self.num_ctx,
            think=self.think,
        )

    @property
    def backend(self) -> Engine:
        """The engine with the base in memory; the first call loads it (seconds)."""
        if self._backend is None:
            self._backend = engine_for(self.base_model, self.settings, self.engine)
        return self._backend

    @property
    def base_model(self) -> Base:
        """The base's name and folder."""
        if self._base is None:
            self._base = resolve_base(self.base or self.settings.base_model_name, self.settings)
        return self._base

    def adapter(self, reference: str | None = None) -> Adapter | None:
        """Return the adapter that `reference` names now, checked against the base; None for `base`."""
        reference = reference or self.model
        kind, _, name = reference.partition(":")
        if reference == "base":
            return None
        if kind != "lora":
            raise ModelError("reference_not_local", reference=reference)
        found = named_adapter(name, self.settings) if name else default_adapter(self.settings)
        if not self.forced:
            found.check_base(self.base_model)
        return found

    def holding(self, reference: str | None = None) -> AbstractContextManager[str | None]:
        """Have the base and what `reference` names in memory for the block; yields the engine's key of it."""
        adapter, backend = self.adapter(reference), self.backend
        pinned = self.pinned or (adapter is not None and adapter.name == self.settings.lora_pinned)
        return backend.holding(adapter, pinned=pinned)

    def load(self, reference: str | None = None) -> str | None:
        """Bring the base and the adapter into memory; return the engine's key of the adapter."""
        with self.holding(reference) as key:
            return key

    def render(self, messages: list[BaseMessage], think: bool | None = None) -> Rendered:
        """Return the token ids that `messages` become for this base; it thinks only where it is told to."""
        return render(self.backend.tokenizer, messages, enable_thinking=bool(think))

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop=stop, run_manager=run_manager, **kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        *,
        model: str | None = None,
        options: GenerationOptions | None = None,
        **kwargs: Any,  # noqa: ARG002  (LangChain passes ls_structured_output_format and the like)
    ) -> Iterator[ChatGenerationChunk]:
        reference = model or self.model
        options = (options or self.options()).updated(stop=tuple(stop) if stop else None)
        adapter, prompt = self.adapter(reference), self.render(messages, options.think)
        state = Generation(timeout=self.timeout, cache=self.keep_prompt)
        stops, think = StopStrings(options.stop), ThinkSplitter(prompt.thinks)

        def chunk(piece: str) -> ChatGenerationChunk | None:
            reasoning, text = think.feed(piece)
            if not reasoning and not text:
                return None
            extra = {"reasoning_content": reasoning} if reasoning else {}
            return ChatGenerationChunk(message=AIMessageChunk(content=text, additional_kwargs=extra))

        # The consumer may stop listening at any time: then the engine stops too.
        with (
            self.holding(reference) as key,
            closing(self.backend.stream(prompt.ids, key, options, state)) as pieces,
        ):
            for piece in pieces:
                new = chunk(stops.feed(piece))
                if new is not None:
                    if run_manager:
                        run_manager.on_llm_new_token(new.text, chunk=new)
                    yield new
                if stops.hit is not None:
                    state.finish_reason = "stop"
                    break
        rest = chunk(stops.flush())
        if rest is not None:
            yield rest
        held_reasoning, held_text = think.flush()
        last = AIMessageChunk(
            content=held_text,
            additional_kwargs={"reasoning_content": held_reasoning} if held_reasoning else {},
            usage_metadata={
                "input_tokens": len(prompt.ids),
                "output_tokens": state.output_tokens,
                "total_tokens": len(prompt.ids) + state.output_tokens,
                "input_token_details": {"cache_read": state.cached},
            },
            response_metadata={
                "model_name": "base" if adapter is None else f"lora:{adapter.name}",
                "model_provider": "rag-kit",
                "engine": self.backend.name,
                "weights": self.backend.dtype,
                "finish_reason": state.finish_reason,
                "first_token_s": state.first_token_s,
                "total_s": state.total_s,
                "prompt_hash": prompt.hash,
            },
            chunk_position="last",
        )
        yield ChatGenerationChunk(message=last, generation_info={"finish_reason": state.finish_reason})
