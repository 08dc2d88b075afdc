"""`LoRALanguageModel`: one base, any number of adapters, as a LangChain chat model.

`model` names what answers, `base`, `lora` (the default adapter) or `lora:NAME`, for the object and, as
a keyword of `invoke` or `stream`, for one request.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
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
from rag_kit.models.device import Device, choose_device
from rag_kit.models.engine import Generation, TransformersEngine
from rag_kit.models.options import GenerationOptions
from rag_kit.models.render import Rendered, render
from rag_kit.models.textstream import StopStrings, ThinkSplitter, TokenDecoder
from rag_kit.settings import Settings, get_settings

_engines: WeakValueDictionary[tuple[Path, Device], TransformersEngine] = WeakValueDictionary()
_latest: list[TransformersEngine] = []
_engines_lock = threading.Lock()


def engine_for(base: Base, device: Device) -> TransformersEngine:
    """Return the engine that holds `base` in memory, loading it at first use; shared by all models.

    One base stays in memory: another goes with the last model that uses it.
    """
    key = (base.folder, device)
    with _engines_lock:
        engine = _engines.get(key)
        if engine is None:
            _latest.clear()  # before the next one is loaded, so that both need not fit
            engine = _engines[key] = TransformersEngine(base, device)
        _latest[:] = [engine]
        return engine


class LoRALanguageModel(BaseChatModel):
    """A local base model with its LoRA adapters, run by transformers and PEFT.

    Values left None come from the settings. Raises ModelError for an unknown reference, an adapter of
    another base, or a prompt that does not fit; AdapterNotFoundError where there is no adapter.
    """

    model: str = "lora"
    base: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = None
    stop: list[str] | None = None
    timeout: float | None = None
    settings: Settings = Field(default_factory=get_settings, exclude=True, repr=False)
    _base: Base | None = PrivateAttr(default=None)
    _engine: TransformersEngine | None = PrivateAttr(default=None)

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
        )

    @property
    def engine(self) -> TransformersEngine:
        """The engine with the base in memory; the first call loads it (seconds)."""
        if self._engine is None:
            self._engine = engine_for(self.base_model, choose_device(self.settings))
        return self._engine

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
        found.check_base(self.base_model)
        return found

    def load(self, reference: str | None = None) -> str | None:
        """Bring the base and the adapter into memory; return the engine's key of the adapter."""
        adapter, engine = self.adapter(reference), self.engine
        return None if adapter is None else engine.load_adapter(adapter)

    def check_effect(self, reference: str | None = None) -> float:
        """Return by how much the adapter moves the base's logits on a probe text at most; 0 for `base`.

        Raises ModelError for an adapter that moves nothing, or to no number: it may not be compared.
        """
        adapter = self.adapter(reference)
        if adapter is None:
            return 0.0
        with self.engine.holding(adapter) as key:
            effect = self.engine.effect(str(key))
        if not 0 < effect < math.inf:
            raise ModelError("adapter_without_effect", adapter=adapter.name, effect=effect)
        return effect

    def render(self, messages: list[BaseMessage]) -> Rendered:
        """Return the token ids that `messages` become for this base."""
        return render(self.engine.tokenizer, messages)

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
        adapter, engine = self.adapter(reference), self.engine
        prompt = self.render(messages)
        state = Generation(timeout=self.timeout)
        decoder, stops, think = TokenDecoder(engine.tokenizer), StopStrings(options.stop), ThinkSplitter()

        def chunk(piece: str) -> ChatGenerationChunk | None:
            reasoning, text = think.feed(piece)
            if not reasoning and not text:
                return None
            extra = {"reasoning_content": reasoning} if reasoning else {}
            return ChatGenerationChunk(message=AIMessageChunk(content=text, additional_kwargs=extra))

        # The consumer may stop listening at any time: then the engine stops too.
        with (
            engine.holding(adapter) as key,
            closing(engine.generate(prompt.ids, key, options, state)) as tokens,
        ):
            for token in tokens:
                new = chunk(stops.feed(decoder.feed(token)))
                if new is not None:
                    if run_manager:
                        run_manager.on_llm_new_token(new.text, chunk=new)
                    yield new
                if stops.hit is not None:
                    state.finish_reason = "stop"
                    break
        rest = chunk(stops.feed(decoder.flush()) + stops.flush())
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
            },
            response_metadata={
                "model_name": "base" if adapter is None else f"lora:{adapter.name}",
                "model_provider": "rag-kit",
                "finish_reason": state.finish_reason,
                "first_token_s": state.first_token_s,
                "total_s": state.total_s,
                "prompt_hash": prompt.hash,
            },
            chunk_position="last",
        )
        yield ChatGenerationChunk(message=last, generation_info={"finish_reason": state.finish_reason})
