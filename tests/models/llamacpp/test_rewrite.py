"""Files from files: what changes is what was asked, and what llama.cpp needs else stays to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize

from rag_kit.errors import ModelError
from rag_kit.models.llamacpp.adapter_gguf import LoraPair
from rag_kit.models.llamacpp.gguf import read_gguf
from rag_kit.models.llamacpp.rewrite import KINDS, rewrite

RNG = np.random.default_rng(4)
MATRIX = RNG.normal(0, 0.3, (6, 64)).astype(np.float32)
NORM = RNG.normal(1, 0.1, 64).astype(np.float32)
ODD = RNG.normal(0, 0.3, (5, 40)).astype(np.float32)  # rows that no block of 32 fills
# A step of each kind for values whose largest in a block is about 1.
STEP = {
    "F32": 0.0,
    "F16": 1e-3,
    "BF16": 8e-3,
    "Q8_0": 0.01,
    "Q5_1": 0.05,
    "Q5_0": 0.08,
    "Q4_1": 0.1,
    "Q4_0": 0.16,
}


def write(path: Path, tensors: dict[str, Any], file_type: int | None = 1, **metadata: str) -> Path:
    writer = GGUFWriter(path, "llama")
    if file_type is not None:
        writer.add_file_type(file_type)
    writer.add_chat_template("{{ '<|im_start|>' }} 你好，世界")
    writer.add_token_list(["<s>", "你", "好", "\u2581a"])
    writer.add_token_scores([0.0, -1.5, -2.25, -3.0])
    writer.add_token_types([3, 1, 1, 1])
    writer.add_array("general.languages", ["en", "zh"])
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    for name, value in tensors.items():
        raw, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {
        "blk.0.attn_q.weight": MATRIX.astype(np.float16),
        "blk.0.attn_norm.weight": NORM,
        "blk.0.attn_k.weight": ODD.astype(np.float16),
        "blk.0.ffn_gate_inp.weight": MATRIX,  # a router, which is kept in F32 on purpose
    }
    return write(tmp_path_factory.mktemp("gguf") / "source.gguf", tensors)


def weights(path: Path) -> dict[str, np.ndarray]:
    return {one.name: dequantize(one.data, one.tensor_type) for one in GGUFReader(path).tensors}


def kinds(path: Path) -> dict[str, str]:
    return {one.name: one.tensor_type.name for one in GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_are_written_in_the_kind_and_all_else_stays(kind: str, source: Path, tmp_path: Path) -> None:
    made = rewrite(source, tmp_path / "folder" / "made.gguf", kind)
    before, after = read_gguf(source), read_gguf(made)
    changed = {"general.file_type": after.metadata["general.file_type"]}
    assert after.metadata == before.metadata | changed
    assert after.quantization == kind
    assert after.tensors.keys() == before.tensors.keys()
    whole = kind if GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 1 else "F16"
    names = dict.fromkeys(("blk.0.attn_norm.weight", "blk.0.ffn_gate_inp.weight"), "F32")
    assert kinds(made) == {"blk.0.attn_q.weight": kind, "blk.0.attn_k.weight": whole, **names}
    found = weights(made)
    np.testing.assert_array_equal(found["blk.0.attn_norm.weight"], NORM)
    np.testing.assert_array_equal(found["blk.0.ffn_gate_inp.weight"], MATRIX)
    np.testing.assert_allclose(found["blk.0.attn_q.weight"], MATRIX, atol=STEP[kind] + 1e-3)
    np.testing.assert_allclose(found["blk.0.attn_k.weight"], ODD, atol=STEP[whole] + 1e-3)
    assert list(made.parent.iterdir()) == [made]


def test_the_same_kind_is_the_same_file(source: Path, tmp_path: Path) -> None:
    assert rewrite(source, tmp_path / "same.gguf", "F16").read_bytes() == source.read_bytes()


def test_a_file_that_does_not_tell_its_kind_does_so_afterwards(tmp_path: Path) -> None:
    mute = write(tmp_path / "mute.gguf", {"x.weight": MATRIX, "blk.0.ffn_norm.weight": NORM}, file_type=None)
    made = rewrite(mute, tmp_path / "made.gguf", "Q8_0")
    assert read_gguf(made).metadata == read_gguf(mute).metadata | {"general.file_type": 7}
    assert kinds(made) == {"x.weight": "Q8_0", "blk.0.ffn_norm.weight": "F32"}


def test_k_quants_are_read(tmp_path: Path) -> None:
    """Which the package cannot write, so their blocks are made of bits whose scales are plain numbers."""
    tensors = {}
    for kind in (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K):
        blocks = RNG.integers(0, 256, (3, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
        scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        places = (0, 2) if kind == GGMLQuantizationType.Q4_K else (-2,)
        for at in places:
            blocks[:, at % blocks.shape[1] : at % blocks.shape[1] + 2] = scale
        tensors[f"{kind.name}.weight"] = blocks, kind
    mixed = write(tmp_path / "mixed.gguf", tensors, file_type=15)
    made = rewrite(mixed, tmp_path / "made.gguf", "F16")
    before, after = weights(mixed), weights(made)
    assert kinds(made) == dict.fromkeys(before, "F16")
    for name in before:
        assert np.ptp(before[name]) > 1
        np.testing.assert_allclose(after[name], before[name], rtol=1e-3)
    with pytest.raises(ModelError) as error:
        rewrite(mixed, tmp_path / "never.gguf", "Q4_K")
    assert error.value.text("en") == (
        "No GGUF can be written in Q4_K here; there are F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0.",
        "Choose one of these.",
    )
    assert "Q4_K" in error.value.text("zh")[0]


def pair(rows: int, columns: int) -> LoraPair:
    a, b = RNG.normal(0, 0.2, (2, columns)), RNG.normal(0, 0.2, (rows, 2))
    return LoraPair(a.astype(np.float32), b.astype(np.float32), 1.5)


def test_pairs_are_merged_and_other_tensors_are_not_touched(source: Path, tmp_path: Path) -> None:
    both = {"blk.0.attn_q.weight": pair(6, 64), "blk.0.ffn_gate_inp.weight": pair(6, 64)}
    found = weights(rewrite(source, tmp_path / "merged.gguf", "F32", both))
    before = weights(source)
    for name, one in both.items():
        np.testing.assert_allclose(found[name], before[name] + 1.5 * one.b @ one.a, atol=1e-6)
    np.testing.assert_array_equal(found["blk.0.attn_k.weight"], before["blk.0.attn_k.weight"])


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("blk.0.attn_q.weight", (6, 32), r"changes blk.0.attn_q.weight by a matrix of \(6, 32\)"),
        ("blk.7.attn_q.weight", (6, 64), "blk.7.attn_q.weight .* has it as -"),
    ],
)
def test_a_pair_without_its_tensor_is_refused(
    name: str, shape: tuple[int, int], said: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=said):
        rewrite(source, tmp_path / "never.gguf", "F16", {name: pair(*shape)})
    assert list(tmp_path.iterdir()) == []


def test_nothing_half_made_is_left(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gguf.quantize", full)
    with pytest.raises(OSError, match="No space"):
        rewrite(source, tmp_path / "never.gguf", "Q8_0")
    assert list(tmp_path.iterdir()) == []


def test_a_block_type_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "new.gguf", {"x.weight": MATRIX.astype(np.float16)})
    index = path.read_bytes().rindex(b"x.weight") + len("x.weight") + 4 + 16
    data = bytearray(path.read_bytes())
    data[index : index + 4] = (9999).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ModelError, match="9999"):
        rewrite(path, tmp_path / "never.gguf", "F16")
