"""The child and its parent: one reason for each failure, a crash that heals, and no orphan."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from rag_kit.embedded import base_gguf
from rag_kit.errors import ModelError, ServiceError
from rag_kit.models.llamacpp import process
from rag_kit.models.llamacpp.process import EngineProcess
from rag_kit.ollama import explaining
from tests.models.llamacpp.conftest import GREEDY, Write, plain
from tests.models.texts import says

LONG = {"model": "stand-in", "prompt": "Once upon a time", "raw": True, "options": GREEDY}


def wait(until, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def failure(path: Path) -> ModelError:
    engine = EngineProcess(path, name="x")
    with pytest.raises(ModelError) as caught:
        engine.start()
    assert not engine.alive and engine.pid is None
    return caught.value


def test_starting_twice_is_starting_once_and_its_key_is_in_no_list(engine):
    before = engine.pid
    assert engine.start() is engine and engine.pid == before and engine.alive
    child = psutil.Process(before)
    key = engine.headers["Authorization"].removeprefix("Bearer ")
    assert len(key) > 30 and key not in " ".join(child.cmdline()) + str(child.environ())
    assert ":11434" not in engine.url and engine.url.startswith("http://127.0.0.1:")
    listening = [one.laddr for one in child.net_connections() if one.status == psutil.CONN_LISTEN]
    assert listening and {address.ip for address in listening} == {"127.0.0.1"}


def test_the_child_holds_no_torch(engine):
    mapped = {Path(area.path).name for area in psutil.Process(engine.pid).memory_maps()}
    assert any("xllamacpp" in name for name in mapped)
    assert not [name for name in mapped if "torch" in name or "tokenizers" in name]


def test_a_second_engine_beside_the_first_has_its_own_key(engine, other):
    assert engine.url != other.url and engine.headers != other.headers
    with plain(engine) as first, plain(other) as second:
        assert first.get("/api/tags").json()["models"][0]["name"] == "stand-in:latest"
        assert second.get("/api/tags").json()["models"][0]["name"] == "other:latest"
        assert second.get("/api/tags", headers=engine.headers).status_code == 401


def test_an_architecture_that_llama_cpp_does_not_know(write_gguf: Write):
    path = write_gguf("weird", tokenizer__ggml__model="gpt2")
    says(failure(path), path, "weird", en="does not know", zh="不认识")


def test_what_llama_cpp_itself_says_is_quoted(write_gguf: Write):
    path = write_gguf("llama", tokenizer__ggml__model="gpt2")
    says(failure(path), path, "llama.context_length", en="could not start", zh="无法用")


def test_a_missing_system_library_is_named(tmp_path, monkeypatch):
    says_so = "libgomp.so.1: cannot open shared object file"
    (tmp_path / "xllamacpp.py").write_text(f"raise ImportError({says_so!r})", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    says(failure(base_gguf()), says_so, en="apt install libgomp1", zh="apt install libgomp1")


def test_a_file_that_cannot_be_served_starts_nothing(tmp_path):
    assert failure(tmp_path / "none.gguf").key == "gguf_missing"


def test_after_a_crash_address_and_key_stay_until_it_crashes_too_often(monkeypatch):
    monkeypatch.setattr(process, "CRASHES", 1)
    with EngineProcess(base_gguf(), name="stand-in", context=512) as engine, plain(engine) as http:
        url, key, pid = engine.url, engine.headers, engine.pid
        with (
            pytest.raises(ServiceError) as caught,
            explaining(engine.url, "stand-in"),
            http.stream("POST", "/api/generate", json=LONG) as reply,
        ):
            for _ in reply.iter_lines():
                os.kill(engine.pid, signal.SIGKILL)
        assert caught.value.key == "ollama_broke_off"
        # the next one works without a second try: it waits for the new child
        assert http.post("/api/generate", json=LONG | {"options": {"num_predict": 2}}).is_success
        assert (engine.url, engine.headers, engine.restarts) == (url, key, 1) and engine.pid != pid

        os.kill(engine.pid, signal.SIGKILL)
        wait(lambda: engine._failure)
        with pytest.raises(ModelError) as failed:
            engine.start()
        says(failed.value, "stand-in", "SIGKILL", en="crashed 2 times", zh="崩溃了 2 次")
        assert not engine.alive
        with pytest.raises(httpx.ConnectError):
            http.get("/")
        engine.stop()
        assert engine.pid is None
        engine.stop()


PARENT = """
import os, sys, time
from pathlib import Path
from rag_kit.models.llamacpp.process import EngineProcess
engine = EngineProcess(Path(sys.argv[1]), name="x", context=512).start()
if sys.argv[2] == "fork" and os.fork() == 0:  # it holds the pipes, so that they do not end
    engine.stop()  # which is not for a fork to do
    time.sleep(60)
    os._exit(0)
print(engine.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("how", ["fork", "alone"])
def test_no_orphan_stays_when_the_parent_is_killed(how):
    command = [sys.executable, "-c", PARENT, str(base_gguf()), how]
    root = str(Path(__file__).parents[3])
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, start_new_session=True) as parent:
        assert parent.stdout is not None
        try:
            child = psutil.Process(int(parent.stdout.readline()))
            time.sleep(0.2)
            assert child.is_running()  # also after the fork's stop
            parent.send_signal(signal.SIGKILL)
            wait(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
        finally:
            os.killpg(parent.pid, signal.SIGKILL)
