"""What became of runs: the folders below `runs/`, read, listed, tabled and told apart.

Knows the files of a run; knows nothing of how one is executed, and calls none better than another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_kit.errors import DataError, message
from rag_kit.manifest import MANIFEST
from rag_kit.settings import Settings

if TYPE_CHECKING:
    import pandas as pd

JOB, COMPARISON = "job.json", "run.json"


@dataclass(frozen=True)
class Run:
    """One notebook (or comparison) with one set of parameters, and its folder.

    `status` is `ok`, `failed` or `unfinished` (cut, or never begun); `metrics` are `{name: {kind, value}}`.
    """

    folder: Path
    notebook: str
    parameters: Mapping[str, Any]
    status: str = "unfinished"
    seconds: float | None = None
    finished: str = ""
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    failure: tuple[str, Mapping[str, Any]] | None = None

    @property
    def reason(self) -> str:
        """Why it failed, in the reader's language; empty where it did not."""
        return message(self.failure[0], **self.failure[1]) if self.failure else ""


def load(folder: Path) -> Run:
    """Read one run; without a manifest it is unfinished."""
    job = folder / JOB
    values = json.loads((job if job.is_file() else folder / COMPARISON).read_text(encoding="utf-8"))
    with suppress(FileNotFoundError):  # sizes are not checked: whoever opens the executed copy may save it
        values |= json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not job.is_file():
        plan = {"arms": values["arms"], "questions": len(values["questions"]), "top_k": values["top_k"]}
        counts = {name: {"kind": "fact", "value": values.get(name)} for name in ("rows", "errors")}
        values |= {"notebook": "comparison", "parameters": plan | values["options"], "metrics": counts}
        values["status"] = "ok" if "finished" in values else "unfinished"
    return Run(folder, **{one.name: values[one.name] for one in fields(Run) if one.name in values})


def list_runs(settings: Settings) -> dict[str, list[Run]]:
    """Return what lies below `runs/` by its id, the notebooks of each by their parameters' values."""

    def order(run: Run) -> Any:
        values = (one if isinstance(one, int | float | str) else str(one) for one in run.parameters.values())
        return run.notebook, [(type(one).__name__, one) for one in values]

    found = {}
    for folder in sorted((settings.root / "runs").glob("*")):
        places = list(folder.glob(f"*/{JOB}")) or list(folder.glob(COMPARISON))
        if places:
            found[folder.name] = sorted((load(path.parent) for path in places), key=order)
    return found


def find_runs(settings: Settings, name: str) -> list[Run]:
    """Return the runs of `ID`, or the one of `ID/FOLDER`; raises DataError with the ids at hand."""
    found = list_runs(settings)
    id_, _, folder = name.partition("/")
    runs = [run for run in found.get(id_, []) if folder in ("", run.folder.name)]
    if not runs:
        raise DataError("run_unknown", name=name, known=", ".join(found) or "–")
    return runs


def table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return one line for each run: how it ended, the parameters in which they differ, the metrics.

    Of a single run it has every parameter.
    """
    import pandas as pd

    names = dict.fromkeys(name for run in runs for name in run.parameters)
    rows = [
        {"run": run.folder.name, "notebook": run.notebook, "status": run.status, "seconds": run.seconds}
        | {name: run.parameters.get(name) for name in names if len(runs) == 1 or _differ(runs, name)}
        | {name: metric["value"] for name, metric in run.metrics.items()}
        for run in runs
    ]
    return pd.DataFrame(rows)


def differences(a: Run, b: Run) -> pd.DataFrame:
    """Return the parameters that differ and every metric side by side, with b - a where both are known.

    `kind` is how to read a metric (see `metrics.record`), or `parameter`.
    """
    import pandas as pd

    rows: list[tuple[Any, ...]] = [
        ("parameter", name, a.parameters.get(name), b.parameters.get(name), None)
        for name in dict.fromkeys([*a.parameters, *b.parameters])
        if _differ([a, b], name)
    ]
    for name in dict.fromkeys([*a.metrics, *b.metrics]):
        x, y = (run.metrics.get(name, {}).get("value") for run in (a, b))
        kind = {**a.metrics, **b.metrics}[name]["kind"]
        rows.append((kind, name, x, y, None if x is None or y is None else y - x))
    return pd.DataFrame(rows, columns=["kind", "name", "a", "b", "difference"], dtype=object)


def _differ(runs: Sequence[Run], name: str) -> bool:
    return len({repr(run.parameters.get(name)) for run in runs}) > 1
