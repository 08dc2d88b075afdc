"""Chinese or English: a share of characters, and which Chinese characters are common."""

from functools import cache
from typing import Literal

import regex

_HAN = regex.compile(r"\p{Han}")
_LETTER = regex.compile(r"\p{L}")


def detect_language(text: str) -> Literal["zh", "en"]:
    """Return `zh` where Han characters are at least a fifth of the letters, else `en`.

    A fifth, because a Chinese sentence full of product names is still a Chinese sentence.
    """
    letters = len(_LETTER.findall(text))
    return "zh" if letters and len(_HAN.findall(text)) >= 0.2 * letters else "en"


@cache
def is_common_han(character: str) -> bool:
    """Tell whether a character is in level 1, the frequent half, of GB 2312 or of Big5."""
    return _level_1(character, "gb2312", 0xB0, 0xD7) or _level_1(character, "big5", 0xA4, 0xC6)


def _level_1(character: str, codec: str, first: int, last: int) -> bool:
    try:
        code = character.encode(codec)
    except UnicodeEncodeError:
        return False
    return len(code) == 2 and first <= code[0] <= last
