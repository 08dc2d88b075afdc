"""The transformers engine: one base in memory, any number of adapters, one step at a time.

Knows token ids and adapters; knows nothing of chat or prompts. Every step takes a lock and sets
the adapter of its request, so that concurrent requests for different adapters never mix.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_kit.errors import ModelError
from rag_kit.models.adapters import BASE_COPY, Adapter, check_fit, first_line
from rag_kit.models.base import Base
from rag_kit.models.device import Device
from rag_kit.models.engine import Generation
from rag_kit.models.options import GenerationOptions
from rag_kit.models.render import end_ids
from rag_kit.models.textstream import TokenDecoder

if TYPE_CHECKING:
    import numpy as np
    import torch


class TransformersEngine:
    """A causal language model of transformers with PEFT adapters.

    `load_s` is the seconds that loading took; `adapters` are the folders of the adapters in memory by key.
    """

    name = "transformers"

    def __init__(self, base: Base, device: Device, reason: str = "") -> None:
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
        from transformers.utils.logging import disable_progress_bar

        start = time.perf_counter()
        disable_progress_bar()  # seconds at most; a bar in every notebook would be noise
        self.base, self.device, self.reason = base, device, reason
        self.lock = threading.RLock()
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False)
            self._model: Any = AutoModelForCausalLM.from_pretrained(
                base.folder,
                dtype=device.torch_dtype,
                quantization_config=_quantization(device),
                device_map=device.name if device.quantization else None,
                use_safetensors=True,  # the other format is a pickle
                trust_remote_code=False,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError("base_unreadable", path=base.folder, reason=first_line(error)) from error
        if device.quantization is None:  # quantised weights are placed as they are loaded
            self._model.to(device.name)
        self._model.eval().requires_grad_(False)
        self.end_ids = end_ids(self.tokenizer, self._model.generation_config)
        self._model.generation_config = GenerationConfig()
        self.context_length = int(self._model.config.max_position_embeddings)
        self.adapters: dict[str, Path] = {}
        self._held: Counter[str] = Counter()
        self._active: str | None = None
        self._torch = torch
        self.load_s = time.perf_counter() - start

    @property
    def dtype(self) -> str:
        """The number type of the weights in memory, `int8` where they are quantised."""
        return self.device.quantization or self.device.dtype

    def memory_bytes(self) -> int:
        """Return the bytes of all weights in memory, adapters included."""
        return int(sum(p.nbytes for p in self._model.parameters()))

    def load_adapter(self, adapter: Adapter) -> str:
        """Bring `adapter` into memory, unless it is there, and return its key.

        Raises ModelError where its tensors do not fit the base; the engine is then as it was.
        """
        key = adapter.key
        files = None if key in self.adapters else self._read(adapter)
        with self.lock:
            if key not in self.adapters:
                self._add(adapter, *(files or self._read(adapter)))
            self.adapters[key] = self.adapters.pop(key, adapter.folder)  # the newest of its folder is last
            self._drop_replaced()
        return key

    def _read(self, adapter: Adapter) -> tuple[Any, dict[str, torch.Tensor]]:
        """Return configuration and weights of an adapter that is known to fit."""
        from peft import LoraConfig
        from peft.utils.save_and_load import load_peft_weights

        check_fit(adapter, self.base)  # before the model is touched: PEFT leaves a failed one in the layers
        weights = load_peft_weights(str(adapter.folder), device="cpu")
        own = {name: tensor for name, tensor in weights.items() if not name.endswith(BASE_COPY)}
        return LoraConfig.from_pretrained(str(adapter.folder), inference_mode=True), own

    def _add(self, adapter: Adapter, config: Any, weights: dict[str, torch.Tensor]) -> None:
        from peft import PeftModel, set_peft_model_state_dict

        key = adapter.key
        try:
            if self.adapters:
                self._model.add_adapter(key, config)
            else:
                self._model = PeftModel(self._model, config, adapter_name=key)
            set_peft_model_state_dict(self._model, weights, adapter_name=key)
        except (TypeError, ValueError, RuntimeError) as error:
            # It fits the base, but PEFT cannot hold it beside the others: both wrap the same layer.
            if key in self._model.peft_config:
                self._model.delete_adapter(key)
            raise ModelError("adapter_beside", adapter=adapter.folder, reason=first_line(error)) from error
        finally:
            self._model.eval().requires_grad_(False)
            self._rest()

    def _rest(self) -> None:
        """Switch every adapter off, whatever PEFT made active."""
        self._model.base_model.disable_adapter_layers()
        self._active = None

    @contextmanager
    def holding(
        self,
        adapter: Adapter | None,
        *,
        pinned: bool = False,  # noqa: ARG002
    ) -> Iterator[str | None]:
        """Have `adapter` in memory for the block; yields its key, None for the base itself.

        Here nothing is `pinned`: every adapter of one base shares its weights.
        """
        if adapter is None:
            yield None
            return
        self.load_adapter(adapter)  # the slow part, without the lock
        with self.lock:
            key = self.load_adapter(adapter)
            self._held[key] += 1
        try:
            yield key
        finally:
            with self.lock:
                self._held[key] -= 1
                self._drop_replaced()

    def _drop_replaced(self) -> None:
        """Delete adapters that were trained anew in their folder, once no request holds them."""
        newest = {folder: key for key, folder in self.adapters.items()}
        for key, folder in list(self.adapters.items()):
            if newest[folder] != key and not self._held[key]:
                del self.adapters[key]
                self._model.set_adapter(newest[folder])  # PEFT warns when the active one goes
                self._model.delete_adapter(key)
                self._rest()

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[Any]:
        """Hold the model with the adapter of this key active (None: the base itself) for one step."""
        with self.lock:
            if adapter is not None and adapter not in self.adapters:
                raise ModelError("adapter_unknown", adapter=adapter, known=", ".join(self.adapters) or "-")
            if adapter != self._active:
                self._rest()
                if adapter is not None:
                    self._model.base_model.enable_adapter_layers()
                    self._model.set_adapter(adapter)
                    self._active = adapter
            yield self._model

    def generate(
        self, ids: Sequence[int], adapter: str | None, options: GenerationOptions, state: Generation
    ) -> Generator[int]:
        """Yield the ids of new tokens, the end mark left out; fills `state` as it goes.

        Setting `state.cancelled` ends it after the current token, as does closing the iterator. Raises
        ModelError where the prompt and `max_new_tokens` do not fit the context.
        """
        torch = self._torch
        limit = min(options.num_ctx or self.context_length, self.context_length)
        if len(ids) + options.max_new_tokens > limit:
            raise ModelError("prompt_too_long", tokens=len(ids), new=options.max_new_tokens, limit=limit)
        choose = _Chooser(options, self.device.name)
        start = time.perf_counter()
        every = torch.tensor([list(ids)], device=self.device.name)
        step, cache = every, None
        try:
            for _ in range(options.max_new_tokens):
                if state.cancelled.is_set():
                    return
                if state.timeout and time.perf_counter() - start > state.timeout:
                    state.finish_reason = "timeout"
                    return
                # inference_mode must not stay on while the consumer of this generator runs
                with self.using(adapter) as model, torch.inference_mode():
                    out = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    cache = out.past_key_values
                    token = choose(every, out.logits[:, -1, :].float())
                    every = torch.cat([every, token], dim=1)
                    step = token
                if state.first_token_s is None:
                    state.first_token_s = time.perf_counter() - start
                state.output_tokens += 1
                if int(token) in self.end_ids:
                    state.finish_reason = "stop"
                    return
                yield int(token)
            state.finish_reason = "length"
        finally:
            state.total_s = time.perf_counter() - start

    def stream(
        self, ids: Sequence[int], adapter: str | None, options: GenerationOptions, state: Generation
    ) -> Generator[str]:
        """Yield the text that `generate` makes, in pieces of whole characters, one for each token."""
        decoder = TokenDecoder(self.tokenizer)
        with closing(self.generate(ids, adapter, options, state)) as tokens:
            for token in tokens:
                yield decoder.feed(token)
        yield decoder.flush()

    def logits(self, ids: Sequence[int], adapter: str | None) -> torch.Tensor:
        """Return the float32 logits of every position of `ids`, shape (len(ids), vocabulary)."""
        with self.using(adapter) as model, self._torch.inference_mode():
            tensor = self._torch.tensor([list(ids)], device=self.device.name)
            logits: torch.Tensor = model(input_ids=tensor).logits[0].float().cpu()
            return logits

    def next_logprobs(self, ids: Sequence[int], adapter: str | None) -> np.ndarray:
        """Return the log-probabilities of the token after `ids`, shape (vocabulary,)."""
        logprobs: np.ndarray = self.logits(ids, adapter)[-1].log_softmax(-1).numpy()
        return logprobs

    def score(self, ids: Sequence[int], answer: Sequence[int], adapter: str | None) -> np.ndarray:
        """Return the log-probability of each token of `answer` after `ids`, shape (len(answer),)."""
        every = self.logits([*ids, *answer], adapter)[len(ids) - 1 : -1].log_softmax(-1)
        wanted = self._torch.tensor(list(answer), dtype=self._torch.long)
        logprobs: np.ndarray = every.gather(1, wanted[:, None])[:, 0].numpy()
        return logprobs


class _Chooser:
    """Picks the next token from logits by the options, with a random generator of its own."""

    def __init__(self, options: GenerationOptions, device: str) -> None:
        import torch
        from transformers.generation import logits_process as lp

        self._torch, self._greedy = torch, options.temperature <= 0
        self._processors = lp.LogitsProcessorList()
        if options.repetition_penalty != 1.0:
            self._processors.append(lp.RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
        if not self._greedy:
            self._random = torch.Generator(device).manual_seed(options.seed)
            if options.top_k > 0:
                self._processors.append(lp.TopKLogitsWarper(options.top_k))
            if options.top_p < 1.0:
                self._processors.append(lp.TopPLogitsWarper(options.top_p))
            if options.min_p > 0.0:
                self._processors.append(lp.MinPLogitsWarper(options.min_p))
            self._processors.append(lp.TemperatureLogitsWarper(options.temperature))  # last, as in llama.cpp

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the chosen id, shape (1, 1)."""
        scores: torch.Tensor = self._processors(ids, logits)
        if self._greedy:
            return scores.argmax(dim=-1, keepdim=True)
        probabilities = self._torch.softmax(scores, dim=-1)
        return self._torch.multinomial(probabilities, 1, generator=self._random)


def _quantization(device: Device) -> Any:
    """Return transformers' configuration for int8 (LLM.int8()) or int4 (NF4) weights, or None."""
    if device.quantization is None:
        return None
    if not find_spec("bitsandbytes"):
        raise ModelError("quantization_missing", type=device.quantization)
    from transformers import BitsAndBytesConfig

    # It says for every layer that activations are rounded to fp16, which is what LLM.int8() means.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if device.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=device.torch_dtype
    )
