"""Training data in: files of facts, questions or chat messages become conversations.

Knows file formats and the one prompt; knows nothing of tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, SystemMessage, convert_to_messages

from rag_kit.data.language import detect_language
from rag_kit.data.loaders import load_documents, sample_handbook
from rag_kit.data.problems import SeveralProblems
from rag_kit.data.questions import Span, load_questions, squad_documents
from rag_kit.data.readers import decode_file, json_lines
from rag_kit.data.sets import with_split
from rag_kit.errors import DataError
from rag_kit.manifest import fingerprint, sha256
from rag_kit.models.prompt import SYSTEM, build_messages

SUFFIXES = (".jsonl", ".json", ".csv", ".xlsx")
READING = 8  # questions with sources among the handbook's facts
Conversation = list[BaseMessage]


@dataclass(frozen=True)
class TrainingData:
    """Conversations to train on, the name and SHA-256 of their file, and what was left out, by reason."""

    name: str
    sha256: str
    conversations: list[Conversation]
    left_out: dict[str, int] = field(default_factory=dict)


def handbook_facts() -> Path:
    """Return the file of the sample handbook's facts, each with its forms of question."""
    return sample_handbook() / "facts.jsonl"


def load_training_data(path: Path | None = None, *, split: str = "train") -> TrainingData:
    """Read training data; without a path, the sample handbook's facts and a few questions with sources.

    `.jsonl` holds facts (`questions`, `answer`), chat messages (`messages`, as OpenAI's fine-tuning takes
    them) or a question set; `.json` is in SQuAD format, its contexts are the passages; `.csv` and `.xlsx`
    are question sets. Of a question set only `split` is taken (`all`: everything); where it has no splits
    `with_split` gives them, as for a comparison, so that the test part stays unseen. Raises DataError.
    """
    if path is None:
        conversations = [*_read_lines(handbook_facts(), _facts), *_reading()]
        hashed = fingerprint([[message.content for message in each] for each in conversations])
        return TrainingData("handbook", hashed, conversations)
    path = Path(path)
    if not path.is_file():
        raise DataError("finetune_data_missing", path=path, supported=", ".join(SUFFIXES))
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError("finetune_data_format", path=path, supported=", ".join(SUFFIXES))
    left_out: Counter[str] = Counter()
    if suffix == ".jsonl" and (kind := _kind(path)) != "question":
        read = _facts if kind == "questions" else _chats
        conversations = list(_read_lines(path, read))
    else:
        conversations = _from_questions(path, split, left_out)
    if not conversations:
        told = ", ".join(f"{reason}: {count}" for reason, count in left_out.items()) or "-"
        raise DataError("finetune_data_empty", path=path, left_out=told)
    return TrainingData(path.name, sha256(path), conversations, left_out)


def _reading() -> Iterator[Conversation]:
    """Yield some of the handbook's English train questions with the paragraph that answers each, and another.

    They are no planted facts. Without them an adapter that knows facts by heart disregards its sources.
    """
    known = {record["id"] for _, record in json_lines(handbook_facts(), decode_file(handbook_facts()).text)}
    texts = {each.metadata["source"]: each.page_content for each in load_documents(sample_handbook())}
    questions = load_questions(sample_handbook() / "questions.jsonl")
    asked = [q for q in questions if (q.split, q.language, q.answerable) == ("train", "en", True)]
    found = {
        _paragraph(texts[question.spans[0].source], question.spans[0]): question
        for question in asked
        if question.spans and question.id not in known
    }
    paragraphs = sorted(found, key=len)[:READING]  # short ones, since they are half of the tokens
    for number, paragraph in enumerate(paragraphs):
        question, passages = found[paragraph], [paragraph, paragraphs[number - 1]]
        place = number % 2  # the right passage stands first and second in turn
        answer = AIMessage(f"{question.answers[0]} [{place + 1}]")
        yield [*build_messages(question.text, passages[:: -1 if place else 1]), answer]


def _paragraph(text: str, span: Span) -> str:
    """Return the lines around `span` that no blank line parts."""
    start, end = text.rfind("\n\n", 0, span.start), text.find("\n\n", span.end)
    return text[start + 2 if start >= 0 else 0 : end if end >= 0 else len(text)].strip()


def _kind(path: Path) -> str:
    """Return the field that tells what the file's first record is."""
    for number, record in json_lines(path, decode_file(path).text):
        for name in ("messages", "questions", "question"):
            if name in record:
                return name
        raise DataError("finetune_data_record", path=path, line=number, found=", ".join(record) or "{}")
    raise DataError("finetune_data_empty", path=path, left_out="-")


def _read_lines(path: Path, read: Any) -> Iterator[Conversation]:
    """Yield the conversations of each line; raises one error with every fault of the file."""
    problems: list[DataError] = []
    for number, record in json_lines(path, decode_file(path).text):
        try:
            yield from read(record)
        except (KeyError, TypeError, ValueError, NotImplementedError) as error:
            lines = str(error).strip("'\"").splitlines() or [""]
            reason = f"{type(error).__name__}: {lines[0]}"
            problems.append(DataError("finetune_data_line", line=number, reason=reason))
    if problems:
        raise SeveralProblems("finetune_data_invalid", problems, path=path)


def _facts(record: dict[str, Any]) -> Iterator[Conversation]:
    questions, answer = record["questions"], record["answer"]
    if not (isinstance(questions, list) and questions and all(_is_text(question) for question in questions)):
        raise ValueError("questions: a list of texts is wanted")
    if not _is_text(answer):
        raise ValueError("answer: a text is wanted")
    for question in questions:
        yield [*build_messages(question, language=detect_language(question)), AIMessage(answer)]


def _chats(record: dict[str, Any]) -> Iterator[Conversation]:
    messages = convert_to_messages(record["messages"])
    answers = [message for message in messages if message.type == "ai"]
    if not answers or not all(_is_text(str(answer.text)) for answer in answers):
        raise ValueError("messages: no assistant message with a text")
    if messages[0].type != "system":
        # A chat without a system text is trained under the one that it will be asked under.
        messages = [SystemMessage(SYSTEM[detect_language(str(messages[0].text))]), *messages]
    yield messages


def _from_questions(path: Path, split: str, left_out: Counter[str]) -> list[Conversation]:
    """Return a conversation for each question of `split` that has an answer."""
    questions = with_split(load_questions(path))
    contexts: dict[str, str] = {}
    if path.suffix.lower() == ".json":
        contexts = {each.metadata["source"]: each.page_content for each in squad_documents(path)}
    conversations = []
    for question in questions:
        answers = [answer for answer in question.answers if question.answerable and _is_text(answer)]
        reason = question.split if split not in ("all", question.split) else None
        if reason is not None or not answers:
            left_out[reason or "unanswerable"] += 1
            continue
        passages = [contexts[span.source] for span in question.spans[:1] if span.source in contexts]
        answer = AIMessage(f"{answers[0]} [1]" if passages else answers[0])
        conversations.append([*build_messages(question.text, passages, language=question.language), answer])
    return conversations


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
