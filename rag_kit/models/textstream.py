"""Token ids to text as they come: whole characters, stop strings cut off, reasoning set apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


class TokenDecoder:
    """Decodes token ids one by one; holds bytes back until a character is whole."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []

    def feed(self, token: int) -> str:
        """Return the text that `token` completes, possibly none."""
        piece: str | None = self._stream.step(self._backend, token)
        if piece is None:
            self._held.append(token)
            return ""
        self._held.clear()
        return piece

    def flush(self) -> str:
        """Return what was held back, with U+FFFD for bytes that never became a character."""
        held, self._held = self._held, []
        return str(self._backend.decode(held, skip_special_tokens=True)) if held else ""


class StopStrings:
    """Cuts text at the first stop string, also one that arrives in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.hit: str | None = None

    def feed(self, piece: str) -> str:
        """Return the text that can be shown; after a hit nothing more comes."""
        if self.hit is not None:
            return ""
        text = self._held + piece
        found = [(text.index(stop), stop) for stop in self._stops if stop in text]
        if found:
            at, self.hit = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return what was held back as a possible beginning of a stop string."""
        held, self._held = self._held, ""
        return held


class ThinkSplitter:
    """Separates `<think>…</think>` from the answer: empty, unclosed and streamed forms.

    Only a block at the very beginning is reasoning; the marks elsewhere are text. `opened`: the prompt has
    begun the block, so that the text comes without its first mark (a second one is no reasoning either).
    """

    def __init__(self, opened: bool = False) -> None:
        self._held, self._state = "", "start"
        self._opened = opened

    def feed(self, piece: str) -> tuple[str, str]:
        """Return (reasoning, text) that `piece` adds."""
        self._held += piece
        reasoning = ""
        if self._state == "start":
            stripped = self._held.lstrip()
            if stripped.startswith(THINK_OPEN):
                self._held, self._state = stripped[len(THINK_OPEN) :], "thinking"
            elif not THINK_OPEN.startswith(stripped):
                self._state = "thinking" if self._opened else "answer"
            else:
                return "", ""
        if self._state == "thinking":
            before, mark, after = self._held.partition(THINK_CLOSE)
            if not mark:
                keep = _overlap(self._held, THINK_CLOSE)
                cut = len(self._held) - keep
                reasoning, self._held = self._held[:cut], self._held[cut:]
                return reasoning, ""
            reasoning, self._held, self._state = before, after, "after"
        if self._state == "after":  # the blank lines behind the block belong to neither
            self._held = self._held.lstrip()
            if not self._held:
                return reasoning, ""
            self._state = "answer"
        text, self._held = self._held, ""
        return reasoning, text

    def flush(self) -> tuple[str, str]:
        """Return what was held back: reasoning where the block was never closed, else text."""
        held, self._held = self._held, ""
        thinking = self._state == "thinking" or (self._opened and self._state == "start")
        return (held, "") if thinking else ("", held)


def _overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of `text` that is a proper beginning of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
