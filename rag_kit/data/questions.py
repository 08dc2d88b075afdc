"""Question sets: questions with reference answers and, where known, the place of each answer.

Gold spans are offsets into documents, never chunk ids, so that they outlive re-chunking. Reads JSON lines
(this project's own form), SQuAD files (CMRC 2018, DRCD and XQuAD are of that shape) and tables. Notebook 03
shows it.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import regex
from langchain_core.documents import Document

from rag_kit.data.language import detect_language
from rag_kit.data.problems import SeveralProblems
from rag_kit.data.question_tables import table_records
from rag_kit.data.readers import decode_file, json_lines
from rag_kit.errors import DataError

_FORMATS = (".jsonl", ".json", ".csv", ".xlsx")
_FIELDS = {  # name: (type, required)
    "id": (str, True),
    "question": (str, True),
    "answers": (list, True),
    "spans": (list, False),
    "answerable": (bool, False),
    "language": (str, False),
    "split": (str, False),
    "paraphrase_of": (str, False),
}


@dataclass(frozen=True)
class Span:
    """A place in a document's text: characters `start` to `end` (exclusive) of `source`."""

    source: str
    start: int
    end: int


@dataclass(frozen=True)
class Question:
    """A question, the answers that count as right, and where in the documents they stand.

    Each span's text is one of `answers`, character by character.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    spans: tuple[Span, ...] = ()
    answerable: bool = True
    language: str = "en"
    split: str | None = None
    paraphrase_of: str | None = None


def load_questions(path: Path | str, documents: Sequence[Document] | None = None) -> list[Question]:
    """Read a question set: `.jsonl` (this project's form), `.json` (SQuAD 1.1 or 2.0), `.csv` or `.xlsx`.

    With `documents` every span is checked against their text. Tables: see `question_tables`. In a SQuAD
    file the spans refer to `squad_documents(path)`, and a negative `answer_start` gives no span.

    Raises one DataError that lists the first faults with line (SQuAD: question id; table: row) and id, and
    counts them all.
    """
    path = Path(path)
    if not path.exists():
        raise DataError("questions_missing", path=path)
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise DataError("questions_format", path=path, supported=", ".join(_FORMATS))
    if suffix == ".jsonl":
        records: Iterator[tuple[int, dict[str, Any]]] = json_lines(path, decode_file(path).text)
    elif suffix == ".json":
        records = enumerate(_squad_records(path), 1)
        documents = squad_documents(path) if documents is None else documents
    else:
        records = table_records(path)
    questions = _checked(path, records, documents)
    if not questions:
        raise DataError("questions_none", path=path)
    return questions


def squad_documents(path: Path | str) -> list[Document]:
    """Return each paragraph of a SQuAD file as a document whose source is `<title>/<number>`, from 0."""
    return [
        Document(page_content=context, metadata={"source": source})
        for source, context, _ in _squad_paragraphs(Path(path))
    ]


def without_spans(questions: Sequence[Question]) -> int:
    """Return how many answerable questions have no gold span: recall@k leaves these out."""
    return sum(question.answerable and not question.spans for question in questions)


def _checked(
    path: Path, records: Iterator[tuple[int, dict[str, Any]]], documents: Sequence[Document] | None
) -> list[Question]:
    """Return the questions; raises one error with every fault of the file."""
    texts = None if documents is None else {each.metadata["source"]: each.page_content for each in documents}
    questions: list[Question] = []
    problems: list[DataError] = []
    seen: dict[str, int] = {}
    for line, record in records:
        where = {"line": line, "id": record.get("id") or "?"}
        faults = list(_field_faults(record, where))
        if not faults:
            question = _question(record)
            faults = list(_question_faults(question, texts, where))
            if question.id in seen:
                faults.append(DataError("question_duplicate", first=seen[question.id], **where))
            seen.setdefault(question.id, line)
            questions.append(question)
        problems += faults
    if problems:
        raise SeveralProblems("questions_invalid", problems, path=path)
    return questions


def _field_faults(record: dict[str, Any], where: dict[str, Any]) -> Iterator[DataError]:
    for name, (kind, required) in _FIELDS.items():
        value = record.get(name)
        if value is None and required:
            yield DataError("question_field_missing", field=name, **where)
        elif value is not None and not isinstance(value, kind):
            yield DataError("question_field_type", field=name, value=_shown(value), **where)
    if unknown := sorted(record.keys() - _FIELDS):
        known = ", ".join(_FIELDS)
        yield DataError("question_field_unknown", field=", ".join(unknown), known=known, **where)
    answers, spans = record.get("answers"), record.get("spans")
    if isinstance(answers, list) and not all(isinstance(answer, str) and answer for answer in answers):
        yield DataError("question_field_type", field="answers", value=_shown(answers), **where)
    for span in spans if isinstance(spans, list) else ():
        if not _is_span(span):
            yield DataError("question_field_type", field="spans", value=_shown(span), **where)


def _is_span(span: Any) -> bool:
    if not isinstance(span, dict) or span.keys() != {"source", "start", "end"}:
        return False
    source, start, end = span["source"], span["start"], span["end"]
    # not isinstance: a bool is an int too
    return isinstance(source, str) and type(start) is type(end) is int and 0 <= start < end


def _question(record: dict[str, Any]) -> Question:
    return Question(
        id=record["id"],
        text=record["question"],
        answers=tuple(record["answers"]),
        spans=tuple(Span(**span) for span in record.get("spans") or ()),
        answerable=record.get("answerable") is not False,
        language=record.get("language") or detect_language(record["question"]),
        split=record.get("split"),
        paraphrase_of=record.get("paraphrase_of"),
    )


def _question_faults(
    question: Question, texts: dict[str, str] | None, where: dict[str, Any]
) -> Iterator[DataError]:
    if not question.text.strip():
        yield DataError("question_field_missing", field="question", **where)
    if question.answerable and not question.answers:
        yield DataError("question_unanswered", **where)
    if texts is None:
        return
    for span in question.spans:
        text = texts.get(span.source)
        place = {"source": span.source, "start": span.start, "end": span.end, **where}
        if text is None:
            available = ", ".join(sorted(texts)[:5]) + (", …" if len(texts) > 5 else "")
            yield DataError("question_source", available=available, **place)
        elif (found := text[span.start : span.end]) not in question.answers:
            expected = question.answers[0] if question.answers else ""
            places = regex.finditer(regex.escape(expected), text, overlapped=True) if expected else ()
            stands = [match.start() for match in islice(places, 3)]
            key = "question_offset_elsewhere" if stands else "question_offset"
            elsewhere = ", ".join(f"{start}–{start + len(expected)}" for start in stands)
            yield DataError(key, found=found[:80], expected=expected, elsewhere=elsewhere, **place)


def _squad_paragraphs(path: Path) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Return (source, text, questions) of each paragraph."""
    paragraphs: list[tuple[str, str, list[dict[str, Any]]]] = []
    numbers: dict[str, int] = {}  # CMRC 2018 has a title more than once
    try:
        for article in json.loads(decode_file(path).text)["data"]:
            for paragraph in article["paragraphs"]:
                title = str(article.get("title") or paragraph.get("id") or "untitled")
                number = numbers[title] = numbers.get(title, -1) + 1
                paragraphs.append((f"{title}/{number}", paragraph["context"], paragraph["qas"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError("questions_not_squad", path=path, reason=reason) from error
    return paragraphs


def _squad_records(path: Path) -> Iterator[dict[str, Any]]:
    for source, _, entries in _squad_paragraphs(path):
        for each in entries:
            impossible = bool(each.get("is_impossible", False))
            answers = [] if impossible else each.get("answers", [])
            spans = {
                (answer["answer_start"], answer["answer_start"] + len(answer["text"])): None
                for answer in answers
                if answer["answer_start"] >= 0 and answer["text"]
            }
            yield {
                "id": str(each["id"]),
                "question": each["question"],
                "answers": list(dict.fromkeys(answer["text"] for answer in answers)),
                "spans": [{"source": source, "start": start, "end": end} for start, end in spans],
                "answerable": not impossible,
            }


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)[:60]
