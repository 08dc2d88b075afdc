"""The runner of notebooks, on tiny notebooks in real kernels."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import psutil
import pytest

from rag_kit.errors import DataError, use_language
from rag_kit.ops.notebooks import find_notebooks
from rag_kit.ops.runner import run_notebooks
from rag_kit.ops.runs import Run, find_runs, load
from rag_kit.settings import Settings
from tests.ops.test_parameters import notebook, told, written

OK = """from pathlib import Path
from rag_kit.ops.metrics import record
record("higher", recall=top_k / 3, none=None)
record("fact", words=len(words), at_home=Path.cwd().name == "notebooks")
print(words, run_folder)"""


@pytest.fixture(autouse=True)
def english():
    use_language("en")
    yield
    use_language("auto")


def a_project(folder: Path) -> Settings:
    (folder / "notebooks").mkdir(parents=True)
    return Settings.load(folder)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, dict[str, Run], list[str]]:
    """One run of notebooks that end in every way, a sweep among them."""
    use_language("en")
    project = a_project(tmp_path_factory.mktemp("study") / "张三 {x} 的项目")
    folder = project.root / "notebooks"
    parameters = 'top_k: int = 5\nwords: str | None = None\nrun_folder: str = ""'
    notebook(folder / "09_ok.ipynb", parameters, OK, metrics=("recall", "none"))
    failing = notebook(folder / "09_raises.ipynb", "x = 1", "1 / 0", "raise ValueError('坏了', x)", "never")
    plain = notebook(folder / "实验 v1.2.ipynb", "print('无参数')", "1 / 0", tagged=False)
    for path in (failing, plain):
        made = nbformat.read(path, as_version=4)
        made.cells[1].metadata["tags"] = ["raises-exception"]
        nbformat.write(made, path)
    notebook(folder / "09_exit.ipynb", "x = 1", "import sys\nsys.exit(0)", "x")
    notebook(folder / "09_died.ipynb", "import os\nos._exit(0)", "1", tagged=False)
    notebook(folder / "09_silent.ipynb", "x = 1", "x", metrics=("recall",))
    written(project.root, "notebook: 09_ok\nparameters:\n  words: 你好\nsweep:\n  top_k: [3, 1]\n")
    said: list[str] = []
    names = ["09_ok", "09_raises", "09_exit", "09_died", "09_silent", "实验 v1.2"]
    runs = run_notebooks(names, sweep="夜间", run="第一次", jobs=2, settings=project, say=said.append)
    titles = ["top_k=3", "top_k=1", *names[1:]]
    return project, dict(zip(titles, runs, strict=True)), said


def test_a_sweep_goes_through_every_value_and_keeps_typed_metrics(study) -> None:
    project, runs, _ = study
    for top_k in (1, 3):
        run = runs[f"top_k={top_k}"]
        assert (run.status, run.parameters) == ("ok", {"top_k": top_k, "words": "你好"})
        assert run.metrics["recall"] == {"kind": "higher", "value": round(top_k / 3, 6)}
        assert run.metrics["none"]["value"] is None
        assert {name: run.metrics[name]["value"] for name in ("words", "at_home")} == {
            "words": 2,
            "at_home": True,
        }
        copy = nbformat.read(run.folder / "09_ok.ipynb", as_version=4)
        assert f"你好 {run.folder / 'rows'}" in copy.cells[-1].outputs[-1].text
        assert (
            copy.cells[-1].outputs[0].data["text/plain"]
            == f"recall: {1 if top_k == 3 else '0.3333'}\nnone: –"
        )
        manifest = json.loads((run.folder / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["files"].keys() == {"09_ok.ipynb", "job.json", "log.txt"}
        assert {"code", "package", "seconds", "finished", "status", "parameters", "metrics"} < manifest.keys()
        assert "TCP" not in (run.folder / "log.txt").read_text(encoding="utf-8")
    assert find_runs(project, "第一次") != []


@pytest.mark.parametrize(
    ("name", "reason", "chinese"),
    [
        ("09_raises", "cell 3 raised ValueError: ('坏了', 1).", "第 3 个单元格出错"),
        ("09_exit", "cell 2 ended the notebook early (sys.exit).", "提前结束"),
        ("09_died", "its process ended in cell 1: DeadKernelError", "中断"),
        ("09_silent", "it did not record what its metadata promises: recall.", "没有记录"),
    ],
)
def test_a_failed_run_says_why_and_keeps_its_copy(study, name: str, reason: str, chinese: str) -> None:
    _, runs, said = study
    run = runs[name]
    assert run.status == "failed"
    assert run.reason.startswith(reason)
    assert (run.folder / f"{name}.ipynb").is_file()
    assert any(f"{name}: failed after" in line and str(run.folder) in line for line in said)
    use_language("zh")
    assert chinese in run.reason


def test_a_notebook_without_parameters_cell_runs_and_may_raise_where_it_says_so(study) -> None:
    project, runs, _ = study
    assert runs["实验 v1.2"].status == "ok"
    with pytest.raises(DataError) as error:
        run_notebooks("实验 v1.2", {"x": 1}, settings=project)
    assert told(error).startswith("-p x: x cannot be set, for no notebook here has a cell tagged")


def test_progress_counts_and_tells_the_time_left(study) -> None:
    _, _, said = study
    assert sum(" …" in line for line in said) == 7
    assert any(line.startswith("[7/7] ") for line in said)
    assert any("(about " in line for line in said)


def test_a_run_named_again_keeps_what_ended_well_unless_the_notebook_changed(study) -> None:
    project, runs, _ = study
    said: list[str] = []
    again = run_notebooks(sweep="夜间", run="第一次", settings=project, say=said.append)
    assert [run.finished for run in again] == [runs[f"top_k={n}"].finished for n in (3, 1)]
    assert said == ["2 of 2 ended well before and are kept."]
    silent = notebook(project.root / "notebooks" / "09_silent.ipynb", "x = 1", "x + 1")
    (fixed,) = run_notebooks("09_silent", run="第一次", settings=project, say=said.append)
    assert (fixed.status, fixed.folder.parent.name) == ("ok", "第一次")
    assert silent.stem in said[-1]


@pytest.mark.parametrize(
    ("how", "wrong"),
    [
        (
            {"parameters": {"topk": 3}},
            "-p topk: no notebook here has a parameter called topk (nearest: top_k;",
        ),
        ({"parameters": {"top_k": "3"}}, "-p top_k: '3' does not fit top_k, declared as `top_k: int = 5`"),
        (
            {"notebooks": "09_exit", "params": "夜间"},
            "The parameter file is for 09_ok, which is not to be run here",
        ),
        ({"notebooks": "07"}, "There is no notebook 07 (there are: 09_died, 09_exit,"),
        ({"run": "../x"}, "A run cannot be called ../x."),
        ({"run": ".."}, "A run cannot be called ... Begin"),
        ({"run": "/x"}, "A run cannot be called /x."),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_executed(study, how: dict, wrong: str) -> None:
    project, *_ = study
    before = sorted(project.root.rglob("*"))
    with pytest.raises(DataError) as error:
        run_notebooks(**({"notebooks": "09_ok"} | how), settings=project)
    assert told(error).startswith(wrong)
    assert sorted(project.root.rglob("*")) == before


def test_a_declared_parameter_that_nothing_reads_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    project = a_project(tmp_path)
    notebook(tmp_path / "notebooks" / "09_x.ipynb", "x = 1\nlimit: int = 3", "x")
    with pytest.raises(DataError):
        run_notebooks("09_x", {"limit": 3}, settings=project)
    assert "09_x: limit is declared, but no later cell reads it" in caplog.text


def test_the_main_job_is_the_first_three(tmp_path: Path) -> None:
    project = a_project(tmp_path)
    for name in ("01_a", "02_b", "03_c", "05_dashboard", "06_regression"):
        notebook(
            tmp_path / "notebooks" / f"{name}.ipynb", "x: int = 'wrong'" if name != "03_c" else "x = 1", "x"
        )
    with pytest.raises(DataError) as error:
        run_notebooks(settings=project)
    assert "01_a" in told(error)
    assert len(find_notebooks(project)) == 5


# --- ends that nobody asked for ----------------------------------------------------------------

SLOW = """import os, subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(999)"])
here = Path("..") / f"{number}.pids"
here.with_suffix(".part").write_text(f"{os.getpid()} {os.getppid()} {child.pid}")
here.with_suffix(".part").rename(here)
while number > 1 and not Path("../go").exists():
    time.sleep(0.05)
child.kill()"""
RUNNER = """import sys
from pathlib import Path
from rag_kit.ops.runner import run_notebooks
from rag_kit.settings import Settings
run_notebooks(sweep="夜间", run="夜间", jobs=2, settings=Settings.load(Path(sys.argv[1])))"""


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def processes(folder: Path) -> list[psutil.Process]:
    found = [int(pid) for path in folder.glob("*.pids") for pid in path.read_text("utf-8").split()]
    running = [psutil.Process(pid) for pid in found if psutil.pid_exists(pid)]
    return [process for process in running if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_sweep_killed_half_way_leaves_no_process_and_is_resumed(tmp_path: Path) -> None:
    project = a_project(tmp_path / "项目")
    notebook(project.root / "notebooks" / "09_slow.ipynb", "number: int = 0", SLOW)
    written(project.root, "notebook: 09_slow\nsweep: {number: [1, 2]}\n")
    home = project.root / "runs" / "夜间"
    for how, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, -signal.SIGINT)):
        command = [sys.executable, "-c", RUNNER, str(project.root)]
        runner = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(lambda: (project.root / "2.pids").exists())
        until(lambda: any(load(path).status == "ok" for path in home.iterdir()))
        assert len(processes(project.root)) >= 3
        runner.send_signal(how)
        assert runner.wait(60) == status
        until(lambda: processes(project.root) == [])
        (project.root / "2.pids").unlink()
    assert [run.status for run in find_runs(project, "夜间")] == ["ok", "unfinished"]
    before = find_runs(project, "夜间")[0].finished
    (project.root / "go").touch()
    said: list[str] = []
    runs = run_notebooks(sweep="夜间", run="夜间", jobs=2, settings=project, say=said.append)
    assert [run.status for run in runs] == ["ok", "ok"]
    assert said[0] == "1 of 2 ended well before and are kept."
    assert runs[0].finished == before


def test_a_notebook_that_hangs_is_killed_with_its_kernel(tmp_path: Path) -> None:
    project = a_project(tmp_path)
    notebook(tmp_path / "notebooks" / "09_slow.ipynb", "number: int = 2", SLOW)
    (run,) = run_notebooks("09_slow", limit_s=6, settings=project, say=lambda text: None)
    assert run.status == "failed"
    assert run.reason.startswith("it had not ended after 6 s, in cell ")
    until(lambda: processes(tmp_path) == [])


def test_a_run_in_use_is_not_entered_twice(tmp_path: Path) -> None:
    from filelock import FileLock

    project = a_project(tmp_path)
    notebook(tmp_path / "notebooks" / "09_x.ipynb", "x = 1", "x")
    (tmp_path / "runs").mkdir()
    with FileLock(tmp_path / "runs" / ".a.lock"), pytest.raises(DataError) as error:
        run_notebooks("09_x", run="a", settings=project)
    assert told(error).startswith(f"Another process is executing notebooks into {tmp_path / 'runs' / 'a'}.")
