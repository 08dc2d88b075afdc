"""A training end to end on the twin: what it writes, what it keeps, and how it fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rag_kit.errors import DataError, ModelError, StoreError
from rag_kit.finetune import FinetuneResult, Hyperparameters, finetune
from rag_kit.finetune.train import _steps, check_output
from rag_kit.manifest import read_manifest, sha256
from rag_kit.models.adapters import find_adapters, named_adapter
from rag_kit.models.base import Base
from rag_kit.settings import Settings
from tests.finetune.conftest import FACTS, write_lines
from tests.models.texts import says
from tests.twin import qwen_twin

GUIDE_FILES = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
FEW = Hyperparameters(epochs=2, batch_size=2, lora_r=4, learning_rate=1e-2)


def few(project: Settings, data: Path, **arguments: Any) -> FinetuneResult:
    return finetune(
        **{"data": data, "settings": project, "hyperparameters": FEW, "progress": False} | arguments
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an adapter of the twin."""
    root = tmp_path_factory.mktemp("trained")
    project = Settings.load(root, base_model_name=str(qwen_twin()))
    return few(project, write_lines(root / "facts.jsonl", FACTS)).folder


@pytest.fixture
def before(project: Settings, trained: Path) -> dict[str, str]:
    """Put an adapter where the project's is; return the hashes of its files."""
    shutil.copytree(trained, project.lora_model_path)
    return files(trained)


def files(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir() if path.is_file()}


def test_the_folder_holds_what_the_guide_says_and_a_recipe(project: Settings, facts: Path) -> None:
    heard: list[dict[str, float]] = []
    result = few(project, facts, on_log=heard.append)

    assert result.folder == project.lora_model_path and result.kept is None
    assert GUIDE_FILES | {"recipe.json", "training_log.jsonl"} <= set(files(result.folder))
    recipe = read_manifest(result.folder, "recipe.json", hashes=True)
    assert recipe == result.recipe == result.adapter.recipe
    base = Base(project.base_model_name, qwen_twin())
    assert recipe["base"] == {"name": project.base_model_name, "fingerprint": base.fingerprint()}
    assert recipe["tokenizer_hash"] == base.fingerprint()["tokenizer_hash"]
    assert recipe["chat_template_hash"] == base.fingerprint()["chat_template_hash"]
    assert recipe["data"] == {"name": "facts.jsonl", "sha256": sha256(facts), "examples": 4, "left_out": {}}
    assert recipe["hyperparameters"]["lora_r"] == 4 and recipe["hyperparameters"]["epochs"] == 2
    result.adapter.check_base(base)

    config = json.loads((result.folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == project.base_model_name
    assert set(find_adapters(project.lora_model_path)) == {"default"}

    lines = (result.folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == result.log == heard
    assert [row["step"] for row in heard] == [1, 2, 3, 4] and heard[-1]["epoch"] == 2
    assert recipe["metrics"]["train_loss"] == pytest.approx(sum(result.losses[2:]) / 2)
    assert result.losses[-1] < result.losses[0]

    forecast = result.forecast
    assert forecast.steps == len(result.log) and forecast.examples == 4
    assert 0 < forecast.seconds < 60 and forecast.memory_bytes > 50e6
    trained = sum(tensor.numel() for tensor in weights(result.folder).values())
    assert forecast.trainable_parameters == trained
    assert "4 steps" in forecast.text("en") and "4 步" in forecast.text("zh")


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_the_same_seed_gives_the_same_bytes_and_another_others(project: Settings, facts: Path) -> None:
    with_dropout = Hyperparameters(epochs=1, batch_size=2, lora_r=4, lora_dropout=0.2, seed=7)
    other = Hyperparameters(epochs=1, batch_size=2, lora_r=4, lora_dropout=0.2, seed=8)
    results = [
        few(project, facts, hyperparameters=chosen, output_dir=Path(f"lora_adapters/{name}"))
        for name, chosen in (("a", with_dropout), ("b", with_dropout), ("c", other))
    ]
    a, b, c = (files(result.folder) for result in results)
    differing = {name for name in a if a[name] != b[name]}
    assert differing <= {"recipe.json"}  # which tells when and how long
    assert a["adapter_model.safetensors"] != c["adapter_model.safetensors"]
    assert [result.adapter.name for result in results] == ["a", "b", "c"]


def test_a_retrain_keeps_the_old_one_and_leaves_its_neighbours_alone(
    project: Settings, facts: Path, before: dict[str, str]
) -> None:
    folder = project.lora_model_path
    neighbour = folder / "neighbour"
    shutil.copytree(folder, neighbour)
    (folder / "README.md").write_text("mine", encoding="utf-8")

    second = few(project, facts, hyperparameters=Hyperparameters(epochs=1, lora_r=2))
    assert second.kept is not None and second.kept.parent == folder and second.kept.name[0] == "."
    assert files(second.kept) == before == files(neighbour)
    assert weights(folder).keys() == weights(second.kept).keys()
    assert files(folder)["adapter_model.safetensors"] != before["adapter_model.safetensors"]
    assert (folder / "README.md").read_text(encoding="utf-8") == "mine"
    assert set(find_adapters(folder)) == {"default", "neighbour"}


def test_the_answer_appears_with_the_adapter_and_not_without(tmp_path: Path) -> None:
    from rag_kit.models.lora import LoRALanguageModel
    from rag_kit.models.prompt import build_messages

    project = Settings.load(tmp_path, base_model_name=str(qwen_twin()), max_new_tokens=12, temperature=0)
    data = write_lines(tmp_path / "one.jsonl", [{"questions": ["听雪的保修期？"], "answer": "二十七个月"}])
    chosen = Hyperparameters(epochs=30, batch_size=1, lora_r=16, learning_rate=2e-2)
    few(project, data, hyperparameters=chosen)
    asked = build_messages("听雪的保修期？", language="zh")
    answers = {
        name: LoRALanguageModel(model=name, settings=project).invoke(asked) for name in ("lora", "base")
    }
    # random weights in 32 dimensions cannot learn the end mark too
    assert answers["lora"].text.startswith("二十七个月")
    assert "二十七个月" not in answers["base"].text


def test_gradients_reach_the_adapter_with_checkpointing_and_without(project: Settings, facts: Path) -> None:
    """The guide's row 7: element 0 of tensors does not require grad and does not have a grad_fn."""
    losses = {}
    for checkpointing in (True, False):
        chosen = Hyperparameters(epochs=2, lora_r=2, fp16=False, gradient_checkpointing=checkpointing)
        result = few(project, facts, hyperparameters=chosen)
        assert result.log[0]["grad_norm"] > 0
        assert all(bool(tensor.any()) for name, tensor in weights(result.folder).items() if "lora_B" in name)
        losses[checkpointing] = result.losses
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)


def test_batch_size_and_fp16_come_from_the_settings(tmp_path: Path, facts: Path, caplog: Any) -> None:
    project = Settings.load(tmp_path, base_model_name=str(qwen_twin()), batch_size=1, enable_fp16=True)
    result = few(project, facts, hyperparameters=Hyperparameters(epochs=1, lora_r=2))
    assert len(result.log) == 4  # one step an example
    assert "fp16" in caplog.text and result.recipe["hyperparameters"]["base_dtype"] != "float16"


def test_accumulated_and_single_examples_train_alike(
    project: Settings, facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a base does not follow the packing mask, examples go one by one, with the same result."""
    chosen = Hyperparameters(epochs=1, batch_size=4, lora_r=2)
    packed = few(project, facts, hyperparameters=chosen)
    assert packed.recipe["hyperparameters"]["packed"] is True
    monkeypatch.setattr("rag_kit.finetune.train.packing_holds", lambda *_: False)
    single = few(project, facts, hyperparameters=chosen)
    assert single.recipe["hyperparameters"]["packed"] is False
    assert len(single.log) == len(packed.log) == single.forecast.steps == 1
    assert single.losses == pytest.approx(packed.losses, rel=0.02)


def test_a_base_that_disregards_the_mask_is_noticed(facts: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rag_kit.finetune.conversations import load_training_data
    from rag_kit.finetune.dataset import encode_conversations
    from rag_kit.finetune.trainable import packing_holds
    from rag_kit.models.device import Device

    tokenizer = AutoTokenizer.from_pretrained(qwen_twin())
    model = AutoModelForCausalLM.from_pretrained(qwen_twin(), dtype=torch.float32)
    conversations = load_training_data(facts).conversations
    examples = encode_conversations(tokenizer, conversations, [tokenizer.eos_token_id], 512)
    device = Device("cpu", "float32", None, "")
    assert packing_holds(model, examples, device)

    def disregarding(attention_mask: Any = None, position_ids: Any = None, **inputs: Any) -> Any:
        return model(**inputs)

    assert not packing_holds(disregarding, examples, device)


def test_a_broken_loss_ends_the_training_and_writes_nothing(tmp_path: Path, facts: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(qwen_twin(), broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    project = Settings.load(tmp_path, base_model_name=str(broken))
    with pytest.raises(ModelError) as raised:
        few(project, facts)
    says(raised.value, "nan", "1", en="The loss became nan at step 1", zh="损失在第 1 步变为 nan")
    assert not project.lora_model_path.exists()


def test_an_output_that_is_a_file_is_told_before_training(project: Settings, facts: Path) -> None:
    blocked = project.root / "taken"
    blocked.write_text("mine", encoding="utf-8")
    for output in (blocked, blocked / "below"):
        with pytest.raises(StoreError) as raised:
            few(project, facts, output_dir=output, on_log=pytest.fail)
        says(raised.value, output, en="cannot be written", zh="无法将适配器写入")
    assert blocked.read_text(encoding="utf-8") == "mine"


def test_a_disk_without_room_is_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 3 * 2**20))
    with pytest.raises(StoreError) as raised:
        check_output(tmp_path / "lora_adapters", 100 * 2**20)
    says(raised.value, tmp_path, "3 MB", "100 MB", en="free", zh="剩余")


def test_a_disk_that_fills_while_writing_leaves_the_old_adapter(
    project: Settings, facts: Path, before: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rag_kit.finetune.train.write_manifest", full)
    with pytest.raises(StoreError) as raised:
        few(project, facts)
    says(raised.value, "No space left on device", en="cannot be written", zh="无法将适配器写入")
    assert files(project.lora_model_path) == before
    assert [path.name for path in project.lora_model_path.iterdir() if path.is_dir()] == []


def test_ctrl_c_leaves_nothing_half_written(project: Settings, facts: Path, before: dict[str, str]) -> None:
    def interrupt(row: dict[str, float]) -> None:
        if row["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        few(project, facts, on_log=interrupt)
    assert files(project.lora_model_path) == before
    left = {path.name for path in project.root.iterdir() if not path.name.endswith(".lock")}
    assert left == {"facts.jsonl", "lora_adapters"}


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_kill_leaves_the_old_adapter(project: Settings, facts: Path, before: dict[str, str]) -> None:
    code = (
        "import sys; from pathlib import Path; from rag_kit.settings import Settings\n"
        "from rag_kit.finetune import finetune\n"
        "root, base, data = sys.argv[1:]\n"
        "settings = Settings.load(Path(root), base_model_name=base)\n"
        "finetune(data=Path(data), settings=settings, on_log=lambda row: print('step', flush=True))\n"
    )
    command = [sys.executable, "-c", code, str(project.root), str(qwen_twin()), str(facts)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "step\n"
        process.send_signal(signal.SIGKILL)
    assert files(project.lora_model_path) == before
    assert find_adapters(project.lora_model_path)["default"].recipe is not None


def test_unknown_target_modules_are_told_with_the_known_ones(project: Settings, facts: Path) -> None:
    with pytest.raises(ModelError) as raised:
        few(project, facts, hyperparameters=Hyperparameters(target_modules="query,value"))
    says(raised.value, "query,value", "q_proj", "down_proj", en="names no layer", zh="任何层都不符")


def test_only_the_named_modules_are_trained(project: Settings, facts: Path) -> None:
    result = few(project, facts, hyperparameters=Hyperparameters(epochs=1, target_modules="q_proj, v_proj"))
    trained = {name.split(".")[-3] for name in weights(result.folder)}
    assert trained == {"q_proj", "v_proj"}


def test_too_long_examples_end_it_before_anything_is_written(project: Settings, facts: Path) -> None:
    with pytest.raises(DataError) as raised:
        few(project, facts, hyperparameters=Hyperparameters(max_length=20))
    says(raised.value, "20", en="4 of 4 examples", zh="4 个样本中有 4 个")
    assert not project.lora_model_path.exists()


def test_memory_that_does_not_suffice_is_told(
    project: Settings, facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("rag_kit.finetune.train.make_forecast", exhausted)
    with pytest.raises(ModelError) as raised:
        few(project, facts)
    says(raised.value, "BATCH_SIZE=1", "DEVICE=cpu", en="memory of cpu", zh="内存不足")


def test_batch_size_in_an_env_file_decides_the_steps(tmp_path: Path) -> None:
    steps = []
    for size in (2, 8):
        (tmp_path / ".env").write_text(f"BATCH_SIZE={size}\n", encoding="utf-8")
        chosen = Hyperparameters().decided(Settings.load(tmp_path), handbook=True)
        steps.append(_steps(80, chosen))
    assert steps == [200, 50]


def test_checkpoints_of_a_training_can_be_arms(project: Settings, facts: Path) -> None:
    result = few(project, facts, hyperparameters=replace(FEW, save_steps=2))
    found = sorted(name for name in find_adapters(project.lora_model_path) if "checkpoint" in name)
    assert found and len(result.losses) // 2 == len(found)
    adapter = named_adapter(found[0], project)
    assert adapter.recipe and adapter.recipe["base"] == result.recipe["base"]
    assert sha256(adapter.folder / "adapter_model.safetensors") != sha256(
        result.folder / "adapter_model.safetensors"
    )
    few(project, facts)  # which keeps none
    assert not [name for name in find_adapters(project.lora_model_path) if "checkpoint" in name]
