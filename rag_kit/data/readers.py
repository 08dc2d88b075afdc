"""One function a file format: its text and what is known of it (encoding, pages).

Each returns a document without a source or raises DataError; headings of HTML and Word become Markdown
headings, so that the chunker sees the sections, and a table's rows become lines `heading: value; …`.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import regex
from langchain_core.documents import Document

from rag_kit.data.encodings import Decoded, decode
from rag_kit.errors import DataError

if TYPE_CHECKING:
    from bs4 import BeautifulSoup

_BLOCKS = regex.compile(
    "^(address|article|aside|blockquote|body|caption|center|dd|details|dialog|dir|div|dl|dt|fieldset|figcaption"
    "|figure|footer|form|h[1-6]|header|hr|legend|li|main|nav|ol|p|pre|section|summary|table|tbody|tfoot|thead|tr|ul)$"
)
_UNSEEN = (
    "title, script, style, noscript, template, svg, iframe, object, textarea, select, "
    "[hidden], [style*='display:none'], [style*='display: none']"
)
_SEPARATORS = ",\t;|"


def decode_file(path: Path, *, html: bool = False) -> Decoded:
    """Return a text file's content decoded; raises DataError where it is empty or is not text."""
    data = path.read_bytes()
    if not data:
        raise DataError("document_empty", path=path)
    declared = None
    if html:
        from bs4.dammit import EncodingDetector

        declared = EncodingDetector.find_declared_encoding(data, is_html=True)
    decoded = decode(data, declared)
    if decoded is None:
        raise DataError("document_undecodable", path=path)
    return decoded


def read_text(path: Path) -> Document:
    """Read Markdown or plain text, every character as it stands but a byte-order mark."""
    decoded = decode_file(path)
    return _document(decoded, decoded.text)


def read_html(path: Path) -> Document:
    """Read the visible text of an HTML page, a line a block, in the charset that it declares."""
    from bs4 import BeautifulSoup

    decoded = decode_file(path, html=True)
    return _document(decoded, _visible_text(BeautifulSoup(decoded.text, "html.parser")))


def read_pdf(path: Path) -> Document:
    """Read a PDF's text; `pages` holds the offset at which each page starts.

    Raises DataError for an encrypted or damaged file, and for a scan, which has pictures but no text.
    """
    from pypdf import PdfReader
    from pypdf.errors import FileNotDecryptedError

    try:
        # It tries the empty password itself: a file that only restricts printing and the like is read.
        pages = [page.extract_text() for page in PdfReader(io.BytesIO(path.read_bytes())).pages]
    except FileNotDecryptedError as error:
        raise DataError("pdf_encrypted", path=path) from error
    except Exception as error:  # a broken file raises whatever the broken part leads to
        raise _damaged(path, "PDF", error) from error
    if not any(page.strip() for page in pages):
        raise DataError("pdf_scanned", path=path, pages=len(pages))
    starts = list(accumulate((len(page) + 2 for page in pages[:-1]), initial=0))
    return Document("\n\n".join(pages), metadata={"pages": starts})


def read_docx(path: Path) -> Document:
    """Read a Word document: paragraphs and tables in their order."""
    import docx

    try:
        blocks = list(_word_blocks(docx.Document(io.BytesIO(path.read_bytes())).iter_inner_content()))
    except Exception as error:  # zip, XML and package faults have no common class
        raise _damaged(path, "Word", error) from error
    return Document("\n\n".join(block for block in blocks if block.strip()))


def read_xlsx(path: Path) -> Document:
    """Read every sheet of a workbook, a row a line; several sheets have their names as headings."""
    sheets = {name: list(table_lines(rows)) for name, rows in xlsx_rows(path).items()}
    filled = {name: lines for name, lines in sheets.items() if lines}
    titled = len(filled) > 1
    return Document("\n\n".join("\n".join([f"# {name}"] * titled + lines) for name, lines in filled.items()))


def read_csv(path: Path) -> Document:
    """Read a CSV file, a row a line."""
    decoded = decode_file(path)
    return _document(decoded, "\n".join(table_lines(csv_rows(path, decoded.text))))


def read_jsonl(path: Path) -> Document:
    """Read JSON lines: each object's `text`, `content` or `page_content`, else `key: value; …`."""
    decoded = decode_file(path)
    records = [_record_text(record) for _, record in json_lines(path, decoded.text)]
    return _document(decoded, "\n\n".join(records))


def json_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of each line that is not blank; raises DataError naming the line."""
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand in a string
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError("json_line", path=path, line=number, reason=_reason(error)) from error
            if not isinstance(record, dict):
                raise DataError("json_line", path=path, line=number, reason=f"{line.strip()[:40]}: no object")
            yield number, record


def csv_rows(path: Path, text: str) -> list[list[str]]:
    """Return the rows of CSV text; the separator is the one of `, tab ; |` that the first line has most of.

    The csv module's sniffer guesses from all rows and takes a comma in a sentence for a separator.
    """
    heading = text.lstrip().partition("\n")[0]
    separator = max(_SEPARATORS, key=heading.count)
    try:
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    except csv.Error as error:
        raise DataError("document_damaged", path=path, format="CSV", reason=_reason(error)) from error


def xlsx_rows(path: Path) -> dict[str, list[list[str]]]:
    """Return the rows of each sheet as text; a formula stands as the value that was last computed."""
    from openpyxl import load_workbook

    try:
        workbook = load_workbook(io.BytesIO(path.read_bytes()), read_only=True, data_only=True)
        return {
            sheet.title: [[_cell_text(cell) for cell in row] for row in sheet.iter_rows(values_only=True)]
            for sheet in workbook.worksheets
        }
    except Exception as error:  # zip, XML and package faults have no common class
        raise _damaged(path, "Excel", error) from error


def table_lines(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield `heading: value; …` for each row below the first that is not blank; empty cells are left out."""
    filled = [row for row in rows if any(cell.strip() for cell in row)]
    headings = [_one_line(cell) for cell in filled[0]] if filled else []
    for row in filled[1:]:
        pairs = ((headings[i] if i < len(headings) else "", _one_line(cell)) for i, cell in enumerate(row))
        yield "; ".join(f"{heading}: {cell}" if heading else cell for heading, cell in pairs if cell)


def _document(decoded: Decoded, text: str) -> Document:
    guessed = {"encoding_guessed": True} if decoded.guessed else {}
    return Document(text, metadata={"encoding": decoded.encoding, **guessed})


def _visible_text(soup: "BeautifulSoup") -> str:
    for tag in soup.select(_UNSEEN):
        tag.decompose()
    for string in soup.find_all(string=True):
        if not string.find_parent("pre") and type(string).__name__ == "NavigableString":  # no comment
            string.replace_with(regex.sub(r"[ \t\r\n\f]+", " ", string))
    for tag in soup.find_all(_BLOCKS):
        if tag.name in ("tr", "li", "dt", "dd"):  # lines; every other block stands apart
            tag.insert_before("\n")
        else:
            tag.insert_before("\n\n")
            tag.insert_after("\n\n")
        if regex.fullmatch("h[1-6]", tag.name):
            tag.insert(0, "#" * int(tag.name[1]) + " ")
        elif tag.name == "li":
            tag.insert(0, "- ")
    for tag in soup.find_all(["td", "th"]):
        tag.insert_after(" | ")
    for tag in soup.find_all("br"):
        tag.replace_with("\n")
    text = str(soup.get_text())
    for pattern in (r"(?m)[ \t]+$", r"(?m) \|$", r"(?m)^ (?=\S)", r"(?m)(?<=^(?:#+|-) ) +", r"(?<=\n\n)\n+"):
        text = regex.sub(pattern, "", text)
    return text.strip()


def _word_blocks(content: Iterable[Any]) -> Iterator[str]:
    for block in content:
        if hasattr(block, "rows"):  # a merged cell is there once for each column that it spans
            yield "\n".join(" | ".join(map(_word_cell, dict.fromkeys(row.cells))) for row in block.rows)
        else:
            style = (block.style.name if block.style else "") or ""
            heading = regex.fullmatch(r"(?:Heading ([1-6])|Title)", style)
            marks = "#" * int(heading[1] or 1) + " " if heading and block.text.strip() else ""
            yield marks + block.text


def _word_cell(cell: Any) -> str:
    return _one_line("\n".join(_word_blocks(cell.iter_inner_content())))


def _record_text(record: dict[str, Any]) -> str:
    for key in ("text", "content", "page_content"):
        if isinstance(record.get(key), str):
            return str(record[key])
    plain = (
        (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for key, value in record.items()
        if value is not None
    )
    return "; ".join(f"{key}: {_one_line(value)}" for key, value in plain)


def _cell_text(value: Any) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _damaged(path: Path, kind: str, error: Exception) -> DataError:
    if isinstance(error, OSError):
        raise error
    if path.stat().st_size == 0:
        return DataError("document_empty", path=path)
    return DataError("document_damaged", path=path, format=kind, reason=_reason(error))


def _reason(error: Exception) -> str:
    return _one_line(str(error)).rstrip(".")[:120] or type(error).__name__
