"""The commands `rag-kit adapters …`: what they print, and with which status they end."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from rag_kit.errors import message
from rag_kit.faces.commands import _table
from rag_kit.settings import start


def adapters_list(_arguments: Namespace) -> int:
    """Print the adapters with what they were trained on, what they scored and what the doctor said."""
    from rag_kit.models.registry import entries

    settings = start()
    found = entries(settings)
    if not found:
        print(message("cli_no_adapters", folder=settings.lora_model_path))
        return 0
    rows = []
    for name, entry in found.items():
        base, data, unknown = entry["base"], entry["data"], message("cli_unknown")
        rows.append(
            (
                name,
                base["name"] or unknown,
                " ".join(filter(None, [data["name"], (data["sha256"] or "")[:8]])) or unknown,
                entry["rank"],
                _scores(entry),
                _checked(entry.get("checked")),
                entry["created"] or unknown,
            )
        )
    _table(rows, "adapter", "base", "data", "rank", "scores", "checked", "created")
    return 0


def _scores(entry: dict[str, Any]) -> str:
    """The training's loss, and what comparisons measured."""
    loss = (entry["metrics"] or {}).get("train_loss")
    parts = [] if loss is None else [f"loss {loss:.3f}"]
    parts += [
        f"{context}: F1 {one['f1']:.3f} (n={one['n']})" for context, one in entry.get("scores", {}).items()
    ]
    return "\n".join(parts) or "-"


def _checked(checked: dict[str, Any] | None) -> str:
    if checked is None:
        return message("cli_never")
    failed = [one for one in checked["findings"] if one["level"] != "ok"]
    told = ", ".join(f"{_level(one['level'])} {one['check']}" for one in failed) or _level("ok")
    return f"{checked['at'][:16]} {checked['engine']}\n{told}"


def _level(level: str) -> str:
    return message(f"health_level_{level}")


def adapters_check(arguments: Namespace) -> int:
    """Print every finding and what to do about it; 1 where an adapter is not fit to be compared or served."""
    from tabulate import tabulate

    from rag_kit.errors import ModelError
    from rag_kit.models.adapters import adapter_folders
    from rag_kit.models.doctor import Finding, checked
    from rag_kit.models.lora import LoRALanguageModel

    settings, fit = start(), True
    names = arguments.names or list(adapter_folders(settings.lora_model_path))
    if not names:
        print(message("cli_no_adapters", folder=settings.lora_model_path))
    model = LoRALanguageModel(settings=settings)  # the base is loaded once
    for name in names:
        try:
            findings = checked(f"lora:{name}", settings, anew=True, model=model)
        except ModelError as error:  # nothing of it can be read; the others may be well
            findings = [Finding("files", "error", *error.text())]
        fit = fit and all(one.level != "error" for one in findings)
        rows = [
            (_level(one.level), one.check, one.text + (f"\n→ {one.hint}" if one.hint else ""))
            for one in findings
        ]
        print(f"lora:{name}\n{tabulate(rows, tablefmt='plain', disable_numparse=True)}\n")
    return 0 if fit else 1


def adapters_add(arguments: Namespace) -> int:
    """Take in an adapter made elsewhere."""
    from rag_kit.models.base import resolve_base
    from rag_kit.models.registry import add_adapter

    settings = start()
    base = resolve_base(arguments.base or settings.base_model_name, settings)
    adapter = add_adapter(arguments.folder, base, settings, arguments.name)
    print(message("cli_adapter_added", name=adapter.name, folder=adapter.folder))
    return 0


def adapters_remove(arguments: Namespace) -> int:
    """Delete an adapter."""
    from rag_kit.models.registry import remove_adapter

    print(message("cli_adapter_removed", name=arguments.name, folder=remove_adapter(arguments.name, start())))
    return 0
