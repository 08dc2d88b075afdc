"""What health looks at, room by room: what each one needs to work, and what to do where it is missing.

Starts nothing, fetches nothing, loads no weights and computes no hash, so that all of it takes a second.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rag_kit import embedded
from rag_kit.errors import ModelError, RagKitError, StoreError, catalogue, language, message
from rag_kit.manifest import MANIFEST, read_manifest
from rag_kit.models.base import EMBEDDED, Base, differences, resolve_base
from rag_kit.models.device import may_have_cuda

if TYPE_CHECKING:
    from rag_kit.models.adapters import Adapter
    from rag_kit.ollama import OllamaModel
    from rag_kit.settings import Settings

Level = Literal["ok", "info", "warning", "error"]
LITTLE_DISK, NO_DISK = 2e9, 0.2e9  # bytes: the embedded models take 0.6e9, an adapter or an index 0.1e9


@dataclass(frozen=True)
class Check:
    """One finding: `ok`, `info`, `warning` (missing, the rest works) or `error` (there and not usable)."""

    level: Level
    name: str
    finding: str
    remedy: str = ""


@dataclass
class Seen:
    """What the checks have found so far; later ones build on it."""

    settings: Any
    checks: list[Check] = field(default_factory=list)
    usable: set[str] = field(default_factory=set)  # of the guide's components
    base: Base | None = None
    embedder: str = ""  # as an index names it
    models: list[OllamaModel] = field(default_factory=list)

    def tell(self, level: Level, about: str, found: str | RagKitError, **values: object) -> None:
        """Add a finding: an error, or a key of the catalogue, where a pair is finding and remedy."""
        if isinstance(found, RagKitError):
            texts = list(found.text())
        else:
            entry = catalogue()[found][language()]
            texts = [text.format(**values) for text in ([entry] if isinstance(entry, str) else entry)]
        self.checks.append(Check(level, about, *texts))


def _settings(seen: Seen) -> None:
    from rag_kit.settings import get_settings

    seen.checks.append(Check("ok", "python", f"{sys.version.split()[0]} ({sys.executable})"))
    seen.settings = given = seen.settings or get_settings()
    seen.tell("ok", "settings", "health_settings", root=given.root, profile=given.rag_kit_profile)
    seen.checks += [Check("warning", "settings", warning) for warning in given.warnings]


def _disk(seen: Seen) -> None:
    given, free = seen.settings, {}
    folders = {"CACHE_DIR": embedded.cache_root(given.cache_dir), "LORA_MODEL_PATH": given.lora_model_path}
    folders |= {"VECTOR_STORE_PATH": given.vector_store_path, "runs": given.root / "runs"}
    for name, path in folders.items():
        there = next(place for place in (path, *path.parents) if place.exists())
        if there.is_dir() and os.access(there, os.W_OK):
            free[there] = shutil.disk_usage(there).free
        else:
            seen.tell("error", "disk", "health_read_only", name=name, path=path)
    for path in sorted(free, key=lambda path: free[path])[:1]:
        level: Level = "error" if free[path] < NO_DISK else "warning" if free[path] < LITTLE_DISK else "ok"
        key = "health_disk" if level == "ok" else "health_little_disk"
        seen.tell(level, "disk", key, free=free[path] / 1e9, path=path)


def _device(seen: Seen) -> None:
    asked = seen.settings.device
    if asked == "cuda" or (asked == "auto" and may_have_cuda()):
        from rag_kit.models.device import choose_device

        device = choose_device(seen.settings)
        name, reason = device.name, device.reason
    else:
        name = "cpu"
        reason = message("device_no_cuda") if asked == "auto" else message("device_asked", device=asked)
    seen.tell("ok", "device", "health_device", device=name, reason=reason)


def _base(seen: Seen) -> None:
    name, settings = seen.settings.base_model_name, seen.settings
    path, folder = settings.path(name), None
    if path.is_dir() or not (path.is_file() or name == EMBEDDED or _is_hub_id(name)):
        folder = resolve_base(name, settings).folder  # raises where there is nothing usable
    elif not path.is_file():  # a `.gguf` is converted at first use
        folder = _at_hand(name, embedded.BASE, settings)
    if folder is None:
        return seen.tell("warning", "base", "health_later", name=name)
    seen.base = Base(name, folder)
    seen.usable.add("rag_handler")
    spoken = ", ".join(message(f"language_{code}") for code in seen.base.languages()) or "-"
    return seen.tell("ok", "base", "health_base", name=name, path=folder, spoken=spoken)


def _is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(?<!\.gguf)", name))


def _at_hand(name: str, wheel: embedded.WheelFile, settings: Settings) -> Path | None:
    """Return the folder of `embedded` or of a hub id where it needs no fetching; raises if it is damaged."""
    if name == EMBEDDED:
        folder = embedded.cache_root(settings.cache_dir) / "models" / wheel.model.rpartition("/")[2]
        return folder if (folder / MANIFEST).is_file() and read_manifest(folder) else None
    from huggingface_hub import try_to_load_from_cache

    plain = (settings.cache_dir or settings.root) / f"models--{name.replace('/', '--')}" / "config.json"
    found = str(plain) if plain.is_file() else try_to_load_from_cache(name, plain.name, settings.cache_dir)
    return Path(found).parent if isinstance(found, str) else None


def _memory(seen: Seen) -> None:
    import psutil

    free = psutil.virtual_memory().available
    weights = seen.base.folder.glob("*.safetensors") if seen.base else ()
    needed = sum(file.stat().st_size for file in weights)
    needed *= 1 if seen.settings.enable_fp16 else 2  # two bytes a weight on the disk, four in memory
    key = "health_little_memory" if free < needed else "health_memory"
    seen.tell("warning" if free < needed else "ok", "memory", key, free=free / 1e9, needed=needed / 1e9)


def _adapters(seen: Seen) -> None:
    from rag_kit.models.adapters import adapter_folders, default_adapter, read_adapter
    from rag_kit.models.registry import entries

    settings, default, problem = seen.settings, "", None
    folders = adapter_folders(settings.lora_model_path)
    known = entries(settings)
    try:
        default = default_adapter(settings).name
    except RagKitError as error:
        problem = error.text()
        if not folders or error.key in ("adapter_undecided", "adapter_unknown", "adapter_twice"):
            seen.tell("warning" if settings.use_lora_default else "info", "adapters", error)
    for name, folder in folders.items():
        try:
            adapter = read_adapter(folder, name)
            _check_base(adapter, seen.base)
        except RagKitError as error:
            meant = name == default or error.text() == problem
            seen.tell("error" if meant else "warning", f"lora:{name}", error)
            continue
        seen.usable |= {"lora_model"} if name == default else set()
        told = {"role": _role(name == default), "rank": adapter.config.get("r"), "path": folder}
        base = ((adapter.recipe or {}).get("base") or {}).get("name") or "-"
        seen.tell("ok", f"lora:{name}", "health_adapter", **told, base=base)
        for one in known.get(name, {}).get("checked", {}).get("findings", ()):  # `rag-kit adapters check`
            if one["level"] == "error":
                level: Level = "error" if name == default else "warning"
                seen.checks.append(Check(level, f"lora:{name}", one["text"], one["hint"]))


def _check_base(adapter: Adapter, base: Base | None) -> None:
    """Do as `Adapter.check_base`, but by `config.json` alone where reading the tokenizer takes seconds."""
    if base is None or "transformers" in sys.modules:
        return adapter.check_base(base) if base else None
    trained_on = (adapter.recipe or {}).get("base") or {}
    theirs = trained_on.get("fingerprint") or {}
    config = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    sizes = {key: config.get(key) for key in theirs.get("sizes") or ()}
    ours = {"architecture": next(iter(config.get("architectures") or ()), None), "sizes": sizes}
    if differing := ", ".join(differences(ours, theirs)):
        told = {"adapter": adapter.name, "trained_on": trained_on.get("name"), "base": base.name}
        raise ModelError("adapter_other_base", **told, differing=differing)
    return None


def _ollama(seen: Seen) -> None:
    from rag_kit.models.standin import STAND_IN, ollama_state
    from rag_kit.ollama import models

    settings = seen.settings
    url, wanted = settings.ollama_base_url, settings.ollama_model
    state, reason = ollama_state(settings)
    if state == "stand-in":
        seen.tell("info", "ollama", "health_ollama_replaced", url=url)
        ready = find_spec("xllamacpp") is not None
        key = "health_stand_in" if ready else "health_no_stand_in"
        return seen.tell("info" if ready else "warning", STAND_IN, key, model=embedded.BASE.model)
    if state != "running":
        # What listens and fails is at fault where it was to answer; what is not there is missing.
        level: Level = "error" if state == "down" and not settings.use_lora_default else "warning"
        return seen.tell(level, "ollama", f"health_ollama_{state}", url=url, reason=reason)
    seen.usable.add("ollama_service")
    seen.models = models(url)
    seen.tell("ok", "ollama", "health_ollama", url=url, version=reason, count=len(seen.models))
    for model in seen.models:
        says = {"template": model.template, "adapter": model.adapter, "loaded": model.loaded}
        told: dict[str, Any] = {k: message("health_yes" if v else "health_no") for k, v in says.items()}
        told |= {"capabilities": ", ".join(model.capabilities or ()) or "-", "size": (model.size or 0) / 1e9}
        seen.tell("ok", f"ollama:{model.name}", "health_model", model=model, **told)
    if not _has(seen.models, wanted):
        return seen.tell("warning", "ollama", "health_no_model", model=wanted)
    return seen.usable.add("rag_handler")


def _has(models: list[OllamaModel], name: str) -> bool:
    return name.removesuffix(":latest") in [model.name.removesuffix(":latest") for model in models]


def _embedder(seen: Seen) -> None:
    settings, reference = seen.settings, seen.settings.embedding_model
    kind, _, rest = reference.partition(":")
    name = rest if kind in ("hf", "ollama") else reference
    folder = settings.path(name)
    if name != EMBEDDED and kind != "hf" and not folder.is_dir():
        seen.embedder, place = name, settings.ollama_base_url
        there = _has(seen.models, name)
        key = "health_embedder" if there else "health_embedder_no_ollama"
        return seen.tell("ok" if there else "error", "embedder", key, name=name, path=place)
    at_hand = folder if folder.is_dir() else _at_hand(name, embedded.EMBEDDER, settings)
    if at_hand is None:
        return seen.tell("warning", "embedder", "health_later", name=reference)
    origin = at_hand / embedded.ORIGIN
    seen.embedder = json.loads(origin.read_text(encoding="utf-8"))["model"] if origin.is_file() else name
    return seen.tell("ok", "embedder", "health_embedder", name=seen.embedder, path=at_hand)


def _indexes(seen: Seen) -> None:
    from rag_kit.index.store import find_index, list_indexes, read_facts

    default = None
    try:
        default = find_index(seen.settings)
    except StoreError as error:
        seen.tell("warning", "indexes", error)
    for folder in list_indexes(seen.settings.vector_store_path):
        try:
            facts = read_facts(folder)
            built = str(facts["embedding"]["model"])
            # By name; whether the vectors agree is looked at when the index is opened.
            if seen.embedder and _last(built) != _last(seen.embedder):
                raise StoreError("index_other_embedder", path=folder, built=built, given=seen.embedder)
        except StoreError as error:
            seen.tell("error" if folder == default else "warning", f"index:{folder.name}", error)
            continue
        seen.usable |= {"vector_store"} if folder == default else set()
        told = {"chunks": facts["index"]["count"], "documents": len(facts.get("documents") or ())}
        told |= {"embedder": built, "path": folder, "role": _role(folder == default)}
        seen.tell("ok", f"index:{folder.name}", "health_index", **told)


def _last(name: str) -> str:
    return Path(name).name.removesuffix(":latest").lower()


def _role(default: bool) -> str:
    return message("health_default") if default else ""


LOOKS: dict[str, Callable[[Seen], None]] = {
    look.__name__.strip("_"): look
    for look in (_settings, _disk, _device, _base, _memory, _adapters, _ollama, _embedder, _indexes)
}
