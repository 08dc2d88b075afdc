"""The one runner of notebooks: papermill, each notebook in a process of its own, its result in a folder.

Knows plans, limits, resuming and what counts as failed; knows nothing of what notebooks do. A result is
`runs/<id>/<notebook>[-<hash of its parameters>]/`: `job.json` is written before the notebook is executed
and the manifest last, so that one that was cut is told from one that ended.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import groupby, product
from pathlib import Path
from shutil import rmtree
from statistics import fmean
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

from rag_kit.errors import DataError, message
from rag_kit.manifest import fingerprint, write_json, write_manifest
from rag_kit.ops.metrics import collect
from rag_kit.ops.notebooks import find_notebooks, new_run_folder
from rag_kit.ops.parameters import ParameterFile, code_cells, declared_parameters, lookup, read_file
from rag_kit.ops.runs import JOB, Run, load
from rag_kit.settings import Settings, get_settings

MAIN = ("01", "02", "03")
LOG = "log.txt"

logger = logging.getLogger("rag_kit.ops.runner")


def run_notebooks(
    notebooks: str | Sequence[str] = (),
    parameters: Mapping[str, Any] | None = None,
    *,
    params: str | Path | None = None,
    sweep: str | Path | None = None,
    run: str | Path | None = None,
    jobs: int = 1,
    limit_s: float = 3600,
    settings: Settings | None = None,
    say: Callable[[str], None] = print,
) -> list[Run]:
    """Execute notebooks, for every combination of a sweep; one that fails does not stop the others.

    Without names it is the main job, or the notebook of the files `params` and `sweep` (`parameters` says
    what stands in them); `all` is every numbered one. `run` names a folder below `runs/` (default: a new
    one), or is the Path of another; given again, what ended well stays if notebook, parameters and package
    are the same. Up to `jobs` runs of one number go side by side; later numbers wait. What takes longer
    than `limit_s` seconds is killed with its kernel. Raises DataError, before anything is executed, for
    what does not fit. Shown in notebook 06.
    """
    from filelock import FileLock, Timeout

    settings = settings or get_settings()
    names = [notebooks] if isinstance(notebooks, str) else notebooks
    files = [read_file(settings, params).model_copy(update={"sweep": {}})] if params else []
    files += [read_file(settings, sweep)] if sweep else []
    planned = _plan(settings, names or [file.notebook for file in files] or MAIN, parameters or {}, files)
    home = run.absolute() if isinstance(run, Path) else new_run_folder(settings, run)
    home.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(home.with_name(f".{home.name}.lock"), timeout=0):
            made = {job.folder: job for job in (_prepare(home, *one) for one in planned)}
            _execute_all([*made.values()], jobs, limit_s, say)
    except Timeout:
        raise DataError("run_in_use", folder=home) from None
    return [load(folder) for folder in made]


@dataclass(frozen=True)
class _Job:
    notebook: Path
    folder: Path
    parameters: Mapping[str, Any]
    title: str


def _plan(
    settings: Settings, names: Sequence[str], parameters: Mapping[str, Any], files: Sequence[ParameterFile]
) -> list[tuple[Path, dict[str, Any], str]]:
    """Return (notebook, its parameters, title) of each run, all checked; the last word is -p's."""
    paths = find_notebooks(settings, () if "all" in names else names)
    declared = {path: declared_parameters(path) for path in paths}
    together = {name: one for found in declared.values() for name, one in found.items()}
    for name in (name for name, one in together.items() if not one.read):
        logger.warning(message("parameter_unread", where=", ".join(one.stem for one in paths), name=name))
    chosen: dict[Path, dict[str, list[Any]]] = {path: {} for path in paths}
    for file in files:
        (path,) = find_notebooks(settings, [file.notebook])
        if path not in paths:
            raise DataError("params_other", notebook=path.stem, known=", ".join(one.stem for one in paths))
        for name, values in ({name: [one] for name, one in file.parameters.items()} | file.sweep).items():
            parameter = lookup(declared[path], name, file.where(name))
            chosen[path][name] = [parameter.check(value, file.where(name)) for value in values]
    for name, value in parameters.items():
        lookup(together, name, f"-p {name}")
        for path in paths:
            if name in declared[path]:
                chosen[path][name] = [declared[path][name].check(value, f"-p {name}")]
    planned = []
    for path, grid in chosen.items():
        for combination in product(*grid.values()):
            given = dict(zip(grid, combination, strict=True))
            told = (f"{name}={value}" for name, value in given.items() if len(grid[name]) > 1)
            planned.append((path, given, " ".join([path.stem, *told])))
    return planned


def _prepare(home: Path, notebook: Path, given: dict[str, Any], title: str) -> _Job:
    """Make the folder of one run; what another notebook, another package or a failure left there goes."""
    folder = home / (f"{notebook.stem}-{fingerprint(given)[:8]}" if given else notebook.stem)
    values = {name: one.default for name, one in declared_parameters(notebook).items()} | given
    own = {"run_folder": str(folder / "rows")} if values.pop("run_folder", None) == "" else {}
    record = {
        "notebook": notebook.stem,
        "code": fingerprint([cell["source"] for cell in code_cells(notebook)]),
        "package": version("rag-kit"),
        "parameters": json.loads(json.dumps(values)),
    }
    path = folder / JOB
    same = path.is_file() and json.loads(path.read_text(encoding="utf-8")) == record
    if not same or load(folder).status == "failed":
        rmtree(folder, ignore_errors=True)
        write_json(path, record)
    return _Job(notebook, folder, given | own, title)


def _execute_all(planned: Sequence[_Job], jobs: int, limit_s: float, say: Callable[[str], None]) -> None:
    """Execute what has not ended well yet; say what begins, what ended, and how long the rest takes."""
    todo = [job for job in planned if load(job.folder).status != "ok"]
    if kept := len(planned) - len(todo):
        say(message("run_kept", kept=kept, total=len(planned)))
    workers: list[subprocess.Popen[bytes]] = []
    stop = Event()
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
    took: list[float] = []

    def execute(job: _Job) -> None:
        left = message("run_left", time=_time(fmean(took) * max(1, len(todo) / jobs))) if took else ""
        say(message("run_begins", title=job.title, left=left))
        seconds = _execute(job, limit_s, workers, stop, threads | os.environ)
        if stop.is_set():
            return
        todo.remove(job)
        took.append(seconds)
        run = load(job.folder)
        done = f"{len(planned) - len(todo)}/{len(planned)}"
        how = {"done": done, "title": job.title, "time": _time(seconds), "folder": str(job.folder)}
        say(message("run_failed" if run.failure else "run_ended", reason=run.reason, **how))

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        try:
            # A numbered notebook may build on those before it; runs of one number do not on each other.
            for _, stage in groupby(todo.copy(), key=lambda job: job.notebook.stem[:2]):
                list(pool.map(execute, stage))
        finally:
            stop.set()
            for worker in workers:
                if worker.stdin:
                    worker.stdin.close()  # which ends it, its kernel and all that they started


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _execute(
    job: _Job,
    limit_s: float,
    workers: list[subprocess.Popen[bytes]],
    stop: Event,
    environment: Mapping[str, str],
) -> float:
    """Execute one notebook in a worker and write its manifest (unless all is to stop); return the seconds."""
    copy, log = job.folder / job.notebook.name, job.folder / LOG
    copy.unlink(missing_ok=True)  # of one that was cut
    order: dict[str, Any] = {"notebook": str(job.notebook), "copy": str(copy), "parameters": job.parameters}
    command = [sys.executable, "-m", "rag_kit.ops.worker"]
    how: dict[str, Any] = {"cwd": job.folder, "env": environment, "start_new_session": True}
    began = time.perf_counter()
    with (
        TemporaryDirectory(prefix="rag-kit-", ignore_cleanup_errors=True) as sockets,
        log.open("wb") as output,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output, **how) as worker,
    ):
        workers.append(worker)
        with suppress(OSError, ValueError):  # it died at once, or all is to stop
            assert worker.stdin
            worker.stdin.write(json.dumps(order | {"sockets": sockets}).encode() + b"\n")
            worker.stdin.flush()
        with suppress(subprocess.TimeoutExpired):
            worker.wait(0 if stop.is_set() else limit_s)
        status = worker.returncode
        # Leaving the block closes stdin, which ends one that is late.
    seconds = time.perf_counter() - began
    if stop.is_set():
        return seconds
    try:
        executed = json.loads(copy.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it never came so far, or was killed while it wrote
        executed = {"cells": [], "metadata": {}}
    failure = _failure(executed, status, limit_s, log)
    values = {
        "kind": "notebook",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 2),
        "metrics": collect(executed["cells"]),
        "status": "failed" if failure else "ok",
        "failure": failure,
    }
    write_manifest(job.folder, json.loads((job.folder / JOB).read_text(encoding="utf-8")) | values)
    return seconds


def _failure(executed: dict[str, Any], status: int | None, limit_s: float, log: Path) -> Any:
    """Return the key of what went wrong and its values, None for nothing; `status` is None for a late one."""
    begun = [cell for cell in executed["cells"] if cell["metadata"].get("papermill", {}).get("start_time")]
    cells = [cell for cell in begun if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    if status is None:
        return "run_late", {"limit": limit_s, "cell": len(cells)}
    if status:
        last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        return "run_died", {"cell": len(cells), "error": last or f"status {status}"}
    for number, cell in enumerate(cells, 1):
        if "raises-exception" in cell["metadata"].get("tags", ()):
            continue
        errors = [output for output in cell["outputs"] if output["output_type"] == "error"]
        if errors and errors[0]["ename"] == "SystemExit":
            return "run_exited", {"cell": number}
        if errors or cell["metadata"]["papermill"]["exception"]:
            error = ": ".join(errors[0][name] for name in ("ename", "evalue")) if errors else "?"
            return "run_raised", {"cell": number, "error": re.sub(r"\x1b\[[0-9;]*m", "", error)}
    promised = executed["metadata"].get("rag_kit", {}).get("metrics", [])
    missing = [name for name in promised if name not in collect(executed["cells"])]
    return ("run_unrecorded", {"names": ", ".join(missing)}) if missing else None
