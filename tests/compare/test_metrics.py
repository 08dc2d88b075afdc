"""Scores against an outside oracle, against cases worked by hand, and by their laws."""

import re
import string
import unicodedata
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from langchain_core.documents import Document

from rag_kit.compare.metrics import contains, exact_match, normalise, recall_at_k, score_tokens, token_f1
from rag_kit.data.questions import Span
from rag_kit.index.hit import Hit

# ---- SQuAD v1.1's official rule, as its evaluation script has it


def squad_normalise(text: str) -> str:
    text = "".join(char for char in text.lower() if char not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_f1(answer: str, reference: str) -> float:
    predicted, gold = squad_normalise(answer).split(), squad_normalise(reference).split()
    same = sum((Counter(predicted) & Counter(gold)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(predicted), same / len(gold)
    return 2 * precision * recall / (precision + recall)


WORDS = st.sampled_from(
    [
        "a",
        "an",
        "the",
        "The",
        "Broncos",
        "broncos",
        "U.S.",
        "don't",
        "well-known",
        "1,000",
        "$5",
        "24",
        "(",
        "!?",
    ]
)
ENGLISH = st.one_of(
    st.lists(WORDS, max_size=6).map(" ".join),
    st.text(st.sampled_from(string.ascii_letters + string.digits + string.punctuation + "   "), max_size=20),
)


@given(ENGLISH, st.lists(ENGLISH, min_size=1, max_size=3))
def test_english_agrees_with_squad(answer, references):
    for text in (answer, *references):
        assume(squad_normalise(text))  # departures, stated: what the rule would leave empty,
        assume(not re.search(r"\d\.\d", text))  # the decimal point,
        assume(not re.search(r"\[\s*\d", text))  # and citation marks
    assert normalise(answer, "en") == squad_normalise(answer)
    official = max(float(squad_normalise(answer) == squad_normalise(r)) for r in references)
    assert exact_match(answer, references, "en") == official
    assert token_f1(answer, references, "en") == pytest.approx(max(squad_f1(answer, r) for r in references))


# ---- by hand


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Qwen2.5 costs 3.14 yuan.", ["qwen2.5", "costs", "3.14", "yuan"]),
        ("K7.2型水壶保修48个月。", ["k7.2", *"型水壶保修", "48", *"个月"]),
        ("容量０．５Ｌ，４８小时", [*"容量", "0.5l", "48", *"小时"]),
        ("K7、K8和K9", ["k7", "k8", "和", "k9"]),
        ("カメラ「Ｘ１」です", [*"カメラ", "x1", *"です"]),
        ("서울 2호", ["서", "울", "2", "호"]),
        ("１２：３０ 开门", ["1230", *"开门"]),
        ("型号：K7（黑）", [*"型号", "k7", "黑"]),
        ("It is Paris [1][2, 3].", ["it", "is", "paris"]),
        ("是巴黎【1】［２］。", list("是巴黎")),
        ("选择 A 方案", [*"选择", "a", *"方案"]),  # no article here
        ("don’t", ["dont"]),
        ("soft\u00adware\u200b", ["software"]),
        ("", []),
        (" \n\t", []),
        ("[1]", []),
        ("the", ["the"]),
        ("+", ["+"]),
    ],
)
def test_tokens(text, tokens):
    assert score_tokens(text) == tokens


def test_articles_go_in_english_only():
    assert normalise("The kettle and a cup") == "kettle and cup"
    assert normalise("the A", "zh") == "the a"
    assert exact_match("方案 B", ["方案 A"], "zh") == 0.0
    assert token_f1("B", ["A"], "zh") == 0.0


@pytest.mark.parametrize(
    ("answer", "reference", "em", "f1", "inside"),
    [
        # as CMRC 2018, by characters: 3 shared of 5 and of 3
        ("在海港路上", "海港路", 0.0, 2 * 3 / (5 + 3), 1.0),
        ("海港路", "港海路", 0.0, 1.0, 0.0),  # the same characters in another order
        ("海港路 12 号", "海港路12号", 1.0, 1.0, 1.0),
        ("海港路１２号。", "海港路12号", 1.0, 1.0, 1.0),
        ("保修期为 48 个月", "48个月", 0.0, 2 * 3 / (7 + 3), 1.0),
        ("148 个月", "48个月", 0.0, 2 * 2 / (3 + 3), 0.0),  # a number is whole
        ("2.5", "25", 0.0, 0.0, 0.0),
        ("The warranty is 48 months. [1]", "48 months", 0.0, 2 * 2 / (4 + 2), 1.0),
        ("forty-eight", "Forty Eight", 0.0, 0.0, 0.0),  # SQuAD's rule joins at the hyphen
        ("", "48", 0.0, 0.0, 0.0),
        ("[1]", "48", 0.0, 0.0, 0.0),
        ("the", "A", 0.0, 0.0, 0.0),
    ],
)
def test_scores(answer, reference, em, f1, inside):
    assert exact_match(answer, [reference]) == em
    assert token_f1(answer, [reference]) == pytest.approx(f1)
    assert contains(answer, [reference]) == inside


def test_best_reference_counts():
    assert token_f1("Blue Heron", ["the courier", "Heron"]) == pytest.approx(2 / 3)
    assert exact_match("蓝鹭", ["快递", "蓝鹭"]) == 1.0


@pytest.mark.parametrize("score", [exact_match, token_f1, contains])
@pytest.mark.parametrize("references", [[], [""], [" ", "\n"]])
def test_without_a_reference_the_score_is_missing(score, references):
    assert score("anything", references) is None
    assert score("", references) is None


# ---- laws

PIECES = st.sampled_from(
    [
        "保修",
        "48",
        "2.5",
        "Qwen2.5",
        "months",
        "the",
        "a",
        "カ",
        "蓝鹭",
        " ",
        "，",
        "。",
        "[1]",
        "，",
        "é",
        "ﬁ",
        "K7",
    ]
)
MIXED = st.one_of(st.lists(PIECES, max_size=8).map("".join), st.text(max_size=12))


@given(MIXED, st.lists(MIXED, max_size=3))
def test_scores_are_shares_and_ordered(answer, references):
    em, f1, inside = (score(answer, references) for score in (exact_match, token_f1, contains))
    if em is None:
        assert f1 is None and inside is None
        return
    assert em in (0.0, 1.0) and inside in (0.0, 1.0) and 0.0 <= f1 <= 1.0
    assert em <= f1 and em <= inside
    if not score_tokens(answer):
        assert em == f1 == inside == 0.0


@given(MIXED)
def test_a_text_matches_itself(text):
    if score_tokens(text):
        assert exact_match(text, [text]) == token_f1(text, [text]) == contains(text, [text]) == 1.0


@given(MIXED, MIXED, st.sampled_from(["en", "zh"]))
def test_symmetric(a, b, language):
    if score_tokens(a, language) and score_tokens(b, language):
        assert token_f1(a, [b], language) == token_f1(b, [a], language)
        assert exact_match(a, [b], language) == exact_match(b, [a], language)


@given(MIXED, st.sampled_from([None, "en", "zh"]))
def test_normalise_is_canonical(text, language):
    once = normalise(text, language)
    assert once == " ".join(once.split()) and unicodedata.is_normalized("NFKC", once)


@given(
    st.lists(st.sampled_from(["保修", "48", "2.5", "Qwen", "Kettle", "蓝鹭", " "]), min_size=1).map("".join)
)
def test_width_case_and_final_marks_do_not_count(text):
    assume(text.strip())
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)
    for same in (
        wide,
        text.upper(),
        f"  {text}。",
        f"“{text}”",
        f"{text}！",
        f"{text}【1】",
        f"{text} [1, 2].",
    ):
        assert score_tokens(same) == score_tokens(text)
        assert exact_match(same, [text]) == 1.0


# ---- recall


def hit(source: str, start: int, end: int) -> Hit:
    return Hit(
        Document("x" * (end - start), metadata={"source": source, "start": start, "end": end}), 0.0, 0, {}
    )


@pytest.mark.parametrize(
    ("hits", "k", "recall"),
    [
        ([hit("d", 0, 30)], 1, 1.0),
        ([hit("d", 10, 20)], 1, 1.0),  # exactly the span
        ([hit("d", 11, 30)], 1, 0.0),  # a character short
        ([hit("d", 0, 19)], 1, 0.0),
        ([hit("e", 0, 30)], 1, 0.0),  # another document
        ([hit("e", 0, 30), hit("d", 0, 30)], 1, 0.0),
        ([hit("e", 0, 30), hit("d", 0, 30)], 2, 1.0),
        ([hit("d", 15, 30), hit("d", 0, 15)], 2, 1.0),  # two neighbours share it
        ([hit("d", 15, 30), hit("d", 0, 15)], 1, 0.0),
        ([hit("d", 16, 30), hit("d", 0, 15)], 2, 0.0),  # with a gap
        ([], 5, 0.0),
    ],
)
def test_recall_by_offsets(hits, k, recall):
    assert recall_at_k(hits, [Span("d", 10, 20)], k) == recall


def test_recall_counts_distinct_spans_and_is_missing_without_any():
    spans = [Span("d", 0, 5), Span("d", 0, 5), Span("文", 3, 9)]
    assert recall_at_k([hit("d", 0, 5)], spans, 1) == 0.5
    assert recall_at_k([hit("d", 0, 5)], [], 1) is None


INTERVALS = st.tuples(st.integers(0, 12), st.integers(1, 8)).map(lambda at: (at[0], at[0] + at[1]))


@given(st.lists(INTERVALS, max_size=6), INTERVALS, st.integers(1, 6))
def test_recall_is_coverage_of_every_character(chunks, gold, k):
    covered = {at for start, end in chunks[:k] for at in range(start, end)}
    hits = [hit("d", *chunk) for chunk in chunks]
    assert recall_at_k(hits, [Span("d", *gold)], k) == float(covered >= set(range(*gold)))
