"""The FAISS index as a LangChain `VectorStore`: chunks and vectors in memory, searched by cosine.

Knows searching, adding and removing; its form on the disk is told in `artefact`. Notebook 02 shows it.
"""

# ruff: noqa: ARG002  (LangChain's signatures have `**kwargs`, used or not)

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self, overload
from uuid import uuid4

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore

from rag_kit.index.artefact import Contents, read_contents, read_facts, write_index
from rag_kit.index.contract import Vectors, contract_of, normalised, passage_vectors, require_same
from rag_kit.index.hit import Hit


class FaissStore(VectorStore):
    """Chunks and their vectors in memory; scores are cosines (-1 to 1, higher is nearer).

    Works with any LangChain `Embeddings`. Searches may run on any number of threads while one changes
    the store: they see it as it was before the change or after it.
    """

    def __init__(self, embeddings: Embeddings, *, facts: dict[str, Any] | None = None) -> None:
        self._embeddings = embeddings
        self.facts = facts or {}  # chunker and document hashes, as the manifest has them
        self._contents = Contents()
        self._change = threading.Lock()

    @property
    def embeddings(self) -> Embeddings:
        """The embedder of texts and questions."""
        return self._embeddings

    def __len__(self) -> int:
        return len(self._contents.documents)

    def __bool__(self) -> bool:
        return True  # an empty store is a store

    def chunks(self) -> list[Document]:
        """Return every chunk, in the order in which they were added."""
        return [_copy(document) for document in self._contents.documents.values()]

    # Reading

    @overload  # type: ignore[override]
    def search(self, query: str, k: int = 4) -> list[Hit]: ...
    @overload
    def search(self, query: str, search_type: str, **kwargs: Any) -> list[Document]: ...
    def search(self, query: str, search_type: Any = 4, **kwargs: Any) -> list[Any]:  # type: ignore[misc]
        """Return the `k` nearest chunks as hits, best first; none from an empty store.

        With a search type (`similarity`, `mmr`) in place of `k` it is LangChain's own `search`.
        """
        if isinstance(search_type, str):
            return super().search(query, search_type, **kwargs)
        k = kwargs.get("k", search_type)
        return self._hits(_row(self._embeddings.embed_query(query)), k) if len(self) else []

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """Return the `k` nearest chunks."""
        return [hit.document for hit in self.search(query, k)]

    def similarity_search_with_score(
        self, query: str, k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """Return the `k` nearest chunks with their cosines."""
        return [(hit.document, hit.score) for hit in self.search(query, k)]

    def similarity_search_by_vector(
        self, embedding: list[float], k: int = 4, **kwargs: Any
    ) -> list[Document]:
        """Return the `k` chunks nearest to a vector."""
        return [hit.document for hit in self._hits(_row(embedding), k)]

    def max_marginal_relevance_search(self, query: str, *args: Any, **kwargs: Any) -> list[Document]:
        """Return `k` of the `fetch_k` nearest chunks that are near the question and unlike each other."""
        vector = self._embeddings.embed_query(query)
        return self.max_marginal_relevance_search_by_vector(vector, *args, **kwargs)

    def max_marginal_relevance_search_by_vector(
        self, embedding: list[float], k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """As `max_marginal_relevance_search`, for a vector."""
        from langchain_core.vectorstores.utils import maximal_marginal_relevance

        contents, query = self._contents, _row(embedding)
        keys = [key for key, _ in _nearest(contents, query, fetch_k)]
        if not keys:
            return []
        vectors = list(contents.index.reconstruct_batch(np.asarray(keys, dtype=np.int64)))
        chosen = maximal_marginal_relevance(query[0], vectors, lambda_mult=lambda_mult, k=k)
        return [_copy(contents.documents[keys[place]]) for place in chosen]

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Return the chunks with these ids; unknown ids are passed over."""
        contents = self._contents
        return [_copy(contents.documents[contents.keys[id]]) for id in ids if id in contents.keys]

    def _hits(self, query: Vectors, k: int) -> list[Hit]:
        contents = self._contents
        return [
            Hit(_copy(contents.documents[key]), score, rank, {"dense": rank})
            for rank, (key, score) in enumerate(_nearest(contents, query, k), start=1)
        ]

    def _select_relevance_score_fn(self) -> Any:
        return lambda cosine: min(max(cosine, 0.0), 1.0)

    # Changing

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Embed and add texts; an id that is there already is replaced. Returns the ids."""
        texts = list(texts)
        given = list(ids) if ids is not None else [None] * len(texts)
        named = [id or str(uuid4()) for id in given]
        metadatas = metadatas if metadatas is not None else [{} for _ in texts]
        documents = [
            Document(text, metadata=dict(metadata), id=id)
            for text, metadata, id in zip(texts, metadatas, named, strict=True)
        ]
        if documents:
            self._put(documents, passage_vectors(self._embeddings, texts))
        return named

    def delete(self, ids: Sequence[str] | None = None, **kwargs: Any) -> bool:
        """Remove chunks by id, all of them where none are named; unknown ids are passed over."""
        with self._change:
            contents = self._contents
            wanted = contents.keys if ids is None else ids
            self._contents = _without(contents, [id for id in dict.fromkeys(wanted) if id in contents.keys])
        return True

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Return a store in memory that holds these texts."""
        store = cls(embedding)
        store.add_texts(texts, metadatas, **kwargs)
        return store

    def _put(self, documents: Sequence[Document], vectors: Vectors) -> None:
        import faiss

        last = {str(document.id): place for place, document in enumerate(documents)}
        with self._change:
            contents = _without(self._contents, [id for id in last if id in self._contents.keys])
            index: Any = contents.index or faiss.IndexIDMap2(faiss.IndexFlatIP(vectors.shape[1]))
            if index is self._contents.index:
                index = faiss.clone_index(index)
            first = max(self._contents.documents, default=-1) + 1
            keys = {id: key for key, id in enumerate(last, start=first)}
            index.add_with_ids(vectors[list(last.values())], np.fromiter(keys.values(), dtype=np.int64))
            added = {keys[id]: documents[place] for id, place in last.items()}
            self._contents = Contents(index, {**contents.documents, **added})

    # On the disk

    def save(self, folder: Path) -> None:
        """Write the store into `folder`, beside what is there, and swap it in whole.

        Raises StoreError where it cannot be written; the former state stays usable then.
        """
        contents = self._contents
        sources = {str(document.metadata.get("source")) for document in contents.documents.values()}
        hashes = {k: v for k, v in self.facts.get("documents", {}).items() if k in sources}
        facts = {
            "chunker": self.facts.get("chunker"),
            "documents": hashes,
            "embedding": contract_of(self._embeddings),
        }
        self.facts = write_index(folder, contents, facts)

    @classmethod
    def open(cls, folder: Path, embeddings: Embeddings) -> Self:
        """Return the store in `folder`, after sizes, headers, manifest and embedder are checked.

        Raises StoreError: no index there, a damaged one, or one that was built by another embedder. Hashes
        are checked by `verify`.
        """
        facts = read_facts(folder)
        contract = facts["embedding"]
        require_same(contract, contract_of(embeddings), folder)
        store = cls(embeddings, facts=facts)
        store._contents = read_contents(folder, contract["dimension"])
        return store


def _copy(document: Document) -> Document:
    """Return a document whose change does not change the store's."""
    return Document(document.page_content, metadata=dict(document.metadata), id=document.id)


def _row(vector: Sequence[float]) -> Vectors:
    return normalised(np.asarray([vector], dtype=np.float32))


def _nearest(contents: Contents, query: Vectors, k: int) -> list[tuple[int, float]]:
    """Return (key, cosine) of the `k` nearest, best first; equal ones in the order they were added."""
    if not contents.documents or k < 1:
        return []
    scores, keys = contents.index.search(query, min(k, len(contents.documents)))
    found = zip(keys[0].tolist(), scores[0].tolist(), strict=True)
    return sorted(((key, score) for key, score in found if key >= 0), key=lambda pair: (-pair[1], pair[0]))


def _without(contents: Contents, ids: Sequence[str]) -> Contents:
    """Return the state without these chunks; readers of the old one are not disturbed."""
    import faiss

    if not ids:
        return contents
    gone = {contents.keys[id] for id in ids}
    index: Any = faiss.clone_index(contents.index)
    index.remove_ids(np.fromiter(gone, dtype=np.int64))
    documents = {key: document for key, document in contents.documents.items() if key not in gone}
    return Contents(index, documents)
