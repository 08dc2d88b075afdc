"""What became of runs, on folders as the runner and a comparison leave them."""

from pathlib import Path
from typing import Any

import pytest

from rag_kit.errors import DataError
from rag_kit.manifest import write_json, write_manifest
from rag_kit.ops.runs import differences, find_runs, list_runs, load, table
from rag_kit.settings import Settings


def plant(folder: Path, parameters: dict[str, Any], status: str = "ok", **metrics: Any) -> None:
    job = {"notebook": "02_build_index", "parameters": parameters, "code": "x", "package": "1"}
    write_json(folder / "job.json", job)
    if status == "unfinished":
        return
    values = {"status": status, "seconds": 1.5, "finished": "2026-11-23T12:00:00+00:00", "kind": "notebook"}
    failure = ["run_exited", {"cell": 2}] if status == "failed" else None
    found = {name: {"kind": "higher", "value": value} for name, value in metrics.items()}
    write_manifest(folder, {**job, **values, "failure": failure, "metrics": found})


@pytest.fixture
def project(tmp_path: Path) -> Settings:
    runs = tmp_path / "runs"
    plant(runs / "昨天" / "02_build_index-b", {"name": "a", "top_k": 10}, recall=0.5, chunks=83)
    plant(runs / "昨天" / "02_build_index-a", {"name": "a", "top_k": 5}, recall=None, chunks=83)
    plant(runs / "昨天" / "02_build_index-c", {"name": "a", "top_k": 20}, "failed")
    plant(runs / "今天" / "02_build_index-b", {"name": "a", "top_k": 10}, recall=0.75, other=1)
    plant(runs / "今天" / "02_build_index-d", {"name": "a", "top_k": 30}, "unfinished")
    plan = {"arms": ["base+none"], "questions": {"q1": "h"}, "top_k": 4, "options": {"seed": 0}, "models": {}}
    write_json(runs / "对比" / "run.json", plan)
    write_json(runs / "断了" / "run.json", plan)
    write_manifest(runs / "对比", {"kind": "comparison", "finished": "2026", **plan, "rows": 8, "errors": 1})
    (runs / "不是").mkdir()
    return Settings.load(tmp_path)


def test_everything_below_runs_is_listed_in_the_order_of_its_parameters(project: Settings) -> None:
    found = list_runs(project)
    assert sorted(found) == sorted(["昨天", "今天", "对比", "断了"])
    assert [run.parameters["top_k"] for run in found["昨天"]] == [5, 10, 20]
    assert [run.status for run in found["昨天"]] == ["ok", "ok", "failed"]
    assert [run.status for run in found["今天"]] == ["ok", "unfinished"]
    assert found["昨天"][2].reason.startswith("cell 2")
    assert [(run.notebook, run.status) for run in found["断了"]] == [("comparison", "unfinished")]
    (comparison,) = found["对比"]
    assert comparison.parameters == {"arms": ["base+none"], "questions": 1, "top_k": 4, "seed": 0}
    assert (comparison.status, comparison.metrics["errors"]["value"]) == ("ok", 1)


def test_a_copy_that_was_opened_and_saved_spoils_nothing(project: Settings) -> None:
    folder = project.root / "runs" / "昨天" / "02_build_index-b"
    (folder / "job.json").write_text(
        (folder / "job.json").read_text(encoding="utf-8") + " ", encoding="utf-8"
    )
    assert load(folder).status == "ok"


def test_a_table_has_the_parameters_that_differ_and_every_metric(project: Settings) -> None:
    frame = table(find_runs(project, "昨天"))
    assert list(frame.columns) == ["run", "notebook", "status", "seconds", "top_k", "chunks", "recall"]
    assert list(frame.top_k) == [5, 10, 20]
    assert frame.recall.isna().tolist() == [True, False, True]


def test_differences_are_numbers_and_a_missing_one_stays_missing(project: Settings) -> None:
    (old,) = find_runs(project, "昨天/02_build_index-b")
    (new,) = find_runs(project, "今天/02_build_index-b")
    lines = differences(old, new).to_numpy().tolist()
    assert lines == [
        ["higher", "chunks", 83, None, None],
        ["higher", "recall", 0.5, 0.75, 0.25],
        ["higher", "other", None, 1, None],
    ]
    (missing,) = find_runs(project, "昨天/02_build_index-a")
    assert differences(missing, new).to_numpy().tolist()[::2] == [
        ["parameter", "top_k", 5, 10, None],
        ["higher", "recall", None, 0.75, None],
    ]


@pytest.mark.parametrize("name", ["明天", "../runs/昨天", "昨天/x", "..", "", "昨天/../今天"])
def test_a_run_that_is_not_there_is_told_with_those_that_are(project: Settings, name: str) -> None:
    with pytest.raises(DataError) as error:
        find_runs(project, name)
    what = error.value.text("en")[0]
    assert what.startswith(f"There is no run {name} (there are: ")
    assert "昨天" in what and "对比" in what
