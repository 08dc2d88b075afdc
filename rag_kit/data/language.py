"""Chinese or English: a share of characters, which Chinese characters are common, what a greeting is."""

import re
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


_GREETING = re.compile(
    r"(hi( there)?|hello|hey|good (morning|afternoon|evening)|"
    r"你好[吗呀啊]?|您好|嗨|哈喽|早上好|下午好|晚上好)?\W*"
    r"((please |can you |could you )*(introduce yourself|tell me about yourself|who are you|what can you do)|"
    r"(请|能|可以)*(简单|简短)?地?(用一句话)?介绍(一下|下)?(你|您)?自己|(你|您)(是谁|叫什么(名字)?|能做什么))?(吗|吧)?",
    re.IGNORECASE,
)


def is_greeting(text: str) -> bool:
    """Whether `text` is nothing but a greeting or a request to introduce oneself."""
    words = re.sub(r"^\W+|\W+$", "", text)
    return bool(words) and bool(_GREETING.fullmatch(words))
