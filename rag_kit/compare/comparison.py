"""The result of a comparison: its rows, a summary by arm, and which differences are more than noise.

Knows a table of rows; knows nothing of how they came about.
"""

from collections.abc import Sequence
from html import escape
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rag_kit.compare.rows import COLUMNS, METRICS, SCORES, TIMES, table
from rag_kit.compare.statistics import CONFIDENCE, FEWEST_DIFFERING, Interval, paired_interval
from rag_kit.errors import DataError, message
from rag_kit.manifest import MANIFEST, read_manifest

if TYPE_CHECKING:
    import pandas as pd

    from rag_kit.compare.factors import Factors

FACTORS = ("engine", "weights", "base", "prompt", "thinking", "generation_config", "options")


class Comparison:
    """The rows of a comparison, one for each arm and question; `path` is its folder, if it has one.

    `factors` are what stands beside each model's answers, FACTORS by reference; empty where nobody looked. A
    missing score is NaN and is left out of every mean and every pair.
    """

    def __init__(
        self, rows: "pd.DataFrame", path: Path | None = None, factors: "dict[str, Factors] | None" = None
    ) -> None:
        self.rows, self.path, self.factors = rows, path, factors or {}

    @classmethod
    def from_rows(cls, rows: Sequence[dict[str, Any]], factors: "dict[str, Factors] | None" = None) -> Self:
        """Make a comparison of plain rows; absent columns are missing values."""
        return cls(table(rows).to_pandas(), None, factors)

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read a finished run, every file checked against its hash.

        Raises DataError where the run is not finished, StoreError where a file was changed.
        """
        from pyarrow import parquet

        folder = Path(folder)
        if not (folder / MANIFEST).exists():
            raise DataError("compare_unfinished", folder=folder)
        told = read_manifest(folder, hashes=True).get("factors") or {}
        rows = parquet.read_table(folder / "rows.parquet").to_pandas()
        return cls(rows, folder, {model: told[model] for model in rows["model"].unique() if model in told})

    def summary(self, by: str | Sequence[str] = ()) -> "pd.DataFrame":
        """Return one line for each arm, or for each arm and value of the columns `by` (`language`, …).

        `coverage` is the share of questions that got an answer at all, `scored` how many stand behind
        the means of exact match, F1 and contains; seconds and tokens a second (of decoding, from the
        second token on) are medians.
        """
        keys = ["arm", *([by] if isinstance(by, str) else by)]
        if unknown := [key for key in keys if key not in COLUMNS]:
            raise DataError("compare_column", column=unknown[0], known=", ".join(COLUMNS))
        groups = self.rows.groupby(keys, sort=False, dropna=False)
        frame = groups.agg(n=("question_id", "size"), answered=("answer", "count"), scored=("f1", "count"))
        frame.insert(1, "coverage", frame.pop("answered") / frame["n"])
        frame = frame.join(groups[list(SCORES)].mean())
        frame = frame.join(groups[["first_token_s", "total_s", "tokens_per_s"]].median())
        frame["errors"] = groups["error"].count()
        return frame.reset_index()

    def differences(self, metric: str = "f1") -> "pd.DataFrame":
        """Return every pair of arms `a`, `b` with the mean of b - a over the questions that both have.

        `low` and `high` bound the paired 95 % bootstrap interval. `verdict` calls an arm better only
        where that interval clears zero on enough pairs.
        """
        import pandas as pd

        if metric not in METRICS:
            raise DataError("compare_metric", metric=metric, known=", ".join(METRICS))
        arms = list(dict.fromkeys(self.rows["arm"]))
        scores = self.rows.pivot(index="question_id", columns="arm", values=metric)
        lines = []
        for a, b in combinations(arms, 2):
            pairs = scores[[a, b]].dropna()
            found = paired_interval((pairs[b] - pairs[a]).tolist())
            lines.append((a, b, metric, found.n, pairs[a].mean(), pairs[b].mean(), found.mean, found.low,
                          found.high, verdict(a, b, metric, found)))  # fmt: skip
        columns = ["a", "b", "metric", "n", "mean_a", "mean_b", "difference", "low", "high", "verdict"]
        return pd.DataFrame(lines, columns=columns)

    def __str__(self) -> str:
        from tabulate import tabulate

        headings, lines = self._cells()
        text = tabulate(
            lines,
            headings,
            tablefmt="simple",
            disable_numparse=True,
            colalign=("left", *["right"] * (len(headings) - 1)),
        )
        headings, lines = self._factor_cells()
        beside = tabulate(lines, headings, tablefmt="simple", disable_numparse=True) if lines else ""
        said = "\n".join([*self._said(), *self.differences()["verdict"]])
        return "\n\n".join(filter(None, [text, beside, said]))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        import pandas as pd

        html = "".join(
            pd.DataFrame(lines, columns=headings).to_html(index=False, escape=True, border=0)
            for headings, lines in (self._cells(), self._factor_cells())
            if lines
        )
        return html + "".join(
            f"<p>{escape(text)}</p>" for text in [*self._said(), *self.differences()["verdict"]]
        )

    def _varying(self) -> list[str]:
        """The factors that are not alike for all models."""
        return [name for name in FACTORS if len({told.get(name) for told in self.factors.values()}) > 1]

    def _factor_cells(self) -> tuple[list[str], list[list[str]]]:
        """The factors that differ as text for a table, one line for each model."""
        varying = self._varying()
        lines = [[model, *(told.get(name, "–") for name in varying)] for model, told in self.factors.items()]
        headings = [message(f"compare_factor_{name}") for name in ("model", *varying)]
        return headings, lines if varying else []

    def _said(self) -> list[str]:
        """What is alike for all models beside their answers, and what is not."""
        varying, first = self._varying(), next(iter(self.factors.values()), {})
        alike = [f"{message(f'compare_factor_{name}')} {first[name]}" for name in FACTORS
                 if name in first and name not in varying]  # fmt: skip
        named = [message(f"compare_factor_{name}") for name in varying]
        said = [message("compare_alike", factors="; ".join(alike))] if alike else []
        return said + ([message("compare_factors", factors=", ".join(named))] if named else [])

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        """The summary as text for a table, headings in the reader's language."""
        formats = dict.fromkeys(SCORES, ".3f") | dict.fromkeys(TIMES, ".2f")
        formats |= {"coverage": ".0%", "tokens_per_s": ".1f"}
        summary = self.summary()
        lines = [
            [
                "–" if value != value else format(value, formats.get(str(name), ""))
                for name, value in line.items()
            ]
            for line in summary.to_dict("records")
        ]
        return [message(f"compare_heading_{name}") for name in summary.columns], lines


def verdict(a: str, b: str, metric: str, interval: Interval) -> str:
    """Say what the interval of b - a shows, in the reader's language."""
    values: dict[str, Any] = {
        "metric": metric,
        "difference": f"{interval.mean:+.3f}",
        "low": f"{interval.low:+.3f}",
        "high": f"{interval.high:+.3f}",
        "level": f"{CONFIDENCE:.0%}",
        "n": interval.n,
        "differing": interval.differing,
        "fewest": FEWEST_DIFFERING,
    }
    if not interval.clears_zero:
        key = "compare_no_difference" if interval.enough else "compare_too_few"
        return message(key, a=a, b=b, **values)
    better, worse = (b, a) if (interval.mean > 0) != (metric in TIMES) else (a, b)
    return message("compare_better", better=better, worse=worse, a=a, b=b, **values)
