"""What goes wrong, in the reader's language: two sentences each, from one catalogue.

Knows how to look a text up in `messages/*.toml` and how to phrase an error; knows nothing of what
failed. Libraries raise these errors, faces print them.
"""

import os
import tomllib
from functools import cache
from locale import getlocale
from pathlib import Path
from typing import Any

LANGUAGES = ("en", "zh")
_process_language: str | None = None


@cache
def catalogue() -> dict[str, dict[str, Any]]:
    """Return every message by key: `{key: {"en": …, "zh": …}}`, a text or a pair (what, remedy)."""
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted((Path(__file__).parent / "messages").glob("*.toml")):
        entries |= tomllib.loads(path.read_text(encoding="utf-8"))
    return entries


def language() -> str:
    """Return `en` or `zh`: what `use_language` chose, else `RAG_KIT_LANG`, else the locale's."""
    chosen = _process_language or os.environ.get("RAG_KIT_LANG", "").lower()
    if chosen in LANGUAGES:
        return chosen
    named = next((os.environ[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if os.environ.get(name)), "")
    return "zh" if (named or getlocale()[0] or "").lower().startswith(("zh", "chinese")) else "en"


def use_language(lang: str) -> None:
    """Choose the language of messages for this process: `en`, `zh`, or `auto` (the locale's)."""
    global _process_language
    _process_language = lang if lang in LANGUAGES else None


def message(key: str, lang: str | None = None, **values: object) -> str:
    """Return the catalogue's text for `key` with `values` filled in; a pair is joined by a space."""
    entry = catalogue()[key][lang or language()]
    return (entry if isinstance(entry, str) else " ".join(entry)).format(**values)


class RagKitError(Exception):
    """Something the user can mend: `message` says what is wrong, `hint` what to do.

    `key` names the pair in the catalogue and `values` fill it; the language is chosen when the text
    is read, so that one error can be shown in either.
    """

    def __init__(self, key: str, /, **values: object) -> None:
        super().__init__(key)
        self.key, self.values = key, values

    def text(self, lang: str | None = None) -> tuple[str, str]:
        """Return (what is wrong, what to do) in `lang`, by default the reader's language."""
        what, remedy = catalogue()[self.key][lang or language()]
        return what.format(**self.values), remedy.format(**self.values)

    @property
    def message(self) -> str:
        """What is wrong, with the value and what is available."""
        return self.text()[0]

    @property
    def hint(self) -> str:
        """What to do or to type next."""
        return self.text()[1]

    def __str__(self) -> str:
        return " ".join(self.text())


class SettingsError(RagKitError):
    """A setting, a `.env` file or a command-line value that cannot be used."""


class DataError(RagKitError):
    """A document or a question set that cannot be read."""


class ModelError(RagKitError):
    """A model or an adapter that cannot be found, read or combined."""


class AdapterNotFoundError(ModelError, FileNotFoundError):
    """No LoRA adapter stands where one was asked for."""


class StoreError(RagKitError):
    """An index that is missing, damaged, or belongs to another embedder."""


class ServiceError(RagKitError):
    """A server that refuses, hangs, breaks off or answers with an error (Ollama, a model hub)."""
