"""Where a base comes from, and what makes two the same."""

import json
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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny base as a folder, and its GGUF elsewhere."""
    from tests.gguf_bases import tiny_base, write_base_gguf

    root = tmp_path_factory.mktemp("tiny")
    folder = tiny_base(root / "folder", "llama")
    return folder, write_base_gguf(folder, root / "tiny.gguf", "F32")


def test_what_ollama_has_pulled_is_a_base(tmp_path, tiny, monkeypatch):
    from tests.models.test_blobs import pulled

    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    (tmp_path / "models/blobs").mkdir(parents=True)
    settings = Settings.load(tmp_path, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ModelError) as caught:
        resolve_base("ollama:tiny:1b", settings)
    says(caught.value, "ollama pull tiny:1b", tmp_path / "models", en="has not pulled", zh="没有拉取过")
    blob = pulled(tmp_path / "models", "registry.ollama.ai/library/tiny/1b")
    shutil.copy(tiny[1], blob)
    found = resolve_base("ollama:tiny:1b", settings)
    assert found.gguf == blob and found.name == "ollama:tiny:1b"  # the file itself: no second download
    ours, theirs = found.fingerprint(), Base("folder", tiny[0]).fingerprint()
    assert differences(ours | {"tokenizer_hash": None}, theirs) == []
    assert resolve_base("ollama:tiny:1b", settings) == found


def test_a_file_of_a_hub_repository_is_a_base(tmp_path, tiny):
    from tests.test_network import COMMIT, listening

    path, whole = "/maker/tiny-GGUF/resolve/main/q8/tiny.gguf", tiny[1].read_bytes()

    def answer(asked):
        if asked == "/api/models/maker/tiny-GGUF":
            return 200, {}, b'{"id": "maker/tiny-GGUF", "siblings": []}'
        there = asked in (path, path.replace("main", COMMIT))
        head = {"X-Repo-Commit": COMMIT, "ETag": '"1"'}
        missing = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
        return (200, head, whole) if there else (404, missing, b"")

    with listening(answer) as hub:
        settings = Settings.load(tmp_path, hf_endpoint=hub.url, cache_dir=str(tmp_path / "cache"))
        found = resolve_base("maker/tiny-GGUF/q8/tiny.gguf", settings)
        assert found.gguf is not None and found.gguf.read_bytes() == whole
        asked = len(hub.asked)
        assert resolve_base("maker/tiny-GGUF/q8/tiny.gguf", settings) == found
        assert len(hub.asked) == asked  # what is at hand is not asked for
        with pytest.raises(ServiceError) as caught:
            resolve_base("maker/tiny-GGUF/other.gguf", settings)
        says(caught.value, "maker/tiny-GGUF/other.gguf", hub.url)
    with pytest.raises(ServiceError) as caught:
        resolve_base("maker/tiny-GGUF/third.gguf", settings)
    says(caught.value, "maker/tiny-GGUF/third.gguf")


def test_a_gguf_beside_the_folder_is_taken_if_it_is_the_same_base(settings, tiny, tmp_path):
    from tests.gguf_bases import tiny_base, write_base_gguf

    folder = settings.root / "base"
    shutil.copytree(tiny[0], folder)
    assert resolve_base("./base", settings).gguf is None
    shutil.copy(tiny[1], folder / "模型.gguf")
    assert resolve_base("./base", settings).gguf == folder / "模型.gguf"
    shutil.copy(tiny[1], folder / "second.gguf")
    assert resolve_base("./base", settings).gguf is None  # which of them is not for us to say
    (folder / "second.gguf").unlink()
    for seed, more, differing in ((1, {}, "tensor_probe"), (0, {"num_hidden_layers": 3}, "sizes")):
        other = tiny_base(tmp_path / f"other{seed}{differing}", "llama", seed, **more)
        write_base_gguf(other, folder / "模型.gguf")
        with pytest.raises(ModelError) as caught:
            resolve_base("./base", settings)
        says(caught.value, folder / "模型.gguf", differing, en="another model", zh="另一个模型")


def test_a_base_file_that_changed_is_seen_although_its_norms_did_not(tmp_path, tiny):
    settings = Settings.load(tmp_path, cache_dir=str(tmp_path / "cache"))
    shutil.copy(tiny[1], tmp_path / "own.gguf")
    trained_on = resolve_base("./own.gguf", settings)
    recipe = {"name": trained_on.name, "fingerprint": trained_on.fingerprint()}
    assert not trained_on.changed_since(recipe)
    data = bytearray((tmp_path / "own.gguf").read_bytes())
    data[-60_000:-50_000] = bytes(10_000)  # of a matrix
    (tmp_path / "own.gguf").write_bytes(data)
    now = resolve_base("./own.gguf", settings)
    assert now.changed_since(recipe) and differences(now.fingerprint(), recipe["fingerprint"]) == []
    assert not now.changed_since({**recipe, "name": "another file of it"})
    assert not now.changed_since({"name": now.name, "fingerprint": {}}) and not now.changed_since({})


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


def test_a_gguf_of_a_folder_has_its_tokenizer(tmp_path, twin):
    """It fills the rows that no token has, and is else the same."""
    written = json.loads((twin.folder / "tokenizer.json").read_text(encoding="utf-8"))
    shutil.copytree(twin.folder, tmp_path / "gguf", ignore=shutil.ignore_patterns("*.safetensors"))
    written["model"]["vocab"] |= {f"[PAD{row}]": row for row in (151_665, 151_935)}
    (tmp_path / "gguf/tokenizer.json").write_text(json.dumps(written), encoding="utf-8")
    ours, padded = (AutoTokenizer.from_pretrained(folder) for folder in (twin.folder, tmp_path / "gguf"))
    assert len(padded) == len(ours) + 2 and tokenizer_hash(padded) == tokenizer_hash(ours)


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
