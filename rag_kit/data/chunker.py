"""Documents to chunks: whole sentences up to a limit of tokens, each with its exact place.

Knows where a chunk ends; where text may be cut is told in `segments`, and what a token is by the counter
that the embedder gives. Notebook 02 shows it.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import regex
from langchain_core.documents import Document

from rag_kit.data.language import is_common_han
from rag_kit.data.segments import Level, Segments
from rag_kit.errors import DataError

# A chunk is cut before a heading, or at a paragraph, that leaves it at least so full.
_FILL = {Level.SECTION: 1 / 3, Level.PARAGRAPH: 1 / 2}


def chunk_documents(
    documents: Sequence[Document],
    *,
    count_tokens: Callable[[str], int],
    max_tokens: int,
    overlap: int = 0,
) -> list[Document]:
    """Cut documents into chunks of at most `max_tokens`, counted by `count_tokens` on the chunk's text.

    A chunk's text is `document.page_content[start:end]` exactly, without whitespace at its ends; every
    other character of a document is in a chunk. A sentence that fits is never cut; one that does not is cut
    at a line, else a clause, else a word, else at a mark inside the word, else a character. Chunks prefer
    to begin at a Markdown heading, then at a paragraph. No chunk opens with a closing or combining mark or
    ends with a heading, but where the limit leaves no other way: the limit always holds.

    `overlap` is the number of whole sentences that a chunk repeats from the one before, as far as they fit.
    Metadata: the document's own but `pages`, with `start` and `end` (character offsets) and, where the
    document has `pages`, the 1-based `page` of the start. Raises DataError where one character alone
    exceeds the limit.
    """
    return [chunk for document in documents for chunk in _chunks(document, count_tokens, max_tokens, overlap)]


def conservative_count(text: str) -> int:
    """Return a number of tokens that the common tokenizers stay below, for embedders without one here.

    A frequent Chinese character (level 1 of GB 2312 or Big5) and CJK punctuation count 2; every other
    character beyond ASCII its UTF-8 bytes, which no byte-level tokenizer exceeds; a Latin word half its
    letters and one more; digits, marks and each space beyond the first 1; two special tokens. A run of
    random letters may exceed it, so the count that the embedder returns is to be checked.
    """
    words = sum(len(word) // 2 + 1 for word in _LETTERS.findall(text))
    rest = _LETTERS.sub("", text)
    return words + sum(map(_weight, rest)) - len(_SINGLE_SPACE.findall(text)) + 2


_LETTERS = regex.compile(r"[A-Za-z]+")
_SINGLE_SPACE = regex.compile(r"(?<=\S) (?=\S)")


@lru_cache(maxsize=1 << 16)
def _weight(character: str) -> int:
    if character.isascii():
        return 1
    if is_common_han(character) or "\u3000" <= character <= "\u303f" or "\uff00" <= character <= "\uff65":
        return 2
    return len(character.encode("utf-8", "surrogatepass"))


def _chunks(
    document: Document, count_tokens: Callable[[str], int], max_tokens: int, overlap: int
) -> Iterator[Document]:
    text = document.page_content
    pages = document.metadata.get("pages")
    carried = {key: value for key, value in document.metadata.items() if key != "pages"}
    for start, end in _Cutter(text, count_tokens, max_tokens, carried.get("source")).ranges(overlap):
        page = {"page": max(bisect_right(pages, start), 1)} if pages else {}
        yield Document(page_content=text[start:end], metadata={**carried, "start": start, "end": end, **page})


class _Cutter:
    """Walks through one text from stop to stop."""

    def __init__(self, text: str, count: Callable[[str], int], limit: int, source: object) -> None:
        self.text, self.count, self.limit, self.source = text, count, limit, source
        self.segments = Segments(text)
        self.stops, self.levels = self.segments.whole

    def ranges(self, overlap: int) -> Iterator[tuple[int, int]]:
        """Yield the (start, end) of each chunk, whitespace trimmed."""
        begin = len(self.text) - len(self.text.lstrip())
        start = begin  # of what is not yet in a chunk
        while begin < self.segments.end:
            stop = self._next(begin, start)
            yield begin, begin + len(self.text[begin:stop].rstrip())
            begin, start = self._repeat(begin, stop, overlap), stop

    def _next(self, begin: int, start: int) -> int:
        """Return the stop at which the chunk that begins at `begin` ends: the best one that fits."""
        first = bisect_right(self.stops, start)
        if not self._fits(begin, self.stops[first]):
            return self._inside(begin, self.stops[first])
        last = self._furthest(begin, self.stops, first, len(self.stops))
        if self.stops[last] == self.segments.end:
            return self.segments.end
        full = self.stops[last] - begin
        for level, fill in _FILL.items():
            for index in range(last, first - 1, -1):
                stop = self.stops[index]
                if stop - begin < fill * full:
                    break
                if self.levels[stop] <= level and self._fits(begin, stop):
                    return stop
        return self.stops[last]

    def _inside(self, begin: int, end: int) -> int:
        """Return a stop inside a sentence that is over the limit, at the coarsest level that fits."""
        for level in list(Level)[Level.LINE :]:
            stops = self.segments.stops(level)
            first, behind = bisect_right(stops, begin), bisect_right(stops, end - 1)
            if first < behind:
                if self._fits(begin, stops[first]):
                    return stops[self._furthest(begin, stops, first, behind)]
                end = stops[first]
        character = self.text[begin]
        raise DataError(
            "chunk_limit",
            limit=self.limit,
            character=character,
            source=self.source,
            tokens=self.count(character),
        )

    def _furthest(self, begin: int, stops: Sequence[int], fitting: int, behind: int) -> int:
        """Return the index of the last stop that fits: sought in doubled steps, then by halving."""
        step = 1
        while fitting + step < behind and self._fits(begin, stops[fitting + step]):
            fitting, step = fitting + step, 2 * step
        further = range(fitting + 1, min(fitting + step, behind))
        return fitting + bisect_left(further, True, key=lambda index: not self._fits(begin, stops[index]))

    def _fits(self, begin: int, stop: int) -> bool:
        """Tell whether a chunk is within the limit; a far too long one is found out by its beginning."""
        probe = 8 * self.limit
        while begin + probe < stop:
            # A cut word may count a little more than the whole; twice the limit is beyond that.
            if self.count(self.text[begin : begin + probe]) > 2 * self.limit + 8:
                return False
            probe *= 2
        return self.count(self.text[begin:stop].rstrip()) <= self.limit

    def _repeat(self, begin: int, stop: int, overlap: int) -> int:
        """Return where the next chunk begins: up to `overlap` sentences before `stop`, as far as they fit."""
        if not overlap or self.levels.get(stop, Level.SECTION) == Level.SECTION:
            return stop  # a sentence that is cut, and a heading, begin their chunk
        here = bisect_right(self.stops, stop)
        for index in range(max(here - 1 - overlap, 0), here - 1):
            if self.stops[index] > begin and self._fits(self.stops[index], self.stops[here]):
                return self.stops[index]
        return stop
