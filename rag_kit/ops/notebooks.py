"""The one runner of notebooks: papermill, each in its own kernel, results under `runs/<id>/`.

Knows files, parameters and kernels; knows nothing of what the notebooks do.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from rag_kit.errors import DataError, ModelError
from rag_kit.settings import Settings

PATTERN = "[0-9][0-9]_*.ipynb"
OWN_PLACES = ("LORA_MODEL_PATH", "VECTOR_STORE_PATH")


def find_notebooks(settings: Settings, names: Sequence[str] = ()) -> list[Path]:
    """Return the numbered notebooks in order, or those whose number or name is given.

    Raises DataError for a name that fits none (those at hand are listed).
    """
    known = sorted((settings.root / "notebooks").glob(PATTERN))
    if not names:
        return known
    found = []
    for name in names:
        fitting = [path for path in known if path.stem == Path(name).stem or path.stem.split("_")[0] == name]
        if not fitting:
            raise DataError("notebook_unknown", name=name, known=", ".join(path.stem for path in known))
        found += fitting
    return found


def new_run_folder(settings: Settings, name: str | None = None) -> Path:
    """Return `runs/<id>`, made; the id is the local time and four random characters, or `name`."""
    if name is not None and not re.fullmatch(r"[\w.-]+", name):
        raise DataError("run_name", name=name)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = settings.root / "runs" / (name or f"{stamp}-{uuid4().hex[:4]}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_notebook(notebook: Path, run_folder: Path, parameters: dict[str, Any]) -> float:
    """Execute one notebook into `run_folder` and return the seconds it took.

    The executed copy stays there also when a cell fails; ModelError then names cell and error.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    start = time.perf_counter()
    try:
        papermill.execute_notebook(
            notebook,
            run_folder / notebook.name,
            parameters=parameters,
            cwd=notebook.parent,
            progress_bar=False,
            kernel_name="python3",
        )
    except PapermillExecutionError as error:
        reason = re.sub(r"\x1b\[[0-9;]*m", "", f"{error.ename}: {error.evalue}")
        copy = run_folder / notebook.name
        told = {"name": notebook.stem, "cell": error.exec_count, "reason": reason, "copy": copy}
        raise ModelError("notebook_failed", **told) from None
    return time.perf_counter() - start


def declared_parameters(notebook: Path) -> list[str]:
    """Return the names that the notebook's `parameters` cell declares."""
    from papermill import inspect_notebook

    return list(inspect_notebook(notebook))


def refresh(notebooks: Sequence[Path], say: Callable[[str], None]) -> None:
    """Execute notebooks and write their outputs back: the only writer of committed outputs.

    Artefacts go to a folder of their own, so that the user's adapters and indexes stay as they are.
    """
    import nbformat
    from nbclient import NotebookClient

    with own_places():
        for path in notebooks:
            notebook = nbformat.read(path, as_version=4)
            where = {"metadata": {"path": path.parent}}
            client = NotebookClient(notebook, kernel_name="python3", resources=where, coalesce_streams=True)
            client.execute()
            for cell in notebook.cells:
                cell.metadata.pop("execution", None)  # times of this machine
            notebook.metadata.pop("papermill", None)
            notebook.metadata.pop("widgets", None)
            nbformat.write(notebook, path)
            say(path.stem)


@contextmanager
def own_places() -> Iterator[dict[str, str]]:
    """Yield variables, set for child processes: a temporary place for artefacts, English, embedded."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="rag-kit-") as folder:
        places = {name: str(Path(folder) / name.lower().removesuffix("_path")) for name in OWN_PLACES}
        places |= {"RAG_KIT_LANG": "en", "RAG_KIT_PROFILE": "embedded"}
        os.environ |= places
        try:
            yield places
        finally:
            os.environ.clear()
            os.environ |= before
