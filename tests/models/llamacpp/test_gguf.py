"""What a GGUF says of itself, and each reason why it cannot be served."""

from pathlib import Path

import pytest

from rag_kit.embedded import base_gguf
from rag_kit.errors import ModelError
from rag_kit.models.llamacpp.gguf import explain
from tests.models.llamacpp.conftest import Write
from tests.models.texts import says


def refusal(path: Path, context: int | None = None) -> ModelError:
    with pytest.raises(ModelError) as caught:
        explain(path, context)
    return caught.value


def test_the_embedded_base_is_read_as_another_library_reads_it(reader):
    ours = explain(base_gguf())
    for key in ("llama.context_length", "tokenizer.chat_template", "tokenizer.ggml.tokens"):
        assert ours.metadata[key] == reader.fields[key].contents()
    assert ours.parameters == sum(int(tensor.n_elements) for tensor in reader.tensors)
    assert (ours.architecture, ours.quantization) == ("llama", "Q4_1")
    assert ours.cache_bytes(1) == 23040  # 30 layers x 3 heads x 64 x 2 x 2 bytes


def test_the_context_is_never_beyond_the_models_own():
    gguf = explain(base_gguf())
    assert (gguf.context(), gguf.context(100), gguf.context(10**6)) == (8192, 100, 8192)


def test_a_file_that_is_missing_or_a_folder(tmp_path):
    says(refusal(tmp_path / "模型.gguf"), "模型.gguf", "No such file", en="cannot be read", zh="无法读取")
    says(refusal(tmp_path), tmp_path, en="cannot be read", zh="无法读取")


@pytest.mark.parametrize("content", [b"", b"hello world", b"GGUF\x01\0\0\0", b"GGUF\0\0\0\x03"])
def test_a_file_of_another_kind(tmp_path, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    says(refusal(path), path, repr(content[:8])[2:-1], en="is no GGUF", zh="不是此处可读的 GGUF")


@pytest.mark.parametrize("kept", [10, 40, 150, 4096])
def test_a_file_that_is_cut_short(write_gguf: Write, kept):
    path = write_gguf("llama", bytes_kept=kept, tokenizer__ggml__model="gpt2")
    says(refusal(path), path, f"{kept:,}", en="cut short", zh="不完整")


def test_counts_without_sense_end_quickly(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 64)
    says(refusal(path), path, en="cut short", zh="不完整")


def test_adapters_projectors_and_models_without_a_tokenizer(write_gguf: Write):
    adapter = write_gguf("llama", general__type="adapter", adapter__type="lora")
    says(refusal(adapter), adapter, en="LoRA adapter", zh="LoRA 适配器")
    says(refusal(write_gguf("clip")), en="multimodal", zh="多模态")
    says(refusal(write_gguf("llama")), en="no tokenizer", zh="没有分词器")
    says(refusal(write_gguf("llama", tokenizer__ggml__model="no_vocab")), en="no tokenizer", zh="没有分词器")


def test_a_model_that_memory_cannot_hold(monkeypatch):
    import psutil

    free = psutil.virtual_memory()._replace(available=200_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert explain(base_gguf(), 1024)
    says(refusal(base_gguf(), 8192), base_gguf(), 8192, "0.3 GB", "0.2 GB", en="needs about", zh="约需")
