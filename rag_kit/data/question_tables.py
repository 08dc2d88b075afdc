"""Question sets in spreadsheets: headings in English or Chinese, one question a row.

Columns are found by their headings in any letter case; others are passed over. Only the question is
required, and an answer unless the row says that there is none. Several answers in a cell are separated by
`|` or `｜` (a semicolon may belong to an answer). A place is read where source, start and end all stand;
offsets are never guessed from a source alone.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import regex

from rag_kit.data.readers import csv_rows, decode_file, xlsx_rows
from rag_kit.errors import DataError

_HEADINGS = {
    "id": "id 编号 編號 序号 序號",
    "question": "question questions query 问题 問題 提问 提問 题目 題目",
    "answers": "answer answers reference reference_answer 答案 回答 参考答案 參考答案 标准答案 標準答案",
    "source": "source document file 来源 來源 文档 文檔 文件 出处 出處",
    "start": "start 起始 开始 開始 起始位置",
    "end": "end 结束 結束 结束位置 終止",
    "answerable": "answerable 可回答 可答",
    "language": "language lang 语言 語言",
    "split": "split 划分 劃分 集合 数据集",
    "paraphrase_of": "paraphrase_of 改写自 改寫自",
}
_FIELD_OF = {heading: field for field, names in _HEADINGS.items() for heading in names.split()}
_LANGUAGES = {"中文": "zh", "汉语": "zh", "chinese": "zh", "英文": "en", "英语": "en", "english": "en"}
_NO = frozenset(("false", "no", "n", "0", "否", "不可", "无", "無", "不"))


def table_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number, record in the form of the JSON lines) of a `.csv` or `.xlsx` file.

    A row without id is `row-<number>`. Raises DataError where no column is headed as the question.
    """
    if path.suffix.lower() == ".csv":
        sheets = {path.stem: csv_rows(path, decode_file(path).text)}
    else:
        sheets = xlsx_rows(path)
    first = next((rows for rows in sheets.values() if any(map(any, rows))), [])
    filled = [(number, row) for number, row in enumerate(first, 1) if any(cell.strip() for cell in row)]
    headings = filled[0][1] if filled else []
    columns = [_FIELD_OF.get(regex.sub(r"[\s_-]+", "_", heading.strip().lower())) for heading in headings]
    if "question" not in columns:
        found = ", ".join(heading for heading in headings if heading) or "–"
        raise DataError("questions_no_column", path=path, found=found)
    for number, row in filled[1:]:
        cells: dict[str, str] = {}
        for field, cell in zip(columns, row, strict=False):
            if field and cell.strip():
                cells.setdefault(field, cell.strip())
        yield number, _record(number, cells)


def _record(number: int, cells: dict[str, str]) -> dict[str, Any]:
    answers = [answer.strip() for answer in regex.split(r"[|｜]", cells.get("answers", "")) if answer.strip()]
    place = [cells.get(name, "") for name in ("start", "end")]
    placed = "source" in cells and all(offset.isdecimal() for offset in place)
    language = cells.get("language", "").lower()
    start, end = (int(offset) for offset in place) if placed else (0, 0)
    record = {
        "id": cells.get("id", f"row-{number}"),
        "question": cells.get("question", ""),
        "answers": answers,
        "spans": [{"source": cells["source"], "start": start, "end": end}] if placed else [],
        "answerable": cells.get("answerable", "").lower() not in _NO,
        "language": _LANGUAGES.get(language, language[:2]) or None,
        "split": cells.get("split"),
        "paraphrase_of": cells.get("paraphrase_of"),
    }
    return {key: value for key, value in record.items() if value is not None}
