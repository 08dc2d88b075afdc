"""The folder of one comparison under way: its plan, frozen passages and rows, each safe from a kill.

Knows files only. `run.json` is written first, then `contexts.jsonl`, then a line of `rows.jsonl` for
each row, flushed to the disk; `rows.parquet` and the manifest, written last, say that it is finished.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rag_kit.compare.comparison import Comparison
from rag_kit.compare.rows import Row, write_parquet
from rag_kit.errors import DataError
from rag_kit.manifest import MANIFEST, canonical_json, fingerprint, write_atomic, write_json, write_manifest

if TYPE_CHECKING:
    from rag_kit.index.hit import Hit

PLAN, CONTEXTS, ROWS, TABLE = "run.json", "contexts.jsonl", "rows.jsonl", "rows.parquet"


@dataclass(frozen=True)
class FrozenContext:
    """What retrieval found for one question, or why it found nothing."""

    hits: "tuple[Hit, ...]"
    seconds: float | None = None
    error: str | None = None


def freeze(hits: "Sequence[Hit]", seconds: float) -> FrozenContext:
    """Return the hits as reading them back would give them."""
    return _context(json.loads(canonical_json(_record("", FrozenContext(tuple(hits), seconds)))))


class Run:
    """The rows of one comparison; with a folder, each is on disk once `add` returns."""

    def __init__(self, folder: Path | None, plan: Mapping[str, Any]) -> None:
        self.folder, self.plan = folder, json.loads(json.dumps(plan))
        self.contexts: dict[str, FrozenContext] = {}
        self._rows: dict[tuple[str, str], Row] = {}

    @classmethod
    @contextmanager
    def open(cls, folder: Path | None, plan: Mapping[str, Any]) -> Iterator[Self]:
        """Begin or resume the run in `folder`, which no other process may hold; None keeps all in memory.

        Raises DataError where the folder holds another plan, another process's run, or damaged files.
        """
        run = cls(folder, plan)
        if folder is None:
            yield run
            return
        from filelock import FileLock, Timeout

        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.absolute().parent / f".{folder.name}.lock", timeout=0)
        try:
            held = lock.acquire()
        except Timeout:
            raise DataError("compare_in_use", folder=folder) from None
        with held:
            run._resume(folder)
            yield run

    def has(self, arm: object, question_id: str) -> bool:
        """Whether this arm has answered this question; a failed row is to be tried again."""
        row = self._rows.get((str(arm), question_id))
        return row is not None and row.get("error") is None

    def add(self, row: Row) -> None:
        """Keep one row; it takes the place of a failed one of the same arm and question."""
        line = canonical_json(row).encode("utf-8", "replace")  # half an emoji would spoil the whole table
        self._rows[row["arm"], row["question_id"]] = json.loads(line)
        if self.folder is not None:
            (self.folder / MANIFEST).unlink(missing_ok=True)  # no longer finished
            with (self.folder / ROWS).open("ab") as file:
                file.write(line + b"\n")
                file.flush()
                os.fsync(file.fileno())

    def save_contexts(self) -> None:
        """Write the frozen passages, atomically."""
        if self.folder is not None:
            (self.folder / MANIFEST).unlink(missing_ok=True)
            lines = [canonical_json(_record(id_, context)) for id_, context in self.contexts.items()]
            write_atomic(self.folder / CONTEXTS, "".join(line + "\n" for line in lines))

    def finish(self) -> Comparison:
        """Write the table and, last, the manifest; return the comparison."""
        rows = [self._rows[arm, id_] for arm in self.plan["arms"] for id_ in self.plan["questions"]]
        if self.folder is None:
            return Comparison.from_rows(rows, self.plan["factors"])
        if not (self.folder / MANIFEST).exists():
            write_parquet(self.folder / TABLE, rows)
            errors = sum(row.get("error") is not None for row in rows)
            values = {"kind": "comparison", "finished": datetime.now(UTC).isoformat(timespec="seconds")}
            write_manifest(self.folder, {**values, **self.plan, "rows": len(rows), "errors": errors})
        return Comparison.load(self.folder)

    def _resume(self, folder: Path) -> None:
        path, theirs = folder / PLAN, None
        if path.exists():
            try:
                theirs = json.loads(path.read_text(encoding="utf-8"))
                found = differences(theirs, self.plan)
            except (ValueError, LookupError, AttributeError, TypeError):
                raise DataError("compare_damaged", path=path, line=1) from None
            if found:
                raise DataError("compare_other_run", folder=folder, differences="; ".join(found))
            known = {model: identity for model, identity in theirs["models"].items() if identity}
            self.plan["models"] |= known  # one that was missing then may be known now, never the reverse
            self.plan["factors"] |= {model: told for model, told in theirs.get("factors", {}).items() if told}
        elif unknown := sorted(child.name for child in folder.iterdir() if child.name[0] != "."):
            raise DataError("compare_not_a_run", folder=folder, found=", ".join(unknown[:5]))
        if self.plan != theirs:
            (folder / MANIFEST).unlink(missing_ok=True)
            write_json(path, self.plan)
        for record in _read_lines(folder / CONTEXTS):
            self.contexts[record["question_id"]] = _context(record)
            if record["hash"] != fingerprint(record["hits"]):
                raise DataError("compare_context_changed", path=folder / CONTEXTS, id=record["question_id"])
        for row in _read_lines(folder / ROWS):
            self._rows[row["arm"], row["question_id"]] = row


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return what tells two plans apart, `name: theirs → ours`; an unknown identity is not compared."""
    found = []
    if theirs["arms"] != ours["arms"]:
        found.append(f"arms: {', '.join(theirs['arms'])} → {', '.join(ours['arms'])}")
    a, b = theirs["questions"], ours["questions"]
    if list(a.items()) != list(b.items()):
        changed = [id_ for id_ in [*a, *b] if a.get(id_) != b.get(id_)] or [*b]
        found.append(f"questions: {len(a)} → {len(b)} (first: {changed[0]})")
    for name in sorted(theirs["options"].keys() | ours["options"].keys()):
        old, new = theirs["options"].get(name), ours["options"].get(name)
        if old != new:
            found.append(f"{name}: {old} → {new}")
    if theirs["top_k"] != ours["top_k"]:
        found.append(f"top_k: {theirs['top_k']} → {ours['top_k']}")
    for model, new in ours["models"].items():
        old = theirs["models"].get(model)
        if old and new and old != new:
            found.append(f"{model}: {old[:160]} → {new[:160]}")
    return found


def _read_lines(path: Path) -> list[Row]:
    """Read JSON lines; a last line that a killed process left half-written is cut off the file."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("torn")
            record = json.loads(line)
            record["question_id"]
            records.append(record)
        except (ValueError, LookupError, TypeError):
            if number < len(lines):
                raise DataError("compare_damaged", path=path, line=number) from None
            os.truncate(path, sum(map(len, lines[:-1])))
    return records


def _record(question_id: str, context: FrozenContext) -> Row:
    hits = [
        {
            "text": hit.document.page_content,
            "metadata": hit.document.metadata,
            "score": float(hit.score),
            "rank": int(hit.rank),
            "ranks": {stage: int(rank) for stage, rank in hit.ranks.items()},
        }
        for hit in context.hits
    ]
    values = {"question_id": question_id, "hits": hits, "hash": fingerprint(hits)}
    return {**values, "seconds": context.seconds, "error": context.error}


def _context(record: Row) -> FrozenContext:
    from langchain_core.documents import Document

    from rag_kit.index.hit import Hit

    hits = (
        Hit(Document(hit["text"], metadata=hit["metadata"]), hit["score"], hit["rank"], hit["ranks"])
        for hit in record["hits"]
    )
    return FrozenContext(tuple(hits), record["seconds"], record["error"])
