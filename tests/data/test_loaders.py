import json
import logging
from pathlib import Path

import pytest

from rag_kit.data.encodings import decode
from rag_kit.data.loaders import SUFFIXES, load_documents, sample_handbook
from rag_kit.errors import DataError

CHINESE = "退货期限为三十天。请保留原始发票与包装，并致电客服。"
TRADITIONAL = "自購買日起三十天內可退貨。請保留原始發票與包裝，並致電客服中心。"
ENGLISH = "Returns are free for thirty days. The Qwen2.5 kit costs 2.5 dollars."


def only(path: Path):
    (document,) = load_documents(path)
    return document


@pytest.mark.parametrize("text", [CHINESE, ENGLISH, "# 标题\r\n\r\nline one  \n\tline\u3000two\n"])
@pytest.mark.parametrize(
    ("codec", "encoding"), [("utf-8", "utf-8"), ("utf-8-sig", "utf-8-sig"), ("utf-16", "utf-16")]
)
def test_text_is_kept_character_by_character(tmp_path, text, codec, encoding):
    path = tmp_path / "a.md"
    path.write_bytes(text.encode(codec))
    document = only(path)
    assert document.page_content == text
    assert document.metadata == {"source": "a.md", "encoding": encoding}


def test_big_endian_utf16_with_its_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xfe\xff" + CHINESE.encode("utf-16-be"))
    assert only(path).page_content == CHINESE


SHORT_SIMPLIFIED = ["你好", "退货", "保修", "价格", "地址", "电话", "退货需要几天？", "产品型号：K7"]
SHORT_TRADITIONAL = ["你好", "設定", "保養", "價格", "地址", "電話", "退貨需要幾天？", "產品型號：K7"]


@pytest.mark.parametrize(
    ("text", "codec", "encoding"),
    [
        *((text, "gb18030", "gb18030") for text in [CHINESE, CHINESE * 50, *SHORT_SIMPLIFIED]),
        *((text, "big5", "big5") for text in [TRADITIONAL, TRADITIONAL * 50, *SHORT_TRADITIONAL]),
        *((text, "gb18030", "gb18030") for text in [TRADITIONAL, *SHORT_TRADITIONAL]),
        (f"{ENGLISH}\n{CHINESE}", "gb18030", "gb18030"),
        (f"{ENGLISH * 20} 退貨", "big5", "big5"),
        ("It’s “free” for 30 days – café Zürich", "cp1252", "windows-1252"),
    ],
)
def test_a_guessed_encoding_is_right_and_reported(tmp_path, caplog, text, codec, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(codec))
    with caplog.at_level(logging.WARNING):
        document = only(path)
    assert document.page_content == text
    assert document.metadata == {"source": "a.txt", "encoding": encoding, "encoding_guessed": True}
    assert "a.txt" in caplog.text and encoding in caplog.text


def test_long_and_short_chinese_of_xquad_is_told_right():
    path = Path(__file__).parents[2].parent / "shared/data/xquad/zh.json"
    if not path.exists():
        pytest.skip("XQuAD is not beside the project")
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for text in (paragraph["context"], *(qa["question"] for qa in paragraph["qas"])):
                found = decode(text.encode("gb18030"))
                assert found and found.text == text


@pytest.mark.parametrize("charset", ["gb2312", "big5", "utf-8"])
def test_html_gives_its_visible_text_in_its_own_charset(tmp_path, charset):
    title = "退貨說明" if charset == "big5" else "退货说明"
    html = f"""<html><head><meta charset="{charset}"><title>tab</title><style>p {{}}</style></head><body>
      <!-- note --><h2>{title}</h2><p>Qwen<b>2.5</b> costs
      2.5 dollars.<br>Call us.</p><script>var x = 1</script><div hidden>secret</div>
      <ul><li>one</li><li>two</li></ul><table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>
      <pre>  kept
    as it is</pre></body></html>"""
    path = tmp_path / "a.html"
    path.write_bytes(html.encode(charset))
    document = only(path)
    assert document.page_content == (
        f"## {title}\n\nQwen2.5 costs 2.5 dollars.\nCall us.\n\n- one\n- two\n\n"
        "a | b\n1 | 2\n\n  kept\n    as it is"
    )
    assert "encoding_guessed" not in document.metadata


def test_pdf_pages_start_where_their_offsets_say(make_pdf):
    document = only(
        make_pdf("a.pdf", [["退货期限为三十天。", "It costs 2.5 dollars."], [], ["第三页：保修"]])
    )
    first, second, third = document.metadata["pages"]
    assert first == 0 and second < third
    assert document.page_content.startswith("退货期限为三十天。\nIt costs 2.5 dollars.")
    assert document.page_content[second:third].strip() == ""
    assert document.page_content[third:].startswith("第三页：保修")


def test_docx_keeps_paragraphs_and_tables_in_order(make_docx):
    blocks = ["# 退货", CHINESE, [["型号", "价格"], ["K7", "2.5"]], ENGLISH]
    expected = f"# 退货\n\n{CHINESE}\n\n型号 | 价格\nK7 | 2.5\n\n{ENGLISH}"
    assert only(make_docx("a.docx", blocks)).page_content == expected


def test_docx_merged_cells_stand_once(tmp_path):
    import docx

    document = docx.Document()
    table = document.add_table(1, 3)
    table.cell(0, 0).merge(table.cell(0, 1)).text = "merged"
    table.cell(0, 2).text = "last"
    document.save(str(tmp_path / "a.docx"))
    assert only(tmp_path / "a.docx").page_content == "merged | last"


def test_xlsx_reads_every_sheet(make_xlsx):
    sheets = {
        "产品": [["型号", "价格"], ["K7", 3.0], ["M3", 2.5]],
        "empty": [],
        "Fees": [["fee"], [None], ["x\ny"]],
    }
    text = only(make_xlsx("a.xlsx", sheets)).page_content
    assert text == "# 产品\n型号: K7; 价格: 3\n型号: M3; 价格: 2.5\n\n# Fees\nfee: x y"


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_csv_finds_its_separator(tmp_path, separator):
    path = tmp_path / "a.csv"
    rows = [["型号", "说明"], ["K7", '"two\nlines, three; commas,"'], ["", ""], ["M3", "", "more"]]
    path.write_text("\n".join(separator.join(row) for row in rows), encoding="utf-8")
    assert only(path).page_content == "型号: K7; 说明: two lines, three; commas,\n型号: M3; more"


def test_jsonl_takes_the_text_field_or_every_field(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        {"text": "一\u2028二"},
        {"content": "two"},
        {"page_content": "three"},
        {"型号": "K7", "n": 2, "x": None},
    ]
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    assert only(path).page_content == "一\u2028二\n\ntwo\n\nthree\n\n型号: K7; n: 2"


def test_a_folder_is_read_in_order_without_what_is_not_a_document(tmp_path):
    files = [
        *("b.txt", "README.md", "a/z.md", ".hidden.md", ".git/x.md", "~$lock.docx", "photo.jpg"),
        *("set/questions.jsonl", "set/facts.jsonl", "set/README.md", "set/en/README.md", "set/en/rows.jsonl"),
    ]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "文本"}', encoding="utf-8")
    documents = load_documents(tmp_path)
    expected = ["README.md", "a/z.md", "b.txt", "set/en/README.md", "set/en/rows.jsonl"]
    assert [document.metadata["source"] for document in documents] == expected


def test_several_paths_have_sources_from_their_common_folder(tmp_path):
    for name in ("one/x.md", "two/x.md"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name, encoding="utf-8")
    paths = [tmp_path / "two", tmp_path / "one" / "x.md", tmp_path / "two" / "x.md"]
    assert [each.metadata["source"] for each in load_documents(paths)] == ["two/x.md", "one/x.md"]


def test_the_sample_handbook_is_a_folder():
    assert sample_handbook().is_dir()


def fails(path, key, english, chinese):
    with pytest.raises(DataError) as caught:
        load_documents(path)
    assert caught.value.key == key
    assert english in caught.value.text("en")[0] and chinese in caught.value.text("zh")[0]
    for what, remedy in (caught.value.text("en"), caught.value.text("zh")):
        assert str(path) in what and what[-1] in ".。" and remedy


def test_missing_and_unsupported_paths(tmp_path):
    fails(tmp_path / "nowhere", "document_missing", "does not exist", "不存在")
    (tmp_path / "photo.jpg").write_bytes(b"x")
    fails(tmp_path / "photo.jpg", "document_format", ", ".join(SUFFIXES), "支持的格式")
    fails(tmp_path, "folder_without_documents", ", ".join(SUFFIXES), "没有文档")


def test_a_link_that_leads_nowhere_is_not_passed_over(tmp_path):
    (tmp_path / "a.md").symlink_to(tmp_path / "gone.md")
    with pytest.raises(DataError, match=r"a\.md cannot be opened: No such file or directory\. Check that"):
        load_documents(tmp_path)


@pytest.mark.parametrize("name", [f"a{suffix}" for suffix in SUFFIXES])
def test_an_empty_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    fails(tmp_path / name, "document_empty", "holds no text", "没有文本")


@pytest.mark.parametrize("content", ["  \n\u3000", "\ufeff"])
def test_a_file_of_spaces_is_empty(tmp_path, content):
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    fails(tmp_path / "a.txt", "document_empty", "holds no text", "没有文本")


def test_a_table_with_headings_alone_is_empty(tmp_path, make_xlsx, make_docx):
    fails(make_xlsx("a.xlsx", {"s": [["问题", "答案"]]}), "document_empty", "holds no text", "没有文本")
    fails(make_docx("a.docx", []), "document_empty", "holds no text", "没有文本")


@pytest.mark.parametrize(
    "content", [b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", bytes(range(128, 256)), b"ab\x00cd"]
)
@pytest.mark.parametrize("name", ["a.txt", "a.html", "a.csv", "a.jsonl"])
def test_binary_content_is_no_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    fails(tmp_path / name, "document_undecodable", "is not text in UTF-8", "编码的文本")


@pytest.mark.parametrize("name", ["a.pdf", "a.docx", "a.xlsx"])
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_damaged_files_are_named(name, damage, make_pdf, make_docx, make_xlsx):
    makers = {
        "a.pdf": lambda: make_pdf("a.pdf", [[ENGLISH]]),
        "a.docx": lambda: make_docx("a.docx", [ENGLISH]),
        "a.xlsx": lambda: make_xlsx("a.xlsx", {"s": [["a"], ["b"]]}),
    }
    path = makers[name]()
    path.write_bytes(path.read_bytes()[:200] if damage == "cut" else b"plain text, not what its name says")
    kind = {"a.pdf": "PDF", "a.docx": "Word", "a.xlsx": "Excel"}[name]
    fails(path, "document_damaged", f"is not a whole {kind} file: ", f"不是完整的 {kind} 文件")


def test_a_scanned_pdf_is_told(make_pdf):
    fails(make_pdf("scan.pdf", [[], []]), "pdf_scanned", "no text on any of its 2 pages", "扫描件")


@pytest.mark.parametrize("password", ["geheim", "密码"])
def test_an_encrypted_pdf_is_told(make_pdf, password):
    fails(
        make_pdf("a.pdf", [[ENGLISH]], password="secret"),
        "pdf_encrypted",
        "protected with a password",
        "密码",
    )


def test_a_bad_json_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ok"}\n\n{"text": \n', encoding="utf-8")
    fails(path, "json_line", "line 3, is not a JSON object", "第 3 行")
    path.write_text("[1]", encoding="utf-8")
    fails(path, "json_line", "line 1, is not a JSON object: [1]", "第 1 行")


def test_every_bad_file_of_a_folder_is_named_at_once(tmp_path):
    (tmp_path / "good.md").write_text(ENGLISH, encoding="utf-8")
    (tmp_path / "bad.md").write_bytes(b"")
    fails_alone = pytest.raises(DataError, match=r"bad\.md holds no text\. Fill it")
    with fails_alone:
        load_documents(tmp_path)
    (tmp_path / "worse.pdf").write_bytes(b"no pdf")
    with pytest.raises(DataError) as caught:
        load_documents(tmp_path)
    assert caught.value.text("en")[0].startswith(
        f"2 documents cannot be read: {tmp_path / 'bad.md'} holds no text; "
    )
    assert "worse.pdf is not a whole PDF file" in str(caught.value)
    assert caught.value.text("zh")[0].startswith(f"有 2 个文档无法读取：{tmp_path / 'bad.md'} 中没有文本; ")
    for number in range(9):
        (tmp_path / f"bad{number}.md").write_bytes(b"")
    with pytest.raises(DataError, match=r"11 documents cannot be read: .*; and 6 more\. Mend"):
        load_documents(tmp_path)
