"""What a parameters cell declares, which values fit it, and the files under notebooks/params/."""

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rag_kit.errors import DataError
from rag_kit.ops.notebooks import find_notebooks
from rag_kit.ops.parameters import Parameter, Written, declared_parameters, lookup, read_file
from rag_kit.settings import Settings

ROOT = Path(__file__).parents[2]


def notebook(path: Path, *cells: str, tagged: bool = True, metrics: tuple[str, ...] = ()) -> Path:
    """Write a notebook of code cells, the first being its parameters."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = nbformat.v4.new_notebook()
    made.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    if tagged:
        made.cells[0].metadata["tags"] = ["parameters"]
    if metrics:
        made.metadata["rag_kit"] = {"metrics": list(metrics)}
    nbformat.write(made, path)
    return path


def declare(folder: Path, source: str, *later: str) -> dict[str, Parameter]:
    return declared_parameters(notebook(folder / "09_问.ipynb", source, *later))


def told(error: pytest.ExceptionInfo[DataError], lang: str = "en") -> str:
    return " ".join(error.value.text(lang))


def test_declarations_have_types_defaults_and_their_line(tmp_path: Path) -> None:
    source = """# a remark
limit: int = 8  # 每类的问题数
rate: float = 1e-4
name: str = "张三"
words: str | None = None
sizes: list[int] = [1, 2]
flags: dict[str, bool] = {"a": True}
plain = -3"""
    found = declare(tmp_path, source, "print(limit, rate, name, words, sizes, flags, plain)")
    assert {name: one.default for name, one in found.items()} == {
        "limit": 8,
        "rate": 1e-4,
        "name": "张三",
        "words": None,
        "sizes": [1, 2],
        "flags": {"a": True},
        "plain": -3,
    }
    assert found["limit"].line == "limit: int = 8  # 每类的问题数"
    assert all(one.read for one in found.values())


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("limit", [3, -1], ["3", 3.0, True, None, [3]]),
        ("rate", [0.5, 1], ["0.5", "1e-4", True, None]),
        ("name", ["", "你好 {x}"], [1, None, True]),
        ("flag", [True, False], ["true", 1, 0, None]),
        ("words", ["a", None], [1, False]),
        ("sizes", [[], [3]], [["3"], 3, [1.5], None]),
        ("maybe", [1, None], [1.0, "1"]),
    ],
)
def test_a_value_of_another_type_is_refused(
    tmp_path: Path, name: str, good: list[Any], bad: list[Any]
) -> None:
    source = (
        "limit: int = 8\nrate: float = 0.1\nname: str = ''\nflag: bool = False\n"
        "words: str | None = None\nsizes: list[int] = []\nmaybe: int | None = None"
    )
    parameter = declare(tmp_path, source, "limit, rate, name, flag, words, sizes, maybe")[name]
    for value in good:
        assert parameter.check(value, "-p") == value
    for value in bad:
        with pytest.raises(DataError) as error:
            parameter.check(value, "nightly.yaml:3")
        assert told(error).startswith(f"nightly.yaml:3: {value!r} does not fit {name}, declared as `{name}:")
        assert name in told(error, "zh")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("limit", "3", 3),
        ("rate", "1e-4", 1e-4),
        ("rate", "2", 2.0),
        ("name", "2024", "2024"),
        ("name", "", ""),
        ("name", "yes", "yes"),
        ("name", "a=b: [c", "a=b: [c"),
        ("name", "你好 # 不是注释", "你好 # 不是注释"),
        ("flag", "true", True),
        ("words", "null", None),
        ("words", "2026-01-01", "2026-01-01"),
        ("sizes", "[1, 2]", [1, 2]),
    ],
)
def test_what_is_typed_in_a_shell_is_read_as_the_parameter_needs_it(
    tmp_path: Path, name: str, text: str, value: Any
) -> None:
    source = (
        "limit: int = 8\nrate: float = 0.1\nname: str = ''\nflag: bool = False\n"
        "words: str | None = None\nsizes: list[int] = []"
    )
    found = declare(tmp_path, source, "limit, rate, name, flag, words, sizes")[name].check(
        Written(text), "-p"
    )
    assert (found, type(found)) == (value, type(value))


@given(
    st.one_of(
        st.integers(),
        st.floats(allow_nan=False),
        st.booleans(),
        st.text(),
        st.none(),
        st.lists(st.integers()),
    )
)
@example(2**53 + 1)  # between two floats
@example(10**400)
@settings(max_examples=60, deadline=None)
def test_a_checked_value_is_the_value_and_of_the_declared_type(value: Any) -> None:
    for declared in (int, float, bool, str, list[int], str | None):
        parameter = Parameter("x", declared, None, "x", True)
        try:
            found = parameter.check(value, "-p x")
        except DataError:
            continue
        assert found == value
        assert isinstance(found, list if declared == list[int] else declared)
        assert json.loads(json.dumps(found)) == found


@given(st.text(), st.one_of(st.integers(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False)))
@settings(max_examples=60, deadline=None)
def test_a_shell_gives_any_text_as_it_stands_and_any_number(text: str, other: Any) -> None:
    assert Parameter("x", str, "", "x", True).check(Written(text), "-p") == text
    assert Parameter("x", type(other), 0, "x", True).check(Written(json.dumps(other)), "-p") == other


@pytest.mark.parametrize(
    "line",
    [
        "limit: int = compute()",
        "limit: int",
        "limit: int = 'eight'",
        "limit: numpy.int64 = 3",
        "limit: number = 3",
        "a = b = 1",
        "import os",
        "limit: int = ",
        "%matplotlib inline",
        "limit: set = {1}",
        "limit: __import__('os').getcwd() = 1",
    ],
)
def test_a_cell_that_declares_anything_else_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError) as error:
        declare(tmp_path, f"fine: int = 1\n{line}", "fine")
    assert told(error).startswith(
        f"Line 2 of the parameters cell of 09_问 declares no parameter: `{line.strip()}`."
    )
    assert "第 2 行" in told(error, "zh")


@pytest.mark.parametrize(
    ("later", "read"),
    [
        (["print(limit)"], True),
        (["x = 1", "f'{limit}'"], True),
        (["%time print(limit)"], True),
        (["!echo hello"], False),
        (["limit = limit or 3"], True),
        (["if not limit:\n    limit = 3"], True),
        (["print('limit')  # limit"], False),
        (["limit = 3"], False),
        (["def f(): return limit"], True),
        (["limits = 3\nprint(limits.limit)"], False),
        ([], False),
    ],
)
def test_a_parameter_must_be_read_later(tmp_path: Path, later: list[str], read: bool) -> None:
    parameter = declare(tmp_path, "limit: int = 1", *later)["limit"]
    assert parameter.read == read
    if not read:
        with pytest.raises(DataError) as error:
            parameter.check(2, "-p limit")
        assert told(error).startswith("-p limit: limit is declared, but no later cell reads it")


def test_an_unknown_name_is_refused_with_the_nearest(tmp_path: Path) -> None:
    found = declare(tmp_path, "top_k: int = 1\nname: str = ''", "top_k, name")
    with pytest.raises(DataError) as error:
        lookup(found, "topk", "-p topk")
    assert "no notebook here has a parameter called topk (nearest: top_k; all: top_k, name)" in told(error)
    with pytest.raises(DataError) as error:
        lookup({}, "topk", "-p topk")
    assert "no notebook here has a cell tagged `parameters`" in told(error)


def test_a_file_that_is_no_notebook_is_told(tmp_path: Path) -> None:
    path = tmp_path / "01_x.ipynb"
    for text in ("", "{}", "[]", '{"cells": [1]}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DataError) as error:
            declared_parameters(path)
        assert told(error).startswith(f"{path} is not a notebook.")


# --- files --------------------------------------------------------------------------------------


def written(folder: Path, text: str, name: str = "夜间.yaml") -> Path:
    path = folder / "notebooks" / "params" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_found_by_name_or_path_and_names_its_lines(tmp_path: Path) -> None:
    path = written(
        tmp_path, "notebook: 03_x\nparameters:\n  top_k: 3\n  名字: 张三\nsweep:\n  seed: [0, 1]\n"
    )
    project = Settings.load(tmp_path)
    for name in ("夜间", "notebooks/params/夜间.yaml", path, str(path)):
        found = read_file(project, name)
        assert (found.notebook, found.parameters, found.sweep) == (
            "03_x",
            {"top_k": 3, "名字": "张三"},
            {"seed": [0, 1]},
        )
    assert [found.where(name) for name in ("top_k", "名字", "seed")] == [
        "夜间.yaml:3",
        "夜间.yaml:4",
        "夜间.yaml:6",
    ]
    with pytest.raises(DataError) as error:
        read_file(project, "日间")
    assert told(error).startswith("There is no parameter file 日间 (in notebooks/params: 夜间).")


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("notebook: 03\nsweep:\n  top_k: 3\n", 1, "notebook: Input should be a valid string"),
        ("notebook: x\nsweep:\n  top_k: 3\n", 3, "sweep.top_k: Input should be a valid list"),
        ("notebook: x\nsweep:\n  a: []\n", 3, "sweep.a: List should have at least 1 item"),
        ("notebook: x\nparameter:\n  top_k: 3\n", 2, "parameter: Extra inputs are not permitted"),
        ("notebook: x\nparameters: [1]\n", 2, "parameters: Input should be a valid dictionary"),
        ("parameters: {}\n", 1, "notebook: Field required"),
        ("- notebook\n", 1, "Input should be a valid dictionary"),
        ("", 1, "Input should be a valid dictionary"),
        ("notebook: x\nparameters: {a: [1\n", 3, "expected ',' or ']'"),
        ("notebook: x\n\tsweep: 1\n", 2, "cannot start any token"),
    ],
)
def test_a_file_of_another_form_is_told_with_line_and_field(
    tmp_path: Path, text: str, line: int, problem: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(DataError) as error:
        read_file(Settings.load(tmp_path), path)
    assert told(error).startswith(f"{path}, line {line}, is not what a parameter file holds: ")
    assert problem in told(error)
    assert f"第 {line} 行" in told(error, "zh")


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    path = written(tmp_path, "")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError):
        read_file(Settings.load(tmp_path), path)


# YAML's own emitter does not write controls and separators (U+0085) so that its reader finds them again
WORDS = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), min_size=1)


@given(st.dictionaries(WORDS, st.one_of(st.integers(), WORDS, st.booleans(), st.none()), max_size=4))
@settings(max_examples=40, deadline=None)
def test_what_is_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "again"
    text = yaml.safe_dump({"notebook": "x", "parameters": values}, allow_unicode=True)
    found = read_file(Settings.load(folder), written(folder, text))
    assert found.parameters == values
    assert all(found.where(name).startswith("夜间.yaml:") for name in values)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "notebooks" / "params").glob("*")), ids=lambda path: path.name
)
def test_every_file_of_the_project_fits_its_notebook(path: Path) -> None:
    project = Settings.load(ROOT)
    found = read_file(project, path)
    (target,) = find_notebooks(project, [found.notebook])
    declared = declared_parameters(target)
    for name, value in found.parameters.items():
        lookup(declared, name, found.where(name)).check(value, found.where(name))
    for name, values in found.sweep.items():
        assert values
        for value in values:
            lookup(declared, name, found.where(name)).check(value, found.where(name))
    assert not found.parameters.keys() & found.sweep.keys()


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_notebook_declares_parameters_that_it_reads(path: Path) -> None:
    assert [name for name, one in declared_parameters(path).items() if not one.read] == []
