"""The `.env` file: its lines, and what looks wrong in them.

Knows python-dotenv's parser and how people misspell; the names of the settings are given to it.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dotenv.parser import parse_stream

from rag_kit.errors import SettingsError

Entries = dict[str, tuple[str | None, int]]  # key as written: (value, line number)
Warned = tuple[str, dict[str, Any]]  # a key of the catalogue, and what fills it


def read_env_file(path: Path) -> Entries:
    """Return the file's entries, none where it is missing; a line that cannot be parsed has the key ''.

    A byte-order mark is passed over. Raises SettingsError where the file is not UTF-8.
    """
    if not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8-sig") as file:
            bindings = list(parse_stream(file))
    except UnicodeDecodeError:
        raise SettingsError("env_file_encoding", path=path) from None
    entries: Entries = {}
    for binding in bindings:
        # A binding's text begins with the blank lines before it.
        text = binding.original.string
        line = binding.original.line + text[: len(text) - len(text.lstrip())].count("\n")
        if binding.key or binding.error:
            entries[binding.key or ""] = (binding.value, line)
    return entries


def judge_keys(entries: Entries, names: Iterable[str]) -> tuple[dict[str, str], list[Warned]]:
    """Return the keys of other programs, which are passed on, and what is warned of: misspelt names."""
    known = list(names)
    foreign: dict[str, str] = {}
    warnings: list[Warned] = []
    for key, (value, line) in entries.items():
        name = key.lower()
        if not key:
            warnings.append(("env_line_unreadable", {"line": line}))
        elif name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            if near and name not in ("all_proxy", "ftp_proxy"):
                told = {"written": key, "line": line, "near": near[0].upper()}
                warnings.append(("env_key_misspelt", told))
            elif value:
                foreign[key] = value
    return foreign, warnings
