"""Files to LangChain documents: one document a file, its text as near to the original as the format allows.

Which reader reads which format is told here; how each one works is told in `readers`. Knows nothing of
chunks. Notebook 02 shows it.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from langchain_core.documents import Document

from rag_kit.data import readers
from rag_kit.data.problems import SeveralProblems
from rag_kit.errors import DataError

_log = logging.getLogger(__name__)

READERS: dict[str, Callable[[Path], Document]] = {
    ".md": readers.read_text,
    ".txt": readers.read_text,
    ".html": readers.read_html,
    ".htm": readers.read_html,
    ".pdf": readers.read_pdf,
    ".docx": readers.read_docx,
    ".xlsx": readers.read_xlsx,
    ".csv": readers.read_csv,
    ".jsonl": readers.read_jsonl,
}
SUFFIXES = tuple(READERS)
QUESTIONS_FILE = "questions.jsonl"


def sample_handbook() -> Path:
    """Return the folder of the sample knowledge base, a fictional maker's customer-service handbook."""
    return Path(__file__).parent / "handbook"


def load_documents(path: Path | str | Sequence[Path | str]) -> list[Document]:
    """Read a file, a folder (recursively, in sorted order) or several of them, one document a file.

    Hidden files, `~$` lock files and other suffixes than `SUFFIXES` are passed over. A folder that holds a
    `questions.jsonl` is a data set: its README.md and the .jsonl files directly in it speak *about* the
    documents and are not documents. Metadata: `source` (POSIX path relative to the folder given, the name
    of a file given alone, or the path relative to the deepest common folder of several paths given);
    `encoding` where text was decoded and `encoding_guessed` where that was a guess; `pages` of a PDF, the
    offset at which each page starts.

    Raises DataError for a path that is missing or holds no document, and one error that names every file
    that cannot be read: nothing is passed over in silence.
    """
    documents: list[Document] = []
    problems: list[DataError] = []
    for file, source in _files(path):
        try:
            documents.append(_load(file, source))
        except DataError as problem:
            problems.append(problem)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise SeveralProblems("documents_unreadable", problems)
    return documents


def _load(file: Path, source: str) -> Document:
    try:
        document = READERS[file.suffix.lower()](file)
    except OSError as error:
        raise DataError("document_not_opened", path=file, reason=error.strerror or error) from error
    if not document.page_content.strip():
        raise DataError("document_empty", path=file)
    if document.metadata.get("encoding_guessed"):
        _log.warning("%s: no encoding is declared, read as %s (a guess)", file, document.metadata["encoding"])
    document.metadata = {"source": source, **document.metadata}
    return document


def _files(path: Path | str | Sequence[Path | str]) -> Iterator[tuple[Path, str]]:
    """Yield each file to read with its source name."""
    if isinstance(path, (str, Path)):
        given = Path(path)
        found = _documents_under(given)
        root = given if given.is_dir() else given.parent
    else:
        paths = [Path(each) for each in path]
        found = list(dict.fromkeys(file for each in paths for file in _documents_under(each)))
        root = Path(os.path.commonpath([each.absolute().parent for each in paths])) if paths else Path()
    for file in found:
        yield file, Path(os.path.relpath(file, root)).as_posix()


def _documents_under(path: Path) -> list[Path]:
    supported = ", ".join(SUFFIXES)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if _is_document(file, path)]
        if not files:
            raise DataError("folder_without_documents", path=path, supported=supported)
        return files
    if not path.exists():
        raise DataError("document_missing", path=path)
    if path.suffix.lower() not in READERS:
        raise DataError("document_format", path=path, supported=supported)
    return [path]


def _is_document(file: Path, root: Path) -> bool:
    if file.suffix.lower() not in READERS or file.is_dir():
        return False
    if any(part.startswith((".", "~$")) for part in file.relative_to(root).parts):
        return False
    about = file.name == "README.md" or file.suffix.lower() == ".jsonl"
    return not (about and (file.parent / QUESTIONS_FILE).exists())
