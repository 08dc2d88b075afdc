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

# Where the guide calls a field of Hyperparameters otherwise; every other flag has its field's name.
FLAGS = {"epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size"}
KINDS = {"float": float, "int": int, "str": str}
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `rag-kit finetune` to `parser`."""
    _add(parser, "model_name", help=message("finetune_help_model_name"))
    _add(parser, "cache_dir", type=Path, help=message("finetune_help_cache_dir"))
    _add(parser, "output_dir", type=Path, help=message("finetune_help_output_dir"))
    _add(parser, "data", type=Path, help=message("finetune_help_data"))
    _add(parser, "split", default="train", help=message("finetune_help_split"))
    for each in fields(Hyperparameters):
        told, kind = message(f"finetune_help_{each.name}"), str(each.type).removesuffix(" | None")
        if kind == "bool":
            how: dict[str, Any] = {"type": truth, "nargs": "?", "const": True, "metavar": "True|False"}
        else:
            told += "" if each.default is None else f" ({each.default})"
            how = {"type": KINDS[kind], "choices": SCHEDULERS if each.name == "lr_scheduler_type" else None}
        _add(parser, FLAGS.get(each.name, each.name), help=told, **how)


def from_arguments(namespace: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (overrides for `Settings.load`, arguments of `finetune`) of a parsed command line.

    Raises SettingsError for a value out of range.
    """
    names = [each.name for each in fields(Hyperparameters)]
    given = {name: getattr(namespace, FLAGS.get(name, name)) for name in names}
    chosen = Hyperparameters(**{name: value for name, value in given.items() if value is not None})
    overrides = {"cache_dir": namespace.cache_dir, "base_model_name": namespace.model_name}
    arguments = {name: getattr(namespace, name) for name in ("data", "output_dir", "split")}
    return overrides, {**arguments, "hyperparameters": chosen}


def truth(word: str) -> bool:
    """Return the truth value of `True`, `false`, `1`, `no` …; raises argparse's error for other words."""
    if word.strip().lower() in (*_TRUE, *_FALSE):
        return word.strip().lower() in _TRUE
    raise argparse.ArgumentTypeError(f"{word!r}: {' | '.join((*_TRUE, *_FALSE))}")


def _add(parser: argparse.ArgumentParser, flag: str, **options: Any) -> None:
    names = dict.fromkeys((f"--{flag}", f"--{flag.replace('_', '-')}"))
    parser.add_argument(*names, dest=flag, **options)
