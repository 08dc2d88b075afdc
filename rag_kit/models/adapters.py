"""LoRA adapters on disk: where they are, which is the default, what they were trained on.

Knows folders, `adapter_config.json` and `recipe.json`; loads no weights.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_kit.errors import AdapterNotFoundError, ModelError
from rag_kit.manifest import replacing, settle, write_manifest
from rag_kit.models.base import Base, differences

if TYPE_CHECKING:
    from rag_kit.settings import Settings

CONFIG, WEIGHTS, RECIPE = "adapter_config.json", "adapter_model.safetensors", "recipe.json"
FLAT = "default"  # the name of an adapter whose files lie directly in LORA_MODEL_PATH
TOKENIZER = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
TAKEN_ALONG = (CONFIG, WEIGHTS, "chat_template.jinja", *TOKENIZER)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its name, folder, PEFT configuration, and recipe (None: made elsewhere)."""

    name: str
    folder: Path
    config: dict[str, Any]
    recipe: dict[str, Any] | None

    def check_base(self, base: Base) -> None:
        """Raise ModelError where the recipe names another base; unknown values are not compared."""
        trained_on = (self.recipe or {}).get("base") or {}
        theirs = trained_on.get("fingerprint") or {}
        differing = differences(base.fingerprint(), theirs)
        if differing:
            raise ModelError(
                "adapter_other_base",
                adapter=self.name,
                trained_on=trained_on.get("name"),
                base=base.name,
                differing=", ".join(differing),
            )


def find_adapters(path: Path) -> dict[str, Adapter]:
    """Return the adapters at `path` by name: the flat one (`default`) first, then its folders."""
    settle(path)
    folders = {FLAT: path} if (path / CONFIG).is_file() else {}
    if path.is_dir():
        for folder in sorted(path.iterdir()):
            if folder.is_dir() and not folder.name.startswith("."):
                settle(folder)
                if (folder / CONFIG).is_file():
                    folders.setdefault(folder.name, folder)
    return {name: read_adapter(folder, name) for name, folder in folders.items()}


def read_adapter(folder: Path, name: str | None = None) -> Adapter:
    """Read one adapter's configuration and recipe.

    Raises AdapterNotFoundError where there is none, ModelError where it is damaged or no LoRA.
    """
    settle(folder)
    if not (folder / CONFIG).is_file():
        raise AdapterNotFoundError("adapter_not_found", path=folder, known=_known(folder))
    config = _read_json(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise ModelError("adapter_pickled" if pickled else "adapter_no_weights", path=folder)
    if config.get("peft_type") != "LORA":
        raise ModelError("adapter_not_lora", path=folder, type=config.get("peft_type"))
    recipe = _read_json(folder / RECIPE) if (folder / RECIPE).is_file() else None
    if recipe:
        for file, expected in recipe.get("files", {}).items():
            size = (folder / file).stat().st_size if (folder / file).is_file() else -1
            if size != expected["size"]:
                raise ModelError("adapter_damaged", path=folder / file, expected=expected["size"], found=size)
    return Adapter(name or folder.name, folder, config, recipe)


def default_adapter(settings: Settings) -> Adapter:
    """Return the default adapter: the flat one, else LORA_DEFAULT, else the only one.

    Raises AdapterNotFoundError where there is none, ModelError (listing them) where none is chosen.
    """
    adapters = find_adapters(settings.lora_model_path)
    if not adapters:
        raise AdapterNotFoundError("adapter_not_found", path=settings.lora_model_path, known="-")
    if FLAT in adapters and adapters[FLAT].folder == settings.lora_model_path:
        return adapters[FLAT]
    if settings.lora_default:
        return named_adapter(settings.lora_default, settings)
    if len(adapters) == 1:
        return next(iter(adapters.values()))
    raise ModelError("adapter_undecided", path=settings.lora_model_path, known=", ".join(adapters))


def named_adapter(name: str, settings: Settings) -> Adapter:
    """Return the adapter called `name`; raises AdapterNotFoundError, listing the known ones."""
    adapters = find_adapters(settings.lora_model_path)
    if name not in adapters:
        known = ", ".join(adapters) or "-"
        raise AdapterNotFoundError("adapter_unknown", adapter=name, known=known)
    return adapters[name]


def add_adapter(source: Path, base: Base, settings: Settings, name: str | None = None) -> Adapter:
    """Copy an adapter made elsewhere into LORA_MODEL_PATH, with a recipe that says what is known.

    Only PEFT's and the tokenizer's own files are taken; `training_args.bin` (a pickle) is never opened.
    Raises ModelError where the adapter does not fit `base` or the name is not a plain one.
    """
    adapter = read_adapter(source)
    name = name or source.resolve().name
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise ModelError("adapter_name", name=name)
    target = settings.lora_model_path / name
    if target.exists():
        raise ModelError("adapter_exists", name=name, path=target)
    adapter.check_base(base)
    check_shapes(adapter, base)
    known = adapter.recipe or {
        "base": {"name": base.name, "fingerprint": base.fingerprint(), "declared_by": "user"},
        "base_model_name_or_path": adapter.config.get("base_model_name_or_path"),
        "data": None,
        "chat_template_hash": None,
        "tokenizer_hash": None,
        "hyperparameters": {
            key: adapter.config.get(key) for key in ("r", "lora_alpha", "lora_dropout", "target_modules")
        },
        "metrics": None,
        "made_by": "elsewhere",
    }
    with replacing(target) as building:
        for pattern in TAKEN_ALONG:
            for file in source.glob(pattern):
                shutil.copyfile(file, building / file.name)
        write_manifest(building, {key: value for key, value in known.items() if key != "files"}, name=RECIPE)
    return read_adapter(target)


def check_shapes(adapter: Adapter, base: Base) -> None:
    """Compare the adapter's tensors with the base's layers, without loading either's weights.

    Raises ModelError naming the first tensor that has no layer or another width.
    """
    from safetensors import safe_open

    layers: dict[str, list[int]] = {}
    for file in sorted(base.folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            layers |= {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    with safe_open(adapter.folder / WEIGHTS, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            layer, _, part = key.removeprefix("base_model.model.").partition(".lora_")
            if part[:1] not in ("A", "B") or "embedding" in part:
                continue
            shape = layers.get(f"{layer}.weight")
            width = tensors.get_slice(key).get_shape()[1 if part[0] == "A" else 0]
            if shape is None or shape[1 if part[0] == "A" else 0] != width:
                raise ModelError("adapter_misfit", adapter=adapter.folder, base=base.name, reason=key)


def _known(path: Path) -> str:
    siblings = (
        find_adapters(path.parent) if path.parent.is_dir() and path.parent.name == "lora_adapters" else {}
    )
    return ", ".join(siblings) or "-"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError("adapter_unreadable", path=path, reason=error) from None
    if not isinstance(value, dict):
        raise ModelError("adapter_unreadable", path=path, reason=type(value).__name__)
    return value
