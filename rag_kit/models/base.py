"""Where a base model comes from, and what makes two bases the same.

`embedded`, a folder, a `.gguf` file or a hub id all become one ordinary Hugging Face folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_kit import embedded, network
from rag_kit.errors import ModelError
from rag_kit.manifest import fingerprint

if TYPE_CHECKING:
    from rag_kit.settings import Settings

EMBEDDED = "embedded"
SPEAKS: dict[str, tuple[str, ...]] = {"HuggingFaceTB/SmolLM2-135M-Instruct": ("en",)}
PROBED = ("model.norm.weight", "model.layers.0.input_layernorm.weight")
PROBE_TOLERANCE = 0.005  # relative; rounding to bf16 moves a value by at most 0.002


@dataclass(frozen=True)
class Base:
    """A base model: `name` as the user gave it, and the folder that holds it."""

    name: str
    folder: Path

    def fingerprint(self) -> dict[str, Any]:
        """Return architecture, tokenizer hash, chat-template hash and tensor probe of the base."""
        return _fingerprint(self.folder)

    def languages(self) -> tuple[str, ...]:
        """Return the languages that the model speaks; empty where that is not known."""
        origin, name = self.folder / embedded.ORIGIN, self.name
        if origin.is_file():
            name = json.loads(origin.read_text(encoding="utf-8")).get("model", name)
        return SPEAKS.get(name, ())


def resolve_base(name: str, settings: Settings) -> Base:
    """Find the folder of base model `name`: `embedded`, a folder, a `.gguf` file or a hub id.

    Raises ModelError where nothing usable stands there, ServiceError where the hub cannot be reached.
    """
    if name == EMBEDDED:
        return Base(name, embedded.base_folder(settings.cache_dir))
    path = settings.path(name)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError("base_not_found", base=name, path=path)
        return Base(name, embedded.converted_gguf(path, settings.cache_dir))
    if path.is_dir():
        return Base(name, _model_folder(path, name))
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        raise ModelError("base_not_found", base=name, path=path)
    return Base(name, _model_folder(network.hub_snapshot(name, settings), name))


def _model_folder(folder: Path, name: str) -> Path:
    """Return the folder below `folder` that directly holds config.json: itself, or the only one."""
    if (folder / "config.json").is_file():
        return folder
    # ModelScope's and the hub's caches nest the files; no layout is parsed, the file is looked for
    found = sorted(
        {path.parent for path in folder.glob("**/config.json") if len(path.relative_to(folder).parts) <= 5}
    )
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelError("base_ambiguous", base=name, found=", ".join(str(path) for path in found))
    raise ModelError("base_no_config", base=name, path=folder)


@lru_cache(maxsize=16)
def _fingerprint(folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    sizes = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    return {
        "architecture": (config.architectures or [type(config).__name__])[0],
        "sizes": {size: getattr(config, size, None) for size in sizes},
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "chat_template_hash": template_hash(tokenizer),
        "tensor_probe": _tensor_probe(folder),
    }


def tokenizer_hash(tokenizer: Any) -> str:
    """Return the hash of what turns text into ids: vocabulary, merges, normaliser, added tokens."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    return fingerprint(
        {key: parts.get(key) for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    )


def template_hash(tokenizer: Any) -> str | None:
    """Return the hash of the chat template, None where there is none."""
    return fingerprint(tokenizer.chat_template.encode()) if tokenizer.chat_template else None


def _tensor_probe(folder: Path) -> dict[str, list[float]]:
    """Return the first eight values of two norm weights: kept in f32 or bf16 by every file format."""
    found = {name: tensor_of(folder.glob("*.safetensors"), name) for name in PROBED}
    return {
        name: [round(float(value), 6) for value in tensor[:8]]
        for name, tensor in found.items()
        if tensor is not None
    }


def tensor_of(files: Iterable[Path], name: str) -> Any:
    """Return the tensor `name` from the first of the safetensors `files` that has it, else None."""
    from safetensors import safe_open

    for file in sorted(files):
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118  (not a dict)
                return tensors.get_tensor(name)
    return None


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Return what tells two bases apart, by name; values that one side does not know are left out."""
    keys = ("architecture", "sizes", "tokenizer_hash")
    differing = [key for key in keys if ours.get(key) and theirs.get(key) and ours[key] != theirs[key]]
    a, b = ours.get("tensor_probe") or {}, theirs.get("tensor_probe") or {}
    for name in a.keys() & b.keys():
        close = (
            math.isclose(x, y, rel_tol=PROBE_TOLERANCE, abs_tol=1e-5)
            for x, y in zip(a[name], b[name], strict=False)
        )
        if not all(close):
            return [*differing, "tensor_probe"]
    return differing
