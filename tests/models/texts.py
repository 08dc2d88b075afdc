"""How the text of an error is tested: in both languages, two parts, every value filled in."""

import re

from rag_kit.errors import RagKitError


def says(error: RagKitError, *values: object, en: str = "", zh: str = "") -> None:
    """Assert that both texts of `error` hold every one of `values`, and `en` and `zh` theirs."""
    for language, phrase in (("en", en), ("zh", zh)):
        what, remedy = error.text(language)
        text = f"{what} {remedy}"
        assert what.strip() and remedy.strip()
        assert what.rstrip()[-1] in ".。" and remedy.rstrip()[-1] in ".。", text
        assert not re.search(r"\{\w*\}", text), text
        assert phrase in text, text
        for value in values:
            assert str(value) in text, (value, text)
        assert bool(re.search(r"[\u4e00-\u9fff]{4}", text)) == (language == "zh"), text


def effect(engine, key):
    """The largest difference of logits that an adapter makes on a text in two languages."""
    ids = engine.tokenizer.encode("What is your name? 你好，请介绍一下你自己。", add_special_tokens=False)
    return float((engine.logits(ids, key) - engine.logits(ids, None)).abs().max())
