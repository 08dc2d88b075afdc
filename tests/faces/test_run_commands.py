"""`rag-kit run` and `rag-kit runs` as a user types them."""

from pathlib import Path

import pytest

from rag_kit.compare.run import Run as Comparing
from rag_kit.faces.cli import build_parser, main
from rag_kit.settings import Settings
from tests.faces.test_cli import rag_kit
from tests.ops.test_parameters import notebook, written
from tests.ops.test_runs import plant

CODE = "from rag_kit.ops.metrics import record\nrecord('higher', recall=1 / top_k)\nif top_k > 2:\n    raise SystemExit"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "张三 的项目"
    notebook(folder / "notebooks" / "07_问.ipynb", "top_k: int = 1\nname: str = ''", CODE, "name")
    return folder


def test_a_sweep_is_run_tabled_shown_and_compared(project: Path) -> None:
    written(project, "notebook: '07'\nparameters: {name: 甲}\nsweep: {top_k: [2, 4]}\n")
    done = rag_kit(project, "run", "--sweep", "夜间", "--jobs", "2", "--run", "a", "--limit-s", "300")
    assert done.returncode == 1, done.stderr
    assert "07_问 name=甲 top_k=4: failed after" in done.stdout
    assert "cell 3 ended the notebook early (sys.exit)." in done.stdout
    assert f"Executed notebooks and rows: {project / 'runs' / 'a'}" in done.stdout
    assert "TCP" not in done.stdout + done.stderr
    listed = rag_kit(project, "runs", "list").stdout.splitlines()
    assert listed[2].split()[:6] == ["a", "07_问", "1", "ok,", "1", "failed"]
    shown = rag_kit(project, "runs", "show", "a", RAG_KIT_LANG="zh").stdout
    assert "top_k" in shown and "recall" in shown and "失败" in shown
    with_name = rag_kit(project, "run", "07", "-p", "top_k=2", "-p", "name=2024", "--run", "b")
    assert with_name.returncode == 0, with_name.stderr
    first = next(line.split()[0] for line in shown.splitlines() if "成功" in line)
    compared = rag_kit(project, "runs", "diff", f"a/{first}", "b").stdout
    assert [line.split() for line in compared.splitlines()[-2:]] == [
        ["parameter", "name", "甲", "2024", "–"],
        ["higher", "is", "better", "recall", "0.5", "0.5", "0"],
    ]


def test_runs_with_the_same_parameters_are_compared_pair_by_pair(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / ".env").touch()
    monkeypatch.chdir(project)
    monkeypatch.setenv("RAG_KIT_LANG", "en")
    assert Settings.load().root == project
    for day, recall in (("monday", 0.5), ("tuesday", 0.25)):
        for top_k in (1, 2):
            plant(project / "runs" / day / f"02_x-{top_k}", {"top_k": top_k}, recall=recall * top_k)
    plant(project / "runs" / "other" / "02_x-9", {"top_k": 9}, recall=1.0)
    assert main(["runs", "diff", "monday", "tuesday"]) == 0
    lines = [line.split()[-3:] for line in capsys.readouterr().out.splitlines() if "recall" in line]
    assert lines == [["0.5", "0.25", "-0.25"], ["1", "0.5", "-0.5"]]
    assert main(["runs", "diff", "monday", "other"]) == 2
    assert "monday and other have no notebook with the same parameters" in capsys.readouterr().err
    assert main(["runs", "show", "../monday"]) == 2
    assert main(["run", "07", "-p", "top_k"]) == 2
    assert "`top_k` is not of the form KEY=VALUE." in capsys.readouterr().err
    assert not (project / "runs" / "07").exists()


def test_a_comparison_is_listed_and_shown(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / ".env").touch()
    monkeypatch.chdir(project)
    monkeypatch.setenv("RAG_KIT_LANG", "en")
    plan = {"arms": ["base+none"], "questions": {"q": "h"}, "top_k": 4, "options": {"seed": 0}, "models": {}}
    with Comparing.open(project / "runs" / "对比", plan) as comparing:
        comparing.add({"arm": "base+none", "question_id": "q", "answer": "Paris", "f1": 1.0})
        comparing.finish()
    assert main(["runs", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[:4] == ["对比", "comparison", "1", "ok"]
    assert main(["runs", "show", "对比"]) == 0
    shown = capsys.readouterr().out
    assert "base+none" in shown and "F1" in shown and "errors" in shown


def test_the_runs_own_arguments_are_understood() -> None:
    given = build_parser().parse_args(["run", "all", "-p", "a=b", "--params", "x", "--sweep", "y", "--limit-s", "9"])
    assert (given.notebooks, given.parameters, given.params, given.sweep) == (["all"], ["a=b"], "x", "y")
    assert (given.jobs, given.limit_s, given.run_name) == (1, 9, None)
