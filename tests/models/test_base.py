"""Where a base comes from, and what makes two the same."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rag_kit.errors import ModelError, ServiceError
from rag_kit.models.base import Base, differences, resolve_base, tokenizer_hash
from rag_kit.settings import Settings
from tests.models.texts import says
from tests.servers import closed_port


@pytest.fixture
def settings(tmp_path):
    return Settings.load(tmp_path)


def saved(base: Base, folder, dtype) -> Base:
    shutil.copytree(base.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(base.folder, dtype=dtype).save_pretrained(folder)
    return Base("copy", folder)


def test_embedded_is_a_folder_that_speaks_english(settings, smol):
    found = resolve_base("embedded", settings)
    assert found.folder == smol.folder and found.languages() == ("en",)


def test_a_folder_absolute_or_from_the_root(settings, twin):
    assert resolve_base(str(twin.folder), settings).folder == twin.folder
    shutil.copytree(twin.folder, settings.root / "模型")
    assert resolve_base("./模型", settings).folder == settings.root / "模型"
    assert resolve_base("模型", settings).languages() == ()


def test_the_nested_folders_of_modelscope_and_the_hub(settings, twin):
    for place in ("ms/hub/models/Qwen/Qwen2___5", "hf/models--Q--Q/snapshots/abc"):
        shutil.copytree(twin.folder, settings.root / place)
        found = resolve_base(str(settings.root / place.split("/")[0]), settings)
        assert found.folder == settings.root / place


def test_a_folder_of_several_models_is_told(settings, twin):
    for name in ("one", "two"):
        (settings.root / "many" / name).mkdir(parents=True)
        shutil.copy(twin.folder / "config.json", settings.root / "many" / name)
    with pytest.raises(ModelError) as caught:
        resolve_base("./many", settings)
    says(caught.value, settings.root / "many" / "one", "two", en="more than one model", zh="多个模型")


def test_a_folder_without_a_model_is_told(settings):
    (settings.root / "empty").mkdir()
    with pytest.raises(ModelError) as caught:
        resolve_base("./empty", settings)
    says(caught.value, settings.root / "empty", "config.json", en="no model folder", zh="不是模型目录")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "no/such/folder", "./不在.gguf", "x.GGUF"])
def test_a_place_where_nothing_is_is_told(settings, name):
    with pytest.raises(ModelError) as caught:
        resolve_base(name, settings)
    says(caught.value, name, "embedded", en="is not there", zh="找不到基础模型")


def test_a_hub_that_cannot_be_reached_is_told(tmp_path):
    with closed_port() as url:
        settings = Settings.load(tmp_path, hf_endpoint=url, cache_dir=str(tmp_path / "cache"))
        with pytest.raises(ServiceError) as caught:
            resolve_base("Nobody/Nothing-1B", settings)
    says(caught.value, "Nobody/Nothing-1B")


def test_a_gguf_cut_short_is_told_and_leaves_nothing(tmp_path):
    from rag_kit.embedded import base_gguf

    settings = Settings.load(tmp_path, cache_dir=str(tmp_path / "cache"))
    whole = base_gguf()
    for size in (3, 1000, 3_000_000):
        with whole.open("rb") as file:
            (tmp_path / "cut.gguf").write_bytes(file.read(size))
        with pytest.raises(ModelError) as caught:
            resolve_base("./cut.gguf", settings)
        says(caught.value, "cut.gguf")
    assert not list((tmp_path / "cache").glob("**/config.json"))


def test_copies_in_other_number_types_are_the_same_base(twin, tmp_path):
    ours = twin.fingerprint()
    for dtype in (torch.bfloat16, torch.float16):
        assert differences(ours, saved(twin, tmp_path / str(dtype), dtype).fingerprint()) == []


def test_a_tokenizer_that_was_saved_again_is_the_same(twin_engine, smol_engine, tmp_path):
    for number, engine in enumerate((twin_engine, smol_engine)):
        engine.tokenizer.save_pretrained(tmp_path / str(number))
        again = AutoTokenizer.from_pretrained(tmp_path / str(number))
        assert tokenizer_hash(again) == engine.base.fingerprint()["tokenizer_hash"]


def test_the_embedded_base_saved_in_f32_is_the_same_base(smol, tmp_path):
    assert differences(smol.fingerprint(), saved(smol, tmp_path / "copy", torch.float32).fingerprint()) == []


def test_other_weights_another_tokenizer_another_shape_are_other_bases(twin, smol, tmp_path):
    from tests.twin import build_qwen_twin

    other = Base("other", build_qwen_twin(tmp_path / "other", seed=1)).fingerprint()
    assert differences(twin.fingerprint(), other) == ["tensor_probe"]
    assert "architecture" in differences(twin.fingerprint(), smol.fingerprint())
    assert "tokenizer_hash" in differences(twin.fingerprint(), smol.fingerprint())


def test_what_one_side_does_not_know_is_not_compared(twin):
    ours = twin.fingerprint()
    assert differences(ours, {}) == []
    assert differences(ours, {**ours, "tokenizer_hash": None, "tensor_probe": None}) == []
