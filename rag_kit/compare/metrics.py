"""Scores of one answer against its references, the same rules for Chinese, English and mixed text.

Pure functions, one score a question; whoever averages must leave missing scores (None) out. The rule
for English is SQuAD v1.1's official one (Rajpurkar et al., 2016, `evaluate-v1.1.py`), the one for Han
text counts characters, as CMRC 2018 does (Cui et al., 2019). Three departures, each so that the
score means something here: the point in `2.5` stays, citation marks go, and a text of which the rules
would leave nothing (`the`, `+`) is taken as it is, so that an empty answer never matches it.

Knows texts and offsets; knows nothing of models, arms or files. Shown in notebook 03.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rag_kit.data.questions import Span
    from rag_kit.index.hit import Hit

_CITATION = re.compile(r"[\[【［]\s*\d{1,2}(?:\s*[,，、;；–-]\s*\d{1,2})*\s*[\]】］]")
_FULL_WIDTH_MARK = re.compile(r"[！，；？（）［］｛｝]|：(?!\d)|(?<!\d)：")  # but not the one in 12：30
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_BY_CHARACTER = (
    "\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u3100-\u312f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff"
)  # Han, kana, bopomofo, hangul syllables
_TOKEN = re.compile(rf"[{_BY_CHARACTER}]|[^\s{_BY_CHARACTER}]+")
_EAST_ASIAN = re.compile(f"[{_BY_CHARACTER}]")


def normalise(text: str, language: str | None = None) -> str:
    """Return `text` as it is scored, never as it is shown.

    In this order: citation marks (`[1]`, `【1, 2】`) go; full-width and CJK marks become a space, since
    they are written without one; NFKC; case folded; every other mark goes, but for the point between
    two digits; English articles go; white space is folded. Articles go where `language` is English, or
    where it is None and the text holds no East Asian character (`A` is a name in `方案 A`).
    """
    text = _FULL_WIDTH_MARK.sub(" ", _CITATION.sub(" ", text))
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    bare = "".join(_without_mark(text, at) for at in range(len(text)))
    english = language.lower().startswith("en") if language else not _EAST_ASIAN.search(text)
    candidates = (_ARTICLE.sub(" ", bare) if english else bare, bare, text)
    return next((folded for folded in (" ".join(c.split()) for c in candidates) if folded), "")


def score_tokens(text: str, language: str | None = None) -> list[str]:
    """Return the units that are counted: each East Asian character, and whatever else stands between
    spaces or such characters as a whole (`qwen2.5`, `3.14`, `k7.2`, `48`), normalised.
    """
    return _TOKEN.findall(normalise(text, language))


def exact_match(answer: str, references: Sequence[str], language: str | None = None) -> float | None:
    """Return 1.0 if the answer's score tokens equal those of any reference, else 0.0.

    None without a reference to compare with: missing is missing.
    """
    return _best(answer, references, language, lambda a, r: float(a == r))


def token_f1(answer: str, references: Sequence[str], language: str | None = None) -> float | None:
    """Return max over references of 2PR / (P + R), P and R from the multiset overlap of score tokens.

    P = overlap / answer tokens, R = overlap / reference tokens; 0.0 without overlap, None without a
    reference.
    """
    return _best(answer, references, language, _f1)


def contains(answer: str, references: Sequence[str], language: str | None = None) -> float | None:
    """Return 1.0 if any reference's score tokens stand in the answer, together and in order, else 0.0.

    Kinder than exact match to an answer in a sentence; blind to what else the sentence claims.
    """
    return _best(answer, references, language, _stands_in)


def recall_at_k(hits: "Sequence[Hit]", spans: "Sequence[Span]", k: int) -> float | None:
    """Return the share of distinct gold spans whose every character stands in the first `k` hits.

    A span [start, end) is found if the union of [start, end) of those hits with the same `source`
    covers it: one hit that holds it whole, or neighbours that share it. A gap of one character is a
    miss. None without gold spans.
    """
    gold = {(span.source, span.start, span.end) for span in spans}
    if not gold:
        return None
    chunks = sorted(
        (str(m["source"]), int(m["start"]), int(m["end"])) for m in (h.document.metadata for h in hits[:k])
    )
    found = 0
    for source, at, end in gold:
        for chunk_source, chunk_start, chunk_end in chunks:
            if chunk_source == source and chunk_start <= at:
                at = max(at, chunk_end)
        found += at >= end
    return found / len(gold)


def _without_mark(text: str, at: int) -> str:
    """The character at `at`, a space or nothing: punctuation, ASCII symbols, invisible characters."""
    char = text[at]
    category = unicodedata.category(char)
    if not (category.startswith("P") or category == "Cf" or char in string.punctuation):
        return char
    if char == "." and text[at - 1 : at].isdecimal() and text[at + 1 : at + 2].isdecimal():
        return char
    return " " if "\u3000" <= char <= "\u303f" else ""


def _best(
    answer: str,
    references: Sequence[str],
    language: str | None,
    score: Callable[[list[str], list[str]], float],
) -> float | None:
    tokens = score_tokens(answer, language)
    golds = [gold for gold in (score_tokens(reference, language) for reference in references) if gold]
    return max((score(tokens, gold) for gold in golds), default=None)


def _f1(answer: list[str], reference: list[str]) -> float:
    overlap = (Counter(answer) & Counter(reference)).total()
    return 2 * overlap / (len(answer) + len(reference))  # equals 2PR / (P + R)


def _stands_in(answer: list[str], reference: list[str]) -> float:
    starts = range(len(answer) - len(reference) + 1)
    return float(any(answer[start : start + len(reference)] == reference for start in starts))
