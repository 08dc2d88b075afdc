"""The sample knowledge base keeps what its README promises: counts, offsets, splits, languages."""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

HANDBOOK = Path(__file__).parents[2] / "rag_kit" / "data" / "handbook"
HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")


def read(path: Path) -> str:
    """Decode without newline translation, so that a carriage return would show."""
    return path.read_bytes().decode("utf-8")


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read(HANDBOOK / name).split("\n") if line]


DOCUMENTS = {path.relative_to(HANDBOOK).as_posix(): read(path) for path in sorted(HANDBOOK.glob("*/*.md"))}
QUESTIONS = lines("questions.jsonl")
FACTS = lines("facts.jsonl")
BY_ID = {question["id"]: question for question in QUESTIONS}
OWN = [question for question in QUESTIONS if question["split"] != "paraphrase"]
PARAPHRASES = [question for question in QUESTIONS if question["split"] == "paraphrase"]


def plain(text: str) -> str:
    """Letters and digits only, lower case: two wordings that differ only in marks are the same."""
    return re.sub(r"[\W_]", "", text.casefold())


def test_counts() -> None:
    answerable = Counter(question["language"] for question in OWN if question["answerable"])
    unanswerable = Counter(question["language"] for question in OWN if not question["answerable"])
    assert answerable == {"en": 94, "zh": 92}
    assert unanswerable == {"en": 10, "zh": 10}
    assert (len(PARAPHRASES), len(FACTS), len(DOCUMENTS)) == (20, 24, 28)
    assert Counter(source[:3] for source in DOCUMENTS) == {"en/": 14, "zh/": 14}


def test_readme_tells_the_counts() -> None:
    readme = read(HANDBOOK / "README.md")
    count = Counter((question["language"], question["split"], question["answerable"]) for question in OWN)
    for split in ("train", "test"):
        en, zh = count["en", split, True], count["zh", split, True]
        assert f"| answerable, {split} | {en} | {zh} | {en + zh} |" in readme
    shares = [f"{count[lang, 'train', False]} / {count[lang, 'test', False]}" for lang in ("en", "zh")]
    assert f"| unanswerable, train / test | {shares[0]} | {shares[1]} | 20 |" in readme
    assert f"| {len(QUESTIONS)} questions" in readme
    assert f"共 {len(QUESTIONS)} 题" in readme


@pytest.mark.parametrize("source", DOCUMENTS)
def test_a_document_is_of_moderate_length_and_has_headings(source: str) -> None:
    text = DOCUMENTS[source]
    if source.startswith("en/"):
        assert 250 <= len(text.split()) <= 500
    else:
        assert 500 <= len(text) <= 900
    assert text.startswith("# ")
    assert text.count("\n## ") >= 3
    assert re.search(r"^(- |1\. |\*\*|\*|\|)", text, re.MULTILINE)


@pytest.mark.parametrize("name", [*DOCUMENTS, "questions.jsonl", "facts.jsonl", "README.md"])
def test_files_are_utf8_without_bom_and_end_lines_with_lf(name: str) -> None:
    text = read(HANDBOOK / name)
    assert "\r" not in text
    assert not text.startswith("\ufeff")
    assert text.endswith("\n") and not text.endswith("\n\n")


def test_documents_hold_what_tempts_chunkers() -> None:
    english = "".join(text for source, text in DOCUMENTS.items() if source.startswith("en/"))
    chinese = "".join(text for source, text in DOCUMENTS.items() if source.startswith("zh/"))
    for temptation in ("2.5 mm", "K7.2", "Qwen2.5", "...", "⛈️", "|---|", "1. ", "- "):
        assert temptation in english
    for temptation in ("2.5 毫米", "T5.2", "Qwen2.5-0.5B", "……", "“", "「", "😊", "|---|", "1. ", "- "):
        assert temptation in chinese


def test_texts_are_in_the_language_they_name() -> None:
    for source, text in DOCUMENTS.items():
        assert bool(HAN.search(text)) == source.startswith("zh/"), source
        if source.startswith("zh/"):
            assert len(HAN.findall(text)) > len(text) / 2, source
    for question in QUESTIONS:
        assert bool(HAN.search(question["question"])) == (question["language"] == "zh"), question["id"]
        if question["language"] == "en":
            assert not any(HAN.search(answer) for answer in question["answers"]), question["id"]
    for fact in FACTS:
        assert not any(HAN.search(text) for text in [*fact["questions"], fact["answer"]]), fact["id"]


def test_ids_and_questions_are_unique() -> None:
    assert len(BY_ID) == len(QUESTIONS)
    assert len({plain(question["question"]) for question in QUESTIONS}) == len(QUESTIONS)


def test_rows_have_the_promised_fields() -> None:
    fields = {"id", "question", "answers", "spans", "answerable", "language", "split"}
    for question in QUESTIONS:
        extra = {"paraphrase_of"} if question["split"] == "paraphrase" else set()
        assert set(question) == fields | extra, question["id"]
        assert question["split"] in {"train", "test", "paraphrase"}
        assert question["language"] in {"en", "zh"}
        assert question["id"].startswith(question["language"] + "-")
        assert bool(question["answers"]) == bool(question["spans"]) == question["answerable"], question["id"]


def test_offsets_point_at_the_first_answer() -> None:
    for question in QUESTIONS:
        for span in question["spans"]:
            assert span["source"].startswith(question["language"] + "/"), question["id"]
            found = DOCUMENTS[span["source"]][span["start"] : span["end"]]
            assert found == question["answers"][0], question["id"]
            assert found == found.strip() and "\n" not in found
        assert len(question["spans"]) <= 1


def test_answers_are_short() -> None:
    for question in QUESTIONS:
        assert len(set(question["answers"])) == len(question["answers"]), question["id"]
        for answer in question["answers"]:
            assert 1 <= len(answer.split()) <= 6 and len(answer) <= 24, question["id"]


def test_the_split_is_by_document() -> None:
    splits: defaultdict[str, set[str]] = defaultdict(set)
    for question in OWN:
        for span in question["spans"]:
            splits[span["source"]].add(question["split"])
    assert set(splits) == set(DOCUMENTS)
    assert all(len(split) == 1 for split in splits.values())
    share = Counter((source[:2], *split) for source, split in splits.items())
    assert share == {("en", "train"): 8, ("en", "test"): 6, ("zh", "train"): 8, ("zh", "test"): 6}
    answerable = [question for question in OWN if question["answerable"]]
    trained = sum(question["split"] == "train" for question in answerable)
    assert 0.55 <= trained / len(answerable) <= 0.65
    unanswerable = Counter((q["language"], q["split"]) for q in OWN if not q["answerable"])
    assert unanswerable == {("en", "train"): 6, ("en", "test"): 4, ("zh", "train"): 6, ("zh", "test"): 4}


def test_paraphrases_ask_for_facts_in_other_words() -> None:
    facts = {fact["id"]: fact for fact in FACTS}
    forms = {plain(form) for fact in FACTS for form in fact["questions"]}
    for paraphrase in PARAPHRASES:
        original = BY_ID[paraphrase["paraphrase_of"]]
        assert original["split"] == "train" and original["id"] in facts, paraphrase["id"]
        assert (paraphrase["answers"], paraphrase["spans"]) == (original["answers"], original["spans"])
        assert plain(paraphrase["question"]) not in forms, paraphrase["id"]
    assert len({paraphrase["paraphrase_of"] for paraphrase in PARAPHRASES}) >= 18


def test_facts_come_from_english_training_questions() -> None:
    for fact in FACTS:
        question = BY_ID[fact["id"]]
        assert set(fact) == {"id", "questions", "answer"}
        assert (question["language"], question["split"]) == ("en", "train"), fact["id"]
        assert fact["questions"][0] == question["question"]
        assert fact["answer"] == question["answers"][0]
        assert len(fact["questions"]) == 6
        assert 1 <= len(fact["answer"].split()) <= 4
    assert len({plain(form) for fact in FACTS for form in fact["questions"]}) == 24 * 6


def test_answers_of_facts_differ_and_cannot_be_read_off_a_question() -> None:
    answers = [plain(fact["answer"]) for fact in FACTS]
    assert len(set(answers)) == len(FACTS)
    asked = [plain(form) for fact in FACTS for form in fact["questions"]]
    asked += [plain(paraphrase["question"]) for paraphrase in PARAPHRASES]
    for answer in answers:
        assert sum(answer in other for other in answers) == 1, answer
        assert not any(answer in question for question in asked), answer
        assert sum(answer in plain(text) for text in DOCUMENTS.values()) == 1, answer
