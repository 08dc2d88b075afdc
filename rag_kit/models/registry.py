"""The adapters at hand and what is known of each: taken in, removed, and what was measured of them.

The folders are the truth. `registry.json` beside them keeps what no folder says, scores of comparisons and
the doctor's last findings, with the adapter's key: what was said of other weights counts no more.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from rag_kit.errors import ModelError
from rag_kit.manifest import fingerprint, replacing, write_json, write_manifest
from rag_kit.models.adapters import (
    CONFIG,
    RECIPE,
    WEIGHTS,
    Adapter,
    adapter_folders,
    check_fit,
    checkpoints,
    find_adapters,
    named_adapter,
    named_folders,
    read_adapter,
)

if TYPE_CHECKING:
    from rag_kit.models.base import Base
    from rag_kit.settings import Settings

TOKENIZER = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
TAKEN_ALONG = (CONFIG, WEIGHTS, "chat_template.jinja", *TOKENIZER)
LOG = "training_log.jsonl"
REGISTRY = "registry.json"
MEASURED = ("scores", "checked")  # what only the registry knows; the rest is read from the folders

logger = logging.getLogger("rag_kit.models")


def add_adapter(source: Path, base: Base, settings: Settings, name: str | None = None) -> Adapter:
    """Copy an adapter made elsewhere into LORA_MODEL_PATH, with a recipe that says what is known.

    Only PEFT's and the tokenizer's own files are taken, those of its checkpoints too; `training_args.bin` (a
    pickle) is never opened. Raises ModelError where it does not fit `base` or the name is not a plain one.
    """
    if source.suffix.lower() == ".gguf":
        raise ModelError("adapter_is_gguf", path=source)
    adapter = read_adapter(source)
    name = unicodedata.normalize("NFC", name or adapter.name)
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise ModelError("adapter_name", name=name)
    target = settings.lora_model_path / name
    if target.exists() or name in adapter_folders(settings.lora_model_path):
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
        for folder in (source, *checkpoints(source)):
            kept = building / folder.relative_to(source)
            kept.mkdir(exist_ok=True)
            for file in (file for pattern in TAKEN_ALONG for file in folder.glob(pattern)):
                shutil.copyfile(file, kept / file.name)
        write_manifest(building, {key: value for key, value in known.items() if key != "files"}, name=RECIPE)
    return read_adapter(target)


def remove_adapter(name: str, settings: Settings) -> Path:
    """Delete the adapter called exactly `name`, its checkpoints too, and return where it was.

    In LORA_MODEL_PATH itself only the adapter's own files are deleted. A request that uses the adapter ends
    well: its weights are in memory. Raises AdapterNotFoundError, and ModelError where two have the name.
    """
    root, name = settings.lora_model_path, unicodedata.normalize("NFC", name)
    found = [folder for known, folder in named_folders(root) if known == name]
    if len(found) != 1:
        named_adapter(name, settings)  # tells why
    folder, whole = found[0], found
    if folder == root:
        whole = checkpoints(root)
        for file in [file for pattern in (*TAKEN_ALONG, RECIPE, LOG) for file in root.glob(pattern)]:
            file.unlink(missing_ok=True)  # its configuration first, without which it is no adapter
    for one in whole:
        if one.is_symlink():
            one.unlink()
        else:  # first under a name that nobody reads, and that `settle` sweeps should this process be killed
            shutil.rmtree(one.rename(one.with_name(f".{one.name}.building-{os.getpid()}-0")))
    return folder


def entries(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return what is known of each adapter at hand, by name.

    `key`, `base` (name, hash of its fingerprint), `rank`, `data` (name, hash), `metrics` of its training,
    `scores` of comparisons by context, and `checked`: when, by which engine, what was found. What was
    measured of other weights in that folder is left out, as is whatever has no folder any more.
    """
    kept = _read(settings.lora_model_path / REGISTRY)
    found = {}
    for name, adapter in find_adapters(settings.lora_model_path).items():
        entry, before = _told(adapter), kept.get(name)
        if isinstance(before, dict) and before.get("key") == adapter.key:
            entry |= {part: before[part] for part in MEASURED if isinstance(before.get(part), dict)}
        found[name] = entry
    return found


def record_scores(name: str, scores: dict[str, dict[str, Any]], settings: Settings) -> None:
    """Keep what a comparison measured of an adapter: `{context: {metric: value}}`."""
    _record(name, lambda entry: {"scores": entry.get("scores", {}) | scores}, settings)


def record_check(
    adapter: Adapter, state: str, engine: str, findings: list[dict[str, str]], settings: Settings
) -> None:
    """Keep what the doctor found; `state` is the hash of all that it looked at."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    told = {"at": now, "state": state, "engine": engine, "findings": findings}
    _record(adapter.name, lambda entry: {"checked": told} if entry["key"] == adapter.key else {}, settings)


def _record(name: str, news: Callable[[dict[str, Any]], dict[str, Any]], settings: Settings) -> None:
    path = settings.lora_model_path / REGISTRY
    try:
        with FileLock(path.with_name(f".{REGISTRY}.lock")):
            now = entries(settings)
            if name in now:
                now[name] |= news(now[name])
                write_json(path, now)
    except OSError as error:  # a folder that cannot be written must not stop who only wants to know
        logger.warning("%s", ModelError("registry_unwritable", path=path, reason=error))


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept if isinstance(kept, dict) else {}
    except (FileNotFoundError, ValueError):
        return {}


def _told(adapter: Adapter) -> dict[str, Any]:
    recipe = adapter.recipe or {}
    base, data = recipe.get("base") or {}, recipe.get("data") or {}
    name = base.get("name") or adapter.config.get("base_model_name_or_path")
    return {
        "key": adapter.key,
        "base": {"name": name, "fingerprint": fingerprint(base.get("fingerprint"))[:16] if base else None},
        "rank": adapter.config.get("r"),
        "data": {"name": data.get("name"), "sha256": data.get("sha256")},
        "metrics": recipe.get("metrics"),
        "created": recipe.get("created"),
    }
