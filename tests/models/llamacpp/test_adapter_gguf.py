"""A PEFT adapter as a GGUF: the same arithmetic, one file in the cache, and every refusal by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rag_kit.errors import ModelError, RagKitError, StoreError
from rag_kit.models.adapters import CONFIG, WEIGHTS, Adapter, read_adapter
from rag_kit.models.base import Base
from rag_kit.models.llamacpp import adapter_gguf as module
from rag_kit.models.llamacpp.adapter_gguf import VARIANTS, adapter_gguf, check_adapter_gguf, lora_pairs
from tests.gguf_bases import tiny_base, write_base_gguf
from tests.models.conftest import MakeAdapter
from tests.models.llamacpp.conftest import Write
from tests.models.texts import says

Made = dict[str, tuple[Base, Path]]
Change = Callable[[dict[str, Any], dict[str, Any]], object]
Q, FIRST = "blk.0.attn_q.weight", "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A llama, whose rows are permuted and whose head is its own; a qwen3, tied; a llama with more layers."""
    root = tmp_path_factory.mktemp("bases")
    folders = {
        "llama": tiny_base(root / "llama", "llama", num_hidden_layers=1),
        "qwen3": tiny_base(root / "qwen3", "qwen3", num_hidden_layers=1, head_dim=16),
        "longer": tiny_base(root / "longer", "llama", num_hidden_layers=2),
    }
    return {
        name: (Base(name, at), write_base_gguf(at, root / f"{name}.gguf")) for name, at in folders.items()
    }


@pytest.fixture(scope="module")
def base(bases: Made) -> Path:
    return bases["llama"][1]


@pytest.fixture(scope="module")
def plain(bases: Made, make_adapter: MakeAdapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "适配器"
    return make_adapter(folder, bases["llama"][0], target_modules=["q_proj", "up_proj"])


@pytest.fixture
def changed(plain: Path, tmp_path: Path) -> Callable[..., Adapter]:
    """Change the configuration and the tensors of an adapter, the plain one by default."""

    def change(how: Change | None = None, source: Path = plain, **config: Any) -> Adapter:
        from safetensors.torch import load_file, save_file

        folder = tmp_path / "changed"
        shutil.copytree(source, folder, dirs_exist_ok=True)
        told = json.loads((folder / CONFIG).read_text(encoding="utf-8")) | config
        tensors = load_file(folder / WEIGHTS)
        if how:
            how(tensors, told)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(told), encoding="utf-8")
        return read_adapter(folder)

    return change


def refusal(adapter: Adapter, base: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        lora_pairs(adapter, base)
    return caught.value


# --- the same arithmetic -------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=st.sampled_from([(2, 1, 4), (4, 2, 8), (3, 3, 6)]),
    rank=st.integers(1, 9),
    alpha=st.integers(0, 40),
    rslora=st.booleans(),
    own=st.dictionaries(st.sampled_from(["q_proj", r"0\.self_attn\.k_proj"]), st.integers(1, 5)),
    seed=st.integers(0, 99),
)
def test_base_and_pair_make_the_weight_that_peft_merges(
    shape, rank, alpha, rslora, own, seed, tmp_path_factory
):
    """Rows of q and k are told apart by index here: half j of pair i of a head lies at 2 i + j."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    heads, kept, width = shape
    folder = tmp_path_factory.mktemp("merge")
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 8,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "head_dim": width,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=kept))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = LoraConfig(
        r=rank, lora_alpha=alpha, use_rslora=rslora, rank_pattern=own, alpha_pattern={**own, "v_proj": 7},
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "embed_tokens", "lm_head"],
    )  # fmt: skip
    made = get_peft_model(model, config)
    for name, parameter in made.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter.data)
    made.save_pretrained(folder)
    merged = made.merge_and_unload().state_dict()
    _header(folder / "base.gguf", "llama", before, heads, kept)
    pairs = lora_pairs(read_adapter(folder), folder / "base.gguf")
    names = {
        "model.embed_tokens": "token_embd", "lm_head": "output",
        "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
        **{f"model.layers.0.self_attn.{one}_proj": f"blk.0.attn_{one}" for one in "qkv"},
        "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
    }  # fmt: skip
    assert pairs.keys() == {f"{name}.weight" for name in names.values()}
    for layer, name in names.items():
        pair, weight = pairs[f"{name}.weight"], before[f"{layer}.weight"].numpy()
        added = pair.scale * pair.b @ pair.a
        if name.endswith(("attn_q", "attn_k")):
            at = np.arange(len(weight))
            pairs_of, half = np.divmod(at % width, width // 2)[::-1]
            added = added[at // width * width + 2 * pairs_of + half]
        np.testing.assert_allclose(weight + added, merged[f"{layer}.weight"].numpy(), rtol=1e-4, atol=1e-4)


def _header(path: Path, architecture: str, weights: dict[str, Any], heads: int, kept: int) -> None:
    """Write what the conversion reads of a base: names, shapes, heads."""
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map

    writer, names = GGUFWriter(path, architecture), get_tensor_name_map(MODEL_ARCH.LLAMA, 1)
    writer.add_block_count(1)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kept)
    for name, value in weights.items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value.numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_adapters_in_sixteen_bits(changed, base, plain, dtype):
    import torch

    def narrow(tensors, _config):
        for key in tensors:
            tensors[key] = tensors[key].to(getattr(torch, dtype))

    ours, exact = lora_pairs(changed(narrow), base)[Q], lora_pairs(read_adapter(plain), base)[Q]
    assert ours.a.dtype == ours.b.dtype == np.float32
    np.testing.assert_allclose(ours.b @ ours.a, exact.b @ exact.a, atol=0.02)


def test_a_scale_of_zero_stays_zero_and_every_module_keeps_its_own(changed, base, tmp_path):
    """In the file one alpha stands for all, and llama.cpp takes 0 for no scale at all."""
    from gguf import GGUFReader

    for alphas in ({"q_proj": 0}, {"q_proj": 0, "up_proj": 0}, {"up_proj": 3}):
        adapter = changed(alpha_pattern=alphas)
        reader = GGUFReader(adapter_gguf(adapter, base, tmp_path))
        alpha = reader.fields["adapter.lora.alpha"].contents()
        found = {tensor.name: tensor.data for tensor in reader.tensors}
        assert alpha != 0
        for name, pair in lora_pairs(adapter, base).items():
            ours = alpha / len(pair.a) * found[f"{name}.lora_b"] @ found[f"{name}.lora_a"]
            np.testing.assert_allclose(ours, pair.scale * pair.b @ pair.a, rtol=1e-5, atol=1e-6)


# --- one file in the cache -----------------------------------------------------------------------------


def test_the_file_is_made_once_and_again_only_for_other_content(plain, changed, bases, tmp_path, monkeypatch):
    written = []
    write = module._write
    monkeypatch.setattr(module, "_write", lambda *args: (written.append(args[-1]), write(*args)))
    (_, base), (_, longer) = bases["llama"], bases["longer"]
    adapter = read_adapter(plain)
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: adapter_gguf(adapter, base, tmp_path), range(8)))
    assert len(paths) == len(written) == 1
    (path,) = paths
    assert path.parent == tmp_path / "rag-kit" / "adapters"
    assert check_adapter_gguf(path, base).metadata["adapter.lora.alpha"] == 8
    content = path.read_bytes()
    assert adapter_gguf(read_adapter(plain), base, tmp_path / "other").read_bytes() == content
    others = [adapter_gguf(changed(lora_alpha=16), base, tmp_path), adapter_gguf(adapter, longer, tmp_path)]
    assert len({path, *others}) == 3 and path.read_bytes() == content
    path.write_bytes(content[: len(content) // 2])
    assert adapter_gguf(adapter, base, tmp_path).read_bytes() == content
    assert not [file for file in path.parent.iterdir() if file.suffix not in (".gguf", ".lock")]


def test_an_adapter_that_is_removed_meanwhile(changed, base, tmp_path):
    adapter = changed()
    shutil.rmtree(adapter.folder)
    with pytest.raises(ModelError) as caught:
        adapter_gguf(adapter, base, tmp_path)
    says(caught.value, WEIGHTS, en="cannot be read", zh="无法读取")


def test_a_write_that_fails_leaves_nothing(plain, base, tmp_path, monkeypatch):
    def full(pairs, architecture, target):
        target.write_bytes(b"GGUF")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(StoreError) as caught:
        adapter_gguf(read_adapter(plain), base, tmp_path)
    says(caught.value, "No space left", en="cannot be written", zh="无法写入")
    assert [file.suffix for file in (tmp_path / "rag-kit" / "adapters").iterdir()] == [".lock"]


# --- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, ["lm_head"] if key == "modules_to_save" else True) for key in VARIANTS),
        ("bias", "all"),
        ("init_lora_weights", "pissa_niter_4"),
    ],
)
def test_what_a_gguf_adapter_cannot_hold(changed, base, key, value):
    error = refusal(changed(**{key: value}), base)
    says(error, f"{key}={value}", "changed", "merge_and_unload", en="cannot hold", zh="无法表示")


def test_dora_as_peft_saves_it(bases, make_adapter, changed, tmp_path):
    llama, base = bases["llama"]
    dora = make_adapter(tmp_path / "dora", llama, use_dora=True)
    says(refusal(read_adapter(dora), base), "use_dora=True", en="cannot hold", zh="无法表示")
    silent = changed(source=dora, use_dora=False)
    says(refusal(silent, base), "lora_magnitude_vector", en="cannot hold", zh="无法表示")


@pytest.mark.parametrize(
    "key",
    [
        f"{FIRST}lora_B.bias",
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.lm_head.modules_to_save.weight",
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
        f"{FIRST}base_layer.weight",
    ],
)
def test_no_tensor_is_left_out_silently(changed, base, key):
    import torch

    adapter = changed(lambda tensors, _: tensors.update({key: torch.zeros(64, 64)}))
    says(refusal(adapter, base), key, en="cannot hold", zh="无法表示")


def test_a_copy_of_the_bases_embedding_is_no_part_of_the_adapter(bases, make_adapter, changed, tmp_path):
    llama, base = bases["llama"]
    source = make_adapter(tmp_path / "ends", llama, target_modules=["embed_tokens", "lm_head"])
    copy = "base_model.model.model.embed_tokens.base_layer.weight"
    assert lora_pairs(read_adapter(source), base).keys() == {"token_embd.weight", "output.weight"}

    def grow(tensors, _config):
        import torch

        tensors[copy] = torch.cat([tensors[copy], tensors[copy][:1]])

    other = changed(lambda tensors, _: tensors[copy].normal_(), source)
    for adapter in (other, changed(grow, source)):
        says(refusal(adapter, base), copy, en="cannot hold", zh="无法表示")


@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
def test_one_end_of_a_model_with_tied_embeddings(bases, make_adapter, tmp_path, end):
    """llama.cpp has no such weight, or ends the process."""
    qwen, base = bases["qwen3"]
    adapter = read_adapter(make_adapter(tmp_path / "tied", qwen, target_modules=[end, "q_proj"]))
    says(refusal(adapter, base), end, "transformers", en="only one of two uses", zh="共用同一权重")


def test_tensors_that_do_not_fit(changed, base, bases, make_adapter, tmp_path):
    import torch

    a, b = f"{FIRST}lora_A.weight", f"{FIRST}lora_B.weight"

    def error(how: Change | None, **config: Any) -> ModelError:
        shutil.rmtree(tmp_path / "changed", ignore_errors=True)
        return refusal(changed(how, **config), base)

    shape = {"en": "must be A (4, 64), B (64, 4)", "zh": "应为 A (4, 64), B (64, 4)"}
    layer = "model.layers.0.self_attn.q_proj"
    says(error(lambda ts, _: ts.update({b: torch.ones(32, 4)})), layer, "A (4, 64), B (32, 4)", **shape)
    says(error(lambda ts, _: ts.update({a: torch.ones(4, 64, 1, 1)})), layer, "(4, 64, 1, 1)", **shape)
    says(error(lambda ts, _: ts.pop(a)), layer, "A ()", **shape)
    says(error(None, r=8), "A (4, 64)", en="must be A (8, 64)", zh="应为 A (8, 64)")
    for bad in (float("nan"), float("-inf")):
        told = error(lambda ts, _, bad=bad: ts[b].view(-1)[3:4].fill_(bad))
        says(told, f"{layer}.lora_B", en="no numbers", zh="非数值")
    says(error(lambda ts, _: ts.clear()), "0", en="no LoRA adapter", zh="不含 LoRA 适配器")
    deep = make_adapter(tmp_path / "deep", bases["longer"][0], target_modules=["o_proj"])
    says(refusal(read_adapter(deep), base), "model.layers.1", en="is not in the base", zh="不存在")
    for odd in (
        {"r": None},
        {"r": 0},
        {"lora_alpha": float("nan")},
        {"rank_pattern": {"(": 4}},
        {"lora_alpha": "x"},
    ):
        says(error(None, **odd), CONFIG, en="cannot be read", zh="无法读取")
    (tmp_path / "changed" / WEIGHTS).write_bytes(b"\x40\0\0\0\0\0\0\0{}")
    says(refusal(read_adapter(tmp_path / "changed"), base), WEIGHTS, en="cannot be read", zh="无法读取")


def test_a_norm_and_a_layer_that_is_named_twice(changed, base):
    import torch

    def norm(tensors, _config):
        key = "base_model.model.model.norm.lora_"
        tensors.update({f"{key}A.weight": torch.ones(4, 64), f"{key}B.weight": torch.ones(64, 4)})

    def twice(tensors, _config):
        tensors.update({key.replace("model.layers", "layers"): one + 0 for key, one in [*tensors.items()]})

    says(refusal(changed(norm), base), "model.norm", en="must be", zh="应为")
    says(refusal(changed(twice), base), "twice", en="cannot hold", zh="无法表示")


def test_an_architecture_that_was_not_shown_to_work(plain, write_gguf: Write):
    says(refusal(read_adapter(plain), write_gguf("phi3")), "phi3", "qwen3", en="architecture", zh="架构")


# --- GGUF adapters made elsewhere ----------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path: Path) -> Callable[..., Path]:
    """Write a GGUF adapter for the weight q of the tiny llama, changed."""

    def write(architecture: str = "llama", kind: str = "adapter", **tensors: Any) -> Path:
        from gguf import GGUFWriter

        path = tmp_path / "made.gguf"
        writer = GGUFWriter(path, architecture)
        writer.add_type(kind)
        writer.add_string("adapter.type", "lora")
        made = {f"{Q}.lora_a": np.ones((4, 64), "f4"), f"{Q}.lora_b": np.ones((64, 4), "f4")} | tensors
        for name, values in made.items():
            if values is not None:
                raw = {"raw_dtype": 19, "raw_shape": (4, 256)} if values.dtype == np.uint8 else {}
                writer.add_tensor(name, values, **raw)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
        return path

    return write


def unfit(path: Path, base: Path) -> RagKitError:
    with pytest.raises(ModelError) as caught:
        check_adapter_gguf(path, base)
    return caught.value


def test_an_adapter_made_elsewhere_that_fits(foreign, base):
    found = check_adapter_gguf(foreign(), base)
    assert found.parameters == 512 and found.tensors[f"{Q}.lora_a"].shape == (4, 64)
    halves = {f"{Q}.lora_a": np.ones((4, 64), "f2"), f"{Q}.lora_b": np.ones((64, 4), "f2")}
    ends = {
        "token_embd.weight.lora_a": np.ones((288, 2), "f4"),
        "token_embd.weight.lora_b": np.ones((64, 2), "f4"),
    }
    assert check_adapter_gguf(foreign(**halves, **ends), base)


def test_an_adapter_made_elsewhere_that_does_not_fit(foreign, bases, base, tmp_path):
    a, b = f"{Q}.lora_a", f"{Q}.lora_b"
    qwen3 = bases["qwen3"][1]
    says(unfit(foreign("qwen2"), base), "qwen2", "llama", en="of the architecture", zh="架构")
    says(unfit(foreign(kind="model"), base), "model/lora", en="no LoRA adapter", zh="不含 LoRA 适配器")
    says(unfit(base, base), base, en="no LoRA adapter", zh="不含 LoRA 适配器")
    says(unfit(foreign(**{a: None, b: None}), base), "0", en="no LoRA adapter", zh="不含 LoRA 适配器")
    shape = {"en": "must be A (4, 64), B (64, 4)", "zh": "应为 A (4, 64), B (64, 4)"}
    says(unfit(foreign(**{b: np.ones((96, 4), "f4")}), base), Q, "B (96, 4)", **shape)
    says(unfit(foreign(**{b: None}), base), Q, "B ()", **shape)
    says(unfit(foreign(**{a: None}), base), Q, "A ()", en="must be A (r, 64)", zh="应为 A (r, 64)")
    for bad in (np.nan, np.inf):
        says(unfit(foreign(**{b: np.full((64, 4), bad, "f2")}), base), b, en="no numbers", zh="非数值")
    other = {"blk.7.attn_q.weight.lora_a": np.ones((4, 64), "f4")}
    says(unfit(foreign(**other), base), "blk.7.attn_q.weight", en="is not in the base", zh="不存在")
    # llama.cpp passes over a norm in silence, and a LoRA on the embedding of a tied model ends the process
    norm = {"blk.0.attn_norm.weight": np.ones(64, "f4")}
    says(unfit(foreign(**norm), base), "blk.0.attn_norm.weight", en="cannot hold", zh="无法表示")
    ends = {
        "token_embd.weight.lora_a": np.ones((288, 2), "f4"),
        "token_embd.weight.lora_b": np.ones((64, 2), "f4"),
    }
    says(unfit(foreign("qwen3", **ends), qwen3), "token_embd", en="only one of two", zh="共用同一权重")
    says(unfit(foreign("llama", **ends | {"token_embd.weight.lora_b": np.ones((64, 3), "f4")}), base),
         "token_embd", en="must be", zh="应为")  # fmt: skip


@pytest.mark.parametrize("kept", [3, 60, 400, -100])
def test_an_adapter_made_elsewhere_that_is_cut_short(foreign, base, kept):
    path = foreign()
    path.write_bytes(path.read_bytes()[:kept])
    says(
        unfit(path, base),
        path,
        **({"en": "is no GGUF", "zh": "不是"} if kept == 3 else {"en": "cut short", "zh": "不完整"}),
    )
