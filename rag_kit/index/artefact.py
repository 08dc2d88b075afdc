"""An index on the disk: three files in a folder, whole or absent.

The vectors (`index.faiss`), the chunks (`chunks.jsonl`, one JSON object a line), and `manifest.json`
with the embedder's contract, the chunker's parameters, the hash of every document by its source, and size
and hash of every file. Nothing is pickled. Knows the files; knows nothing of embedding or searching.
"""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from langchain_core.documents import Document

from rag_kit.errors import StoreError
from rag_kit.manifest import MANIFEST, fingerprint, read_manifest, replacing, settle, write_manifest

INDEX, CHUNKS = "index.faiss", "chunks.jsonl"
FORMAT = 1


@dataclass(frozen=True)
class Contents:
    """Vectors and chunks, joined by integer keys; a change makes new `Contents`, so readers need no lock."""

    index: Any = None  # faiss.IndexIDMap2 over IndexFlatIP, whose ids are the keys; None before the first
    documents: dict[int, Document] = field(default_factory=dict)

    @cached_property
    def keys(self) -> dict[str, int]:
        """The keys by the documents' ids."""
        return {str(document.id): key for key, document in self.documents.items()}


def write_index(folder: Path, contents: Contents, facts: dict[str, Any]) -> dict[str, Any]:
    """Write an index beside the one in `folder` and swap it in; returns `facts` as the manifest has them.

    Raises StoreError where it cannot be written; the former index is as it was then.
    """
    import faiss

    index = contents.index or faiss.IndexIDMap2(faiss.IndexFlatIP(facts["embedding"]["dimension"]))
    values = {
        **facts,
        "kind": "index",
        "format": FORMAT,
        "name": folder.name,
        "index": {"type": "flat", "metric": "cosine", "count": len(contents.documents)},
    }
    try:
        with replacing(folder) as building:
            # Python writes the bytes: FAISS's own writer does not notice a disk that fills at the end.
            (building / INDEX).write_bytes(faiss.serialize_index(index).data)
            with (building / CHUNKS).open("w", encoding="utf-8", newline="\n") as file:
                for key, document in contents.documents.items():
                    file.write(_line(key, document) + "\n")
            write_manifest(building, {**values, "seal": fingerprint(values)})
    except OSError as error:
        raise StoreError("index_unwritable", path=folder, reason=error.strerror or error) from error
    return values


def verify(folder: Path) -> dict[str, Any]:
    """Return the manifest of the index in `folder` after the hash of every file is checked.

    Raises StoreError that names the file which differs by as little as one byte.
    """
    manifest = read_facts(folder, hashes=True)
    read_contents(folder, manifest["embedding"]["dimension"])
    return manifest


def read_facts(folder: Path, *, hashes: bool = False) -> dict[str, Any]:
    """Return the manifest of the index in `folder`, after sizes (and `hashes`) and format are checked."""
    settle(folder)
    if not (folder / MANIFEST).is_file():
        known = [path.parent.name for path in sorted(folder.parent.glob(f"*/{MANIFEST}"))]
        raise StoreError("index_missing", path=folder, known=", ".join(known) or "-")
    manifest = read_manifest(folder, hashes=hashes)
    values = {key: value for key, value in manifest.items() if key not in ("files", "seal")}
    if manifest.get("seal") != fingerprint(values) or not {INDEX, CHUNKS} <= manifest["files"].keys():
        raise StoreError("artefact_unreadable", path=folder / MANIFEST)
    if manifest["format"] != FORMAT:
        raise StoreError("index_other_format", path=folder, found=manifest["format"], known=FORMAT)
    return manifest


def read_contents(folder: Path, dimension: int) -> Contents:
    """Read vectors and chunks, and check that they belong together."""
    import faiss

    try:
        index: Any = faiss.read_index(str(folder / INDEX))
        keys = faiss.vector_to_array(index.id_map).tolist()
        flat = faiss.downcast_index(index.index)
        if type(flat) is not faiss.IndexFlatIP or (index.d, index.ntotal) != (dimension, len(keys)):
            raise ValueError("another kind, dimension or number")
    except (RuntimeError, MemoryError, AttributeError, OSError, ValueError) as error:
        raise StoreError("index_damaged", path=folder / INDEX) from error
    documents = {}
    try:
        with (folder / CHUNKS).open(encoding="utf-8") as file:
            for row in map(json.loads, file):
                documents[row["key"]] = Document(row["text"], metadata=row["metadata"], id=row["id"])
        if sorted(documents) != sorted(keys):
            raise ValueError("other keys than those of the vectors")
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError("index_damaged", path=folder / CHUNKS) from error
    return Contents(index, documents)


def _line(key: int, document: Document) -> str:
    row = {"key": key, "id": document.id, "text": document.page_content, "metadata": document.metadata}
    return json.dumps(row, ensure_ascii=False, default=str)
