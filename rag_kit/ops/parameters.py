"""The parameters of a notebook: what its cell declares, and whether values fit.

Knows the cell tagged `parameters` and the files under `notebooks/params/`; executes nothing. Such a file is
YAML, of one form:

    notebook: 02_build_index        # whom it is for, by name or number
    parameters: {name: nightly}     # values for its parameters (may be left out)
    sweep: {top_k: [1, 3, 5]}       # values to go through, in every combination (may be left out)

`--params FILE` takes its parameters; `--sweep FILE` takes them too and goes through its sweep. A value of
`-p` counts above both.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from rag_kit.errors import DataError
from rag_kit.settings import Settings

TYPES: dict[str, Any] = {one.__name__: one for one in (int, float, str, bool, list, dict)}
TYPE_NODES = (ast.Name, ast.Constant, ast.Subscript, ast.Tuple, ast.BinOp, ast.BitOr, ast.Load)


class Written(str):
    """A value as typed in a shell: `3` is a number or a text, whichever the parameter takes."""


@dataclass(frozen=True)
class Parameter:
    """One line of the parameters cell; `read` says whether a later cell uses it."""

    name: str
    type: Any
    default: Any
    line: str
    read: bool

    def check(self, value: Any, where: str) -> Any:
        """Return `value` as the declared type; raises DataError where it is of another or has no effect."""
        if not self.read:
            raise DataError("parameter_unread", where=where, name=self.name)
        for candidate in _readings(value) if isinstance(value, Written) else [value]:
            with suppress(ValueError):
                return _checked(self.type, candidate)
        shown = value if isinstance(value, Written) else repr(value)
        raise DataError("parameter_type", where=where, name=self.name, value=shown, line=self.line)


class ParameterFile(BaseModel, extra="forbid"):
    """What a file under `notebooks/params/` says."""

    notebook: str
    parameters: dict[str, Any] = {}
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    _path: Path

    def where(self, name: str) -> str:
        """Return `FILE:LINE` of a parameter."""
        return f"{self._path.name}:{_line(self._path, [name])}"


def lookup(declared: Mapping[str, Parameter], name: str, where: str) -> Parameter:
    """Return a declared parameter; raises DataError with the nearest names and all."""
    if not declared:
        raise DataError("parameter_none", where=where, name=name)
    if name not in declared:
        near = ", ".join(get_close_matches(name, declared, cutoff=0.5)) or "–"
        raise DataError("parameter_unknown", where=where, name=name, near=near, known=", ".join(declared))
    return declared[name]


def declared_parameters(notebook: Path) -> dict[str, Parameter]:
    """Return what a notebook's `parameters` cell declares, nothing where it has no such cell.

    Raises DataError where that cell holds anything but `name: type = literal`.
    """
    cells = code_cells(notebook)
    sources = ["".join(cell["source"]) for cell in cells]
    tagged = (n for n, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", ()))
    if (at := next(tagged, None)) is None:
        return {}
    read = set().union(*map(_names_read, sources[at + 1 :]))
    lines, number, found = sources[at].splitlines(), 1, {}
    try:
        for statement in ast.parse(sources[at]).body:
            number = statement.lineno
            name, type_, default = _declaration(statement)
            line = lines[number - 1].strip()
            found[name] = Parameter(name, type_, _checked(type_, default), line, name in read)
    except (ValueError, SyntaxError, NameError, TypeError) as error:
        number = getattr(error, "lineno", None) or number
        line = lines[min(number, len(lines)) - 1].strip() if lines else ""
        told = {"notebook": notebook.stem, "number": number, "line": line}
        raise DataError("parameter_cell", types=", ".join(TYPES), **told) from None
    return found


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    """Return a notebook's code cells; raises DataError where the file is no notebook."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        return [cell for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, LookupError, TypeError):
        raise DataError("notebook_unreadable", path=notebook) from None


def read_file(settings: Settings, name: str | Path) -> ParameterFile:
    """Read a parameter file: a path (a relative one is taken from the root) or a name in `notebooks/params`.

    Raises DataError with line and field where it is not of the one form.
    """
    import yaml

    folder = settings.root / "notebooks" / "params"
    path = next((one for one in (settings.path(name), folder / f"{name}.yaml") if one.is_file()), None)
    if path is None:
        known = ", ".join(one.stem for one in sorted(folder.glob("*.yaml")))
        raise DataError("params_missing", name=name, known=known or "–")
    try:
        found = ParameterFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise DataError("params_form", path=path, line=_line(path, first["loc"]), problem=problem) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        raise DataError(
            "params_form", path=path, line=mark.line + 1 if mark else 1, problem=problem
        ) from None
    found._path = path
    return found


def _line(path: Path, keys: Iterable[Any]) -> int:
    """Return the number of the line where a file has the last of `keys`."""
    lines = list(enumerate(path.read_text(encoding="utf-8").splitlines(), 1))
    found = [n for key in keys for n, line in lines if re.search(rf"(?<!\w){re.escape(str(key))}\s*:", line)]
    return found[-1] if found else 1


def _readings(text: Written) -> Iterator[Any]:
    import yaml

    with suppress(yaml.YAMLError):
        value = yaml.safe_load(text)
        yield str(text) if isinstance(value, str) else value
    with suppress(ValueError):
        yield float(text)  # to YAML 1e-4 is a text
    yield str(text)


def _declaration(statement: ast.stmt) -> tuple[str, Any, Any]:
    """Return (name, type, default) of `name: type = literal`; ValueError for anything else."""
    match statement:
        case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=ast.expr() as value):
            if not all(isinstance(node, TYPE_NODES) for node in ast.walk(annotation)):
                raise ValueError(annotation)
            code = compile(ast.Expression(annotation), "<annotation>", "eval")
            return name, eval(code, {"__builtins__": {}}, TYPES), ast.literal_eval(value)
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            default = ast.literal_eval(value)
            return name, Any if default is None else type(default), default
    raise ValueError(statement)


def _checked(type_: Any, value: Any) -> Any:
    """Return `value` as `type_`, ints as floats where those are wanted; ValueError where it is neither."""
    checked = TypeAdapter(type_).validate_python(value, strict=True)
    same = checked == value or value != value  # an int may be none of the floats; nan is never itself
    with suppress(TypeError):
        json.dumps(checked)
        if same:
            return checked
    raise ValueError(value)


def _names_read(source: str) -> set[str]:
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError:  # IPython's magics
        return set(re.findall(r"\w+", source))
    return {one.id for one in nodes if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load)}
