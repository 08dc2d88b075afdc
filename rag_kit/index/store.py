"""The door to indexes: build one from documents, find, open and verify those that are there.

The store itself stands in `faiss_store`, its form on the disk in `artefact`. Notebook 02 shows it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings

from rag_kit.data.chunker import chunk_documents, conservative_count
from rag_kit.errors import StoreError
from rag_kit.index.artefact import read_facts as read_facts
from rag_kit.index.artefact import verify as verify
from rag_kit.index.contract import ContractEmbeddings
from rag_kit.index.faiss_store import FaissStore as FaissStore
from rag_kit.manifest import MANIFEST, fingerprint, settle

if TYPE_CHECKING:
    from rag_kit.settings import Settings

DEFAULT_NAME = "default"
CHUNK_TOKENS = 256  # for an embedder that does not say


def build_index(
    documents: Sequence[Document],
    folder: Path,
    embeddings: Embeddings,
    *,
    max_tokens: int | None = None,
    overlap: int = 0,
) -> FaissStore:
    """Build the index of `documents` and put it into `folder`, whose former index serves until then.

    `max_tokens` limits a chunk, counted as the embedder counts; by default the embedder's `chunk_tokens`.
    `overlap` is in sentences. Raises StoreError: a limit that the embedder cannot read, nothing to index,
    or a folder that cannot be written.
    """
    count, limit = _measure(embeddings, max_tokens)
    chunks = chunk_documents(documents, count_tokens=count, max_tokens=limit, overlap=overlap)
    if not chunks:
        raise StoreError("index_nothing", documents=len(documents))
    chunker = {"max_tokens": limit, "overlap": overlap}
    store = FaissStore(embeddings, facts={"chunker": chunker, "documents": document_hashes(documents)})
    store.add_texts(
        [chunk.page_content for chunk in chunks],
        [chunk.metadata for chunk in chunks],
        ids=[chunk_id(chunk) for chunk in chunks],
    )
    store.save(folder)
    return store


def ensure_index(documents: Sequence[Document], folder: Path, embeddings: Embeddings) -> FaissStore:
    """Open the index in `folder` if it is of these documents, chunks and embedder; else build it."""
    _, limit = _measure(embeddings, None)
    try:
        facts = read_facts(folder)
        wanted = {"max_tokens": limit, "overlap": 0}, document_hashes(documents)
        if (facts["chunker"], facts["documents"]) == wanted:
            return FaissStore.open(folder, embeddings)
    except StoreError:
        pass  # none there, damaged, or another embedder's: the new one takes its place
    return build_index(documents, folder, embeddings)


def chunk_id(chunk: Document) -> str:
    """Return an id that a chunk keeps for as long as its source, place and text stay."""
    place: list[Any] = [chunk.metadata.get(key) for key in ("source", "start", "end")]
    return fingerprint([*place, chunk.page_content])[:16]


def document_hashes(documents: Sequence[Document]) -> dict[str, str]:
    """Return a hash of the text by source; of several documents of one source, of all of them in order."""
    texts: dict[str, list[str]] = {}
    for document in documents:
        texts.setdefault(str(document.metadata.get("source")), []).append(document.page_content)
    return {source: fingerprint(parts) for source, parts in texts.items()}


def list_indexes(root: Path) -> list[Path]:
    """Return the folders of the indexes in `root`, by name; `root` itself first where it is one."""
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir())] if root.is_dir() else []
    for folder in folders:
        settle(folder)
    return [folder for folder in folders if (folder / MANIFEST).is_file()]


def find_index(settings: "Settings", name: str | None = None) -> Path:
    """Return the folder of the index that VECTOR_STORE_PATH means.

    It is the one called `name`; where no name is given the path itself if an index lies there, else the
    one called `default`, else the only one. Raises StoreError that lists those there are.
    """
    root = settings.vector_store_path
    there = {folder.name: folder for folder in list_indexes(root) if folder != root}
    if name is None:
        if (root / MANIFEST).is_file():
            return root
        name = next(iter(there)) if len(there) == 1 else DEFAULT_NAME
    if name not in there:
        raise StoreError("index_missing", path=root / name, known=", ".join(there) or "-")
    return there[name]


def open_store(
    settings: "Settings", name: str | None = None, embeddings: Embeddings | None = None
) -> FaissStore:
    """Open the index that VECTOR_STORE_PATH means, with EMBEDDING_MODEL unless an embedder is given."""
    from rag_kit.index.embeddings import load_embeddings

    folder = find_index(settings, name)
    return FaissStore.open(folder, embeddings or load_embeddings(None, settings))


def _measure(embeddings: Embeddings, max_tokens: int | None) -> tuple[Callable[[str], int], int]:
    """Return how an embedder counts tokens, and the limit of a chunk in that count."""
    if not isinstance(embeddings, ContractEmbeddings):
        return conservative_count, max_tokens or CHUNK_TOKENS
    if max_tokens is not None and max_tokens > embeddings.max_tokens:
        raise StoreError("index_chunk_limit", asked=max_tokens, limit=embeddings.max_tokens)
    return embeddings.count_tokens, max_tokens or embeddings.chunk_tokens
