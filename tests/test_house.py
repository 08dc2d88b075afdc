"""Rules of the whole house, read from its own files: who imports whom, what an import does, its words."""

import ast
import io
import json
import re
import string
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import rag_kit.errors
from rag_kit.errors import RagKitError, catalogue
from rag_kit.settings import Settings

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rag_kit"
# From the ground up; rooms of one floor do not import each other, but for those of the ground floor.
FLOORS = [
    {"errors", "settings", "envfile", "manifest", "embedded", "e5s1", "network", "ollama", "plots"},
    {"data"},
    {"models", "index"},
    {"answer"},
    {"finetune", "rag"},
    {"compare", "ops"},
    {"faces"},
    {"__init__", "__main__", "bootstrap"},  # the doors: they open on every room, and no room opens on them
]
HEAVY = [
    "torch",
    "transformers",
    "sentence_transformers",
    "peft",
    "pandas",
    "faiss",
    "matplotlib",
    "langchain",
    "IPython",
    "fastapi",
    "uvicorn",
    "xllamacpp",
]


def floor(room: str) -> int:
    found = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert found, f"rag_kit/{room} stands on no floor: give it one in FLOORS"
    return found[0]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> Iterator[str]:
    """Yield the dotted name of every module of ours that a file imports, in functions too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "rag_kit")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are written in full"
            if node.module == "rag_kit":
                yield from (f"rag_kit.{alias.name}" for alias in node.names)
            elif (node.module or "").startswith("rag_kit."):
                yield str(node.module)


def test_imports_run_downward_only() -> None:
    wrong = []
    for path in modules():
        room = room_of(path)
        for name in imported(path):
            other = name.split(".")[1] if "." in name else "__init__"
            down = floor(other) < floor(room)
            beside = other == room or floor(other) == floor(room) in (0, len(FLOORS) - 1)
            if not down and not beside:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def python(script: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> str:
    import os

    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
    quiet = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=cwd,
        env=kept | quiet | environment,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_rag_kit_loads_nothing_of_weight() -> None:
    loaded = python(
        "import sys, rag_kit; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    ).split()
    assert "rag_kit" in loaded
    assert [name for name in [*HEAVY, "langchain_core", "pydantic", "numpy"] if name in loaded] == []


EVERY_MODULE = """
import importlib, json, logging, os, sys, warnings
def state():
    named = {name: (one.level, len(one.handlers)) for name, one in logging.root.manager.loggerDict.items()
             if isinstance(one, logging.Logger) and name.split(".")[0] == "rag_kit"}
    return dict(os.environ), logging.root.level, len(logging.root.handlers), len(warnings.filters), named
before, changes = state(), {}
for name in sys.argv[1:]:
    others = state()[-2]
    importlib.import_module(name)
    after = state()
    if after[:3] != before[:3] or any(value != (0, 0) for value in after[-1].values()):
        changes[name] = repr(after)
print(json.dumps({"changes": changes, "heavy": [name for name in HEAVY if name in sys.modules]}))
"""


def test_importing_every_module_changes_nothing_and_loads_nothing_heavy(tmp_path: Path) -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in modules()
        if path.stem != "__main__"
    ]
    script = f"HEAVY = {HEAVY!r}\n" + EVERY_MODULE
    seen = json.loads(python(script, *names, cwd=tmp_path, HOME=str(tmp_path), USERPROFILE=str(tmp_path)))
    assert seen == {"changes": {}, "heavy": []}
    assert list(tmp_path.rglob("*")) == []


# --- words --------------------------------------------------------------------------------------

ERRORS = {
    name
    for name, value in vars(rag_kit.errors).items()
    if isinstance(value, type) and issubclass(value, RagKitError)
}


def texts(entry: str | list[str]) -> list[str]:
    return [entry] if isinstance(entry, str) else entry


def fields(entry: str | list[str]) -> set[str]:
    parsed = (part for text in texts(entry) for part in string.Formatter().parse(text))
    return {re.split(r"[.\[]", name)[0] for _, name, _, _ in parsed if name is not None}


def calls() -> Iterator[tuple[str, ast.Call, str, str]]:
    """Yield (where, call, function's name, key) of every text that is asked for by a literal key."""
    for path in modules():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if (name == "message" or name in ERRORS) and isinstance(node.args[0].value, str):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node, name, node.args[0].value


def test_every_text_stands_once_in_both_languages_with_the_same_fields() -> None:
    names = [
        name
        for path in (PACKAGE / "messages").glob("*.toml")
        for name in re.findall(r"^\[(.+)\]$", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert len(names) == len(set(names)), "two rooms use one key"
    for key, entry in catalogue().items():
        assert set(entry) == {"en", "zh"}, key
        assert type(entry["en"]) is type(entry["zh"]), key
        assert fields(entry["en"]) == fields(entry["zh"]), key
        for text in [*texts(entry["en"]), *texts(entry["zh"])]:
            assert text.strip(), key
        if isinstance(entry["en"], list):
            assert len(entry["en"]) == len(entry["zh"]) == 2, key
        chinese = re.sub(r"rag-kit|{.*?}", "", "".join(texts(entry["zh"])))
        assert re.search(r"[\u4e00-\u9fff]", chinese) or not re.search("[a-z]{3}", chinese), key
        english = "".join(texts(entry["en"]))  # which may name a Chinese heading
        assert len(re.findall(r"[\u4e00-\u9fff]", english)) < len(english) / 5, key


def test_every_key_that_is_asked_for_exists_and_gets_its_values() -> None:
    wrong = []
    for where, call, name, key in calls():
        entry = catalogue().get(key)
        given = {keyword.arg for keyword in call.keywords}
        if entry is None:
            wrong.append(f"{where}: no text {key}")
        elif name in ERRORS and isinstance(entry["en"], str):
            wrong.append(f"{where}: {key} is no pair")
        elif None not in given and (missing := fields(entry["en"]) - given):
            wrong.append(f"{where}: {key} lacks {missing}")
    assert wrong == []


def test_every_text_is_used() -> None:
    constants, prefixes = set(), set()
    for path in modules():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                constants.add(node.value)
            if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
                prefixes.add(str(node.values[0].value))
    begun = tuple(prefix for prefix in prefixes if re.fullmatch(r"[a-z]+(_[a-z]+)*_", prefix))
    assert [key for key in catalogue() if key not in constants and not key.startswith(begun)] == []


# --- files --------------------------------------------------------------------------------------


def own_files() -> list[Path]:
    """Return every text file of the project that is not ignored."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout, so what is ignored is not known")
    paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


# Written in pieces, so that this file does not find itself.
MACHINE = re.compile(
    r"(?<![\w.~…])/(?:" + "|".join(["wor" + "k", "roo" + "t", "tm" + "p", "hom" + "e"]) + r")/\w"
)
REGISTRY = re.compile(
    "|".join(["pypi" + r"\.org", "python" + "hosted", "anaconda" + r"\.(?:org|com)", "tuna" + r"\.tsing"])
)


@pytest.mark.parametrize(
    ("pattern", "what"), [(MACHINE, "a path of one machine"), (REGISTRY, "a package registry")]
)
def test_no_file_names(pattern: re.Pattern[str], what: str) -> None:
    found = []
    for path in own_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number} names {what}: {line.strip()[:100]}")
    assert found == []


def test_the_patterns_find_what_they_are_for() -> None:
    assert MACHINE.search("open('/" + "tmp/x')") and MACHINE.search("/" + "root/a")
    assert not MACHINE.search("https://host/" + "work/x".replace("work", "user")) and REGISTRY.search(
        "https://pypi" + ".org/simple"
    )


def code_lines(path: Path) -> int:
    """Count the lines that do something: without blank ones, comments and docstrings."""
    text, code = path.read_text(encoding="utf-8"), set()
    nothing = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in nothing:
            code |= {*range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(tree(path)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node) is not None:
            code -= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    return len(code)


def test_the_house_stays_small(capsys: pytest.CaptureFixture[str]) -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    rooms: dict[str, int] = {}
    for path, count in lines.items():
        rooms[room_of(path)] = rooms.get(room_of(path), 0) + count
    code = sum(map(code_lines, lines))
    with capsys.disabled():
        told = ", ".join(
            f"{room} {count}" for room, count in sorted(rooms.items(), key=lambda item: -item[1])
        )
        long = [f"{path.relative_to(ROOT)} {count}" for path, count in lines.items() if count > 300]
        sys.stdout.write(f"\nrag_kit: {sum(lines.values())} lines, {code} of them code ({told})\n")
        sys.stdout.write(f"over 300: {', '.join(long) or 'none'}\n")
    assert code < 11_500 and not long


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_every_setting_stands_in_the_readme(name: str) -> None:
    path = ROOT / name
    if not path.is_file() or path.stat().st_size < 1000:
        pytest.skip(f"{name} is not written yet")
    text = path.read_text(encoding="utf-8")
    assert [one.upper() for one in Settings.model_fields if f"`{one.upper()}`" not in text] == []
