"""An Ollama that can make models: blobs, create, copy, delete on loopback, answered by a real engine process.

What `/api/create` is told to run is what answers, so that a round trip is one. The little of Go's template
language that is used here is read by a reader of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from rag_kit.models.llamacpp.process import EngineProcess

NO_SPACE = "write blobs/sha256-1: no space left on device"


@dataclass
class Double:
    """A running server: its blobs, its models by full name, and a fault by name.

    `fault`: `blob` or `create` (no space left), `cut` (hangs up amid a blob), `weights` (an adapter is not
    applied, or the base served for merged weights), `truncates`, `no_logprobs`, `refuses` (adapters, as from
    0.34.1 on), `no_create` (another program that only speaks the wire), or empty.
    """

    folder: Path
    tokenizer: Any
    base: Path
    url: str = ""
    version: str = "0.13.0"
    fault: str = ""
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    engines: dict[tuple[Path, Path | None], EngineProcess] = field(default_factory=dict)

    def blob(self, digest: str) -> Path:
        assert re.fullmatch(r"sha256:[0-9a-f]{64}", digest), digest
        return self.folder / digest.replace(":", "-")

    def engine(self, model: dict[str, Any]) -> EngineProcess:
        """The process over the files that the model was made of; one for each pair of files."""
        (gguf,) = (self.blob(one) for one in model["files"].values())
        adapter = next((self.blob(one) for one in (model.get("adapters") or {}).values()), None)
        if self.fault == "weights":
            gguf, adapter = self.base, None
        if (gguf, adapter) not in self.engines:
            served = {} if adapter is None else {"one": adapter}
            self.engines[gguf, adapter] = EngineProcess(
                gguf, name="double", context=1024, adapters=served
            ).start()
        return self.engines[gguf, adapter]


@contextmanager
def ollama_double(folder: Path, base: Path, tokenizer: Any) -> Iterator[Double]:
    double = Double(folder, tokenizer, base)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"double": double}))
    server.daemon_threads = True
    double.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield double
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        for engine in double.engines.values():
            engine.stop()


def _full(name: str) -> str:
    return name if ":" in name else f"{name}:latest"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    double: Double

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, status: int, value: Any = None, lines: bool = False) -> None:
        rows = value if lines else [value]
        data = b"" if value is None else b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        self.send_response(status)
        self.send_header("Content-Type", "application/x-ndjson" if lines else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        self.double.requests.append((self.path, told))
        return told

    def do_HEAD(self) -> None:
        there = self.double.blob(self.path.removeprefix("/api/blobs/")).is_file()
        self.reply(200 if there else 404)

    def do_GET(self) -> None:
        if self.path == "/api/version":
            self.reply(200, {"version": self.double.version})
        else:
            self.reply(200, {"models": [{"model": name, "name": name} for name in self.double.models]})

    def do_DELETE(self) -> None:
        name = _full(self.body()["model"])
        found = self.double.models.pop(name, None)
        self.reply(404 if found is None else 200, None if found else {"error": f"model '{name}' not found"})

    def do_POST(self) -> None:
        if self.double.fault == "no_create":
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return self.reply(404, {"error": "Not Found"})
        if self.path.startswith("/api/blobs/"):
            return self.take(self.path.removeprefix("/api/blobs/"))
        told = self.body()
        if self.path == "/api/create":
            return self.create(told)
        name = _full(told.get("model") or told.get("source"))
        model = self.double.models.get(name)
        if model is None:
            return self.reply(404, {"error": f"model '{name}' not found"})
        if self.path == "/api/copy":
            self.double.models[_full(told["destination"])] = model
            return self.reply(200)
        if self.path == "/api/show":
            return self.reply(200, {"template": model["template"], "model_info": {}, "details": {}})
        return self.answer(told, model)

    def take(self, digest: str) -> None:
        """Receive a blob; what breaks off leaves nothing."""
        size = int(self.headers["Content-Length"])
        if self.double.fault == "cut":
            self.rfile.read(size // 2)
            return self.connection.close()
        data = self.rfile.read(size)
        if self.double.fault == "blob":
            return self.reply(500, {"error": NO_SPACE})
        assert digest == f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.double.blob(digest).write_bytes(data)
        return self.reply(201)

    def create(self, told: dict[str, Any]) -> None:
        digests = [*told["files"].values(), *(told.get("adapters") or {}).values()]
        if told.get("adapters") and self.double.fault == "refuses":
            return self.reply(400, {"error": "LoRA adapters are no longer supported"})
        if not all(self.double.blob(digest).is_file() for digest in digests):
            return self.reply(400, {"error": "blob not found"})
        if self.double.fault == "create":
            return self.reply(200, [{"status": "parsing GGUF"}, {"error": NO_SPACE}], lines=True)
        self.double.models[_full(told["model"])] = told
        return self.reply(200, [{"status": "writing manifest"}, {"status": "success"}], lines=True)

    def answer(self, told: dict[str, Any], model: dict[str, Any]) -> None:
        """Answer /api/generate (raw) or /api/chat (through the model's template), never streamed."""
        double, engine = self.double, self.double.engine(model)
        chat = self.path == "/api/chat"
        text = said(model["template"], told["messages"]) if chat else told["prompt"]
        options = model["parameters"] | (told.get("options") or {}) | {"num_ctx": None}
        top = told.get("top_logprobs") or 0
        with httpx.Client(base_url=engine.url, headers=engine.headers, trust_env=False, timeout=60) as http:
            ids = http.post("/engine/tokenize", json={"model": "", "text": text, "special": True}).json()[
                "ids"
            ]
            ids = ids[: len(ids) // 2] if double.fault == "truncates" else ids
            asked = {
                "ids": ids,
                "options": options,
                "adapter": next(iter(engine.adapters), None),
                "logprobs": top,
            }
            lines = http.post("/engine/generate", json=asked).text.splitlines()
        *parts, last = map(json.loads, lines)
        assert "error" not in last, last
        shown = "".join(part["text"] for part in parts)
        for stop in options["stop"]:
            shown = shown.partition(stop)[0]
        anchor = double.tokenizer.encode("a")

        def token(one: int, logprob: float) -> dict[str, Any]:
            return {"token": double.tokenizer.decode([*anchor, one])[1:], "logprob": logprob}

        rows = [token(part["id"], 0.0) | {"top_logprobs": [token(*pair) for pair in part["top"]]}
                for part in parts if top]  # fmt: skip
        reply = {"model": told["model"], "done": True, **{k: v for k, v in last.items() if k != "done"}}
        reply |= {"message": {"role": "assistant", "content": shown}} if chat else {"response": shown}
        self.reply(200, reply | ({"logprobs": rows} if top and double.fault != "no_logprobs" else {}))


def said(template: str, messages: list[dict[str, str]]) -> str:
    """Return what a Go template says of a conversation: if, else, range, eq, a variable, `.Field`."""
    tokens = re.split(r"\{\{ (.+?) \}\}", template)
    assert "{{" not in "".join(tokens[::2])
    variables: dict[str, bool] = {}
    systems = [one["content"] for one in messages if one["role"] == "system"]

    def true(test: str, dot: dict[str, Any]) -> bool:
        if test.startswith("eq "):
            _, name, value = test.split()
            return bool(dot[name[1:]] == json.loads(value))
        return variables[test] if test.startswith("$") else bool(dot[test[1:]])

    def block(at: int) -> list[tuple[str, int, int]]:
        """The branches of the block that begins at `at`: (action, first token, the token that ends it)."""
        depth, starts = 0, [(tokens[at], at + 1)]
        branches = []
        for here in range(at + 2, len(tokens), 2):
            word = tokens[here].split()[0]
            if depth == 0 and word in ("else", "end"):
                branches.append((*starts.pop(), here))
                if word == "end":
                    return branches
                starts.append((tokens[here], here + 1))
            depth += (word in ("if", "range")) - (word == "end")
        raise AssertionError("no end")

    def run(first: int, end: int, dot: dict[str, Any]) -> str:
        out, at = "", first
        while at < end:
            if at % 2 == 0:
                out += tokens[at]
            elif tokens[at].startswith(("if ", "range ")):
                branches = block(at)
                if tokens[at].startswith("range "):
                    out += "".join(run(branches[0][1], branches[0][2], one) for one in dot[tokens[at][7:]])
                else:
                    tests = ((re.sub(r"^(else )?(if )?", "", action), a, b) for action, a, b in branches)
                    taken = next(
                        ((a, b) for test, a, b in tests if test in ("", "else") or true(test, dot)), None
                    )
                    out += run(*taken, dot) if taken else ""
                at = branches[-1][2]
            elif match := re.fullmatch(r"(\$\w+) :?= (true|false)", tokens[at]):
                variables[match[1]] = match[2] == "true"
            else:
                out += str(dot[tokens[at][1:]])
            at += 1
        return out

    every = [{"Role": one["role"], "Content": one["content"]} for one in messages]
    return run(0, len(tokens), {"System": "\n\n".join(systems), "Messages": every})
