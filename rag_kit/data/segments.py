"""Where Chinese, English and mixed text may be cut, from sections down to single characters.

A *stop* is an offset at which a piece may begin: always the offset of a character that is not whitespace.
Knows the marks and the shapes of text; knows nothing of tokens or of limits.
"""

from collections.abc import Iterable, Iterator
from enum import IntEnum
from functools import cached_property

import regex

_CJK = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\u3000-\u303f\uff00-\uffef"
# Closing marks, and what clings to the character before it: combining marks, variation selectors,
# joiners, skin tones, tags.
CLOSING = regex.compile(
    r"[\p{Pe}\p{Pf}\p{M}。．｡！？，、；：｡､…‥.,!?;:%‰‱°℃℉％‼⁇⁈⁉·・ー々ゝゞヽヾ”’＂＇\u200d\U0001F3FB-\U0001F3FF\U000E0020-\U000E007F]"
)
_OPENING = regex.compile(r"[\p{Ps}\p{Pi}\p{Sc}]")
_CLOSERS = r"[\p{Pe}\p{Pf}\"']*"
_SENTENCE_END = regex.compile(
    rf"(?:[。！？｡…]|(?<![\d０-９])．|．(?![\d０-９]))[。！？｡…．!?]*{_CLOSERS}"
    rf"|(?P<latin>[.!?]+){_CLOSERS}(?=[\s{_CJK}]|$)"
)
_CLAUSE_END = regex.compile(rf"(?:[，、；：]|——|[,;:](?=[\s{_CJK}])){_CLOSERS}")
_ABBREVIATION = regex.compile(
    r"(?i)mr|mrs|ms|dr|prof|sr|jr|st|vs|etc|e\.g|i\.e|cf|al|approx|no|nos|figs?|eq|sec|ch|vol|eds?|pp?|ca|inc|ltd"
    r"|co|corp|dept|tel|ext|gen|col|capt|lt|sgt|rev|hon|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec"
)
_WORD_BEFORE = regex.compile(r"(?r)\b[\w.]+")
_LIST_NUMBER = regex.compile(r"(?r)(?<=(?:^|\n)[ \t]*)(?:\d{1,3}|[A-Za-z])\b")
_BLANK_LINE = regex.compile(r"\n[^\S\n]*(?:\n|$)|\r[^\S\r\n]*\r|\n(?=\u3000)|[\f\u2029]")
_LINE_END = regex.compile(r"\r\n?|[\n\u2028\x85\v]")
_STARTS_ITEM = regex.compile(
    r"[ \t]*(?:[-*+•●▪◦·][ \t]|\d{1,3}[.)、．）][ \t]?(?!\d)|[(（][\d一二三四五六七八九十a-zA-Z]{1,3}[)）]"
    r"|[一二三四五六七八九十]{1,3}、|[①-⑳]|\||>|```|~~~|[问答QA][:：])"
)
_HEADING = regex.compile(r"(?m)^[ ]{0,3}#{1,6}[ \t]+\S[^\r\n]*$")
# A run without spaces is one word, a URL therefore too; a Chinese character is one by itself.
_WORD = regex.compile(rf"[^\s\x1c-\x1f“”…—{_CJK}]+|\X")
_PART = regex.compile(
    r"[\p{L}\p{M}\p{N}_--[\p{Han}\p{Hiragana}\p{Katakana}]]+"
    r"(?:(?:[.'’-]|(?<=\d)[,:](?=\d))[\p{L}\p{M}\p{N}_--[\p{Han}\p{Hiragana}\p{Katakana}]]+)*|\X",
    regex.V1,
)


class Level(IntEnum):
    """How good a place to cut is, the best first."""

    SECTION = 0
    PARAGRAPH = 1
    SENTENCE = 2
    LINE = 3
    CLAUSE = 4
    WORD = 5  # from here on behind a heading too: a word that fits is not cut for its sake
    PART = 6  # at the marks inside a word without spaces, as in a long URL
    CHARACTER = 7  # a character as a reader sees it (grapheme cluster)
    FORCED = 8  # before a closing mark: only where the limit leaves no other way
    CODE_POINT = 9


class Segments:
    """The stops of one text, by level; each level is found when it is first asked for."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.end = len(text.rstrip())
        self._stops: dict[Level, list[int] | range] = {Level.CODE_POINT: range(self.end + 1)}
        headings = [(match.start(), match.end()) for match in _HEADING.finditer(text)]
        self._section_stops = {self._skip(start) for start, _ in headings}
        self._behind_heading = {self._skip(end) for _, end in headings}

    def stops(self, level: Level) -> list[int] | range:
        """Return the sorted stops of one level below sentences (`whole` has the levels above)."""
        if level not in self._stops:
            self._stops[level] = self._find(level)
        return self._stops[level]

    @cached_property
    def whole(self) -> tuple[list[int], dict[int, Level]]:
        """The stops of sentences, paragraphs and sections with the end of the text, and each one's level."""
        levels: dict[int, Level] = {}
        for level, offsets in (
            (Level.SENTENCE, self._sentences()),
            (Level.PARAGRAPH, (match.end() for match in _BLANK_LINE.finditer(self.text))),
            (Level.SECTION, self._section_stops),
        ):
            levels |= dict.fromkeys(self._clean(offsets), level)
        levels[self.end] = Level.SECTION
        return sorted(levels), levels

    def _find(self, level: Level) -> list[int]:
        patterns = {
            Level.LINE: (_LINE_END, "end"),
            Level.CLAUSE: (_CLAUSE_END, "end"),
            Level.WORD: (_WORD, "start"),
            Level.PART: (_PART, "start"),
            Level.CHARACTER: (regex.compile(r"\X"), "start"),
            Level.FORCED: (regex.compile(r"\X"), "start"),
        }
        pattern, side = patterns[level]
        offsets = (getattr(match, side)() for match in pattern.finditer(self.text))
        if level == Level.FORCED:
            found = sorted({self._skip(offset) for offset in offsets})
        else:
            found = sorted(set(self._clean(offsets, behind_heading=level >= Level.WORD)))
        if level == Level.WORD:  # a word takes its opening marks along
            found = [stop for stop in found if not _OPENING.match(self.text, stop - 1)]
        return found

    def _clean(self, offsets: Iterable[int], *, behind_heading: bool = False) -> Iterator[int]:
        """Yield the stops at `offsets`, less those before a closing mark or (by default) behind a heading."""
        for offset in offsets:
            stop = self._skip(offset)
            allowed = behind_heading or stop not in self._behind_heading
            if allowed and stop < self.end and not CLOSING.match(self.text, stop):
                yield stop

    def _skip(self, offset: int) -> int:
        text, end = self.text, self.end
        while offset < end and text[offset].isspace():
            offset += 1
        return offset

    def _sentences(self) -> Iterator[int]:
        for match in _SENTENCE_END.finditer(self.text):
            if match["latin"] is None or self._ends_sentence(match):
                yield match.end()
        for match in _LINE_END.finditer(self.text):
            if _STARTS_ITEM.match(self.text, match.end()):
                yield match.end()

    def _ends_sentence(self, match: "regex.Match[str]") -> bool:
        """Tell a full stop from the dots of abbreviations, initials, list numbers and ellipses."""
        following = self._skip(match.end())
        if match["latin"] != ".":
            return not (match["latin"].endswith("..") and self.text[following : following + 1].islower())
        if _LIST_NUMBER.match(self.text, 0, match.start()):
            return False
        word = _WORD_BEFORE.match(self.text, 0, match.start())
        before = word[0] if word else ""
        if _ABBREVIATION.fullmatch(before) or (len(before) == 1 and before.isupper()):
            return False
        return not self.text[following : following + 1].islower()
