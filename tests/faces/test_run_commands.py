"""`rag-kit run` and `rag-kit runs` as a user types them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from rag_kit.compare.run import Run as Comparing
from rag_kit.errors import use_language
from rag_kit.faces.cli import build_parser, main
from tests.faces.test_cli import rag_kit
from tests.ops.test_parameters import notebook, written
from tests.ops.test_runs import plant

CODE = """from rag_kit.ops.metrics import record
record("higher", recall=1 / top_k)
if top_k > 2:
    raise SystemExit"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "张三 的项目"
    notebook(folder / "notebooks" / "07_问.ipynb", "top_k: int = 1\nname: str = ''", CODE, "name")
    (folder / ".env").touch()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RAG_KIT_LANG", "en")
    monkeypatch.setattr("rag_kit.settings._process", None)
    yield folder
    use_language("auto")


def test_a_sweep_is_run_tabled_shown_and_compared(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(project, "notebook: '07'\nparameters: {name: 甲}\nsweep: {top_k: [2, 4]}\n")
    command = "run --sweep 夜间 -p name=2024 --jobs 2 --run a --limit-s 300"
    done = rag_kit(project, *command.split())
    assert done.returncode == 1, done.stderr
    assert "07_问 top_k=4: failed after" in done.stdout
    assert "cell 3 ended the notebook early (sys.exit)." in done.stdout
    assert f"Executed notebooks and rows: {project / 'runs' / 'a'}" in done.stdout
    assert "TCP" not in done.stdout + done.stderr
    assert main(["runs", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[:6] == ["a", "07_问", "1", "ok,", "1", "failed"]
    assert main(["runs", "show", "a"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines.pop(0) == []
    assert lines[0] == ["run", "status", "seconds", "top_k", "recall"]
    assert [(line[1], *line[3:]) for line in lines[2:4]] == [("ok", "2", "0.5"), ("failed", "4", "0.25")]
    assert lines[4][:2] == [f"{lines[3][0]}:", "cell"]
    assert main(["runs", "show", f"a/{lines[2][0]}"]) == 0
    lone = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert all(line in lone for line in (["recall", "0.5"], ["status", "ok"], ["name", "2024"]))
    assert main(["runs", "diff", f"a/{lines[2][0]}", f"a/{lines[3][0]}"]) == 0
    compared = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert compared[-2:] == [
        ["parameter", "top_k", "2", "4", "–"],
        ["higher", "is", "better", "recall", "0.5", "0.25", "-0.25"],
    ]
    job = (project / "runs" / "a" / lines[2][0] / "job.json").read_text(encoding="utf-8")
    assert '"name": "2024"' in job


def test_runs_with_the_same_parameters_are_compared_pair_by_pair(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    assert sorted(path.name for path in (project / "runs").iterdir()) == ["monday", "other", "tuesday"]


def test_a_comparison_is_listed_and_shown(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    given = build_parser().parse_args(
        ["run", "all", "-p", "a=b", "--params", "x", "--sweep", "y", "--limit-s", "9"]
    )
    assert (given.notebooks, given.parameters, given.params, given.sweep) == (["all"], ["a=b"], "x", "y")
    assert (given.jobs, given.limit_s, given.run_name) == (1, 9, None)
