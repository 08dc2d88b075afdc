"""What an embedder promises: its instructions, its limit, and vectors to know it again by.

Knows the families that want an instruction before their texts, and when two embedders are the same;
knows nothing of what computes the vectors.
"""

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from langchain_core.embeddings import Embeddings

from rag_kit.errors import StoreError

Vectors = npt.NDArray[np.float32]

PROBES = (
    "The warranty of the A-12 pump lasts 24 months.",
    "请问这款水泵的保修期有多长？",
    "型号 X200 uses 2.5 mm screws，请勿替换。",
)
SAME = 0.999  # cosine; bf16 against f32 of one model stays above 0.9999, another model far below


class Instructions(NamedTuple):
    """What stands before a question and before a passage."""

    query: str = ""
    passage: str = ""


# By the model's name, the first that fits; from the models' own cards.
_FAMILIES = (
    (
        r"e5-.*instruct",
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: ",
        "",
    ),
    (r"(^|-)e5-", "query: ", "passage: "),
    (r"bge-(small|base|large)-zh", "为这个句子生成表示以用于检索相关文章：", ""),
    (r"bge-(small|base|large)", "Represent this sentence for searching relevant passages: ", ""),
)


def instructions_for(model: str, prompts: Mapping[str, str | None] | None = None) -> Instructions:
    """Return the instructions of the family that `model` (a name or a folder) belongs to.

    `prompts` are a sentence-transformers folder's own; where it has any, they hold.
    """
    own = {name: text for name, text in (prompts or {}).items() if text}
    if own.keys() & {"query", "passage", "document"}:
        return Instructions(own.get("query", ""), own.get("passage", own.get("document", "")))
    name = re.sub(r"[^a-z0-9]+", "-", model.lower().rstrip("/\\"))
    for family, query, passage in _FAMILIES:
        if re.search(family, name):
            return Instructions(query, passage)
    return Instructions()


class ContractEmbeddings(Embeddings):
    """LangChain `Embeddings` that can say what they are, and count tokens.

    `reference` is what `load_embeddings` was given; `max_tokens` is how many tokens a passage may have
    beside the instruction and the special tokens, counted by `count_tokens`; `chunk_tokens` is a good
    size for a chunk in that count. A text over the limit is an error, never cut.
    """

    reference: str
    max_tokens: int
    chunk_tokens: int
    instructions: Instructions

    @abstractmethod
    def encode(self, texts: Sequence[str], instruction: str) -> Vectors:
        """Return one normalised vector a text (n × dimension, float32) with `instruction` before each."""

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """Return the tokens that `text` adds to a passage; never fewer than the model's own."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return backend, model, revision, pooling and number type."""

    def passages(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors of passages (n × dimension)."""
        return self.encode(texts, self.instructions.passage)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return the vectors of passages as lists (LangChain's form)."""
        return self.passages(texts).tolist() if texts else []

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of a question as a list (LangChain's form)."""
        vector: list[float] = self.encode([text], self.instructions.query)[0].tolist()
        return vector

    def contract(self) -> dict[str, Any]:
        """Return what an index writes down of its embedder, JSON-serialisable."""
        return {
            **self.describe(),
            "reference": self.reference,
            "query_instruction": self.instructions.query,
            "passage_instruction": self.instructions.passage,
            "max_tokens": self.max_tokens,
            "too_long": "error",
            **_probed(self),
        }


def contract_of(embeddings: Embeddings) -> dict[str, Any]:
    """Return the contract of any embedder; one that is not ours is known by its class and its vectors."""
    if isinstance(embeddings, ContractEmbeddings):
        return embeddings.contract()
    kind = type(embeddings)
    name = getattr(embeddings, "model_name", None) or getattr(embeddings, "model", None)
    model = name if isinstance(name, str) else f"{kind.__module__}.{kind.__qualname__}"
    return {"backend": kind.__name__, "model": model, "reference": None, **_probed(embeddings)}


def passage_vectors(embeddings: Embeddings, texts: Sequence[str]) -> Vectors:
    """Return normalised vectors of passages (n × dimension) from any embedder."""
    if isinstance(embeddings, ContractEmbeddings):
        return embeddings.passages(texts)
    return normalised(np.asarray(embeddings.embed_documents(list(texts)), dtype=np.float32))


def normalised(vectors: Vectors) -> Vectors:
    """Return rows of length 1; a row of zeros stays as it is."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors / np.maximum(lengths, 1e-12), dtype=np.float32)


def matches(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Tell whether two contracts are of the same embedder.

    They are when dimension and instructions agree and every probe text has the same vector (cosine
    above 0.999): the name may differ, as where one model lies in two folders, and so may the number type.
    """
    for key in ("dimension", "query_instruction", "passage_instruction"):
        if ours.get(key) is not None and theirs.get(key) is not None and ours[key] != theirs[key]:
            return False
    a, b = (normalised(np.asarray(contract["probes"], dtype=np.float32)) for contract in (ours, theirs))
    return a.shape == b.shape and bool((np.sum(a * b, axis=1) > SAME).all())


def require_same(built_with: Mapping[str, Any], given: Mapping[str, Any], path: Path) -> None:
    """Raise StoreError where the index at `path` was built by another embedder than the given one."""
    if not matches(built_with, given):
        raise StoreError("index_other_embedder", path=path, built=_named(built_with), given=_named(given))


def _named(contract: Mapping[str, Any]) -> str:
    known = contract.get("reference") or contract["backend"]
    return f"{known} ({contract['model']}, {contract['dimension']})"


def _probed(embeddings: Embeddings) -> dict[str, Any]:
    vectors = passage_vectors(embeddings, PROBES)
    return {
        "dimension": int(vectors.shape[1]),
        "normalised": True,
        "probes": np.round(vectors.astype(float), 6).tolist(),
    }
