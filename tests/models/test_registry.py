"""The registry and its folders: taken in, removed, scores kept, entries never lost and never stale."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from rag_kit.errors import AdapterNotFoundError, ModelError
from rag_kit.manifest import replacing
from rag_kit.models.adapters import CONFIG, RECIPE, WEIGHTS, named_adapter
from rag_kit.models.lora import LoRALanguageModel
from rag_kit.models.registry import (
    REGISTRY,
    add_adapter,
    entries,
    record_check,
    record_scores,
    remove_adapter,
)
from rag_kit.settings import Settings
from tests.models.texts import says

SCORES = {"retrieved": {"f1": 0.5, "n": 40}}
FAILED = [{"check": "probe", "level": "error", "text": "无作用", "hint": ""}]


@pytest.fixture(scope="module")
def plain(make_adapter, tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("made") / "plain")


@pytest.fixture
def settings(tmp_path, twin):
    return Settings.load(tmp_path, base_model_name=str(twin.folder))


@pytest.fixture
def put(plain, settings):
    def put(*places):
        for place in places:
            shutil.copytree(plain, settings.lora_model_path / place, dirs_exist_ok=True)
        return settings.lora_model_path / places[-1]

    return put


def test_an_entry_says_what_folder_and_recipe_say(put, settings, twin):
    recipe = {
        "base": {"name": "twin", "fingerprint": twin.fingerprint()},
        "data": {"name": "手册", "sha256": "ab" * 32},
        "metrics": {"train_loss": 0.25},
    }
    (put("客服", "别处") / ".." / "客服" / RECIPE).write_text(json.dumps(recipe), encoding="utf-8")
    told = entries(settings)
    assert list(told) == ["别处", "客服"]
    assert told["客服"] | {"key": None, "base": None} == {
        "key": None,
        "base": None,
        "rank": 4,
        "data": recipe["data"],
        "metrics": recipe["metrics"],
        "created": None,
    }
    assert told["客服"]["base"]["name"] == "twin" and len(told["客服"]["base"]["fingerprint"]) == 16
    assert told["别处"]["base"]["fingerprint"] is None and told["别处"]["data"]["name"] is None
    assert not (settings.lora_model_path / REGISTRY).exists()  # looking writes nothing


def test_what_was_measured_stays_with_the_weights_it_was_measured_on(put, settings):
    folder = put("客服")
    record_scores("客服", SCORES, settings)
    record_scores("客服", {"none": {"f1": 0.1, "n": 40}}, settings)
    record_check(named_adapter("客服", settings), "state", "transformers", FAILED, settings)
    entry = entries(settings)["客服"]
    assert entry["scores"].keys() == {"retrieved", "none"} and entry["checked"]["findings"] == FAILED
    assert "无作用" in (settings.lora_model_path / REGISTRY).read_text(encoding="utf-8")
    before = named_adapter("客服", settings)
    os.utime(folder / WEIGHTS, ns=(1, 1))  # trained anew
    assert not {"scores", "checked"} & entries(settings)["客服"].keys()
    record_check(before, "state", "transformers", FAILED, settings)  # of a check that took longer than that
    assert "checked" not in entries(settings)["客服"]


def test_the_folders_are_the_truth(put, settings):
    folder = put("红", "蓝")
    for name in ("红", "蓝", "无"):
        record_scores(name, SCORES, settings)
    shutil.rmtree(folder)
    assert list(entries(settings)) == ["红"]
    record_scores("红", SCORES, settings)
    kept = json.loads((settings.lora_model_path / REGISTRY).read_text(encoding="utf-8"))
    assert list(kept) == ["红"]


@pytest.mark.parametrize("content", ["{", "[]", '{"红": 1}', '{"红": {"key": 1}}', "\x00"])
def test_a_damaged_registry_is_begun_anew(put, settings, content):
    put("红")
    (settings.lora_model_path / REGISTRY).write_text(content, encoding="utf-8")
    assert "scores" not in entries(settings)["红"]
    record_scores("红", SCORES, settings)
    assert entries(settings)["红"]["scores"] == SCORES


def test_writers_at_the_same_time_lose_nothing(put, settings):
    names = [f"第{number}" for number in range(8)]
    put(*names)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: record_scores(name, SCORES, settings), names))
    assert all(entry["scores"] == SCORES for entry in entries(settings).values())


def test_a_flat_training_leaves_the_registry(put, settings):
    put(".", "红")
    record_scores("红", SCORES, settings)
    with replacing(settings.lora_model_path, keep_as=settings.lora_model_path / ".previous-1") as building:
        (building / CONFIG).write_text('{"peft_type": "LORA"}', encoding="utf-8")
        (building / WEIGHTS).write_bytes(b"new")
    assert entries(settings)["红"]["scores"] == SCORES


def test_a_registry_that_cannot_be_written_stops_nobody(put, settings, caplog):
    put("红")
    (settings.lora_model_path / f".{REGISTRY}.lock").mkdir()
    record_scores("红", SCORES, settings)
    assert REGISTRY in caplog.text and "scores" not in entries(settings)["红"]


# --- taken in -----------------------------------------------------------------------------------


def test_checkpoints_are_taken_in_with_their_training(plain, settings, twin, tmp_path):
    source = shutil.copytree(plain, tmp_path / "训练")
    for step in (10, 5):
        shutil.copytree(plain, source / f"checkpoint-{step}")
        (source / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"pickle")
    folder = add_adapter(source, twin, settings).folder
    assert sorted(path.name for path in (folder / "checkpoint-5").iterdir()) == [CONFIG, WEIGHTS]
    assert list(entries(settings)) == ["训练", "训练/checkpoint-5", "训练/checkpoint-10"]
    checkpoint = named_adapter("训练/checkpoint-5", settings)
    assert checkpoint.recipe["base"]["name"] == "twin" and checkpoint.recipe["metrics"] == {"steps": 5}


def test_a_gguf_is_refused_with_the_way_out(settings, twin, tmp_path):
    with pytest.raises(ModelError) as caught:
        add_adapter(tmp_path / "x.gguf", twin, settings)
    says(caught.value, "x.gguf", CONFIG, en="is a GGUF", zh="是 GGUF 文件")


def test_the_flat_ones_name_is_taken(put, plain, settings, twin):
    put(".")
    with pytest.raises(ModelError) as caught:
        add_adapter(plain, twin, settings, "default")
    says(caught.value, "default", "--name")


# --- removed ------------------------------------------------------------------------------------


def test_an_adapter_is_removed_with_its_checkpoints(put, settings):
    put("红", "红/checkpoint-1", "红/checkpoint-2", "蓝")
    assert remove_adapter("红/checkpoint-1", settings) == settings.lora_model_path / "红" / "checkpoint-1"
    assert list(entries(settings)) == ["红", "红/checkpoint-2", "蓝"]
    remove_adapter("红", settings)
    assert [path.name for path in settings.lora_model_path.iterdir()] == ["蓝"]


def test_of_the_flat_one_only_its_own_files_are_deleted(put, settings):
    root = put(".", "checkpoint-3", "红").parent
    for name in ("README.md", "记录.txt", "tokenizer.json", RECIPE):
        (root / name).write_text("{}", encoding="utf-8")
    record_scores("红", SCORES, settings)
    remove_adapter("default", settings)
    left = {path.name for path in root.iterdir() if path.suffix != ".lock"}
    assert left == {"README.md", "记录.txt", "红", REGISTRY}
    assert entries(settings)["红"]["scores"] == SCORES


def test_a_link_is_removed_and_not_what_it_leads_to(plain, settings, tmp_path):
    elsewhere = shutil.copytree(plain, tmp_path / "elsewhere")
    settings.lora_model_path.mkdir()
    (settings.lora_model_path / "链").symlink_to(elsewhere, target_is_directory=True)
    remove_adapter("链", settings)
    assert entries(settings) == {} and (elsewhere / WEIGHTS).is_file()


@pytest.mark.parametrize("name", ["..", ".", "", "../outside", "红/..", "红/checkpoint-9", "re", "红/../红"])
def test_only_an_exact_name_is_removed(put, plain, settings, name):
    put("红")
    shutil.copytree(plain, settings.root / "outside")
    with pytest.raises(AdapterNotFoundError) as caught:
        remove_adapter(name, settings)
    says(caught.value, name, "红")
    assert (settings.root / "outside" / WEIGHTS).is_file() and list(entries(settings)) == ["红"]


def test_a_request_ends_well_while_its_adapter_is_removed(put, settings, twin_engine):
    put("红")
    model = LoRALanguageModel(
        model="lora:红", settings=settings, engine="transformers", temperature=0, max_tokens=8
    )
    whole = model.invoke("你好").content
    pieces = model.stream("你好")
    first = next(pieces).content
    remove_adapter("红", settings)
    assert first + "".join(piece.content for piece in pieces) == whole
    with pytest.raises(AdapterNotFoundError) as caught:
        model.invoke("你好")
    says(caught.value, "红")
