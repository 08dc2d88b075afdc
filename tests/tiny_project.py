"""A project whose base is tiny and speaks ASCII, with its GGUF beside it and adapters of random weights."""

from __future__ import annotations

from pathlib import Path

from tests.gguf_bases import tiny_base, write_base_gguf


def tiny_project(root: Path, *adapters: str) -> Path:
    """Write `base/` (with model.gguf) and an adapter of each name below `root`; returns `root`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_base(root / "base", "llama")
    tensors = load_file(folder / "model.safetensors")
    known = {at: token for token, at in AutoTokenizer.from_pretrained(folder).get_vocab().items()}
    for at in range(288):
        if not (len(known.get(at, "")) == 1 and known[at].isascii()):
            tensors["lm_head.weight"][at] = 0  # half a character cannot be shown, nor compared as text
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_base_gguf(folder, folder / "model.gguf")
    for seed, name in enumerate(adapters, 1):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter.data, std=0.3)
        model.save_pretrained(root / "lora_adapters" / name)
    return root
