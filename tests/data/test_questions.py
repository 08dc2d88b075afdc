import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.documents import Document

from rag_kit.data.language import detect_language
from rag_kit.data.loaders import load_documents, sample_handbook
from rag_kit.data.questions import (
    Question,
    Span,
    load_questions,
    squad_documents,
    without_spans,
)
from rag_kit.errors import DataError

TEXT = "退货期限为三十天。The K7 costs 2.5 dollars, or 2.5 euros."
DOCUMENTS = [Document(page_content=TEXT, metadata={"source": "zh/退货.md"})]
GOOD = {
    "id": "zh-001",
    "question": "退货期限多久？",
    "answers": ["三十天"],
    "spans": [{"source": "zh/退货.md", "start": 5, "end": 8}],
    "answerable": True,
    "language": "zh",
    "split": "train",
}


def write(path: Path, *records: dict) -> Path:
    path.write_text(
        "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records), encoding="utf-8"
    )
    return path


words = st.text(min_size=1, max_size=12)
spans = st.builds(
    lambda source, start, length: Span(source, start, start + length), words, st.integers(0), st.integers(1)
)
generated = st.lists(
    st.builds(
        Question,
        id=words,
        text=words.filter(str.strip),
        answers=st.lists(words, min_size=1).map(tuple),
        spans=st.lists(spans, max_size=3).map(tuple),
        answerable=st.booleans(),
        language=st.sampled_from(["zh", "en"]),
        split=st.none() | words,
        paraphrase_of=st.none() | words,
    ),
    min_size=1,
    unique_by=lambda question: question.id,
)


@settings(max_examples=100, deadline=None)
@given(questions=generated)
def test_written_questions_come_back_as_they_were(tmp_path_factory, questions):
    path = tmp_path_factory.mktemp("set") / "questions.jsonl"
    records = [asdict(question) for question in questions]
    write(path, *({"question": record.pop("text"), **record} for record in records))
    assert load_questions(path) == questions


def test_the_json_form_is_as_documented(tmp_path):
    path = write(tmp_path / "q.jsonl", GOOD)
    (question,) = load_questions(path, DOCUMENTS)
    span = Span("zh/退货.md", 5, 8)
    assert question == Question("zh-001", "退货期限多久？", ("三十天",), (span,), True, "zh", "train")


def test_what_is_left_out_has_its_default(tmp_path):
    records = [
        {"id": "a", "question": "退货 K7 吗？", "answers": ["是"]},
        {"id": "b", "question": "Why?", "answers": ["x"]},
    ]
    chinese, english = load_questions(write(tmp_path / "q.jsonl", *records))
    assert (chinese.language, english.language) == ("zh", "en")
    assert chinese.answerable and chinese.spans == () and chinese.split is None
    unanswerable = replace(chinese, answers=(), answerable=False)
    assert without_spans([chinese, english, unanswerable]) == 2


def test_the_sample_questions_stand_where_they_say():
    folder = sample_handbook()
    if not (folder / "questions.jsonl").exists():
        pytest.skip("the sample handbook has no questions yet")
    questions = load_questions(folder / "questions.jsonl", load_documents(folder))
    assert without_spans(questions) == 0
    assert {question.language for question in questions} == {"zh", "en"}


SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": title,
            "paragraphs": [
                {
                    "context": TEXT,
                    "qas": [
                        {
                            "id": f"{title}-1",
                            "question": "退货期限多久？",
                            "answers": [
                                {"text": "三十天", "answer_start": 5},
                                {"text": "三十天", "answer_start": 5},
                            ],
                            "is_impossible": False,
                        },
                        {"id": f"{title}-2", "question": "Who?", "answers": [], "is_impossible": True},
                        {
                            "id": f"{title}-3",
                            "question": "How much?",
                            "answers": [{"text": "two and a half", "answer_start": -1}],
                        },
                    ],
                }
            ],
        }
        for title in ("退货", "退货2")
    ],
}


def test_squad_files_give_questions_and_documents(tmp_path):
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(SQUAD), encoding="utf-8")
    documents = squad_documents(path)
    assert [each.metadata["source"] for each in documents] == ["退货/0", "退货2/0"]
    first, second, third = load_questions(path)[:3]
    assert first == Question("退货-1", "退货期限多久？", ("三十天",), (Span("退货/0", 5, 8),), language="zh")
    assert not second.answerable and second.answers == ()
    assert third.answers == ("two and a half",) and third.spans == ()


def test_squad_paragraphs_under_one_title_have_sources_of_their_own(tmp_path):
    path = tmp_path / "dev.json"
    article = {"title": "t", "paragraphs": [{"context": "一", "qas": []}]}
    path.write_text(json.dumps({"data": [article, article]}), encoding="utf-8")
    assert [each.metadata["source"] for each in squad_documents(path)] == ["t/0", "t/1"]


def test_xquad_is_read_whole():
    folder = Path(__file__).parents[2].parent / "shared/data/xquad"
    if not folder.exists():
        pytest.skip("XQuAD is not beside the project")
    for language in ("en", "zh"):
        questions = load_questions(folder / f"{language}.json")
        assert len(questions) == 1190 and len(squad_documents(folder / f"{language}.json")) == 240
        assert without_spans(questions) == 0
        assert sum(question.language == language for question in questions) > 1150


HEADINGS = {
    "en": ["ID", "Question", "Answer", "Source", "Start", "End", "Answerable", "Language", "Split", "note"],
    "zh": ["编号", "问题", "参考答案", "来源", "起始", "结束", "可回答", "语言", "划分", "备注"],
}
ROWS = [
    ["zh-001", "退货期限多久？", "三十天|30天｜一个月；整", "zh/退货.md", 5, 8, "", "中文", "train", "n"],
    [None, "How much?", "2.5 dollars", "zh/退货.md", None, None, None, None, None, None],
    [None] * 10,
    ["x", "Who?", None, None, None, None, "否", "English", "test", None],
]
EXPECTED = [
    Question(
        "zh-001",
        "退货期限多久？",
        ("三十天", "30天", "一个月；整"),
        (Span("zh/退货.md", 5, 8),),
        True,
        "zh",
        "train",
    ),
    Question("row-3", "How much?", ("2.5 dollars",)),
    Question("x", "Who?", (), (), False, "en", "test"),
]


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("kind", ["xlsx", "utf-8", "utf-8-sig", "gb18030"])
def test_tables_with_headings_in_either_language(tmp_path, make_xlsx, language, kind):
    if kind == "xlsx":
        path = make_xlsx("q.xlsx", {"empty": [], "set": [HEADINGS[language], *ROWS]})
    else:
        path = tmp_path / "q.csv"
        lines = [
            ",".join("" if cell is None else str(cell) for cell in row) for row in [HEADINGS[language], *ROWS]
        ]
        path.write_bytes("\r\n".join(lines).encode(kind))
    assert load_questions(path, DOCUMENTS) == EXPECTED


def fails(path, english, chinese, documents=DOCUMENTS):
    with pytest.raises(DataError) as caught:
        load_questions(path, documents)
    assert str(path) in str(caught.value)
    for lang, expected in (("en", english), ("zh", chinese)):
        what, remedy = caught.value.text(lang)
        assert expected in what and what[-1] in ".。" and remedy[-1] in ".。"


CHANGES = {
    "elsewhere": (
        {"answers": ["2.5"]},
        "has 1 fault(s): line 2 (zh-002): "
        "zh/退货.md 5–8 reads “三十天”, not the answer “2.5”, which stands at 22–25, 38–41.",
        "有 1 处错误：第 2 行（zh-002）："
        "zh/退货.md 的 5–8 是“三十天”，不是答案“2.5”；答案位于 22–25, 38–41。",
    ),
    "off by one": (
        {"spans": [{"source": "zh/退货.md", "start": 4, "end": 8}]},
        "zh/退货.md 4–8 reads “为三十天”, not the answer “三十天”, which stands at 5–8",
        "zh/退货.md 的 4–8 是“为三十天”，不是答案“三十天”；答案位于 5–8",
    ),
    "nowhere": ({"answers": ["七天"]}, "which is nowhere in that document", "该文档中没有这个答案"),
    "unknown source": (
        {"spans": [{"source": "en/x.md", "start": 0, "end": 1}]},
        "the document en/x.md is unknown; there are zh/退货.md",
        "没有文档 en/x.md；现有 zh/退货.md",
    ),
    "duplicate id": (
        {"id": "zh-001"},
        "line 2: the id zh-001 stands already in line 1",
        "编号 zh-001 在第 1 行已出现",
    ),
    "no id": ({"id": None}, "line 2 (?): the field id is missing", "字段 id 缺失"),
    "blank question": (
        {"question": " "},
        "(zh-002): the field question is missing or empty",
        "字段 question 缺失或为空",
    ),
    "no answers": ({"answers": None}, "the field answers is missing", "字段 answers 缺失"),
    "unanswered": (
        {"answers": [], "spans": []},
        "it is answerable but has no answer",
        "标为可回答，却没有答案",
    ),
    "answers a string": (
        {"answers": "三十天"},
        'the field answers cannot be "三十天"',
        '字段 answers 不能是 "三十天"',
    ),
    "empty answer": ({"answers": [""]}, 'the field answers cannot be [""]', "字段 answers 不能是"),
    "answerable a word": (
        {"answerable": "no"},
        'the field answerable cannot be "no"',
        "字段 answerable 不能是",
    ),
    "backward span": (
        {"spans": [{"source": "zh/退货.md", "start": 8, "end": 5}]},
        'the field spans cannot be {"source": "zh/退货.md", "start": 8, "end": 5}',
        "字段 spans 不能是",
    ),
    "offset as text": (
        {"spans": [{"source": "s", "start": "5", "end": 8}]},
        "the field spans cannot be",
        "spans 不能是",
    ),
    "unknown field": (
        {"span": []},
        "unknown field span; known are id, question, answers, spans",
        "未知字段 span",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_fault_is_named_with_its_line(tmp_path, change):
    changed, english, chinese = CHANGES[change]
    fails(write(tmp_path / "q.jsonl", GOOD, {**GOOD, "id": "zh-002", **changed}), english, chinese)


def test_all_faults_of_a_file_come_in_one_report(tmp_path):
    records = [{**GOOD, "id": f"q{number}", "answers": ["七天"]} for number in range(8)]
    path = write(tmp_path / "q.jsonl", *records)
    fails(path, "has 8 fault(s): line 1 (q0)", "有 8 处错误：第 1 行（q0）")
    fails(path, "; and 3 more.", "; 另有 3 处。")
    assert len(load_questions(path)) == 8  # without documents the offsets are not checked


def test_a_wrong_offset_in_a_squad_file_is_named(tmp_path):
    data = json.loads(json.dumps(SQUAD))
    data["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = 6
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    fails(path, "(退货-1): 退货/0 6–9 reads “十天。”", "（退货-1）：退货/0 的 6–9", documents=None)


@pytest.mark.parametrize(
    "content", ['{"questions": []}', "[]", "not json", '{"data": [{"paragraphs": [{}]}]}']
)
def test_json_of_another_form_is_told(tmp_path, content):
    path = tmp_path / "dev.json"
    path.write_text(content, encoding="utf-8")
    fails(path, "is not in SQuAD form (", "不是 SQuAD 格式")


def test_files_that_are_no_question_set(tmp_path):
    fails(tmp_path / "none.jsonl", "does not exist", "不存在")
    for name, content, english, chinese in [
        ("q.md", "x", "supported are .jsonl, .json, .csv, .xlsx", "支持的格式有 .jsonl"),
        ("q.csv", "名称,答案\na,b", "its headings are 名称, 答案", "现有标题为 名称, 答案"),
        ("q.jsonl", "", "holds no text", "没有文本"),
        ("empty.jsonl", "\n", "holds no question", "没有问题"),
        ("bad.jsonl", '{"id": 1,', "line 1, is not a JSON object", "第 1 行不是"),
        ("empty.csv", "问题,答案\n", "holds no question", "没有问题"),
    ]:
        (tmp_path / name).write_text(content, encoding="utf-8")
        fails(tmp_path / name, english, chinese)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        *(
            ("退货期限多久？", "zh"),
            ("How long is it?", "en"),
            ("Qwen2.5 支持 LoRA 微调吗？", "zh"),
            ("", "en"),
            ("2024", "en"),
        ),
        *(
            ("What does 退货 mean in this handbook?", "en"),
            ("請問Tidewright M3的保固多久", "zh"),
            ("ひらがなです", "en"),
        ),
    ],
)
def test_the_language_is_the_share_of_han_characters(text, language):
    assert detect_language(text) == language
