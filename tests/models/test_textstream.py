"""Whatever the cuts, the pieces are the whole."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_kit.models.textstream import StopStrings, ThinkSplitter, TokenDecoder

TEXTS = st.text(alphabet=st.sampled_from("ab </think>\n。你好😀👨‍👩‍👧é\u0301END停止"), max_size=60)


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@pytest.fixture(scope="module", params=["smol", "twin"])
def tokenizer(request):
    return request.getfixturevalue(f"{request.param}_engine").tokenizer


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_the_pieces_of_a_text_are_the_text(smol_engine, twin_engine, text):
    for tokenizer in (smol_engine.tokenizer, twin_engine.tokenizer):
        ids = tokenizer.encode(text.encode("utf-8", "ignore").decode(), add_special_tokens=False)
        pieces = decode(tokenizer, ids)
        assert "".join(pieces) == tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 48_000), max_size=12))
def test_the_pieces_of_any_ids_are_their_text(smol_engine, twin_engine, ids):
    for tokenizer in (smol_engine.tokenizer, twin_engine.tokenizer):
        whole = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(decode(tokenizer, ids)) == whole


def decode(tokenizer, ids) -> list[str]:
    decoder = TokenDecoder(tokenizer)
    return [decoder.feed(token) for token in ids] + [decoder.flush()]


@pytest.mark.parametrize("text", ["修理需要两周。", "😀 👨‍👩‍👧‍👦 ok", "𠮷野家"])
def test_a_character_of_several_tokens_comes_whole(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = [piece for piece in decode(tokenizer, ids) if piece]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) < len(ids) or len(ids) <= len(text)


def test_bytes_that_never_become_a_character_are_shown_as_such(tokenizer):
    ids = tokenizer.encode("𒀀", add_special_tokens=False)
    assert len(ids) > 1
    assert "\ufffd" in "".join(decode(tokenizer, ids[:-1]))


@settings(max_examples=200)
@given(text=TEXTS, places=st.lists(st.integers(0, 99), max_size=8), stops=st.lists(st.sampled_from(
    ["END", "停止", "😀", "ab", "a", "\n\n", "好😀", "。", ""]), max_size=3))  # fmt: skip
def test_text_ends_before_the_first_stop_string(text, places, stops):
    stop = StopStrings(stops)
    shown = "".join(stop.feed(piece) for piece in cut(text, places)) + stop.flush()
    found = [text.index(s) for s in stops if s and s in text]
    assert shown == (text[: min(found)] if found else text)
    assert (stop.hit is not None) == bool(found)


def test_the_stop_string_that_was_hit_is_known():
    stop = StopStrings(["停止", "END"])
    assert stop.feed("开始停") == "开始" and stop.feed("止了 END") == ""
    assert stop.hit == "停止" and stop.feed("more") == "" and stop.flush() == ""


@settings(max_examples=200)
@given(
    before=st.sampled_from(["", "\n", "  "]),
    reasoning=TEXTS.filter(lambda text: "</think>" not in text),
    text=TEXTS.filter(lambda text: "</think>" not in text),
    places=st.lists(st.integers(0, 199), max_size=10),
)
def test_reasoning_is_set_apart_whatever_the_cuts(before, reasoning, text, places):
    # "<" at an end of either part could complete a mark: the last "</think>" decides, so keep them apart
    whole = f"{before}<think>{reasoning}</think>{text}"
    if whole.index("</think>") != len(before) + len("<think>") + len(reasoning):
        return
    assert split(cut(whole, places)) == (reasoning, text.lstrip())


@settings(max_examples=100)
@given(text=TEXTS, places=st.lists(st.integers(0, 99), max_size=8))
def test_text_without_a_block_stays_as_it_is(text, places):
    if text.lstrip().startswith("<think>"):
        return
    assert split(cut(text, places)) == ("", text)


def split(pieces: list[str], opened: bool = False) -> tuple[str, str]:
    splitter = ThinkSplitter(opened)
    fed = [splitter.feed(piece) for piece in pieces] + [splitter.flush()]
    return "".join(r for r, _ in fed), "".join(t for _, t in fed)


@pytest.mark.parametrize(
    ("pieces", "reasoning", "text"),
    [
        (["<think>", "\n\n", "</think>", "\n\n", "Yes."], "\n\n", "Yes."),  # empty
        (["<think>hm 嗯"], "hm 嗯", ""),  # unclosed
        (["<thi", "nk>嗯</th", "ink>", "\n\n好"], "嗯", "好"),  # streamed
        (["Say <think>x</think>"], "", "Say <think>x</think>"),  # not at the beginning
        (["<think>a</think>b <think>c</think>"], "a", "b <think>c</think>"),
        (["<thin"], "", "<thin"),
    ],
)
def test_the_forms_that_occur(pieces, reasoning, text):
    assert split(pieces) == (reasoning, text)


@pytest.mark.parametrize(
    ("pieces", "reasoning", "text"),
    [
        (["\n", "嗯", "</thi", "nk>", "\n\n好"], "\n嗯", "好"),
        (["</think>", "Yes"], "", "Yes"),  # empty
        (["hm", " hm"], "hm hm", ""),  # unclosed
        (["<thi", "nk>嗯</think>好"], "嗯", "好"),  # the model begins the block once more
        (["<thin"], "<thin", ""),
        ([" "], " ", ""),
        ([], "", ""),
    ],
)
def test_a_block_that_the_prompt_has_opened(pieces, reasoning, text):
    assert split(pieces, opened=True) == (reasoning, text)
