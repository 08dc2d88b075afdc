"""One engine over the embedded GGUF, and one over the same weights in Q8_0 with another tokenizer set-up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest

from rag_kit.embedded import base_gguf
from rag_kit.models.llamacpp.process import EngineProcess

Write = Callable[..., Path]
GREEDY = {"temperature": 0.0, "repeat_penalty": 1.0}


@pytest.fixture(scope="session")
def engine() -> Iterator[EngineProcess]:
    with EngineProcess(base_gguf(), name="stand-in", context=2048) as running:
        yield running


@pytest.fixture(scope="session")
def reader() -> Any:
    """The embedded GGUF as the `gguf` package reads it, which takes seconds."""
    from gguf import GGUFReader

    return GGUFReader(base_gguf())


@pytest.fixture(scope="session")
def q8(reader: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded weights as Q8_0: without a chat template, with a beginning token, and one named token."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, dequantize, quantize

    target = tmp_path_factory.mktemp("gguf") / "smollm2-q8_0.gguf"
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    kinds[reader.fields["tokenizer.ggml.tokens"].contents().index("<repo_name>")] = 4
    changed = {
        "general.file_type": 7,
        "tokenizer.chat_template": None,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.token_type": kinds,
    }
    writer = GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        value = changed.get(key, field.contents())
        if not key.startswith("GGUF.") and key != "general.architecture" and value is not None:
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(key, value, field.types[0], inner)
    for tensor in reader.tensors:
        if tensor.tensor_type == GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        else:
            weights = dequantize(tensor.data, tensor.tensor_type)
            q8_0 = GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor.name, quantize(weights, q8_0), raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture(scope="session")
def lora(reader: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Write an adapter over the embedded base whose effect depends on its number."""
    folder = tmp_path_factory.mktemp("adapters")

    def write(number: int) -> Path:
        import numpy as np
        from gguf import GGUFWriter

        path, random = folder / f"适配器{number}.gguf", np.random.default_rng(number)
        if path.exists():
            return path
        writer = GGUFWriter(path, "llama")
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 8.0)
        for tensor in reader.tensors:
            if tensor.name in ("blk.2.attn_q.weight", "blk.9.ffn_down.weight", "blk.20.attn_output.weight"):
                wide, high = map(int, tensor.shape)
                for half, shape in (("lora_a", (4, wide)), ("lora_b", (high, 4))):
                    values = random.normal(0, 0.08, shape).astype(np.float32)
                    writer.add_tensor(f"{tensor.name}.{half}", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture(scope="session")
def other(q8: Path) -> Iterator[EngineProcess]:
    with EngineProcess(q8, name="other", context=512) as running:
        yield running


@pytest.fixture(scope="session")
def client(engine: EngineProcess) -> Iterator[ollama.Client]:
    """Ollama's own client: an outside description of the wire."""
    with ollama.Client(host=engine.url, headers=engine.headers, trust_env=False, timeout=60) as made:
        yield made


@pytest.fixture(scope="session")
def http(engine: EngineProcess) -> Iterator[httpx.Client]:
    with plain(engine) as made:
        yield made


def plain(engine: EngineProcess, **how: Any) -> httpx.Client:
    return httpx.Client(base_url=engine.url, headers=engine.headers, trust_env=False, timeout=60, **how)


@pytest.fixture(scope="session")
def write_gguf(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Write a GGUF with hardly anything in it."""

    def write(architecture: str, *, bytes_kept: int | None = None, **metadata: str) -> Path:
        import numpy as np
        from gguf import GGUFWriter

        path = tmp_path_factory.mktemp("gguf") / "made.gguf"
        writer = GGUFWriter(path, architecture)
        for key, value in metadata.items():
            writer.add_string(key.replace("__", "."), value)
        writer.add_tensor("x", np.zeros((64, 64), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if bytes_kept is not None:
            path.write_bytes(path.read_bytes()[:bytes_kept])
        return path

    return write
