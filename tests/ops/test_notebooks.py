"""Where notebooks and runs lie, and the refreshing of outputs, in real kernels."""

import os
from pathlib import Path

import nbformat
import pytest

from rag_kit.errors import DataError
from rag_kit.ops.notebooks import find_notebooks, new_run_folder, own_places, refresh
from rag_kit.ops.worker import kernel_config
from rag_kit.settings import Settings
from tests.ops.test_parameters import notebook


def test_notebooks_are_found_by_number_and_name(tmp_path: Path) -> None:
    first = notebook(tmp_path / "notebooks" / "01_a.ipynb", "")
    second = notebook(tmp_path / "notebooks" / "02_b.ipynb", "")
    settings = Settings.load(tmp_path)
    assert find_notebooks(settings) == [first, second]
    assert find_notebooks(settings, ["02", "01_a", "notebooks/01_a.ipynb"]) == [second, first, first]
    with pytest.raises(DataError) as told:
        find_notebooks(settings, ["07"])
    assert told.value.text("en")[0] == "There is no notebook 07 (there are: 01_a, 02_b)."
    own = notebook(tmp_path / "别处" / "我的 v1.2.ipynb", "")
    assert find_notebooks(settings, [str(own), "别处/我的 v1.2.ipynb"]) == [own, own]


def test_run_folders_are_new_and_names_cannot_climb(tmp_path: Path) -> None:
    settings = Settings.load(tmp_path)
    assert new_run_folder(settings) != new_run_folder(settings)
    assert (
        new_run_folder(settings, "实验-1")
        == new_run_folder(settings, "实验-1")
        == tmp_path / "runs" / "实验-1"
    )
    for name in ("../x", "a/b", "", "..", ".", "/x", "a\\b", ".x"):
        with pytest.raises(DataError) as told:
            new_run_folder(settings, name)
        assert told.value.text("en")[0] == f"A run cannot be called {name}."


def test_refreshing_writes_outputs_and_leaves_the_users_places_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
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
    assert "TCP" not in capfd.readouterr().err


def test_own_places_end_with_the_block() -> None:
    with own_places() as places:
        folder = Path(places["LORA_MODEL_PATH"])
        folder.mkdir()
        assert places["RAG_KIT_PROFILE"] == "embedded"
    assert not folder.exists()
    assert os.environ.get("LORA_MODEL_PATH") != str(folder)


def test_kernels_talk_over_sockets_where_these_can_be(tmp_path: Path) -> None:
    short, long = kernel_config("x"), kernel_config("x" * 100)
    assert (short.KernelManager.transport, long.KernelManager.transport_encryption) == ("ipc", "auto")
