"""One row of a comparison: its columns, and how an answer or a failure fills them.

Knows one question, one arm and one answer at a time.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_kit.compare.metrics import contains, exact_match, recall_at_k, token_f1
from rag_kit.manifest import fingerprint, write_atomic

if TYPE_CHECKING:
    import pyarrow as pa

    from rag_kit.answer import Answer
    from rag_kit.compare.compare import Arm
    from rag_kit.compare.run import FrozenContext
    from rag_kit.data.questions import Question
    from rag_kit.index.hit import Hit

Row = dict[str, Any]
RECALL_AT = (1, 5)
SCORES = ("exact_match", "f1", "contains", *(f"recall_at_{k}" for k in RECALL_AT))
TIMES = ("first_token_s", "total_s", "retrieval_s")  # less is better
METRICS = (*SCORES, *TIMES, "tokens_per_s")
COLUMNS = {
    "question_id": "string",
    "question": "string",
    "language": "string",
    "answerable": "bool",
    "split": "string",
    "arm": "string",
    "model": "string",
    "context": "string",
    "model_label": "string",
    "answer": "string",
    "reasoning": "string",  # for the reader; never scored
    "references": "strings",
    **dict.fromkeys(SCORES, "double"),
    "citations": "integers",
    "input_tokens": "int64",
    "output_tokens": "int64",
    **dict.fromkeys((*TIMES, "tokens_per_s"), "double"),
    "load_s": "double",
    "finish_reason": "string",
    "context_hash": "string",
    "prompt_hash": "string",
    "degraded": "strings",
    "error": "string",
}


def failed_row(arm: "Arm", question: "Question", passages: "Sequence[Hit]", reason: str) -> Row:
    """Return a row that says why there is no answer; every score is missing."""
    return {**_asked(arm, question, passages), "error": reason}


def answered_row(
    arm: "Arm", question: "Question", passages: "Sequence[Hit]", context: "FrozenContext", result: "Answer"
) -> Row:
    """Return the row of one answer; a score without anything to score against is None.

    `recall_at_k` and `retrieval_s` are those of the frozen retrieval; the other seconds do not hold it,
    nor `load_s`, the model's own way into memory.
    """
    usage, times = result.usage or {}, result.timings or {}
    references, spans = (question.answers, question.spans) if question.answerable else ((), ())
    row = _asked(arm, question, passages) | {
        "model_label": result.model,
        "answer": result.text,
        "reasoning": result.reasoning,
        "exact_match": exact_match(result.text, references, question.language),
        "f1": token_f1(result.text, references, question.language),
        "contains": contains(result.text, references, question.language),
        "citations": list(result.citations),
        "input_tokens": usage.get("input_tokens"),
        "output_tokens": usage.get("output_tokens"),
        "first_token_s": times.get("first_token_s"),
        "total_s": times.get("total_s"),
        "tokens_per_s": result.tokens_per_s,
        "finish_reason": result.finish_reason,
        "prompt_hash": result.prompt_hash,
        "degraded": list(result.degraded),
    }
    if arm.context == "retrieved":
        row |= {f"recall_at_{k}": recall_at_k(context.hits, spans, k) for k in RECALL_AT}
        row["retrieval_s"] = context.seconds
    return row


def table(rows: Sequence[Row]) -> "pa.Table":
    """Return rows as an Arrow table of COLUMNS; what a row lacks is null."""
    import pyarrow as pa

    types = {"strings": pa.list_(pa.string()), "integers": pa.list_(pa.int64()), "bool": pa.bool_()}
    fields = [(name, types.get(kind) or pa.type_for_alias(kind)) for name, kind in COLUMNS.items()]
    return pa.Table.from_pylist(list(rows), schema=pa.schema(fields))


def write_parquet(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as Parquet, atomically."""
    from io import BytesIO

    from pyarrow import parquet

    buffer = BytesIO()
    parquet.write_table(table(rows), buffer)
    write_atomic(path, buffer.getvalue())


def _asked(arm: "Arm", question: "Question", passages: "Sequence[Hit]") -> Row:
    return {
        "question_id": question.id,
        "question": question.text,
        "language": question.language,
        "answerable": question.answerable,
        "split": question.split,
        "arm": str(arm),
        "model": arm.model,
        "context": arm.context,
        "references": list(question.answers),
        "context_hash": fingerprint([hit.document.page_content for hit in passages]),
    }
