"""Where a model runs, the reason, and what each setting of it changes, from a `.env` alone."""

import pytest
import torch
from langchain_core.messages import HumanMessage

from rag_kit.errors import ModelError, message
from rag_kit.models.adapters import read_adapter
from rag_kit.models.device import choose_device
from rag_kit.models.engine import Generation
from rag_kit.models.options import GenerationOptions
from rag_kit.models.render import render
from rag_kit.models.transformers_engine import TransformersEngine
from rag_kit.settings import Settings
from tests.models.texts import says

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


def env(root, *lines: str) -> Settings:
    (root / ".env").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Settings.load(root)


@without_cuda
def test_device_auto_and_cpu_say_why(tmp_path):
    auto, cpu = choose_device(env(tmp_path, "DEVICE=auto")), choose_device(env(tmp_path, "DEVICE=cpu"))
    assert auto.name == cpu.name == "cpu"
    assert auto.reason == message("device_no_cuda") and cpu.reason == message("device_asked", device="cpu")


@without_cuda
def test_device_cuda_without_cuda_is_an_error(tmp_path):
    with pytest.raises(ModelError) as caught:
        choose_device(env(tmp_path, "DEVICE=cuda"))
    says(
        caught.value, "DEVICE=cuda", "DEVICE=cpu", en="no CUDA device can be used", zh="没有可用的 CUDA 设备"
    )


def test_fp16_halves_the_memory(tmp_path, twin):
    sizes = [
        TransformersEngine(
            twin, choose_device(env(tmp_path, f"ENABLE_FP16={value}", "DEVICE=cpu"))
        ).memory_bytes()
        for value in ("false", "true")
    ]
    assert sizes[1] * 2 == sizes[0]


@without_cuda
def test_the_memory_fraction_says_that_it_needs_cuda(tmp_path):
    full, half = (choose_device(env(tmp_path, f"CUDA_MEMORY_FRACTION={value}")) for value in (1.0, 0.5))
    assert "CUDA_MEMORY_FRACTION=0.5" in half.reason and "FRACTION" not in full.reason
    told = [message("device_fraction_unused", lang, fraction=0.5) for lang in ("en", "zh")]
    assert "no effect without CUDA" in told[0] and "没有 CUDA" in told[1]


def test_the_memory_fraction_is_set_where_there_is_cuda(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", asked.append)
    device = choose_device(env(tmp_path, "CUDA_MEMORY_FRACTION=0.8", "DEVICE=auto"))
    assert (device.name, device.dtype) == ("cuda", "bfloat16")
    assert asked == [0.8] and message("device_cuda_found") in device.reason and "80%" in device.reason
    assert choose_device(env(tmp_path, "DEVICE=cuda", "ENABLE_FP16=true")).dtype == "float16"
    assert choose_device(env(tmp_path, "DEVICE=cpu")).name == "cpu"


def test_quantisation_shrinks_the_base_and_keeps_its_sense(tmp_path, smol, smol_engine, make_adapter):
    settings = env(tmp_path, "ENABLE_QUANTIZATION=true", "QUANTIZATION_TYPE=int8", "DEVICE=cpu")
    engine = TransformersEngine(smol, choose_device(settings))
    assert engine.dtype == "int8" and smol_engine.dtype == "float32"
    assert engine.memory_bytes() < 0.5 * smol_engine.memory_bytes()
    ids = render(engine.tokenizer, [HumanMessage("What is the capital of France?")]).ids
    ours, theirs = engine.logits(ids, None), smol_engine.logits(ids, None)
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.8
    assert ours[-1].argmax() == theirs[-1].argmax()
    assert torch.nn.functional.cosine_similarity(ours, theirs).mean() > 0.98
    key = engine.load_adapter(read_adapter(make_adapter(tmp_path / "a", smol, size=0.05)))
    adapted = smol_engine.load_adapter(read_adapter(tmp_path / "a"))
    theirs_adapted = smol_engine.logits(ids, adapted)
    assert torch.nn.functional.cosine_similarity(engine.logits(ids, key), theirs_adapted).mean() > 0.95
    assert (theirs_adapted - theirs).abs().max() > 1
    answer = list(engine.generate(ids, None, GenerationOptions(max_new_tokens=2), Generation()))
    assert len(answer) == 2


def test_the_type_of_quantisation_has_an_effect(tmp_path, twin):
    sizes = {
        kind: TransformersEngine(
            twin,
            choose_device(
                env(tmp_path, "ENABLE_QUANTIZATION=true", f"QUANTIZATION_TYPE={kind}", "DEVICE=cpu")
            ),
        ).memory_bytes()
        for kind in ("int8", "int4")
    }
    assert sizes["int4"] < sizes["int8"]


def test_quantisation_without_its_package_is_told(tmp_path, twin, monkeypatch):
    monkeypatch.setattr("rag_kit.models.transformers_engine.find_spec", lambda name: None)
    with pytest.raises(ModelError) as caught:
        TransformersEngine(twin, choose_device(env(tmp_path, "ENABLE_QUANTIZATION=true")))
    says(caught.value, "bitsandbytes", "int8", en="is not installed", zh="未安装")
