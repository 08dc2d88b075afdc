"""Metrics in a notebook's outputs: typed for the runner, rounded for the reader.

Knows how one is written and found again; knows nothing of what is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from rag_kit.errors import DataError

MIME = "application/vnd.rag-kit.metrics+json"
Kind = Literal["higher", "lower", "time", "fact"]


def record(kind: Kind, **values: Any) -> None:
    """Show named numbers in the cell's output, where the runner finds them: `record("higher", recall=0.8)`.

    `kind` says how to read them: `higher` or `lower` is better, `time` in seconds (less is better), `fact`
    (neither: a count, a yes or no). None and NaN are missing and stay so; a name recorded again takes the
    new value. Floats keep six digits, so that nbval can compare them; a cell that records times is tagged
    `nbval-ignore-output`. Raises DataError for another kind, and for what is no number. Shown in
    notebook 06.
    """
    from IPython.display import display

    if kind not in get_args(Kind):
        raise DataError("metric_kind", kind=repr(kind), known=", ".join(get_args(Kind)))
    found = {name: {"kind": kind, "value": _number(name, value)} for name, value in values.items()}
    text = "\n".join(f"{name}: {shown(metric['value'])}" for name, metric in found.items())
    display({MIME: found, "text/plain": text}, raw=True)


def collect(cells: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return `{name: {"kind": …, "value": …}}` from the outputs of executed cells."""
    outputs = (output.get("data", {}).get(MIME, {}) for cell in cells for output in cell.get("outputs", ()))
    return {name: metric for metrics in outputs for name, metric in metrics.items()}


def shown(value: object) -> str:
    """Return a value as a table shows it: floats with four digits, a missing one as a dash."""
    if value is None or value != value:
        return "–"
    return format(value, ".4g" if abs(value) < 1e4 else ".0f") if isinstance(value, float) else str(value)


def _number(name: str, value: Any) -> float | None:
    value = value.item() if getattr(value, "ndim", None) == 0 else value  # NumPy's and torch's scalars
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, int | float) or math.isinf(value):
        raise DataError("metric_value", name=name, value=repr(value))
    return float(f"{value:.6g}") if isinstance(value, float) else value
