"""One door to every embedder: `load_embeddings(reference)`.

Knows how a reference is read and where its files lie; the two backends stand in `local` and `ollama`,
what an embedder promises in `contract`. Notebook 02 shows it.
"""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from rag_kit.embedded import embedder_folder
from rag_kit.errors import ModelError, SettingsError
from rag_kit.index.contract import ContractEmbeddings

if TYPE_CHECKING:
    from rag_kit.index.local import LocalEmbeddings
    from rag_kit.settings import Settings

EMBEDDED = "embedded"
_OF_MODELS = ("base", "lora", "openai")  # references of models, which are no embedders
# Of a hub repository only what sentence-transformers reads.
_HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors", "*/config.json", "*/*.safetensors"]


def load_embeddings(reference: str | None = None, settings: "Settings | None" = None) -> ContractEmbeddings:
    """Return the embedder behind `reference`, by default EMBEDDING_MODEL.

    `embedded` · `ollama:MODEL` · `hf:ID` or `hf:FOLDER` · a bare name, which is a folder where one
    exists and else an Ollama model. Query and passage instructions are set by the model's family. A
    local model is loaded once and shared. Raises SettingsError, ModelError or ServiceError.
    """
    from rag_kit.settings import get_settings

    settings = settings or get_settings()
    reference = (reference or settings.embedding_model).strip()
    if reference == EMBEDDED:
        return _local(embedder_folder(settings.cache_dir), reference, None, settings.device)
    kind, _, name = reference.partition(":")
    if kind in _OF_MODELS or (kind in ("ollama", "hf") and not name):
        raise SettingsError("embedder_unknown", reference=reference)
    if kind == "hf":
        return _from_hub_or_folder(name, reference, settings)
    if kind != "ollama":
        name = reference
        if settings.path(name).is_dir():
            return _from_hub_or_folder(name, reference, settings)
    from rag_kit.index.ollama import OllamaEmbeddings

    return OllamaEmbeddings(name, settings.ollama_base_url, reference)


def _from_hub_or_folder(name: str, reference: str, settings: "Settings") -> ContractEmbeddings:
    folder = settings.path(name)
    if folder.is_dir():
        return _local(_model_folder(folder), reference, None, settings.device)
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        raise ModelError("embedder_no_folder", path=folder)
    from rag_kit.network import hub_snapshot

    found = hub_snapshot(name, settings, allow_patterns=_HUB_FILES)
    return _local(found, reference, name, settings.device)


def _model_folder(folder: Path) -> Path:
    """Return the folder that holds the model: itself, or the only one below it (a hub's cache layout)."""
    if (folder / "modules.json").is_file() or (folder / "config.json").is_file():
        return folder
    found = sorted({path.parent for path in folder.glob("**/modules.json")})
    if len(found) != 1:
        raise ModelError("embedder_no_folder", path=folder)
    return found[0]


@lru_cache(maxsize=2)
def _local(folder: Path, reference: str, model: str | None, device: str) -> "LocalEmbeddings":
    from rag_kit.index.local import LocalEmbeddings

    return LocalEmbeddings(folder, reference, model, device)
