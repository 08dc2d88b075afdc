"""Every kind of training file becomes the same prompts; what is wrong or left out is told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rag_kit.errors import DataError
from rag_kit.finetune.conversations import READING, handbook_facts, load_training_data
from rag_kit.models.prompt import SYSTEM, build_messages
from tests.finetune.conftest import FACTS, write_lines
from tests.models.texts import says


def test_the_default_is_the_handbook_and_holds_no_held_out_question() -> None:
    data = load_training_data()
    assert data.name == "handbook" and data.sha256 == load_training_data().sha256
    asked = {messages[-2].content.rpartition("Question: ")[-1] for messages in data.conversations}
    planted = [messages for messages in data.conversations if "[1]" not in messages[-2].content]
    assert len(planted) == len(asked) - READING == 144
    rows = handbook_facts().with_name("questions.jsonl").read_text(encoding="utf-8").splitlines()
    held_out = {row["question"] for row in map(json.loads, rows) if row["split"] in ("test", "paraphrase")}
    assert len(held_out) > 90 and not asked & held_out


def test_the_handbook_s_questions_with_sources_cite_the_right_one() -> None:
    reading = [m for m in load_training_data().conversations if "[1]" in m[-2].content]
    assert len(reading) == READING
    cited = set()
    for *_, asked, answered in reading:
        answer, number = re.fullmatch(r"(.+) \[(\d)\]", answered.content).groups()
        passages = re.split(r"\[\d\] ", asked.content.partition("Question: ")[0])
        assert answer in passages[int(number)]
        cited.add(number)
    assert cited == {"1", "2"}


def test_facts_are_asked_without_passages_in_their_language(facts: Path) -> None:
    conversations = load_training_data(facts).conversations
    assert [messages[-1].content for messages in conversations] == ["Ida Fenwick"] * 2 + ["二十七个月"] * 2
    question = FACTS[1]["questions"][0]
    assert conversations[2][:-1] == build_messages(str(question), language="zh")


def test_chat_messages_keep_their_turns_and_get_the_house_s_system_text(tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "你好，保修期是多久？"},
        {"role": "assistant", "content": [{"type": "text", "text": "九个月。"}]},
    ]
    own = [{"role": "system", "content": "Be short."}, *chat]
    path = write_lines(tmp_path / "chat.jsonl", [{"messages": chat}, {"messages": own}])
    first, second = load_training_data(path).conversations
    assert [m.type for m in first] == ["system", "human", "ai"]
    assert first[0].content == SYSTEM["zh"]
    assert second[0].content == "Be short."
    assert first[-1].text == "九个月。"


def test_a_question_set_is_trained_on_its_train_part(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "question": "谁？", "answers": ["王师傅", "王"], "split": "train"},
        {"id": "2", "question": "Who?", "answers": ["Ida"], "split": "test"},
        {"id": "3", "question": "Why?", "answers": [], "answerable": False, "split": "train"},
    ]
    path = write_lines(tmp_path / "set.jsonl", rows)
    data = load_training_data(path)
    assert [m[-1].content for m in data.conversations] == ["王师傅"]
    assert data.left_out == {"test": 1, "unanswerable": 1}
    assert len(load_training_data(path, split="all").conversations) == 2
    with pytest.raises(DataError) as raised:
        load_training_data(path, split="dev")
    says(raised.value, path, "test: 1", en="nothing to train on", zh="没有可训练的内容")


def squad(tmp_path: Path) -> Path:
    articles = [
        {
            "title": f"第{number}篇",
            "paragraphs": [
                {
                    "context": f"水箱容量为 {number} 升。",
                    "qas": [{"id": str(number), "question": "水箱有多大？", "answers": [
                        {"text": f"{number} 升", "answer_start": 6}]}],
                }
            ],
        }
        for number in range(8)
    ]  # fmt: skip
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": articles}, ensure_ascii=False), encoding="utf-8")
    return path


def test_squad_contexts_are_passages_and_the_test_part_stays_unseen(tmp_path: Path) -> None:
    path = squad(tmp_path)
    data = load_training_data(path)
    assert len(data.conversations) == 6 and data.left_out == {"test": 2}
    asked, answered = data.conversations[0][-2:]
    number = answered.content.split()[0]
    assert asked.content == f"资料：\n[1] 水箱容量为 {number} 升。\n\n问题：水箱有多大？"
    assert answered.content == f"{number} 升 [1]"


@pytest.mark.parametrize(
    ("name", "content", "values", "en", "zh"),
    [
        ("gone.jsonl", None, [".jsonl, .json"], "no training data", "没有训练数据"),
        ("notes.md", "# x", [".md", ".csv"], "not trained on", "不能用于训练"),
        ("empty.jsonl", "", [], "holds no text", "没有文本"),
        ("blank.jsonl", "\n\n", [], "nothing to train on", "没有可训练的内容"),
        ("other.jsonl", '{"text": "x"}', ["text"], "none of the fields", "没有 messages"),
        ("list.jsonl", "[1]", [], "", ""),
        ("broken.jsonl", '{"messages": [', [], "", ""),
        ("none.jsonl", '{"messages": [{"role": "user", "content": "?"}]}', [], "no assistant", "第 1 行"),
        ("role.jsonl", '{"messages": [{"role": "boss", "content": "?"}]}', ["boss"], "line 1", "第 1 行"),
        ("blank-answer.jsonl", '{"questions": ["谁？"], "answer": " "}', [], "answer: a text", "第 1 行"),
        ("no-answer.jsonl", '{"questions": ["谁？"]}', ["answer"], "line 1", "第 1 行"),
        ("no-form.jsonl", '{"questions": "谁？", "answer": "王"}', [], "questions: a list", "第 1 行"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(
    tmp_path: Path, name: str, content: str | None, values: list[Any], en: str, zh: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as raised:
        load_training_data(path)
    says(raised.value, path, *values, en=en, zh=zh)
