"""The way to the hub, on real sockets: a fake hub, a logging proxy and a fake Ollama on loopback.

The client runs in a process of its own, with an empty HOME, so that what it writes and asks is all there is.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from rag_kit.errors import ServiceError
from rag_kit.network import HUB_SECONDS

ROOT = Path(__file__).parent.parent
REPO, COMMIT = "maker/tiny-model", "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "tiny"}',
    "model.safetensors": b"\0" * 5000,
    "说明.md": "说明".encode(),
}


class Handler(BaseHTTPRequestHandler):
    """A hub of one repository. Asked as a proxy (`GET http://host/path`), it answers for every host."""

    server: Any

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        path = urlsplit(self.path).path
        if self.server.answer:
            status, headers, body = self.server.answer(path)
        elif path.startswith(f"/api/models/{REPO}/tree/"):
            tree = [
                {"type": "file", "path": n, "size": len(b), "oid": f"{i:040d}"}
                for i, (n, b) in enumerate(FILES.items())
            ]
            status, headers, body = 200, {}, json.dumps(tree).encode()
        elif path.startswith(f"/api/models/{REPO}"):
            siblings = [{"rfilename": name} for name in FILES]
            status, headers, body = (
                200,
                {},
                json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode(),
            )
        elif path == "/api/tags":
            status, headers, body = 200, {}, b'{"models": []}'
        elif (name := unquote(path.rsplit("/", 1)[1])) in FILES:
            etag = f'"{sorted(FILES).index(name):040d}"'
            status, headers, body = 200, {"X-Repo-Commit": COMMIT, "ETag": etag}, FILES[name]
        else:
            status, headers, body = 404, {}, b""
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *told: object) -> None:
        pass


@contextmanager
def listening(answer: Callable[[str], tuple[int, dict[str, str], bytes]] | None = None) -> Iterator[Any]:
    """A server on loopback; `asked` holds the requests, `answer(path)` replaces the hub's answers."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.answer = [], answer
    server.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub() -> Iterator[Any]:
    with listening() as server:
        yield server


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


FETCH = f"""
import json, sys, time
from rag_kit.errors import RagKitError
from rag_kit.settings import start
settings = start()
from rag_kit.network import hub_snapshot
began = time.monotonic()
try:
    folder = hub_snapshot({REPO!r}, settings)
    result = {{"files": sorted(path.name for path in folder.iterdir()), "folder": str(folder)}}
except RagKitError as error:
    result = {{"en": error.text("en"), "zh": error.text("zh"), "kind": type(error).__name__}}
result["seconds"] = time.monotonic() - began
"""
REPORT = "\nprint(json.dumps(result))\n"


def client(home: Path, env: str, script: str = FETCH + REPORT, **environment: str) -> dict[str, Any]:
    """Run `script` in a fresh process whose settings are the text `env`; returns what it reports."""
    project = home.parent / "project"
    project.mkdir(exist_ok=True)
    (project / ".env").write_text(env, encoding="utf-8")
    bare = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "LANG") if name in os.environ}
    bare |= {"HOME": str(home), "USERPROFILE": str(home), "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=project,
        env=bare | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"log": done.stderr}  # type: ignore[no-any-return]


def test_the_hub_is_asked_once_and_then_nothing_is_needed_of_it(hub: Any, home: Path) -> None:
    env = f"HF_ENDPOINT={hub.url}\nCACHE_DIR=../models\n"
    first = client(home, env)
    assert first["files"] == sorted(FILES)
    assert (
        Path(first["folder"]) == home.parent / "models" / "models--maker--tiny-model" / "snapshots" / COMMIT
    )
    assert any(f"/{REPO}/resolve/{COMMIT}/config.json" in line for line in hub.asked)
    hub.asked.clear()
    again = client(home, env)
    assert (again["folder"], hub.asked) == (first["folder"], [])


def test_without_a_mirror_in_the_settings_the_hub_is_not_asked(hub: Any, home: Path) -> None:
    client(home, "CACHE_DIR=../models\n", HF_HUB_OFFLINE="1")
    assert hub.asked == []


def test_the_proxy_sees_the_hub_calls_and_no_ollama_call(hub: Any, home: Path) -> None:
    with listening() as proxy:
        ollama = (
            "import ollama\nthere = ollama.Client(host=settings.ollama_base_url).list()\n"
            "result['models'] = len(there.models)\n"
        )
        env = (
            f"HF_ENDPOINT=http://hub.example.test\nHTTP_PROXY={proxy.url}\nHTTPS_PROXY={proxy.url}\n"
            f"OLLAMA_BASE_URL={hub.url.replace('127.0.0.1', 'localhost')}\nCACHE_DIR=../models\n"
        )
        seen = client(home, env, FETCH + ollama + REPORT)
        assert seen["files"] == sorted(FILES) and seen["models"] == 0
        assert proxy.asked and all("http://hub.example.test/" in line for line in proxy.asked)
        assert hub.asked == ["GET /api/tags"]


def test_with_a_cache_dir_nothing_is_written_to_an_empty_home(hub: Any, home: Path) -> None:
    kernel = """
from jupyter_client.manager import start_new_kernel
manager, kernel = start_new_kernel()
code = "import matplotlib.pyplot as plt; plt.figure()"
kernel.execute_interactive(code, timeout=60, output_hook=lambda message: None)
kernel.stop_channels(); manager.shutdown_kernel()
import transformers
"""
    env = f"HF_ENDPOINT={hub.url}\nCACHE_DIR=../models\n"
    assert client(home, env, FETCH + kernel + REPORT)["files"] == sorted(FILES)
    assert [str(path) for path in home.rglob("*")] == []
    written = {path.name for path in (home.parent / "models" / "rag-kit").iterdir()}
    assert {"ipython", "matplotlib"} <= written
    # and the same without CACHE_DIR does write there: the check can fail
    client(home, f"HF_ENDPOINT={hub.url}\n", FETCH + kernel + REPORT)
    assert any(home.rglob("*"))


def test_a_plain_folder_under_the_cache_is_a_model_as_the_guide_draws_it(home: Path) -> None:
    plain = home.parent / "models" / "models--maker--tiny-model"
    plain.mkdir(parents=True)
    (plain / "config.json").write_bytes(FILES["config.json"])
    found = client(home, "HF_ENDPOINT=http://127.0.0.1:1\nCACHE_DIR=../models\n")
    assert found["files"] == ["config.json"] and Path(found["folder"]).resolve() == plain.resolve()


def test_a_hub_library_that_was_imported_too_early_is_warned_of(hub: Any, home: Path) -> None:
    early = client(
        home,
        f"HF_ENDPOINT={hub.url}\nRAG_KIT_LANG=en\n",
        "import huggingface_hub.constants\n" + FETCH + REPORT,
    )
    assert f"may still ask https://huggingface.co and not {hub.url}" in early["log"]
    assert early["files"] == sorted(FILES)  # hub_snapshot itself is not misled
    assert "imported before" not in client(home, f"HF_ENDPOINT={hub.url}\nRAG_KIT_LANG=en\n")["log"]


# --- a hub that fails ---------------------------------------------------------------------------


def refused() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def check_unreachable(seen: dict[str, Any], endpoint: str) -> None:
    assert seen["kind"] == ServiceError.__name__ and seen["seconds"] < 10
    what, remedy = seen["en"]
    assert re.fullmatch(
        rf"The model hub at {re.escape(endpoint)} could not be reached for {REPO} \(.+\)\.", what
    ), what
    for word in (
        "HF_ENDPOINT",
        "https://hf-mirror.com",
        "HTTPS_PROXY",
        "BASE_MODEL_NAME=FOLDER",
        "RAG_KIT_PROFILE=embedded",
    ):
        assert word in remedy
    assert seen["zh"][0].startswith(f"无法从模型库 {endpoint} 获取 {REPO}（")
    assert "https://hf-mirror.com" in seen["zh"][1] and "RAG_KIT_PROFILE=embedded" in seen["zh"][1]


def test_a_hub_that_refuses(home: Path) -> None:
    endpoint = refused()
    check_unreachable(client(home, f"HF_ENDPOINT={endpoint}\nCACHE_DIR=../models\n"), endpoint)
    assert not list((home.parent / "models").rglob("*tiny-model*"))


def test_a_hub_that_accepts_and_never_answers(home: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        seen = client(home, f"HF_ENDPOINT={endpoint}\nCACHE_DIR=../models\n")
    assert seen["seconds"] > HUB_SECONDS - 1
    check_unreachable(seen, endpoint)


def test_a_hub_whose_name_is_looked_up_for_ever(home: Path) -> None:
    slow = "import socket, time\nsocket.getaddrinfo = lambda *a, **k: time.sleep(60)\n"
    began = time.monotonic()
    seen = client(home, "HF_ENDPOINT=http://hub.example.test\nCACHE_DIR=../models\n", slow + FETCH + REPORT)
    check_unreachable(seen, "http://hub.example.test")
    assert time.monotonic() - began < 30  # the process does not wait for the lookup at its end either


@pytest.mark.parametrize(
    "answer",
    [
        (503, {}, b"busy"),
        (200, {"Content-Type": "text/html"}, b"<html>please log in to this network</html>"),
        (407, {}, b"proxy authentication required"),
    ],
)
def test_a_hub_that_answers_with_something_else(
    home: Path, answer: tuple[int, dict[str, str], bytes]
) -> None:
    with listening(lambda path: answer) as server:
        check_unreachable(client(home, f"HF_ENDPOINT={server.url}\nCACHE_DIR=../models\n"), server.url)


def test_a_proxy_that_is_not_there(home: Path) -> None:
    seen = client(home, f"HF_ENDPOINT=http://hub.example.test\nHTTP_PROXY={refused()}\nCACHE_DIR=../models\n")
    check_unreachable(seen, "http://hub.example.test")


def test_a_password_in_the_address_is_not_told(home: Path) -> None:
    endpoint = refused().replace("http://", "http://wang:geheim@")
    seen = client(home, f"HF_ENDPOINT={endpoint}\nCACHE_DIR=../models\n")
    assert "wang:***@" in seen["en"][0] and "geheim" not in json.dumps(seen)


@pytest.mark.parametrize("status", [401, 404])
def test_a_model_that_the_hub_does_not_know(home: Path, status: int) -> None:
    with listening(lambda path: (status, {"X-Error-Code": "RepoNotFound"}, b"{}")) as server:
        seen = client(home, f"HF_ENDPOINT={server.url}\nCACHE_DIR=../models\n")
    assert seen["en"][0] == f"The model hub at {server.url} has no public model {REPO}."
    assert "ORGANISATION/NAME" in seen["en"][1] and "HF_TOKEN" in seen["en"][1]
    assert seen["zh"][0] == f"模型库 {server.url} 中没有公开的模型 {REPO}。"


def test_a_model_behind_terms(home: Path) -> None:
    with listening(lambda path: (403, {"X-Error-Code": "GatedRepo"}, b"{}")) as server:
        seen = client(home, f"HF_ENDPOINT={server.url}\nCACHE_DIR=../models\n")
    assert seen["en"][0].endswith(f"gives {REPO} only to those who accepted its terms.")
    assert (
        seen["zh"][0] == f"模型库 {server.url} 只向接受条款的用户提供 {REPO}。"
        and "HF_TOKEN" in seen["zh"][1]
    )


@pytest.mark.skipif(os.name == "nt", reason="needs resource limits to imitate a full disk")
def test_a_full_disk_is_told_and_the_next_try_completes(hub: Any, home: Path) -> None:
    env = f"HF_ENDPOINT={hub.url}\nCACHE_DIR=../models\n"
    full = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (4000, -1))\n"
    seen = client(home, env, full + FETCH + REPORT)
    assert re.fullmatch(
        rf"The files of {REPO} could not be written under \S+/models \(.+\)\.", seen["en"][0]
    ), seen
    assert "CACHE_DIR" in seen["en"][1] and seen["zh"][0].startswith(f"无法把 {REPO} 的文件写入")
    snapshots = home.parent / "models" / "models--maker--tiny-model" / "snapshots"
    assert not list(snapshots.rglob("model.safetensors"))
    assert client(home, env)["files"] == sorted(FILES)
