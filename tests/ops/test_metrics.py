"""Metrics: what may be recorded, how it is found in outputs and shown."""

import math
from typing import Any

import numpy as np
import pytest

from rag_kit.errors import DataError
from rag_kit.ops import metrics


@pytest.fixture
def displayed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    import IPython.display

    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(IPython.display, "display", lambda data, raw: seen.append(data))
    return seen


def test_a_metric_is_typed_and_its_text_is_rounded(displayed: list[dict[str, Any]]) -> None:
    metrics.record(
        "higher", 召回=np.float64(2 / 3), n=np.int64(7), ok=np.bool_(True), none=None, nan=math.nan
    )
    metrics.record("time", seconds=12.3456789)
    assert displayed[0][metrics.MIME] == {
        "召回": {"kind": "higher", "value": 0.666667},
        "n": {"kind": "higher", "value": 7},
        "ok": {"kind": "higher", "value": True},
        "none": {"kind": "higher", "value": None},
        "nan": {"kind": "higher", "value": None},
    }
    assert displayed[0]["text/plain"] == "召回: 0.6667\nn: 7\nok: True\nnone: –\nnan: –"
    cells = [{"outputs": [{"output_type": "stream"}, {"data": data}]} for data in displayed]
    assert metrics.collect([{}, *cells])["seconds"] == {"kind": "time", "value": 12.3457}
    assert metrics.collect([]) == {}


@pytest.mark.parametrize("value", ["0.5", [1], math.inf, -math.inf, np.array([1, 2]), 1j])
def test_what_is_no_number_is_refused(displayed: list[dict[str, Any]], value: Any) -> None:
    with pytest.raises(DataError) as error:
        metrics.record("higher", recall=value)
    assert error.value.text("en")[0].startswith("The metric recall is no number: ")
    assert "不是数值" in error.value.text("zh")[0]
    assert displayed == []


@pytest.mark.parametrize("kind", ["better", 0.5, ""])
def test_another_kind_is_refused(displayed: list[dict[str, Any]], kind: Any) -> None:
    with pytest.raises(DataError) as error:
        metrics.record(kind, recall=1)
    assert f"cannot be {kind!r} (there are: higher, lower, time, fact)" in error.value.text("en")[0]


def test_a_table_shows_four_digits() -> None:
    values = [None, math.nan, 0.123456, 123456.7, 12.0, 3, True, "文"]
    assert [metrics.shown(value) for value in values] == [
        "–",
        "–",
        "0.1235",
        "123457",
        "12",
        "3",
        "True",
        "文",
    ]
