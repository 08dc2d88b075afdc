"""One result of a search: what retrieval, fusion and reranking pass on, and what comparisons record."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from langchain_core.documents import Document


@dataclass(frozen=True)
class Hit:
    """A chunk with its score, its final 1-based rank, and its rank at each stage of retrieval.

    The score's meaning is that of the last stage: for `dense` the cosine of question and chunk, -1 to 1.
    """

    document: Document
    score: float
    rank: int
    ranks: Mapping[str, int] = field(default_factory=dict)
