"""A question set with the documents it is about: the sample's, a SQuAD file's, or the user's own."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from langchain_core.documents import Document

from rag_kit.data.loaders import load_documents, sample_handbook
from rag_kit.data.questions import Question, load_questions, squad_documents
from rag_kit.errors import DataError

TRAIN_SHARE = 0.75


def question_set(
    questions: Path | None = None, documents: Path | None = None
) -> tuple[list[Question], list[Document], str]:
    """Return questions, documents and the set's name; without arguments, the sample handbook's.

    A SQuAD file brings its own documents; other files need `documents` for arms that retrieve.
    """
    if questions is None and documents is None:
        questions, documents = sample_handbook() / "questions.jsonl", sample_handbook()
    if questions is None:
        raise DataError("questions_missing", path=documents)
    if documents is not None:
        texts = load_documents(documents)
        name = documents.resolve().stem
    else:
        texts = squad_documents(questions) if questions.suffix.lower() == ".json" else []
        name = questions.resolve().stem
    return with_split(load_questions(questions, texts or None)), texts, name


def with_split(questions: Sequence[Question], seed: int = 0) -> list[Question]:
    """Give questions without a split one by document, so that none stands on both sides.

    Documents of one article (`ARTICLE/number`) stay together: their list, in the file's order, is
    shuffled by `random.Random(seed)`; the first three quarters are `train`, the rest `test`.
    """
    if not questions or any(question.split for question in questions):
        return list(questions)
    groups = list(dict.fromkeys(_group(question) for question in questions))
    random.Random(seed).shuffle(groups)
    train = set(groups[: round(TRAIN_SHARE * len(groups))])
    return [replace(q, split="train" if _group(q) in train else "test") for q in questions]


def pick(
    questions: Sequence[Question],
    *,
    split: str = "all",
    language: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Question]:
    """Return the questions of one split and language, at most `limit` of them drawn with `seed`.

    Raises DataError where none is left (the splits at hand are listed).
    """
    chosen = [q for q in questions if split in ("all", q.split) and language in (None, q.language)]
    if not chosen:
        known = ", ".join(sorted({str(question.split) for question in questions}))
        raise DataError("questions_no_split", split=split, language=language or "-", known=known)
    if limit is not None and limit < len(chosen):
        drawn = set(random.Random(seed).sample(range(len(chosen)), limit))
        chosen = [question for number, question in enumerate(chosen) if number in drawn]
    return chosen


def _group(question: Question) -> str:
    source = question.spans[0].source if question.spans else question.id
    return source.rpartition("/")[0] or source
