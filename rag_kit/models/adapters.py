"""LoRA adapters on disk: where they are, which is the default, what they were trained on.

Knows folders, `adapter_config.json` and `recipe.json`; loads no weights.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_kit.errors import AdapterNotFoundError, ModelError
from rag_kit.manifest import fingerprint, replacing, settle, write_manifest
from rag_kit.models.base import Base, differences, tensor_of

if TYPE_CHECKING:
    from rag_kit.settings import Settings

CONFIG, WEIGHTS, RECIPE = "adapter_config.json", "adapter_model.safetensors", "recipe.json"
FLAT = "default"  # the name of an adapter whose files lie directly in LORA_MODEL_PATH
TOKENIZER = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
TAKEN_ALONG = (CONFIG, WEIGHTS, "chat_template.jinja", *TOKENIZER)

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
    """Return the folders of the adapters at `path` by name: the flat one (`default`) first."""
    settle(path)
    folders = {FLAT: path} if (path / CONFIG).is_file() else {}
    if path.is_dir():
        for folder in sorted(path.iterdir()):
            if folder.is_dir() and not folder.name.startswith("."):
                settle(folder)
                if (folder / CONFIG).is_file():
                    folders.setdefault(folder.name, folder)
    return folders


def find_adapters(path: Path) -> dict[str, Adapter]:
    """Return the adapters at `path` by name; one that cannot be read is logged and left out."""
    adapters = {}
    for name, folder in adapter_folders(path).items():
        try:
            adapters[name] = read_adapter(folder, name)
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
    recipe = _read_json(folder / RECIPE) if (folder / RECIPE).is_file() else None
    for file, expected in (recipe or {}).get("files", {}).items():
        size = (folder / file).stat().st_size if (folder / file).is_file() else -1
        if size != expected["size"]:
            raise ModelError("adapter_damaged", path=folder / file, expected=expected["size"], found=size)
    return Adapter(name or folder.resolve().name, folder, config, recipe, key)


def default_adapter(settings: Settings) -> Adapter:
    """Return the default adapter: the flat one, else LORA_DEFAULT, else the only one.

    Raises AdapterNotFoundError where there is none, ModelError (listing them) where none is chosen.
    """
    path = settings.lora_model_path
    folders = adapter_folders(path)
    if folders.get(FLAT) == path:
        return read_adapter(path, FLAT)
    if settings.lora_default:
        return named_adapter(settings.lora_default, settings)
    if not folders:
        raise AdapterNotFoundError("adapter_not_found", path=path, known="-")
    if len(folders) > 1:
        raise ModelError("adapter_undecided", path=path, known=", ".join(folders))
    ((name, folder),) = folders.items()
    return read_adapter(folder, name)


def named_adapter(name: str, settings: Settings) -> Adapter:
    """Return the adapter called `name`; raises AdapterNotFoundError, listing the known ones."""
    folders = adapter_folders(settings.lora_model_path)
    if name not in folders:
        raise AdapterNotFoundError("adapter_unknown", adapter=name, known=", ".join(folders) or "-")
    return read_adapter(folders[name], name)


def add_adapter(source: Path, base: Base, settings: Settings, name: str | None = None) -> Adapter:
    """Copy an adapter made elsewhere into LORA_MODEL_PATH, with a recipe that says what is known.

    Only PEFT's and the tokenizer's own files are taken; `training_args.bin` (a pickle) is never opened.
    Raises ModelError where the adapter does not fit `base` or the name is not a plain one.
    """
    adapter = read_adapter(source)
    name = name or adapter.name
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise ModelError("adapter_name", name=name)
    target = settings.lora_model_path / name
    if target.exists():
        raise ModelError("adapter_exists", name=name, path=target)
    adapter.check_base(base)
    check_fit(adapter, base)
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


def check_fit(adapter: Adapter, base: Base) -> None:
    """Compare the adapter's tensors with those that PEFT would make for this base; loads no weights.

    Raises ModelError naming the first tensor that is missing, too many or of another shape, and for an
    adapter that would overwrite weights of the base itself, which every other adapter shares.
    """
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    told = {"adapter": adapter.folder, "base": base.name}
    if adapter.config.get("bias", "none") != "none":
        raise ModelError("adapter_misfit", **told, reason=f"bias={adapter.config['bias']}")
    try:
        found = _shapes(adapter.folder / WEIGHTS)
    except SafetensorError as error:
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
    for key in sorted(found.keys() | expected.keys()):
        own = key.endswith(BASE_COPY) and _copies_base(key, adapter, base)
        if found.get(key) != expected.get(key) and not own:
            reason = f"{key} {found.get(key, '-')} ≠ {expected.get(key, '-')}"
            raise ModelError("adapter_misfit", **told, reason=reason)


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


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
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
