"""`rag-kit run` and `rag-kit runs`: notebooks executed, and what became of them."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rag_kit.errors import DataError, message
from rag_kit.settings import start

if TYPE_CHECKING:
    from rag_kit.ops.runs import Run


def run(arguments: Namespace) -> int:
    """Execute notebooks; print comparisons, table and where everything lies. 1 where one has failed."""
    from rag_kit.faces.commands import _prepare
    from rag_kit.ops.parameters import Written
    from rag_kit.ops.runner import run_notebooks

    settings = start()
    for text in arguments.parameters:
        if "=" not in text:
            raise DataError("parameter_form", text=text)
    given = {
        name: Written(value) for name, _, value in (text.partition("=") for text in arguments.parameters)
    }
    places = {name: _path(getattr(arguments, name)) for name in ("params", "sweep")}
    _prepare(settings)
    how = {"run": arguments.run_name, "jobs": arguments.jobs, "limit_s": arguments.limit_s, **places}
    runs = run_notebooks([str(_path(name)) for name in arguments.notebooks], given, settings=settings, **how)
    _show(runs, single=False)
    print()
    for name, place in (
        ("notebooks", runs[0].folder.parent),
        ("adapters", settings.lora_model_path),
        ("indexes", settings.vector_store_path),
    ):
        print(message(f"cli_{name}_lie", folder=place))
    return 0 if all(one.status == "ok" for one in runs) else 1


def runs_list(_arguments: Namespace) -> int:
    """Print what lies below runs/."""
    from rag_kit.ops.runs import list_runs

    rows = []
    for id_, runs in list_runs(start()).items():
        ends = (
            f"{n} {message(f'run_status_{how}')}" for how, n in Counter(one.status for one in runs).items()
        )
        names = dict.fromkeys(one.notebook for one in runs)
        rows.append((id_, ", ".join(names), ", ".join(ends), max(one.finished for one in runs)))
    _table(rows, [message(f"run_column_{name}") for name in ("run", "notebook", "status", "finished")])
    return 0


def runs_show(arguments: Namespace) -> int:
    """Print a run's notebooks with parameters, metrics and what failed, and its comparisons."""
    from rag_kit.ops.runs import find_runs

    runs = find_runs(start(), arguments.run)
    _show(runs, single=True)
    print(f"\n{message('cli_run_lies', folder=runs[0].folder if len(runs) == 1 else runs[0].folder.parent)}")
    return 0


def runs_diff(arguments: Namespace) -> int:
    """Print parameters that differ and metrics side by side, for each notebook that both runs have."""
    from rag_kit.ops.metrics import shown
    from rag_kit.ops.runs import differences, find_runs

    settings = start()
    first, second = (find_runs(settings, name) for name in (arguments.a, arguments.b))
    pairs = [(a, b) for a in first for b in second if a.folder.name == b.folder.name]
    pairs = pairs or ([(first[0], second[0])] if len(first) == len(second) == 1 else [])
    if not pairs:
        raise DataError("run_no_pair", a=arguments.a, b=arguments.b)
    for a, b in pairs:
        frame = differences(a, b)
        frame["kind"] = [message(f"run_kind_{kind}") for kind in frame["kind"]]
        print(f"\nA: {a.folder}\nB: {b.folder}")
        headings = [message("run_column_kind"), message("run_column_name"), "A", "B", "B − A"]
        _table(frame.map(shown).to_numpy(), headings)
    return 0


def _show(runs: Sequence[Run], *, single: bool) -> None:
    """Print comparisons, a table for each notebook that ran several times (or `single`), and failures."""
    from rag_kit.compare.comparison import Comparison
    from rag_kit.manifest import MANIFEST
    from rag_kit.ops.metrics import shown
    from rag_kit.ops.runs import table

    for folder in (one.folder / rows for one in runs for rows in ("", "rows")):
        if (folder / "rows.parquet").is_file() and (folder / MANIFEST).is_file():
            print(f"\n{Comparison.load(folder)}")
    for _, group in groupby(runs, key=lambda one: one.notebook):
        frame = table(several := list(group)).drop(columns="notebook")
        frame["status"] = [message(f"run_status_{status}") for status in frame["status"]]
        fixed = ("run", "status", "seconds")
        headings = [message(f"run_column_{name}") if name in fixed else str(name) for name in frame.columns]
        rows = frame.map(shown).to_numpy()
        if len(several) > 1:
            print()
            _table(rows, headings)
        elif single:
            print()
            _table(rows.T[1:], [headings[0], rows[0][0]], headings[1:])
    for one in runs:
        if one.reason:
            print(f"{one.folder.name}: {one.reason}")


def _path(text: str | None) -> str | Path | None:
    """Return a file's path as the shell means it; a name stays a name."""
    return Path(text).absolute() if text and Path(text).is_file() else text


def _table(rows: Iterable[Sequence[object]], headings: Sequence[str], names: Sequence[str] = ()) -> None:
    from tabulate import tabulate

    print(tabulate(rows, headings, disable_numparse=True, showindex=names or "default"))
