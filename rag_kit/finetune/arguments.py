"""The command line of fine-tuning: the guide's flags as written, and the usual ones of LoRA.

Every flag exists with underscores and with dashes. Knows argparse alone.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from rag_kit.errors import message
from rag_kit.finetune.hyperparameters import Hyperparameters

# flag: the field of Hyperparameters that it fills, and its type
VALUES: dict[str, tuple[str, type]] = {
    "num_train_epochs": ("epochs", float),
    "learning_rate": ("learning_rate", float),
    "per_device_train_batch_size": ("batch_size", int),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", int),
    "lora_r": ("lora_r", int),
    "lora_alpha": ("lora_alpha", float),
    "lora_dropout": ("lora_dropout", float),
    "target_modules": ("target_modules", str),
    "warmup_ratio": ("warmup_ratio", float),
    "lr_scheduler_type": ("lr_scheduler_type", str),
    "weight_decay": ("weight_decay", float),
    "max_length": ("max_length", int),
    "seed": ("seed", int),
}
SWITCHES = ("fp16", "gradient_checkpointing")
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `rag-kit finetune` to `parser`."""
    defaults = {each.name: each.default for each in fields(Hyperparameters)}
    _add(parser, "model_name", help=message("finetune_help_model_name"))
    _add(parser, "cache_dir", type=Path, help=message("finetune_help_cache_dir"))
    _add(parser, "output_dir", type=Path, help=message("finetune_help_output_dir"))
    _add(parser, "data", type=Path, help=message("finetune_help_data"))
    _add(parser, "split", default="train", help=message("finetune_help_split"))
    for flag, (name, kind) in VALUES.items():
        choices = SCHEDULERS if flag == "lr_scheduler_type" else None
        shown = "" if defaults[name] is None else f" ({defaults[name]})"
        _add(parser, flag, type=kind, choices=choices, help=message(f"finetune_help_{name}") + shown)
    for flag in SWITCHES:
        told = message(f"finetune_help_{flag}")
        _add(parser, flag, type=truth, nargs="?", const=True, metavar="True|False", help=told)


def from_arguments(namespace: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (overrides for `Settings.load`, arguments of `finetune`) of a parsed command line.

    Raises SettingsError for a value out of range.
    """
    given = {name: getattr(namespace, flag) for flag, (name, _) in VALUES.items()}
    given |= {flag: getattr(namespace, flag) for flag in SWITCHES}
    chosen = Hyperparameters(**{name: value for name, value in given.items() if value is not None})
    overrides = {"cache_dir": namespace.cache_dir, "base_model_name": namespace.model_name}
    arguments = {
        "data": namespace.data,
        "output_dir": namespace.output_dir,
        "split": namespace.split,
        "hyperparameters": chosen,
    }
    return overrides, arguments


def truth(word: str) -> bool:
    """Return the truth value of `True`, `false`, `1`, `no` …; raises argparse's error for other words."""
    if word.strip().lower() in (*_TRUE, *_FALSE):
        return word.strip().lower() in _TRUE
    raise argparse.ArgumentTypeError(f"{word!r}: {' | '.join((*_TRUE, *_FALSE))}")


def _add(parser: argparse.ArgumentParser, flag: str, **options: Any) -> None:
    names = dict.fromkeys((f"--{flag}", f"--{flag.replace('_', '-')}"))
    parser.add_argument(*names, dest=flag, **options)
