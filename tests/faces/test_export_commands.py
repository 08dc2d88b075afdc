"""`adapters export`, `serve-ollama` and `drift` as a user has them: real sockets and a real Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ollama
import pytest
from transformers import AutoTokenizer

from rag_kit.errors import ModelError, RagKitError
from rag_kit.faces import export_commands
from rag_kit.settings import Settings
from tests.models.texts import says
from tests.ollama_double import ollama_double
from tests.tiny_project import tiny_project

ROOT = Path(__file__).parents[2]
CHAT = [{"role": "user", "content": "保修期是多久？ How long?"}]
GREEDY = {"temperature": 0.0, "repeat_penalty": 1.0, "num_predict": 8}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tiny_project(tmp_path_factory.mktemp("faces") / "张三 的项目", "desk", "客服")
    lines = (
        "BASE_MODEL_NAME=./base",
        "CACHE_DIR=./cache",
        "RAG_KIT_LANG=en",
        "OLLAMA_BASE_URL=http://127.0.0.1:9",
    )
    (root / ".env").write_text("\n".join(lines), encoding="utf-8")
    return root


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The project is the working directory, and its settings are the process's."""
    from rag_kit.network import withdraw

    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(project)
    yield project
    withdraw()


def test_an_adapter_is_exported_and_answers_ollamas_own_client(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(here / "base")
    with ollama_double(tmp_path, here / "base/model.gguf", tokenizer) as double:
        monkeypatch.setenv("OLLAMA_BASE_URL", double.url)
        how = {"how": "merged", "kind": "F16", "replace": False, "force": False}
        assert export_commands.adapters_export(Namespace(name="客服", to="desk-zh:v1", **how)) == 0
        assert [*double.models] == ["desk-zh:v1"]
        told = ollama.Client(double.url).chat("desk-zh:v1", CHAT, options=GREEDY)
        assert told.message.content
    assert "desk-zh:v1" in capsys.readouterr().out


@pytest.fixture(scope="module")
def served(project: Path) -> Iterator[tuple[str, list[str], subprocess.Popen[str]]]:
    """`serve-ollama` in a process of its own: its address, what it printed, the process."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    script = (
        "import sys; from argparse import Namespace; from rag_kit.faces.export_commands import serve_ollama\n"
        "try: serve_ollama(Namespace(host='127.0.0.1', port=int(sys.argv[1]), adapters=[], force=False))\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    kept = {k: v for k, v in os.environ.items() if k.lower() not in Settings.model_fields}
    environment = kept | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(port)], cwd=project, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, encoding="utf-8", start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines: list[str] = []
    watch = threading.Timer(120, process.kill)
    watch.start()
    for line in process.stdout:
        lines.append(line.strip())
        if "Ctrl-C" in line:
            break
    yield f"http://127.0.0.1:{port}", lines, process
    watch.cancel()
    process.kill()
    process.wait()
    process.stdout.close()


def test_any_client_of_ollama_talks_to_each_adapter_by_name(served: Any) -> None:
    url, lines, _ = served
    client = ollama.Client(url)
    assert {model.model for model in client.list().models} == {
        f"base{name}:latest" for name in ("", "+desk", "+客服")
    }
    answers = {
        name: client.chat(name, CHAT, options=GREEDY).message.content
        for name in ("base", "base+desk", "base+客服")
    }
    assert len({*answers.values()}) == 3 and all(answers.values())
    assert client.chat("base+desk", CHAT, options=GREEDY).message.content == answers["base+desk"]
    with pytest.raises(ollama.ResponseError) as caught:
        client.chat("base+nobody", CHAT)
    assert caught.value.status_code == 404
    assert any(url in line and "base+客服" in line for line in lines)
    assert any(f"OLLAMA_HOST={url.removeprefix('http://')}" in line for line in lines)
    assert not any("anybody" in line for line in lines)


def test_a_port_that_is_taken_is_told(served: Any, here: Path) -> None:
    port = int(served[0].rpartition(":")[2])
    with pytest.raises(RagKitError) as caught:
        export_commands.serve_ollama(Namespace(host="127.0.0.1", port=port, adapters=["desk"], force=False))
    says(caught.value, port)


def test_ctrl_c_ends_it_with_its_child(served: Any) -> None:
    import psutil

    _, _, process = served
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_beyond_loopback_it_says_who_may_use_it(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_commands.time, "sleep", stop)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(KeyboardInterrupt):
        export_commands.serve_ollama(Namespace(host="0.0.0.0", port=port, adapters=["desk"], force=False))
    assert "anybody who can reach it" in capsys.readouterr().out


def test_an_adapter_that_fails_is_left_out_and_told_unless_it_is_named(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(here / "lora_adapters/desk", here / "lora_adapters/broken")
    weights = here / "lora_adapters/broken/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    settings = Settings.load(here)
    try:
        process = export_commands.serving(settings, ("127.0.0.1", 0), [])
        assert [*process.adapters] == ["desk", "客服"] and "broken" in capsys.readouterr().out
        with pytest.raises(ModelError) as caught:
            export_commands.serving(settings, ("127.0.0.1", 0), ["broken"])
        says(caught.value, "broken")
        with pytest.raises(RagKitError) as unknown:
            export_commands.serving(settings, ("127.0.0.1", 0), ["nobody"])
        says(unknown.value, "nobody", "desk")
    finally:
        shutil.rmtree(here / "lora_adapters/broken")


def test_the_ladder_as_json_is_json_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = {"questions": None, "split": "test", "limit": 1, "ollama": None, "max_new_tokens": 2, "json": True}
    assert export_commands.drift(Namespace(name="desk", **how)) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["reference"] == "lora:desk" and len(told["rungs"]) == 7 and told["verdict"]
