"""Marks that stand for the contents of chat messages while a template renders them.

The template sees marks, so that what a document or a user wrote can be encoded apart from it and never
becomes a control token. Knows text only; whoever renders and encodes is told by his own module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

# Private-use marks stand for a content, with a wide blank at either side: where a template trims contents
# (Llama 3, Gemma) the blank is gone, and then the content is trimmed too.
_BLANK = "\u2003"
_MARK = f"{_BLANK}\ue000{{}}\ue001{_BLANK}"
_MARKED = re.compile(f"({_BLANK}?)\ue000(\\d+)\ue001({_BLANK}?)")


def marks(contents: Sequence[str]) -> list[str]:
    """Return a mark for each content; a blank one stays itself, since templates ask whether there is any."""
    return [_MARK.format(number) if text.strip() else text for number, text in enumerate(contents)]


def pieces(rendered: str, contents: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yield (text, number of the content that it is, or -1 for the template's own) from left to right."""
    at = 0
    for mark in _MARKED.finditer(rendered):
        yield rendered[at : mark.start()], -1
        content = contents[int(mark[2])]
        content = content if mark[1] else content.lstrip()
        yield content if mark[3] else content.rstrip(), int(mark[2])
        at = mark.end()
    yield rendered[at:], -1
