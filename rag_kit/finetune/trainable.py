"""A base with a new LoRA adapter: number types, gradients, and whether its batches can be packed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rag_kit.errors import ModelError, message
from rag_kit.finetune.dataset import Example, pack
from rag_kit.finetune.hyperparameters import Hyperparameters
from rag_kit.models.base import Base
from rag_kit.models.device import Device

if TYPE_CHECKING:
    import torch

PACKING_TOLERANCE = 0.12  # a token's loss: bf16 moves it by 0.08 on average, a disregarded mask by 0.8

_log = logging.getLogger(__name__)


def load_trainable(base: Base, device: Device, chosen: Hyperparameters) -> tuple[Any, Any, str]:
    """Return the base with a new adapter whose weights alone are trained (f32), tokenizer and dtype name.

    Raises ModelError where `target_modules` names no layer of the base.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading, which takes seconds
    dtype = training_dtype(device, chosen)
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    model: Any = AutoModelForCausalLM.from_pretrained(base.folder, dtype=getattr(torch, dtype))
    model.to(device.name)
    model.config.use_cache = False
    # the Trainer warns where these differ, although packed batches need no padding
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
    if chosen.gradient_checkpointing:
        # Frozen embeddings give the checkpointed layers inputs without gradient: the backward pass would end
        # with "element 0 of tensors does not require grad".
        model.enable_input_require_grads()
    set_seed(chosen.seed)  # the first values of the adapter's A matrices
    config = LoraConfig(
        r=chosen.lora_r, lora_alpha=chosen.lora_alpha, lora_dropout=chosen.lora_dropout,
        target_modules=chosen.layers, task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        model = get_peft_model(model, config)
    except ValueError as error:
        linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        told = {"targets": chosen.target_modules, "base": base.name, "known": ", ".join(sorted(linear))}
        raise ModelError("finetune_targets", **told) from error
    return model, tokenizer, dtype


def training_dtype(device: Device, chosen: Hyperparameters) -> str:
    """Return the number type of the frozen base; the adapter is always trained in float32.

    On the CPU bfloat16 where the CPU multiplies it natively (a quarter faster), else float32; `fp16` has no
    effect there. On CUDA float16 with `fp16`, else what `choose_device` says.
    """
    import torch

    if device.name != "cpu":
        return "float16" if chosen.fp16 else "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    if chosen.fp16:
        _log.warning("%s", message("finetune_fp16_unused"))
    has = torch.cpu.get_capabilities()
    return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"


def packing_holds(model: Any, examples: Sequence[Example], device: Device) -> bool:
    """Return whether the base gives the tokens of packed examples the loss that they get alone.

    It does where attention follows the given mask and positions; a base with another memory (a state-space
    or linear-attention model) does not, and is trained one example at a time.
    """
    import torch

    few = sorted(examples, key=len)[:4]
    if len(few) == 1:
        return True

    def losses(batch: Sequence[Example]) -> torch.Tensor:
        inputs = {name: tensor.to(device.name) for name, tensor in pack(batch).items()}
        logits, labels = model(**inputs).logits[0].float(), inputs["labels"][0]
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    with torch.inference_mode():
        together, alone = losses(few), torch.cat([losses([example]) for example in few])
    return float((together - alone).abs().mean()) < PACKING_TOLERANCE
