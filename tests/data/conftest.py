"""Real files of every format, made in a temporary folder, in Chinese and in English."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def english_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show messages in English whatever the machine speaks; tests of Chinese ask for it."""
    monkeypatch.setenv("RAG_KIT_LANG", "en")


@pytest.fixture
def make_pdf(tmp_path: Path) -> Callable[..., Path]:
    """Write a PDF of the given pages (lists of lines); a page without lines is a picture of nothing."""

    def make(name: str, pages: Sequence[Sequence[str]], password: str = "") -> Path:
        from pypdf import PdfReader, PdfWriter
        from reportlab.pdfbase import pdfmetrics
        from reportlab.pdfbase.cidfonts import UnicodeCIDFont
        from reportlab.pdfgen.canvas import Canvas

        path = tmp_path / name
        pdfmetrics.registerFont(UnicodeCIDFont("STSong-Light"))
        canvas = Canvas(str(path))
        for lines in pages:
            canvas.setFont("STSong-Light", 12)
            canvas.rect(72, 72, 300, 600, fill=1) if not lines else None
            for number, line in enumerate(lines):
                canvas.drawString(72, 720 - 20 * number, line)
            canvas.showPage()
        canvas.save()
        if password:
            writer = PdfWriter(clone_from=PdfReader(path))
            writer.encrypt(password, algorithm="RC4-128")
            writer.write(path)
        return path

    return make


@pytest.fixture
def make_docx(tmp_path: Path) -> Callable[..., Path]:
    """Write a Word document: a string is a paragraph, `# …` a heading, a list of rows a table."""

    def make(name: str, blocks: Sequence[str | list[list[str]]]) -> Path:
        import docx

        document = docx.Document()
        for block in blocks:
            if isinstance(block, list):
                table = document.add_table(len(block), len(block[0]))
                for row, cells in zip(table.rows, block, strict=True):
                    for cell, text in zip(row.cells, cells, strict=True):
                        cell.text = text
            elif block.startswith("# "):
                document.add_heading(block[2:], level=1)
            else:
                document.add_paragraph(block)
        document.save(str(tmp_path / name))
        return tmp_path / name

    return make


@pytest.fixture
def make_xlsx(tmp_path: Path) -> Callable[..., Path]:
    """Write a workbook of the given sheets: `{name: rows}`."""

    def make(name: str, sheets: dict[str, list[list[object]]]) -> Path:
        from openpyxl import Workbook

        workbook = Workbook()
        workbook.remove(workbook.active)
        for title, rows in sheets.items():
            sheet = workbook.create_sheet(title)
            for row in rows:
                sheet.append(row)
        workbook.save(tmp_path / name)
        return tmp_path / name

    return make
