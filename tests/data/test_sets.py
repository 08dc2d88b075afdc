"""Question sets with their documents, split by article, drawn with a seed."""

import json
from pathlib import Path

import pytest

from rag_kit.data.questions import Question, Span
from rag_kit.data.sets import pick, question_set, with_split
from rag_kit.errors import DataError

XQUAD = Path(__file__).parents[2].parent / "shared" / "data" / "xquad"


def squad(path: Path, articles: int) -> Path:
    data = [
        {
            "title": f"文章{article}",
            "paragraphs": [
                {
                    "context": f"Paragraph {number} of {article}: code A{article}-{number}. 代码如上。",
                    "qas": [
                        {
                            "id": f"{article}-{number}",
                            "question": f"What is the code of paragraph {number}?",
                            "answers": [{"text": "A", "answer_start": 35 + len(str(article)) - 1}],
                        }
                    ],
                }
                for number in range(2)
            ],
        }
        for article in range(articles)
    ]
    for article in data:
        for paragraph in article["paragraphs"]:
            answer = paragraph["qas"][0]["answers"][0]
            answer["answer_start"] = paragraph["context"].index("A")
    path.write_text(json.dumps({"data": data, "version": "1.1"}, ensure_ascii=False), encoding="utf-8")
    return path


def test_the_sample_comes_without_arguments() -> None:
    questions, documents, name = question_set()
    assert name == "handbook"
    sources = {document.metadata["source"] for document in documents}
    assert {span.source for question in questions for span in question.spans} <= sources
    assert {question.split for question in questions} == {"train", "test", "paraphrase"}


def test_a_squad_file_brings_its_documents_and_is_split_by_article(tmp_path: Path) -> None:
    questions, documents, name = question_set(squad(tmp_path / "set.json", articles=8))
    assert (name, len(documents), len(questions)) == ("set", 16, 16)
    sides = {
        split: {
            question.spans[0].source.rpartition("/")[0] for question in questions if question.split == split
        }
        for split in ("train", "test")
    }
    assert len(sides["train"]) == 6
    assert len(sides["test"]) == 2
    assert not sides["train"] & sides["test"]
    assert with_split(questions) == questions


def test_xquad_is_split_as_its_readme_says() -> None:
    if not XQUAD.is_dir():
        pytest.skip(f"XQuAD is not at {XQUAD}")
    for language in ("en", "zh"):
        questions, documents, _ = question_set(XQUAD / f"{language}.json")
        assert (len(questions), len(documents)) == (1190, 240)
        articles = {
            s: {q.spans[0].source.rpartition("/")[0] for q in questions if q.split == s}
            for s in ("train", "test")
        }
        assert {split: len(names) for split, names in articles.items()} == {"train": 36, "test": 12}


def test_picking_keeps_the_order_and_repeats_with_a_seed() -> None:
    questions = [Question(str(n), f"q{n}", ("a",), (Span("d", n, n + 1),), split="test") for n in range(50)]
    drawn = pick(questions, split="test", limit=10)
    assert drawn == pick(questions, split="test", limit=10)
    assert drawn != pick(questions, split="test", limit=10, seed=1)
    assert [int(q.id) for q in drawn] == sorted(int(q.id) for q in drawn)
    assert len(pick(questions, limit=99)) == 50


def test_a_split_that_is_not_there_lists_those_that_are() -> None:
    questions = [Question("1", "q", ("a",), split="test")]
    with pytest.raises(DataError) as told:
        pick(questions, split="dev")
    assert told.value.text("en") == (
        "No question has the split dev and the language - (splits at hand: test).",
        "Choose another with --split, or `--split all`.",
    )
    assert "test" in told.value.text("zh")[0]
