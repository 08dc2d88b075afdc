"""The drift ladder's outcome: what was measured on each rung, which step costs quality, table and picture.

Knows numbers and answers; knows nothing of how they were made. Shown in notebook 03.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from math import nan
from typing import TYPE_CHECKING, Any

from rag_kit.compare.statistics import CONFIDENCE, Interval, paired_interval
from rag_kit.errors import message

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Rung:
    """One form of the adapter, by question: `kl` (nats), `top20` and `argmax` against PEFT over the positions
    of PEFT's answer, `agreement` (token F1 with that answer), `f1` (with the references); None is missing.

    `size` is in bytes; `reason` says why nothing was measured.
    """

    name: str
    answers: tuple[str, ...] = ()
    kl: tuple[float | None, ...] = ()
    top20: tuple[float | None, ...] = ()
    argmax: tuple[float | None, ...] = ()
    agreement: tuple[float | None, ...] = ()
    f1: tuple[float | None, ...] = ()
    size: int | None = None
    seconds: float = 0.0
    reason: str = ""

    def mean(self, metric: str) -> float:
        """Return the mean of a metric over the questions that have it, NaN where none has."""
        known = [value for value in getattr(self, metric) if value is not None]
        return sum(known) / len(known) if known else nan


@dataclass(frozen=True)
class Step:
    """Two neighbouring rungs and the mean paired difference of a metric between them."""

    before: str
    after: str
    difference: Interval

    def __str__(self) -> str:
        return f"{self.before} → {self.after}"


@dataclass(frozen=True)
class Drift:
    """The ladder of one adapter, from PEFT downward."""

    reference: str
    rungs: tuple[Rung, ...]

    def steps(self, metric: str) -> list[Step]:
        """Return the steps between measured neighbours, with the paired difference (after - before)."""
        known = [rung for rung in self.rungs if any(value is not None for value in getattr(rung, metric))]
        return [Step(a.name, b.name, paired_interval(_differences(a, b, metric))) for a, b in pairwise(known)]

    @property
    def worst_step(self) -> Step | None:
        """The step that costs most of the score, None where no fall is beyond noise."""
        falls = [step for step in self.steps("f1") if step.difference.clears_zero]
        worst = min(falls, key=lambda step: step.difference.mean, default=None)
        return worst if worst and worst.difference.mean < 0 else None

    @property
    def verdict(self) -> str:
        """Which step costs quality, as far as it is shown, and where log-probabilities move most."""
        worst, n = self.worst_step, max(len(rung.answers) for rung in self.rungs)
        told = message("drift_no_cost", n=n)
        if worst:
            shown = {key: f"{getattr(worst.difference, key):+.3f}" for key in ("mean", "low", "high")}
            told = message("drift_costs", step=str(worst), n=n, level=f"{CONFIDENCE:.0%}", **shown)
        moves = [
            step for step in self.steps("kl") if step.difference.clears_zero and step.difference.mean > 0
        ]
        if moves:
            most = max(moves, key=lambda step: step.difference.mean)
            told += " " + message("drift_moves", step=str(most), kl=most.difference.mean)
        return told

    def table(self) -> pd.DataFrame:
        """Return a row a rung: means over the questions, the score's interval, MB, seconds, why not."""
        import pandas as pd

        rows = []
        for rung in self.rungs:
            score = paired_interval([value for value in rung.f1 if value is not None])
            same = [mine == first for mine, first in zip(rung.answers, self.rungs[0].answers, strict=False)]
            means = {metric: rung.mean(metric) for metric in ("kl", "top20", "argmax", "agreement")}
            means |= {"same": sum(same) / len(same) if same else nan}
            means |= {"f1": score.mean, "f1_low": score.low, "f1_high": score.high}
            means |= {"mb": rung.size / 1e6 if rung.size else nan, "seconds": rung.seconds or nan}
            rows.append({"rung": rung.name, **means, "reason": rung.reason})
        return pd.DataFrame(rows).set_index("rung")

    def __str__(self) -> str:
        from tabulate import tabulate

        frame = self.table().reset_index()
        shown = [[_shown(value) for value in row] for row in frame.to_numpy()]
        names = [message(f"drift_column_{name}") for name in frame.columns]
        return f"{tabulate(shown, names, disable_numparse=True)}\n\n{self.verdict}"

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return asdict(self) | {"verdict": self.verdict}

    def plot(self) -> Figure:
        """Draw log-probability drift and score by rung; a rung that was not measured is left out."""
        import matplotlib.pyplot as plt

        from rag_kit.plots import legible, style

        style()
        frame = self.table()
        frame = frame[frame["f1"].notna() | frame["kl"].notna()]
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        places, names = range(len(frame)), [legible(str(name)) for name in frame.index]
        left.plot(places, frame["kl"].clip(lower=1e-7), "o-")
        left.set_yscale("log")
        left.set_title(legible(message("drift_plot_kl")))
        spread = [frame["f1"] - frame["f1_low"], frame["f1_high"] - frame["f1"]]
        right.errorbar(
            places, frame["f1"], yerr=spread, fmt="o-", capsize=3, label=message("drift_column_f1")
        )
        right.plot(places, frame["agreement"], "s--", label=legible(message("drift_column_agreement")))
        right.set_ylim(-0.05, 1.05)
        right.set_title(legible(message("drift_plot_score")))
        right.legend()
        for axes in (left, right):
            axes.set_xticks(list(places), names, rotation=30, ha="right")
        figure.suptitle(legible(self.reference))
        plt.close(figure)  # what is returned is shown once
        return figure


def _differences(a: Rung, b: Rung, metric: str) -> list[float]:
    both = zip(getattr(a, metric), getattr(b, metric), strict=True)
    return [after - before for before, after in both if before is not None and after is not None]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "-" if value != value else f"{value:.3f}" if abs(value) < 10 else f"{value:.0f}"
    return str(value)
