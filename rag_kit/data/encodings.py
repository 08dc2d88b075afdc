"""Bytes to text: UTF-8 and byte-order marks are certain, GB18030, Big5 and Windows-1252 are guesses.

General detectors are made for pages of text; measured on Chinese file names, titles and questions they
call GB18030 Korean, Japanese or UTF-16. The three legacy encodings that matter here are told apart by a
strict decoding and by how common the characters are that come out.
"""

import codecs
from dataclasses import dataclass

import regex

from rag_kit.data.language import is_common_han

_MARKS = (  # UTF-32 before UTF-16: their little-endian marks begin alike
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CONTROLS = regex.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_FOREIGN = regex.compile(r"[^\x00-\x7f]")
_PUNCTUATION = frozenset("，。、：；？！（）《》“”‘’「」『』【】—…·％　～￥")
# The hundred or so most frequent characters, in both scripts: what makes a title of two words tell.
_FREQUENT = frozenset(
    "的一是不了在人有我他这這个個们們中来來上大为為和国國地到以说說时時要就出会會可也你对對生能而子那得于於着"
    "下自之年过過发發后後作里裡用道行所然家种種事成方多经經么麼去法学學如都同现現当當没沒动動面起看定天分还還"
    "进進好小部其些主样樣理心她本前开開但因只从從想实實日军軍者意无無力它与與长長把机機十民第公此已工使情明性"
    "知全三又关關点點正业業外将將两兩高间間由问問很最重并物手应應战戰向头頭文体體政美相见見被利什二等产產新己"
    "制身果加西斯月话話合回特代内內信表化老给給世位次度门門任常先海通教儿兒原东東声聲提立及比员員解水名真论論"
    "处處走义義各入几幾口认認条條平系气氣题題活尔爾更别別打女变變四神总總何电電数數安少报報才结結反受目太量再"
    "感建务務做接必场場件计計管期市直德资資命山金指克许許统統区區保至队隊形社便空决決治展马馬科司五基眼书書非"
    "则則听聽白却卻界达達光放强強即像难難且权權思王象完设設式色路记記南品住告类類求据據程北边邊死张張该該交规"
    "規万萬取拉格望觉覺术術领領共确確传傳师師观觀清今切院让讓识識候带帶导導争爭运運请請客服退货貨修价價址订訂"
)
_ENOUGH = 0.35  # below this mean score the text is not Chinese


@dataclass(frozen=True)
class Decoded:
    """Text, the encoding it was read in, and whether that encoding was a guess."""

    text: str
    encoding: str
    guessed: bool = False


def decode(data: bytes, declared: str | None = None) -> Decoded | None:
    """Return the text of `data` without its byte-order mark, or None where it is not text.

    Order: a byte-order mark, `declared` (an HTML file's own charset), strict UTF-8, then the guess.
    """
    marked = [encoding for mark, encoding in _MARKS if data.startswith(mark)][:1]
    # Browsers read gb2312 and gbk as their superset, and big5 with its Hong Kong extension.
    supersets = {"gb2312": "gb18030", "gbk": "gb18030", "big5": "big5hkscs"}
    told = [supersets.get(declared.lower(), declared)] if declared else []
    for encoding in marked or [*told, "utf-8"]:
        if (text := _strict(data, encoding)) is not None:
            return Decoded(text, encoding)
    return None if marked else _guess(data)


def _strict(data: bytes, encoding: str) -> str | None:
    """Return the text, or None where it is in another encoding or is none: a NUL stands in no text."""
    try:
        text = data.decode(encoding)
    except (UnicodeDecodeError, LookupError):
        return None
    return None if "\x00" in text else text


def _guess(data: bytes) -> Decoded | None:
    """Return the reading whose characters are the most common ones, or None where none looks like text."""
    readings = []
    for encoding, codec, score in (
        ("gb18030", "gb18030", _chinese),
        ("big5", "big5hkscs", _chinese),
        ("windows-1252", "cp1252", _western),
    ):
        text = _strict(data, codec)
        if text is not None and not _CONTROLS.search(text) and (common := score(text)) >= _ENOUGH:
            readings.append((common, Decoded(text, encoding, guessed=True)))
    return max(readings, key=lambda reading: reading[0], default=(0, None))[1]


def _chinese(text: str) -> float:
    """Return the mean, over the non-ASCII characters that tell, of how common each is (-1 to 1)."""
    found = _FOREIGN.findall(text)
    # Punctuation tells less than characters do, but a file may hold nothing else.
    telling = [c for c in found if c not in _PUNCTUATION] or found
    return sum(map(_commonness, telling)) / len(telling) if telling else 0.0


def _commonness(character: str) -> float:
    if character in _FREQUENT or character in _PUNCTUATION:
        return 1.0
    if is_common_han(character):
        return 0.5
    # Letters of other scripts and private-use characters are what a wrong reading looks like.
    return 0.0 if regex.match(r"\p{Han}", character) else -1.0


def _western(text: str) -> float:
    """Return the share of non-ASCII characters that are accents in a word or typographic marks."""
    foreign = len(_FOREIGN.findall(text))
    accents = len(regex.findall(r"(?<=[\x00-\x7f]|^)(?![a-zA-Z])\p{Latin}(?=[\x00-\x7f]|$)", text))
    marks = len(regex.findall(r"(?<=[\x00-\x7f]|^)[‘’“”–—…•€£°©®™](?=[\x00-\x7f]|$)", text))
    letters = len(regex.findall(r"[A-Za-z]", text))
    # They are rare among plain letters; what a misread Chinese text shows is dense.
    return (accents + marks) / foreign if foreign and foreign * 3 <= letters else 0.0
