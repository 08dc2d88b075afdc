"""Where notebooks and their runs lie, and the committed outputs.

Knows files and kernels; knows nothing of parameters, nor of what the notebooks do.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from uuid import uuid4

from rag_kit.errors import DataError
from rag_kit.ops.worker import kernel_config
from rag_kit.settings import Settings

PATTERN = "[0-9][0-9]_*.ipynb"
OWN_PLACES = ("LORA_MODEL_PATH", "VECTOR_STORE_PATH")


def find_notebooks(settings: Settings, names: Sequence[str] = ()) -> list[Path]:
    """Return the numbered notebooks in order, or those of the numbers, names or paths given.

    Raises DataError for a name that fits none (those at hand are listed).
    """
    folder = settings.root / "notebooks"
    known = sorted(folder.glob(PATTERN))
    if not names:
        return known
    found = []
    for name in names:
        places = (settings.path(name), folder / f"{Path(name.removesuffix('.ipynb')).name}.ipynb")
        fitting = [path for path in known if path.stem.split("_")[0] == name]
        fitting = fitting or [path for path in places if path.is_file()][:1]
        if not fitting:
            raise DataError("notebook_unknown", name=name, known=", ".join(path.stem for path in known))
        found += fitting
    return found


def new_run_folder(settings: Settings, name: str | None = None) -> Path:
    """Return `runs/<id>`, made; the id is the local time and four random characters, or `name`."""
    if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
        raise DataError("run_name", name=name)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = settings.root / "runs" / (name or f"{stamp}-{uuid4().hex[:4]}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


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
            with tempfile.TemporaryDirectory(prefix="rag-kit-") as sockets:
                how = {"resources": where, "coalesce_streams": True, "config": kernel_config(sockets)}
                NotebookClient(notebook, kernel_name="python3", **how).execute()
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
