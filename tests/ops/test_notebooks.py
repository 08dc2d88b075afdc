"""The runner of notebooks, on tiny notebooks in real kernels."""

import os
from pathlib import Path

import nbformat
import pytest

from rag_kit.errors import DataError, ModelError
from rag_kit.ops.notebooks import (
    declared_parameters,
    find_notebooks,
    new_run_folder,
    own_places,
    refresh,
    run_notebook,
)
from rag_kit.settings import Settings


def notebook(path: Path, *cells: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = nbformat.v4.new_notebook()
    made.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    made.cells[0].metadata["tags"] = ["parameters"]
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(made, path)
    return path


def test_a_notebook_runs_with_parameters_and_keeps_its_copy(tmp_path: Path) -> None:
    path = notebook(
        tmp_path / "张三 的项目" / "01_问.ipynb", "limit: int = 1\nname: str = ''", "print(limit + 1, name)"
    )
    assert declared_parameters(path) == ["limit", "name"]
    run_notebook(path, tmp_path, {"limit": 41, "name": "你好"})
    executed = nbformat.read(tmp_path / path.name, as_version=4)
    assert executed.cells[-1].outputs[0].text == "42 你好\n"


def test_a_failing_notebook_names_the_cell_and_keeps_its_copy(tmp_path: Path) -> None:
    path = notebook(tmp_path / "notebooks" / "02_fails.ipynb", "x = 1", "raise ValueError('坏了')")
    with pytest.raises(ModelError) as told:
        run_notebook(path, tmp_path, {})
    assert told.value.text("en") == (
        "Notebook 02_fails failed in cell 2: ValueError: 坏了",
        f"The executed copy shows where: {tmp_path / '02_fails.ipynb'}.",
    )
    assert (tmp_path / "02_fails.ipynb").is_file()
    assert "第 2 个单元格" in told.value.text("zh")[0]


def test_notebooks_are_found_by_number_and_name(tmp_path: Path) -> None:
    first = notebook(tmp_path / "notebooks" / "01_a.ipynb", "")
    second = notebook(tmp_path / "notebooks" / "02_b.ipynb", "")
    settings = Settings.load(tmp_path)
    assert find_notebooks(settings) == [first, second]
    assert find_notebooks(settings, ["02", "01_a", "notebooks/01_a.ipynb"]) == [second, first, first]
    with pytest.raises(DataError) as told:
        find_notebooks(settings, ["07"])
    assert told.value.text("en")[0] == "There is no notebook 07 (there are: 01_a, 02_b)."


def test_run_folders_are_new_and_names_cannot_climb(tmp_path: Path) -> None:
    settings = Settings.load(tmp_path)
    assert new_run_folder(settings) != new_run_folder(settings)
    assert (
        new_run_folder(settings, "实验-1")
        == new_run_folder(settings, "实验-1")
        == tmp_path / "runs" / "实验-1"
    )
    for name in ("../x", "a/b", ""):
        with pytest.raises(DataError) as told:
            new_run_folder(settings, name)
        assert told.value.text("en")[0] == f"A run cannot be called {name}."


def test_refreshing_writes_outputs_and_leaves_the_users_places_alone(tmp_path: Path) -> None:
    asks = "import os\nprint('LORA' if 'rag-kit-' in os.environ['LORA_MODEL_PATH'] else 'users')"
    path = notebook(tmp_path / "notebooks" / "01_a.ipynb", "n = 2", "n * 21", asks)
    before = dict(os.environ)
    said: list[str] = []
    refresh([path], said.append)
    assert dict(os.environ) == before
    done = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in done.cells] == [1, 2, 3]
    assert done.cells[1].outputs[0].data["text/plain"] == "42"
    assert done.cells[2].outputs[0].text == "LORA\n"
    assert said == ["01_a"]


def test_own_places_end_with_the_block() -> None:
    with own_places() as places:
        folder = Path(places["LORA_MODEL_PATH"])
        folder.mkdir()
        assert places["RAG_KIT_PROFILE"] == "embedded"
    assert not folder.exists()
    assert os.environ.get("LORA_MODEL_PATH") != str(folder)
