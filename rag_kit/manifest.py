"""Artefacts that are whole or absent: hashes, atomic files and folders, manifests written last.

An artefact is a folder of files (an adapter, an index, a converted model). It is built beside the
live one and swapped in; a process that dies at any moment leaves either the old state or the new.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock

from rag_kit.errors import StoreError

MANIFEST = "manifest.json"
# What a folder of artefacts has of its own, also where an artefact's files lie directly in it.
KEPT = ("README.md", "registry.json", ".registry.json.lock")


def fingerprint(value: object) -> str:
    """Return the SHA-256 (hex) of a JSON-serialisable value in canonical form, or of bytes."""
    data = value if isinstance(value, bytes) else canonical_json(value).encode()
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: object) -> str:
    """Return JSON with sorted keys, no spaces, and characters as they are."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write indented UTF-8 JSON atomically."""
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n")


def write_manifest(folder: Path, values: dict[str, Any], name: str = MANIFEST) -> dict[str, Any]:
    """Write `values` and the size and hash of every other file of `folder`; returns what was written.

    Called last, so that a folder with a manifest is complete.
    """
    files = {
        path.name: {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != name
    }
    manifest = {**values, "files": files}
    write_json(folder / name, manifest)
    return manifest


def read_manifest(folder: Path, name: str = MANIFEST, *, hashes: bool = False) -> dict[str, Any]:
    """Read a folder's manifest and check its files' sizes (and with `hashes` their SHA-256).

    Raises StoreError where the manifest is missing or unreadable, or a file is missing or changed.
    """
    settle(folder)
    try:
        manifest: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
        files = manifest["files"].items()
    except FileNotFoundError:
        raise StoreError("artefact_missing", path=folder, name=name) from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise StoreError("artefact_unreadable", path=folder / name) from None
    for file, expected in files:
        path = folder / file
        size = path.stat().st_size if path.is_file() else -1
        if size != expected["size"] or (hashes and sha256(path) != expected["sha256"]):
            raise StoreError("artefact_damaged", path=path, expected=expected["size"], found=size)
    return manifest


@contextmanager
def replacing(target: Path, keep_as: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder to build in; when the block ends well its files replace `target`'s.

    Only the files directly in `target` are replaced; folders in it stay. The old files go to
    `keep_as`, or away. When the block fails, `target` is as it was. A process killed before the
    block's end leaves `target` untouched; one killed later is completed by `settle`.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    settle(target)
    building = target.parent / f".{target.name}.building-{os.getpid()}-{uuid4().hex[:8]}"
    building.mkdir()
    try:
        yield building
        with _lock(target):
            if keep_as is not None:
                write_json(building / _KEEP, str(keep_as.absolute()))
            building.rename(_beside(target, "incoming"))
            _settle(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def settle(target: Path) -> None:
    """Complete a swap that a killed process left half-way; does nothing otherwise.

    Readers call it before they open an artefact.
    """
    target = target.absolute()
    _sweep(target)
    if any(_beside(target, state).exists() for state in ("incoming", "arriving")):
        with _lock(target):
            _settle(target)


_KEEP = ".keep_as.json"


def _beside(target: Path, state: str) -> Path:
    return target.parent / f".{target.name}.{state}"


def _lock(target: Path) -> FileLock:
    return FileLock(_beside(target, "lock"))


def _settle(target: Path) -> None:
    """Two steps, each repeatable: old files out of `target`, then new files in."""
    incoming, arriving = _beside(target, "incoming"), _beside(target, "arriving")
    target.mkdir(exist_ok=True)
    if incoming.exists():
        keep = incoming / _KEEP
        aside = Path(json.loads(keep.read_text(encoding="utf-8"))) if keep.exists() else None
        for path in list(target.iterdir()):
            if path.is_file() and path.name not in KEPT:
                if aside is None:
                    path.unlink()
                else:
                    aside.mkdir(parents=True, exist_ok=True)
                    path.replace(aside / path.name)
        incoming.rename(arriving)
    if arriving.exists():
        (arriving / _KEEP).unlink(missing_ok=True)
        for path in list(arriving.iterdir()):
            path.replace(target / path.name)
        arriving.rmdir()


def _sweep(target: Path) -> None:
    """Remove what dead processes were building beside `target`."""
    import psutil

    if target.parent.is_dir():
        for path in target.parent.glob(f".{target.name}.building-*"):
            if not psutil.pid_exists(int(path.name.rsplit("-", 2)[1])):
                shutil.rmtree(path, ignore_errors=True)
