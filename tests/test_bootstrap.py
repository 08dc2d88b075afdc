"""From a bare Python to the project's own: a real venv and a real pip, offline, on a tiny house."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from rag_kit import bootstrap
from rag_kit.errors import catalogue, message

ROOT = Path(__file__).parent.parent
PYTHON = Path(sys.base_prefix) / ("python.exe" if os.name == "nt" else "bin/python3")

# A build backend within the tree, so that pip needs no index: an editable wheel is one .pth file.
BACKEND = """
import zipfile
from pathlib import Path
def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "rag_kit-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(Path(folder) / name, "w") as wheel:
        wheel.writestr("rag_kit.pth", str(Path.cwd()))
        wheel.writestr("rag_kit-0.1.0.dist-info/METADATA", METADATA)
        wheel.writestr("rag_kit-0.1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any\\n")
        wheel.writestr("rag_kit-0.1.0.dist-info/RECORD", "")
    return name
METADATA = "Metadata-Version: 2.1\\nName: rag-kit\\nVersion: 0.1.0\\nProvides-Extra: test\\n"
"""
COMMAND_LINE = """
import sys
def main(argv):
    print("ran", argv, sys.prefix, sys.version_info[:2])
    return 7
"""


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with the real bootstrap and a small everything else, in a folder with a difficult name."""
    root = tmp_path_factory.mktemp("clone") / "张三 的项目"
    package = root / "rag_kit"
    (package / "faces").mkdir(parents=True)
    for name in ("__init__.py", "__main__.py", "bootstrap.py", "errors.py"):
        shutil.copy(ROOT / "rag_kit" / name, package)
    shutil.copytree(ROOT / "rag_kit" / "messages", package / "messages")
    (package / "faces" / "__init__.py").write_text("", encoding="utf-8")
    (package / "faces" / "cli.py").write_text(COMMAND_LINE, encoding="utf-8")
    (root / "backend.py").write_text(BACKEND, encoding="utf-8")
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n', encoding="utf-8"
    )
    (root / "constraints.txt").write_text("torch==2.13.0\n", encoding="utf-8")
    with zipfile.ZipFile(root / "torch-2.13.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("torch.py", "")
        wheel.writestr(
            "torch-2.13.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n"
        )
        wheel.writestr("torch-2.13.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("torch-2.13.0.dist-info/RECORD", "")
    return root


def run(
    root: Path, *arguments: str, python: Path = PYTHON, **environment: str
) -> subprocess.CompletedProcess[str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TORCH", "TORCH_INDEX", "PYTHONPATH")
    }
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": root.as_uri(), "PYTHONUTF8": "1", "RAG_KIT_LANG": "en"}
    return subprocess.run(
        [str(python), "-m", "rag_kit", *arguments],
        cwd=root,
        env=kept | offline | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


def test_a_failing_step_shows_pips_words_and_the_remedy_and_leaves_no_marker(twin: Path) -> None:
    failed = run(twin, "test", TORCH="no-such-torch==1", RAG_KIT_LANG="zh")
    assert failed.returncode == 1
    assert "No matching distribution found for no-such-torch==1" in failed.stderr
    assert "安装在“安装 PyTorch”这一步失败（退出码 1），原因见上面的输出。" in failed.stderr
    assert "PIP_INDEX_URL" in failed.stderr and "Traceback" not in failed.stderr
    assert not (twin / ".venv" / bootstrap.MARKER.name).exists()


def test_a_fresh_clone_sets_itself_up_then_is_quick_and_passes_arguments_and_exit_codes_on(
    twin: Path,
) -> None:
    first = run(twin, "run", "--quick", "问题")
    assert "[2/3] installing PyTorch …" in first.stderr and "done in" in first.stderr, first.stderr
    assert first.returncode == 7 and "ran ['run', '--quick', '问题']" in first.stdout
    assert str(twin / ".venv") in first.stdout

    second = run(twin, "run")
    assert (second.returncode, second.stderr) == (7, "")  # no step was taken

    inside = run(twin, "run", python=venv_python(twin))
    assert (inside.returncode, inside.stderr) == (7, "")


def test_an_interrupted_or_damaged_set_up_is_resumed_and_new_pins_are_installed(twin: Path) -> None:
    assert run(twin, "run").returncode == 7
    marker = twin / ".venv" / bootstrap.MARKER.name
    marker.unlink()
    resumed = run(twin, "run")
    assert "[1/3]" not in resumed.stderr and "[3/3]" in resumed.stderr and resumed.returncode == 7

    (twin / "constraints.txt").write_text("torch==2.13.0\nanother==1\n", encoding="utf-8")
    assert "[3/3]" in run(twin, "run").stderr

    marker.unlink()
    shutil.rmtree(next((twin / ".venv").glob("lib*/python*/site-packages/pip")))
    remade = run(twin, "run")
    assert "[1/3] making .venv" in remade.stderr and remade.returncode == 7, remade.stderr


def test_another_torch_is_not_held_to_the_pinned_one(twin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "ROOT", twin)
    monkeypatch.setattr(bootstrap, "VENV", twin / ".venv")
    (twin / ".venv").mkdir(exist_ok=True)
    assert bootstrap._constraints(bootstrap.TORCH) == "constraints.txt"
    other = twin / bootstrap._constraints("torch==2.14.0")
    assert "torch==" not in other.read_text(encoding="utf-8")


def venv_python(root: Path) -> Path:
    return root / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def test_a_python_without_venv_is_told_what_to_install(twin: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nreal = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'ensurepip' else real(name, *rest)\n",
        encoding="utf-8",
    )
    clone = tmp_path / "clone"
    shutil.copytree(twin, clone, ignore=shutil.ignore_patterns(".venv"))
    refused = run(clone, "run", PYTHONPATH=str(tmp_path))
    assert refused.returncode == 1
    assert (
        "lacks the module venv or ensurepip" in refused.stderr
        and "sudo apt install python3." in refused.stderr
    )
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize("minor", [8, 9, 10])
def test_an_older_python_hands_over_to_a_newer_one_or_says_so_in_both_languages(
    twin: Path, minor: int
) -> None:
    old = older_python(minor)
    alone = run(twin, "run", python=old, PATH=str(old.parent))
    assert alone.returncode == 1 and "Traceback" not in alone.stderr
    assert f"needs Python 3.11 or newer, and this is Python 3.{minor}" in alone.stderr
    assert "需要 Python 3.11 或更高版本" in alone.stderr

    name = f"python3.{sys.version_info[1]}"
    beside = Path(sys.base_prefix) / "bin" / name
    helped = run(twin, "run", python=old, PATH=f"{beside.parent}{os.pathsep}{os.environ['PATH']}")
    assert helped.returncode == 7 and f"(3, {sys.version_info[1]})" in helped.stdout, helped.stderr


def older_python(minor: int) -> Path:
    candidates = [Path(found) for found in [shutil.which(f"python3.{minor}")] if found]
    candidates += Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python3.{minor}")
    for candidate in reversed(candidates):
        if subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    pytest.skip(f"no Python 3.{minor} on this machine to be refused")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_requirement_is_pinned_and_its_pin_satisfies_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = {normal(name): pin for name, pin in pins().items()}
    asked = [
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    ]
    for requirement in map(Requirement, asked):
        if normal(requirement.name) != "rag-kit":
            assert pinned[normal(requirement.name)] in requirement.specifier, requirement
    assert f"torch=={pinned['torch']}" == bootstrap.TORCH


def test_the_pins_are_exact_sorted_and_what_is_installed_here() -> None:
    lines = [f"{name}=={pin}" for name, pin in pins().items()]
    assert lines == sorted(lines, key=str.upper)
    assert all(re.fullmatch(r"[0-9][0-9A-Za-z.!]*", pin) for pin in pins().values())
    for name in ("pydantic-settings", "transformers", "peft", "pytest"):
        assert version(name) == pins()[name]


def test_the_conda_environment_is_python_and_pip_and_the_project() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["name"] == "rag-kit"
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    python, pip, through_pip = environment["dependencies"]
    assert python == "python=3.11" and pip == "pip"
    assert through_pip == {"pip": ["-c constraints.txt", "-e .[test]"]}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_alone_lists_every_target() -> None:
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"setup", "run", "test", "lint", "lab", "refresh-notebooks", "clean"} <= set(targets)
    for target in targets:
        assert re.search(rf"^make {target} +\S", listed, re.MULTILINE), target


def test_the_steps_are_told_in_both_languages() -> None:
    assert message("setup_step", "zh", number=1, total=3, name="甲") == "[1/3] 甲……"
    assert set(catalogue()["setup_failed"]) == {"en", "zh"}
