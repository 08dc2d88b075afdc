"""Where a base model comes from, and what makes two bases the same.

`embedded`, a folder, a `.gguf` file (one's own, of a hub repository, or that Ollama has pulled) and a hub id
all become one ordinary Hugging Face folder, with the GGUF beside it where there is one.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_kit import embedded, network
from rag_kit.errors import ModelError
from rag_kit.manifest import fingerprint
from rag_kit.models.blobs import blob_of, model_folders
from rag_kit.models.llamacpp.gguf import read_gguf

if TYPE_CHECKING:
    from rag_kit.settings import Settings

EMBEDDED, OLLAMA = "embedded", "ollama:"
SAMPLES, SAMPLE = 16, 1 << 16  # of a file of weights: a merged adapter changes all of it
SPEAKS: dict[str, tuple[str, ...]] = {"HuggingFaceTB/SmolLM2-135M-Instruct": ("en",)}
PROBED = ("model.norm.weight", "model.layers.0.input_layernorm.weight")
PROBE_TOLERANCE = 0.005  # relative; rounding to bf16 moves a value by at most 0.002


@dataclass(frozen=True)
class Base:
    """A base model: `name` as the user gave it, the folder that holds it, a GGUF of it if one is at hand."""

    name: str
    folder: Path
    gguf: Path | None = None

    def fingerprint(self) -> dict[str, Any]:
        """Return architecture, tokenizer hash, chat-template hash, tensor probe and hash of its files."""
        return _fingerprint(self.folder) | {"weights_hash": self._weights_hash()}

    def _weights_hash(self) -> str:
        files = [self.gguf] if self.gguf else sorted(self.folder.glob("*.safetensors"))
        stats = ((file, file.stat()) for file in files)
        return fingerprint([_sampled(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats])

    def changed_since(self, trained_on: dict[str, Any]) -> bool:
        """Whether the files under this name are others than those that a recipe's `base` was made with.

        The same base in another block type is still the same base; what is not known is not told.
        """
        then = (trained_on.get("fingerprint") or {}).get("weights_hash")
        return trained_on.get("name") == self.name and then not in (None, self._weights_hash())

    def languages(self) -> tuple[str, ...]:
        """Return the languages that the model speaks; empty where that is not known."""
        origin, name = self.folder / embedded.ORIGIN, self.name
        if origin.is_file():
            name = json.loads(origin.read_text(encoding="utf-8")).get("model", name)
        return SPEAKS.get(name, ())


def resolve_base(name: str, settings: Settings) -> Base:
    """Find the folder of base model `name`.

    It is `embedded`, a folder, a `.gguf` file, one of a hub repository (`OWNER/REPO/FILE.gguf`), what Ollama
    on this machine has pulled (`ollama:MODEL`), or a hub id. Raises ModelError where nothing usable stands
    there, ServiceError where the hub cannot be reached.
    """
    if name == EMBEDDED:
        cache = settings.cache_dir
        return Base(name, embedded.base_folder(cache), embedded.base_gguf(cache))
    if name.startswith(OLLAMA):
        blob = blob_of(name.removeprefix(OLLAMA))
        if blob is None:
            folders = ", ".join(map(str, model_folders()))
            raise ModelError("blob_not_found", model=name.removeprefix(OLLAMA), folders=folders)
        return Base(name, embedded.converted_gguf(blob, settings.cache_dir), blob)
    path, here = settings.path(name), name.startswith((".", "/", "~")) or "\\" in name
    if path.suffix.lower() == ".gguf":
        repo, file = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
        if not path.is_file() and (here or not file):
            raise ModelError("base_not_found", base=name, path=path)
        gguf = path if path.is_file() else network.hub_file(repo, file, settings)
        return Base(name, embedded.converted_gguf(gguf, settings.cache_dir), gguf)
    if path.is_dir():
        folder = _model_folder(path, name)
        return Base(name, folder, _gguf_beside(folder, name))
    if here or name.count("/") > 1:
        raise ModelError("base_not_found", base=name, path=path)
    return Base(name, _model_folder(network.hub_snapshot(name, settings), name))


def _gguf_beside(folder: Path, name: str) -> Path | None:
    """Return the only GGUF in a model's folder, None where there is none or several.

    Raises ModelError where it is not the same base.
    """
    files = list(folder.glob("*.gguf"))
    if len(files) != 1:
        return None
    from rag_kit.models.parity import weights_of_gguf

    gguf, config = read_gguf(files[0]), json.loads((folder / "config.json").read_text(encoding="utf-8"))
    told = {
        "hidden_size": gguf.sized("embedding_length"),
        "num_hidden_layers": gguf.sized("block_count"),
        "vocab_size": len(gguf.metadata.get("tokenizer.ggml.tokens", ())),
    }
    ours = {"sizes": {size: config.get(size) for size in told}, "tensor_probe": _tensor_probe(folder)}
    differing = differences(ours, {"sizes": told, "tensor_probe": weights_of_gguf(gguf).tensors})
    if differing:
        raise ModelError("base_gguf_other", base=name, path=files[0], differing=", ".join(differing))
    return files[0]


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
def _sampled(file: Path, size: int, _changed: int) -> str:
    """Return the hash of a file's size and of SAMPLES pieces, evenly from all over it."""
    told = hashlib.sha256(str(size).encode())
    with file.open("rb") as data:
        for number in range(SAMPLES):
            data.seek(size * number // SAMPLES)
            told.update(data.read(SAMPLE))
    return told.hexdigest()


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
    vocabulary = parts["model"].get("vocab")
    if isinstance(vocabulary, dict):  # a GGUF names the rows that no token has, and a folder does not
        parts["model"]["vocab"] = {k: v for k, v in vocabulary.items() if not re.fullmatch(r"\[PAD\d+\]", k)}
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
