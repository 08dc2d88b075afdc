"""Artefacts stay whole: every moment at which a process may die is tried."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_kit import manifest
from rag_kit.errors import StoreError
from rag_kit.manifest import fingerprint, read_manifest, replacing, settle, write_atomic, write_manifest

OLD = {"a.txt": "old a", "only-old.txt": "旧"}
NEW = {"a.txt": "new a", "only-new.txt": "新"}


def fill(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if path.is_file()}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if ".lock" not in path.name and path != folder]


def test_files_are_replaced_and_subfolders_stay(tmp_path: Path) -> None:
    target = tmp_path / "适配器"
    fill(target, OLD)
    fill(target / "other", {"x": "stays"})
    (target / "README.md").write_text("of the project", encoding="utf-8")
    with replacing(target) as building:
        fill(building, NEW)
    assert content(target) == NEW | {"README.md": "of the project"}
    assert content(target / "other") == {"x": "stays"}
    assert leftovers(target) == []


def test_the_former_files_are_kept_aside(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    fill(target, OLD)
    with replacing(target, keep_as=target / ".previous") as building:
        fill(building, NEW)
    assert content(target) == NEW
    assert content(target / ".previous") == OLD


def test_a_failure_while_building_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "index"
    fill(target, OLD)
    with pytest.raises(OSError, match="No space"), replacing(target) as building:
        fill(building, NEW)
        raise OSError(28, "No space left on device")
    assert content(target) == OLD
    assert leftovers(target) == []


class Died(BaseException):
    """A process that stops here and never comes back."""


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dies_at", range(1, 14))
def test_a_death_at_any_step_of_the_swap_is_completed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int, keep: bool
) -> None:
    target = tmp_path / "adapter"
    aside = target / ".previous" if keep else None
    fill(target, OLD)
    steps = 0

    def counted(name: str) -> None:
        real = getattr(Path, name)

        def step(self: Path, *arguments: object, **how: object) -> object:
            nonlocal steps
            steps += 1
            if steps == dies_at:
                raise Died
            return real(self, *arguments, **how)

        monkeypatch.setattr(Path, name, step)

    building_done = False
    try:
        with replacing(target, keep_as=aside) as building:
            fill(building, NEW)
            building_done = True
            for name in ("replace", "rename", "unlink", "rmdir"):
                counted(name)
    except Died:
        pass
    monkeypatch.undo()
    assert building_done
    settle(target)
    assert content(target) in (OLD, NEW)  # the swap had begun, or it had not
    if content(target) == NEW and aside is not None:
        assert content(aside) == OLD
    if not target.parent.joinpath(".adapter.incoming").exists():
        assert [name for name in leftovers(target) if "arriving" in name] == []


def test_kill_9_while_building_leaves_the_former_state_and_the_rest_is_swept(tmp_path: Path) -> None:
    target = tmp_path / "index"
    fill(target, OLD)
    program = textwrap.dedent(f"""
        from pathlib import Path
        from rag_kit.manifest import replacing
        with replacing(Path({str(target)!r})) as building:
            (building / "a.txt").write_text("half", encoding="utf-8")
            print("half-way", flush=True)
            import time; time.sleep(60)
    """)
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert leftovers(target) != []
    settle(target)
    assert content(target) == OLD
    assert leftovers(target) == []


def test_a_manifest_knows_every_file_and_every_byte(tmp_path: Path) -> None:
    fill(tmp_path, NEW)
    written = write_manifest(tmp_path, {"kind": "test"})
    assert set(written["files"]) == set(NEW)
    assert read_manifest(tmp_path, hashes=True)["kind"] == "test"

    path = tmp_path / "a.txt"
    path.write_text("nex a", encoding="utf-8")  # same size, another byte
    read_manifest(tmp_path)
    with pytest.raises(StoreError) as told:
        read_manifest(tmp_path, hashes=True)
    assert "a.txt is damaged" in told.value.text("en")[0]
    assert "已损坏" in told.value.text("zh")[0]

    path.unlink()
    assert _error(tmp_path).key == "artefact_damaged"


def _error(folder: Path) -> StoreError:
    with pytest.raises(StoreError) as told:
        read_manifest(folder)
    return told.value


def test_what_is_no_artefact_is_told(tmp_path: Path) -> None:
    assert _error(tmp_path).text("en")[0] == f"{tmp_path} is not complete: it holds no manifest.json."
    for text in ("{", "[]", '{"files": 3}', "\x00"):
        (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
        assert "is not a manifest" in _error(tmp_path).text("en")[0]


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "设置.json"
    write_atomic(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert content(tmp_path) == {"设置.json": "old"}


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.none(), max_size=4))
def test_a_fingerprint_does_not_depend_on_the_order(value: dict[str, object]) -> None:
    shuffled = dict(reversed(value.items()))
    assert fingerprint(value) == fingerprint(shuffled)
    assert fingerprint(value) == fingerprint(json.loads(json.dumps(value)))
    assert fingerprint(value) != fingerprint([value])
