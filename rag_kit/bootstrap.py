"""From a fresh clone to the project's own Python, with nothing but the standard library.

Knows `.venv`, pip and the constraints file; knows nothing of what is installed. A Python in which
rag-kit is installed (conda's, a user's own) is used as it is; any other one makes `.venv` first.
`python -m rag_kit.bootstrap ARGUMENTS` runs the project's Python with those arguments.
"""

from __future__ import annotations  # an old Python must get as far as the sentence that it is too old

import hashlib
import os
import queue
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
MARKER = VENV / "rag-kit-setup"
OLDEST = (3, 11)
TORCH = "torch==2.13.0"
TOO_OLD = (
    "rag-kit needs Python 3.11 or newer, and this is Python {0} ({1}). Install one, then name it: "
    "`make run PYTHON=python3.11`, or `python3.11 -m rag_kit run`.\n"
    "rag-kit 需要 Python 3.11 或更高版本，而当前是 Python {0}（{1}）。请安装后指定它："
    "`make run PYTHON=python3.11`，或 `python3.11 -m rag_kit run`。"
)


def main(argv: list[str]) -> int:
    """Run the command line in a Python that has the project; returns its exit code."""
    if sys.version_info >= OLDEST and is_ready():
        from rag_kit.faces.cli import main as command_line

        return command_line(argv)
    return run_python(["-m", "rag_kit", *argv])


def run_python(arguments: list[str]) -> int:
    """Run the project's Python with `arguments`, set up first where it must; returns its exit code."""
    if sys.version_info < OLDEST:
        return _run_newer(arguments)
    from rag_kit.errors import RagKitError

    try:
        python = sys.executable if is_ready() else str(ensure())
    except RagKitError as error:
        sys.stderr.write(f"{error.message}\n{error.hint}\n")
        return 1
    return _call([python, *arguments])


def is_ready() -> bool:
    """Whether the running Python has the project: its `.venv`, complete, or another with rag-kit in it."""
    if Path(sys.prefix).resolve() == VENV.resolve():
        return _is_current()
    from importlib.metadata import distributions

    return any(distributions(name="rag-kit", path=[sysconfig.get_paths()["purelib"]]))


def ensure() -> Path:
    """Make `.venv` complete and return its Python; quick where it is, resumed where it was interrupted.

    `TORCH` (a requirement) and `TORCH_INDEX` (an index for it alone) come from the environment; pip's
    own configuration, such as a mirror, holds for everything. Raises SettingsError, ServiceError.
    """
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if _is_current() and python.exists():
        return python
    MARKER.unlink(missing_ok=True)
    _make_venv(python)
    torch, index = os.environ.get("TORCH") or TORCH, os.environ.get("TORCH_INDEX")
    constraints = _constraints(torch)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    # An index of torch's own holds few versions of what torch needs: the pins follow in the next step.
    _step(2, "setup_torch", [*pip, torch, *(["--index-url", index] if index else ["-c", constraints])])
    _step(3, "setup_project", [*pip, "-c", constraints, "-e", ".[test]"])
    partial = MARKER.with_suffix(".partial")
    partial.write_text(_fingerprint(), encoding="utf-8")
    partial.replace(MARKER)
    return python


def _make_venv(python: Path) -> None:
    from rag_kit.errors import SettingsError

    probe = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    if python.exists() and subprocess.run([str(python), "-c", probe], capture_output=True).returncode == 0:
        return
    from importlib.util import find_spec

    if find_spec("venv") is None or find_spec("ensurepip") is None:
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        raise SettingsError("setup_no_venv", python=sys.executable, package=package)
    _step(1, "setup_venv", [sys.executable, "-m", "venv", "--clear", str(VENV)])


def _constraints(torch: str) -> str:
    """Return the constraints file, or a copy in `.venv` without torch where the user chose another."""
    file = ROOT / "constraints.txt"
    if torch == TORCH:
        return file.name
    kept = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("torch==")]
    copy = VENV / "constraints.txt"
    copy.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return str(copy.relative_to(ROOT))


def _step(number: int, key: str, command: list[str]) -> None:
    """Run one step of the set-up with a line that tells what it does; its output only if it fails."""
    from rag_kit.errors import ServiceError, message

    name = message(key)
    _say(message("setup_step", number=number, total=3, name=name) + "\n")
    began = time.monotonic()
    environment = {**os.environ, "PYTHONUTF8": "1", "PIP_PROGRESS_BAR": "off"}
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    lines = _watch(child, began)
    if child.wait() != 0:
        _say("\n" + "".join(lines))
        raise ServiceError("setup_failed", name=name, code=child.returncode)
    _say(message("setup_done", seconds=round(time.monotonic() - began)) + "\n")


def _watch(child: subprocess.Popen[str], began: float) -> list[str]:
    """Return all that a child prints, showing meanwhile the seconds and its latest doing.

    On a terminal in place, every second; elsewhere as a line, every half minute.
    """
    fresh: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in child.stdout or ():
            fresh.put(line)
        fresh.put(None)

    threading.Thread(target=read, daemon=True).start()
    live = sys.stderr.isatty()
    lines: list[str] = []
    shown = began
    try:
        while True:
            try:
                line = fresh.get(timeout=1)
                if line is None:
                    return lines
                lines.append(line)
            except queue.Empty:
                pass
            if time.monotonic() - shown >= (1 if live else 30):
                shown = time.monotonic()
                doing = f"      {shown - began:4.0f} s  {lines[-1].strip()[:80] if lines else ''}"
                _say(f"\r\033[K{doing}" if live else f"{doing}\n")
    except BaseException:
        child.terminate()
        raise
    finally:
        if live:
            _say("\r\033[K")


def _fingerprint() -> str:
    """Return what the set-up depends on: requirements, pins, torch, and where the folder lies."""
    parts = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    parts += [part.encode() for part in (os.environ.get("TORCH") or TORCH, str(ROOT))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _is_current() -> bool:
    return MARKER.is_file() and MARKER.read_text(encoding="utf-8") == _fingerprint()


def _run_newer(arguments: list[str]) -> int:
    """Hand over to a newer Python on the PATH, or say that there is none."""
    for minor in range(11, 20):
        newer = shutil.which(f"python3.{minor}")
        if newer and subprocess.call([newer, "-c", ""], stderr=subprocess.DEVNULL) == 0:
            return _call([newer, "-m", "rag_kit.bootstrap", *arguments])
    _say(TOO_OLD.format(".".join(map(str, sys.version_info[:2])), sys.executable) + "\n")
    return 1


def _call(command: list[str]) -> int:
    """Run a child that shares this terminal; Ctrl-C is the child's, its exit code is ours."""
    child = subprocess.Popen(command)
    while True:
        try:
            code = child.wait()
            return 128 - code if code < 0 else code
        except KeyboardInterrupt:
            continue


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(run_python(sys.argv[1:]))
