"""The guide's flags as written, with dashes too; values out of range are told."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from rag_kit.errors import SettingsError
from rag_kit.finetune import Hyperparameters
from rag_kit.finetune.arguments import add_arguments, from_arguments
from tests.models.texts import says


def parsed(*words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return from_arguments(parser.parse_args(words))


def test_nothing_given_leaves_everything_to_the_settings() -> None:
    overrides, arguments = parsed()
    assert set(overrides.values()) == {None}
    assert arguments == {
        "data": None, "output_dir": None, "split": "train", "hyperparameters": Hyperparameters()
    }  # fmt: skip


@pytest.mark.parametrize("dashes", [False, True])
def test_the_guide_s_commands(dashes: bool) -> None:
    words = [
        "--model_name", "Qwen/Qwen2.5-1.5B-Instruct", "--cache_dir", "models",
        "--output_dir", "./lora_adapters", "--num_train_epochs", "3",
        "--fp16", "False", "--gradient_checkpointing", "False",
    ]  # fmt: skip
    if dashes:
        words = [word.replace("_", "-") if word.startswith("--") else word for word in words]
    overrides, arguments = parsed(*words)
    assert overrides == {"cache_dir": Path("models"), "base_model_name": "Qwen/Qwen2.5-1.5B-Instruct"}
    assert arguments["output_dir"] == Path("lora_adapters")
    assert arguments["hyperparameters"] == Hyperparameters(epochs=3, fp16=False, gradient_checkpointing=False)


def test_every_other_flag() -> None:
    given = {
        "learning-rate": "2e-4", "per-device-train-batch-size": "3", "gradient-accumulation-steps": "2",
        "lora-r": "8", "lora-alpha": "12", "lora-dropout": "0.1", "target-modules": "q_proj,v_proj",
        "warmup-ratio": "0.1", "lr-scheduler-type": "linear", "weight-decay": "0.01",
        "max-length": "256", "seed": "5",
    }  # fmt: skip
    words = [word for flag, value in given.items() for word in (f"--{flag}", value)]
    chosen = parsed(*words, "--data", "我的数据.jsonl", "--split", "all")[1]
    assert chosen["data"] == Path("我的数据.jsonl") and chosen["split"] == "all"
    assert chosen["hyperparameters"] == Hyperparameters(
        learning_rate=2e-4, batch_size=3, gradient_accumulation_steps=2, lora_r=8, lora_alpha=12,
        lora_dropout=0.1, target_modules="q_proj,v_proj", warmup_ratio=0.1, lr_scheduler_type="linear",
        weight_decay=0.01, max_length=256, seed=5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("True", True),
        ("true", True),
        ("1", True),
        ("", True),
        ("False", False),
        ("false", False),
        ("0", False),
    ],
)
@pytest.mark.parametrize("flag", ["fp16", "gradient_checkpointing"])
def test_truth_values(flag: str, words: str, value: bool) -> None:
    assert getattr(parsed(f"--{flag}", *words.split())[1]["hyperparameters"], flag) is value


def test_another_word_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--fp16", "maybe")
    assert "maybe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("num_train_epochs", "0"), ("learning_rate", "-1"), ("lora_r", "0"), ("lora_dropout", "1"),
        ("warmup_ratio", "1.5"), ("per_device_train_batch_size", "0"), ("learning_rate", "nan"),
        ("max_length", "-3"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_told(flag: str, value: str) -> None:
    with pytest.raises(SettingsError) as raised:
        parsed(f"--{flag}", value)
    says(raised.value, en="is not allowed", zh="不合法")


def test_every_flag_is_explained() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert all(action.help for action in parser._actions)
    parser.format_help()  # a stray percent sign would break it
