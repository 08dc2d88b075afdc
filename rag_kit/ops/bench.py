"""Benchmarks: what is measured, how fast each side was, and one line of JSON from which it can be recomputed.

Knows the plans by name and how numbers are told; the frame stands in `measure`, each plan in a file of its
own. Shown in notebook 04.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from rag_kit.errors import DataError, message
from rag_kit.ops.measure import Row, Side, SideFailed, machine, more_ms, p95, ratio, samples, take_turns

if TYPE_CHECKING:
    import pandas as pd

    from rag_kit.settings import Settings

BENCHES = {"engines": "rag_kit.ops.bench_engines"}  # each has `plan(settings, quick, repeats, threads)`
Samples = tuple[str, str, str]  # a side, its metric, cold or warm


@dataclass(frozen=True)
class Plan:
    """What a bench measures: `sides`, ours first; the requests they answer; the ratios that come of it.

    A ratio is (ours, the other's), which may be seconds measured before; a text in its place is the reason
    why there is none. `notes` say what was left out.
    """

    about: str
    sides: list[Side]
    requests: list[Row]
    cold: int
    ratios: dict[str, tuple[Samples, Samples | list[float]] | str]
    notes: list[str]


@dataclass(frozen=True)
class BenchResult:
    """`values` by key (None has its reason in `reasons`), `samples` in seconds, and every reply in `rows`."""

    bench: str
    values: dict[str, float | None]
    reasons: dict[str, str]
    samples: dict[str, dict[str, list[float]]]
    machine: dict[str, Any]
    rows: list[Row]
    notes: list[str]

    def table(self) -> pd.DataFrame:
        """Return a line for each side, phase and metric: median, p95 (nearest rank; of rates p5) and n."""
        import pandas as pd

        keys = ["side", "phase", "metric"]
        long = pd.DataFrame(self.rows).melt(["side", "phase"], var_name="metric").dropna()
        groups = long[~long.metric.isin(["repeat", "error"])].groupby(keys).value
        lines = [(*key, of.median(), _slow(str(key[2]), of), len(of)) for key, of in groups]
        return pd.DataFrame(lines, columns=[*keys, "median", "p95", "n"])

    def json(self) -> str:
        """Return the bench's line of JSON."""
        told = {"bench": self.bench, "values": self.values, "reasons": self.reasons, "samples": self.samples}
        told |= {"machine": self.machine, "package": version("rag-kit")}
        return json.dumps(told, ensure_ascii=False)

    def __str__(self) -> str:
        from tabulate import tabulate

        table = self.table()
        pairs = zip(table["median"], table["p95"], table["n"], strict=True)
        table["shown"] = [" / ".join(map(_short, (middle, high)[: min(n, 2)])) for middle, high, n in pairs]
        wide = table.pivot(index=["side", "phase", "n"], columns="metric", values="shown").fillna("")
        cells, heads = wide.reset_index().to_numpy().tolist(), [*wide.index.names, *wide.columns]
        parts = [tabulate(cells, heads, disable_numparse=True), "", *self.notes]
        failed = [row for row in self.rows if "error" in row]
        parts += [message("bench_failed", side=row["side"], reason=row["error"]) for row in failed]
        for key, value in self.values.items():
            parts.append(f"{key}: null ({self.reasons[key]})" if value is None else f"{key}: {value:.3g}")
        return "\n".join(parts)

    __repr__ = __str__


def _slow(metric: str, numbers: Iterable[float]) -> float:
    """Return what 95 % of the numbers do not exceed, of a rate what they do not fall below."""
    sign = -1 if metric.endswith("_per_s") else 1
    return sign * p95([sign * one for one in numbers])


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def bench(
    name: str,
    *,
    quick: bool = False,
    repeats: int | None = None,
    order: Literal["ours-first", "other-first"] = "ours-first",
    settings: Settings | None = None,
    say: Callable[[str], None] | None = None,
) -> BenchResult:
    """Measure the sides of bench `name` in turn, each in a process of its own.

    `say` is told what is measured before it is. `quick` takes fewer repeats and smaller inputs. Raises
    DataError for a name that is not known (those that are are listed). A side that fails is a reason.
    """
    from rag_kit.settings import get_settings

    if name not in BENCHES:
        raise DataError("bench_unknown", name=name, known=", ".join(BENCHES))
    threads = int(os.environ.get("OMP_NUM_THREADS") or machine(0)["cores"] or 1)
    plan: Plan = import_module(BENCHES[name]).plan(settings or get_settings(), quick, repeats, threads)
    if say:
        say(plan.about)
    sides = plan.sides[::-1] if order == "other-first" else plan.sides
    rows = take_turns(sides, plan.requests, cold=plan.cold, threads=threads)
    result = BenchResult(name, {}, {}, {}, machine(threads), rows, plan.notes)
    for key, wanted in plan.ratios.items():
        result.values[key] = None
        try:
            if isinstance(wanted, str):
                raise SideFailed(wanted)
            ours, other = wanted
            both = {"ours": samples(rows, *ours)}
            both["other"] = samples(rows, *other) if isinstance(other, tuple) else other
            result.samples[key], result.values[key] = (
                both,
                (more_ms if key.endswith("_ms") else ratio)(**both),
            )
        except SideFailed as error:
            result.reasons[key] = str(error)
    return result
