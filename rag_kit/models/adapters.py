"""LoRA adapters on disk: where they are, which is the default, what they were trained on.

Knows folders, `adapter_config.json` and `recipe.json`; loads no weights.
"""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_kit.errors import AdapterNotFoundError, ModelError
from rag_kit.manifest import fingerprint, settle
from rag_kit.models.base import Base, differences, tensor_of

if TYPE_CHECKING:
    from rag_kit.settings import Settings

CONFIG, WEIGHTS, RECIPE = "adapter_config.json", "adapter_model.safetensors", "recipe.json"
FLAT = "default"  # the name of an adapter whose files lie directly in LORA_MODEL_PATH
CHECKPOINT = re.compile(r"checkpoint-(\d+)")  # what transformers' Trainer calls them

logger = logging.getLogger("rag_kit.models")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its name, folder, PEFT configuration, and recipe (None: made elsewhere).

    `key` is another one as soon as the files in the folder are.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    recipe: dict[str, Any] | None
    key: str

    def check_base(self, base: Base) -> None:
        """Raise ModelError where the recipe names another base; unknown values are not compared."""
        trained_on = (self.recipe or {}).get("base") or {}
        differing = differences(base.fingerprint(), trained_on.get("fingerprint") or {})
        if differing:
            raise ModelError(
                "adapter_other_base",
                adapter=self.name,
                trained_on=trained_on.get("name"),
                base=base.name,
                differing=", ".join(differing),
            )


def adapter_folders(path: Path) -> dict[str, Path]:
    """Return the folders of the adapters at `path` by name: the flat one (`default`) first.

    An adapter's checkpoints stand behind it, as `NAME/checkpoint-N`.
    """
    folders: dict[str, Path] = {}
    for name, folder in named_folders(path):
        folders.setdefault(name, folder)
    return folders


def named_folders(path: Path) -> Iterator[tuple[str, Path]]:
    """Yield every adapter's name and folder; a name that two have comes twice."""
    settle(path)
    flat = (path / CONFIG).is_file()
    if flat:
        yield FLAT, path
        yield from ((f"{FLAT}/{folder.name}", folder) for folder in checkpoints(path))
    for folder in sorted(path.iterdir()) if path.is_dir() else ():
        if folder.is_dir() and not folder.name.startswith(".") and not (flat and _is_checkpoint(folder)):
            settle(folder)
            if (folder / CONFIG).is_file():
                name = unicodedata.normalize("NFC", folder.name)  # macOS writes é as two characters
                yield name, folder
                yield from ((f"{name}/{one.name}", one) for one in checkpoints(folder))


def _is_checkpoint(folder: Path) -> bool:
    """Whether the folder has weights of a training's course: it has no recipe, its parent's is its own."""
    whole = (folder / CONFIG).is_file() and not (folder / RECIPE).exists()
    return bool(CHECKPOINT.fullmatch(folder.name)) and whole


def checkpoints(folder: Path) -> list[Path]:
    """Return the folders of the checkpoints that a training left in an adapter's folder, earliest first."""
    found = [one for one in folder.glob("checkpoint-*") if _is_checkpoint(one)]
    return sorted(found, key=lambda one: int(one.name.rpartition("-")[2]))


def find_adapters(path: Path) -> dict[str, Adapter]:
    """Return the adapters at `path` by name; one that cannot be read is logged and left out."""
    adapters = {}
    for name in adapter_folders(path):
        try:
            adapters[name] = _only(name, path)
        except ModelError as error:
            logger.warning("%s", error)
    return adapters


def read_adapter(folder: Path, name: str | None = None) -> Adapter:
    """Read one adapter's configuration and recipe.

    Raises AdapterNotFoundError where there is none, ModelError where it is damaged or no LoRA.
    """
    settle(folder)
    if not (folder / CONFIG).is_file():
        known = ", ".join(adapter_folders(folder)) or "-"
        raise AdapterNotFoundError("adapter_not_found", path=folder, known=known)
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise ModelError("adapter_pickled" if pickled else "adapter_no_weights", path=folder)
    stats = [(folder / file).stat() for file in (CONFIG, WEIGHTS)]
    key = fingerprint([str(folder), *((stat.st_mtime_ns, stat.st_size) for stat in stats)])[:16]
    config = _read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ModelError("adapter_not_lora", path=folder, type=config.get("peft_type"))
    recipe = _recipe(folder)
    for file, expected in ((recipe or {}).get("files") or {}).items():
        size = (folder / file).stat().st_size if (folder / file).is_file() else -1
        if size != expected.get("size"):
            told = {"expected": expected.get("size"), "found": size}
            raise ModelError("adapter_damaged", path=folder / file, **told)
    return Adapter(name or folder.resolve().name, folder, config, recipe, key)


def _recipe(folder: Path) -> dict[str, Any] | None:
    """Return the recipe of the adapter in `folder`; a checkpoint has its training's, but for the metrics."""
    checkpoint = not (folder / RECIPE).is_file() and CHECKPOINT.fullmatch(folder.name)
    path = (folder.parent if checkpoint else folder) / RECIPE
    if not path.is_file():
        return None
    recipe = _read_json(path)
    base, files = recipe.get("base") or {}, recipe.get("files") or {}
    parts = [base, files, recipe.get("data") or {}, recipe.get("metrics") or {}]
    if all(isinstance(part, dict) for part in parts):
        parts += [base.get("fingerprint") or {}, *files.values()]
        parts += [name for name in files if Path(name).name != name]
    for part in parts:
        if not isinstance(part, dict):  # later readers take it for granted
            raise ModelError("adapter_unreadable", path=path, reason=repr(part))
    if checkpoint:
        return recipe | {"files": {}, "metrics": {"steps": int(checkpoint[1])}}
    return recipe


def default_adapter(settings: Settings) -> Adapter:
    """Return the default adapter: the flat one, else LORA_DEFAULT, else the only one.

    Raises AdapterNotFoundError where there is none, ModelError (listing them) where none is chosen.
    """
    path = settings.lora_model_path
    folders = {name: folder for name, folder in adapter_folders(path).items() if "/" not in name}
    if folders.get(FLAT) == path:
        return named_adapter(FLAT, settings)
    if settings.lora_default:
        return named_adapter(settings.lora_default, settings)
    if not folders:
        raise AdapterNotFoundError("adapter_not_found", path=path, known="-")
    if len(folders) > 1:
        raise ModelError("adapter_undecided", path=path, known=", ".join(folders))
    return named_adapter(next(iter(folders)), settings)


def named_adapter(name: str, settings: Settings) -> Adapter:
    """Return the adapter called `name`, or `NAME/checkpoint-N`.

    Raises AdapterNotFoundError, listing the known ones, and ModelError where two have that name.
    """
    return _only(unicodedata.normalize("NFC", name), settings.lora_model_path)


def _only(name: str, path: Path) -> Adapter:
    found = [folder for known, folder in named_folders(path) if known == name]
    if not found:
        known = ", ".join(adapter_folders(path)) or "-"
        raise AdapterNotFoundError("adapter_unknown", adapter=name, known=known)
    if len(found) > 1:
        raise ModelError("adapter_twice", adapter=name, folders=", ".join(map(str, found)))
    return read_adapter(found[0], name)


def adapter_of(reference: str, settings: Settings) -> Adapter:
    """Return the adapter that `lora` or `lora:NAME` names; raises as `default_adapter`, `named_adapter`."""
    name = reference.partition(":")[2]
    return named_adapter(name, settings) if name else default_adapter(settings)


def check_fit(adapter: Adapter, base: Base) -> None:
    """Raise ModelError naming the first tensor that does not fit the base, as `misfits` finds them."""
    for reason in misfits(adapter, base):
        raise ModelError("adapter_misfit", adapter=adapter.folder, base=base.name, reason=reason)


def misfits(adapter: Adapter, base: Base) -> list[str]:
    """Compare the adapter's tensors with those that PEFT would make for this base; loads no weights.

    Returns each tensor that is missing, too many or of another shape: its name, its shape, the expected one.
    Raises ModelError for weights that cannot be read or placed, and for an adapter that would overwrite
    weights of the base itself, which every other adapter shares.
    """
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    told = {"adapter": adapter.folder, "base": base.name}
    if adapter.config.get("bias", "none") != "none":
        raise ModelError("adapter_misfit", **told, reason=f"bias={adapter.config['bias']}")
    try:
        found = shapes(adapter.folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ModelError("adapter_weights", path=adapter.folder / WEIGHTS, reason=error) from error
    try:
        config = LoraConfig.from_pretrained(str(adapter.folder))
        with torch.device("meta"):
            base_config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(base_config)
            made = get_peft_model_state_dict(PeftModel(model, config), save_embedding_layers=False)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise ModelError("adapter_misfit", **told, reason=first_line(error)) from error
    expected = {key: tuple(tensor.shape) for key, tensor in made.items()}
    return [
        f"{key} {found.get(key, '-')} ≠ {expected.get(key, '-')}"
        for key in sorted(found.keys() | expected.keys())
        if found.get(key) != expected.get(key)
        and not (key.endswith(BASE_COPY) and _copies_base(key, adapter, base))
    ]


# PEFT writes a copy of the base's embedding beside a LoRA on it; loading it would replace the base's own.
BASE_COPY = ".base_layer.weight"


def _copies_base(key: str, adapter: Adapter, base: Base) -> bool:
    """Whether the tensor `key` of the adapter is the base's own (a tied head is its embedding)."""
    import torch

    layer = key.removeprefix("base_model.model.").removesuffix(BASE_COPY)
    for name in (f"{layer}.weight", "model.embed_tokens.weight"):
        theirs = tensor_of(base.folder.glob("*.safetensors"), name)
        if theirs is not None:
            ours = tensor_of([adapter.folder / WEIGHTS], key)
            same = ours is not None and ours.shape == theirs.shape
            return same and torch.allclose(ours.float(), theirs.float(), rtol=0.01, atol=1e-3)
    return False


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a safetensors file; reads its head alone."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118


def first_line(error: BaseException) -> str:
    """Return the last line that an error says: libraries put the reason there, below a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError("adapter_unreadable", path=path, reason=error) from None
    if not isinstance(value, dict):
        raise ModelError("adapter_unreadable", path=path, reason=type(value).__name__)
    return value
