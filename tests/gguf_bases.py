"""Base models for llama.cpp, made on the spot: tiny random ones of each family, and the GGUF of any of them.

What llama.cpp's own converter does with these families is written down here anew, so that what the house
reads from a base's GGUF is tested against something that it did not write.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WINDOW = 16  # tokens: shorter than the prompts, so that it shows
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": WINDOW},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": WINDOW},
}
LAYERS = {"gemma2": 2, "gemma3_text": 6}  # at least one of each kind of attention


def tiny_base(folder: Path, family: str, seed: int = 0, **changed: Any) -> Path:
    """Write a random model of a family (transformers' name), its tokens single bytes; returns `folder`."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *alphabet, "he"]
    bpe = Tokenizer(BPE({token: at for at, token in enumerate(tokens)}, [("h", "e")]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = {"bos_token": SPECIAL[0], "pad_token": SPECIAL[0], "eos_token": SPECIAL[2]}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, **names, extra_special_tokens=[SPECIAL[1]], chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 288, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": LAYERS.get(family, 2), "max_position_embeddings": 512,
        "bos_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **sizes | FAMILIES[family] | changed)
    )
    with torch.no_grad():  # wider than the initialiser's, so that logits differ visibly by prompt
        for name, parameter in model.named_parameters():
            middle = float("norm" in name and not family.startswith("gemma"))
            parameter.normal_(middle, 0.15 if parameter.dim() == 2 else 0.1)
    model.save_pretrained(folder)
    return folder


def write_base_gguf(folder: Path, target: Path, kind: str = "F16") -> Path:
    """Write the GGUF (`F16` or `F32`) of a folder of one of the families; returns `target`."""
    import numpy as np
    from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
    from safetensors import safe_open
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    architecture = config.model_type.removesuffix("_text")
    heads, gemma = config.num_attention_heads, architecture.startswith("gemma")
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    writer = GGUFWriter(target, architecture)
    writer.add_name(folder.name)
    writer.add_file_type({"F32": 0, "F16": 1}[kind])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    _add_tokenizer(writer, folder, config.vocab_size)
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in sorted(tensors.keys()):
                values = tensors.get_tensor(key).float().numpy()
                if gemma and key.endswith("norm.weight"):
                    values = values + 1
                for module, count in (("q_proj", heads), ("k_proj", config.num_key_value_heads)):
                    if architecture == "llama" and module in key:
                        halves = values.reshape(count, 2, width // 2, *values.shape[1:])
                        values = halves.swapaxes(1, 2).reshape(values.shape)
                stored = np.float16 if kind == "F16" and values.ndim > 1 else np.float32
                name = names.get_name(key, try_suffixes=(".weight", ".bias"))
                writer.add_tensor(name, np.ascontiguousarray(values, dtype=stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _add_tokenizer(writer: Any, folder: Path, size: int) -> None:
    from gguf import TokenType
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    written = json.loads(tokenizer.backend_tokenizer.to_str())
    found = {at: (token, TokenType.NORMAL) for token, at in written["model"]["vocab"].items()}
    for added in written["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        found[added["id"]] = added["content"], kind
    listed = [found.get(at, (f"[PAD{at}]", TokenType.UNUSED)) for at in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if "Qwen" in type(tokenizer).__name__ else "gpt-2")
    writer.add_token_list([token for token, _ in listed])
    writer.add_token_types([kind for _, kind in listed])
    writer.add_token_merges([" ".join(pair) for pair in written["model"]["merges"]])
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(bool(tokenizer("")["input_ids"]))
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
