"""The files of the models that Ollama has pulled, found through its manifests, so that none is fetched twice.

Reads only below Ollama's own folders. Knows how a name becomes a manifest and a digest a file; knows nothing
of servers or of what the files hold.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from rag_kit.errors import ModelError

MODEL = "application/vnd.ollama.image.model"
HOST, NAMESPACE, TAG = "registry.ollama.ai", "library", "latest"
# HOST/NAMESPACE/MODEL:TAG, of which the model alone is needed
NAME = re.compile(
    r"(?:(?:(?P<host>[\w.-]+(?::\d+)?)/)?(?P<space>[\w-]+)/)?(?P<model>[\w.-]+)(?::(?P<tag>[\w.-]+))?",
    re.ASCII,
)


def model_folders() -> list[Path]:
    """Return where Ollama keeps its models: OLLAMA_MODELS, else the user's folder and the system's."""
    if asked := os.environ.get("OLLAMA_MODELS"):
        return [Path(asked).expanduser()]
    return [Path.home() / ".ollama/models", Path("/usr/share/ollama/.ollama/models")]


def blob_of(model: str) -> Path | None:
    """Return the GGUF of a `model` that Ollama on this machine has pulled, None where it has none.

    `model` is written as for Ollama: `qwen2.5:1.5b`, `NAMESPACE/NAME`, `HOST/NAMESPACE/NAME:TAG`. Raises
    ModelError for another name, and where the manifest cannot be read, names no plain digest, or its file
    is missing or lies outside Ollama's blobs.
    """
    parts = NAME.fullmatch(model)
    if parts is None or any(part and not part.strip(".") for part in parts.groups()):
        raise ModelError("blob_name", model=model)
    place = (parts["host"] or HOST, parts["space"] or NAMESPACE, parts["model"], parts["tag"] or TAG)
    for folder in model_folders():
        manifest = folder.joinpath("manifests", *place)
        try:
            layers = json.loads(manifest.read_text(encoding="utf-8"))["layers"]
            digest = next(str(layer["digest"]) for layer in layers if layer["mediaType"] == MODEL)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, LookupError, TypeError, StopIteration) as error:
            reason = str(error) or type(error).__name__
            raise ModelError("blob_manifest", model=model, path=manifest, reason=reason) from error
        blobs = (folder / "blobs").resolve()
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            raise ModelError("blob_outside", model=model, path=digest, folder=blobs)
        file = (blobs / digest.replace(":", "-")).resolve()
        if file.parent != blobs:
            raise ModelError("blob_outside", model=model, path=file, folder=blobs)
        if not os.access(file, os.R_OK):
            raise ModelError("blob_manifest", model=model, path=manifest, reason=f"{file.name}: -r")
        return file
    return None
