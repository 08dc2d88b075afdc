"""Small real servers on loopback: one speaks Ollama's wire, one OpenAI's.

Their answers come from a chat model (the embedded one) or from a script; `mode` names a fault.
"""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[list[dict[str, Any]], dict[str, Any]], Iterator[str]]


@dataclass
class Wire:
    """A running server: what it answers with, how it fails, what it was asked.

    `mode`: `hang`, `reset` (closes the socket in mid-answer), `unfinished` (no last line), `error_line`,
    `proxy` (503 with a page), `garbage` (no JSON), `endless`, `no_metrics`, `old` (no capabilities), or
    empty.
    """

    url: str = ""
    reply: Reply | None = None
    models: tuple[str, ...] = ("tiny:latest",)
    adapters: tuple[str, ...] = ()  # of the models, those made by a Modelfile with ADAPTER
    loaded: list[str] = field(default_factory=list)
    digest: str = ""
    thinking: str | None = None  # a thinking model's reasoning
    context_length: int | None = 2048
    mode: str = ""
    shown: dict[str, Any] = field(default_factory=dict)  # what `/api/show` says besides, or instead
    counted: int | None = None  # the tokens of a prompt, where they are not its words
    gate: threading.Semaphore | None = None  # every piece waits for a permit
    tokens: int = 0  # pieces sent, of all replies
    hung_up: int = 0  # replies that the client did not wait for
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    def sent(self, path: str) -> list[dict[str, Any]]:
        return [body for asked, body in self.requests if asked == path]


def scripted(*pieces: str) -> Reply:
    return lambda messages, body: iter(pieces)


def from_model(model: Any) -> Reply:
    """Answer with a chat model of this project, under the options on the wire."""
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

    from rag_kit.models.options import GenerationOptions

    kinds = {"system": SystemMessage, "user": HumanMessage, "assistant": AIMessage}

    def reply(messages: list[dict[str, Any]], body: dict[str, Any]) -> Iterator[str]:
        sent = body.get("options") or {}
        options = GenerationOptions(
            temperature=sent.get("temperature", 0.0),
            max_new_tokens=sent.get("num_predict") or body.get("max_tokens") or 16,
            seed=sent.get("seed", 0),
            stop=tuple(sent.get("stop") or ()),
        )
        chat = [kinds[message["role"]](message["content"] or "") for message in messages]
        for chunk in model.stream(chat, options=options):
            if chunk.text:
                yield str(chunk.text)

    return reply


@contextmanager
def ollama(reply: Reply | None = None, **how: Any) -> Iterator[Wire]:
    with _serving(_Ollama, Wire(reply=reply or scripted("Hel", "lo", "!"), **how)) as wire:
        yield wire


@contextmanager
def openai(reply: Reply | None = None, **how: Any) -> Iterator[Wire]:
    with _serving(_OpenAI, Wire(reply=reply or scripted("Hel", "lo", "!"), **how)) as wire:
        yield wire


@contextmanager
def closed_port() -> Iterator[str]:
    """The address of a port where nothing listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, never listening: nobody else can take it
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@contextmanager
def _serving(handler: type[_Handler], wire: Wire) -> Iterator[Wire]:
    server = _Server(("127.0.0.1", 0), type("Bound", (handler,), {"wire": wire}))
    wire.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield wire
    finally:
        wire.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may hang up at any time, and these do."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wire: Wire

    def log_message(self, *args: Any) -> None:
        pass

    def body(self) -> dict[str, Any]:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"{}")
        self.wire.requests.append((self.path, body))
        return body

    def send(self, status: int, value: Any, kind: str = "application/json") -> None:
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, lines: Iterator[str], kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in lines:
            data = line.encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def stumble(self) -> bool:
        """Do what `mode` says of whole requests; whether the request is over."""
        if self.wire.mode == "proxy":
            page = "<html><body><h1>503 Service Unavailable</h1></body></html>"
            self.send(503, page, "text/html")
        elif self.wire.mode == "hang":
            self.wire.closing.wait(30)
            self.close_connection = True
        return self.wire.mode in ("proxy", "hang")

    def look(self) -> None:
        """Stop, as Ollama does, where the client has hung up."""
        ready, _, _ = select.select([self.connection], [], [], 0)
        if self.wire.closing.is_set() or (ready and not self.connection.recv(1, socket.MSG_PEEK)):
            self.wire.hung_up += 1
            raise _Cut

    def cut(self) -> None:
        self.close_connection = True
        self.connection.close()


class _Ollama(_Handler):
    def do_GET(self) -> None:
        self.wire.requests.append((self.path, {}))
        if self.stumble():
            return
        if self.path == "/":
            self.send(200, "Ollama is running", "text/plain")
        elif self.path == "/api/version":
            self.send(200, {"version": "0.13.0"})
        elif self.path == "/api/tags":
            now = datetime.now(UTC).isoformat()
            details = {"family": "llama", "parameter_size": "1B", "quantization_level": "Q4_K_M"}
            models = [
                {
                    "name": m,
                    "model": m,
                    "size": 10**6,
                    "modified_at": now,
                    "digest": self.wire.digest or f"sha256:{m}",
                    "details": details,
                }
                for m in self.wire.models
            ]
            self.send(200, {"models": models})
        elif self.path == "/api/ps":
            running = [{"name": m, "model": m, "size": 2 * 10**6} for m in self.wire.loaded]
            self.send(200, {"models": running})
        else:
            self.send(404, "404 page not found", "text/plain")

    def do_POST(self) -> None:
        body = self.body()
        if self.stumble():
            return
        name = body.get("model", "")
        if (name if ":" in name else f"{name}:latest") not in self.wire.models:
            self.send(404, {"error": f"model '{name}' not found"})
        elif self.path == "/api/show":
            capabilities = ["completion"] + (["thinking"] if self.wire.thinking is not None else [])
            shown = {"details": {"family": "llama"}, "template": "{{ .Prompt }}", "model_info": {}}
            if name in self.wire.adapters:
                shown["modelfile"] = "FROM llama\nADAPTER ./lora.gguf\n"
            if self.wire.context_length:
                shown["model_info"] = {"llama.context_length": self.wire.context_length}
            shown |= {} if self.wire.mode == "old" else {"capabilities": capabilities}
            self.send(200, shown | self.wire.shown)
        elif self.path == "/api/generate" and not body.get("prompt"):  # loads, or unloads
            full = name if ":" in name else f"{name}:latest"
            loading = body.get("keep_alive") != 0
            self.wire.loaded = [m for m in self.wire.loaded if m != full] + [full] * loading
            told = {"model": name, "created_at": datetime.now(UTC).isoformat(), "response": "", "done": True}
            self.send(200, told | {"done_reason": "load" if loading else "unload"})
        elif self.path not in ("/api/chat", "/api/generate"):
            self.send(404, "404 page not found", "text/plain")
        elif body.get("think") and self.wire.thinking is None:
            self.send(400, {"error": f'"{name}" does not support thinking'})
        elif body.get("stream", True):
            try:
                self.stream(self.lines(body), "application/x-ndjson")
            except _Cut:
                self.cut()
        else:
            parts = [json.loads(line) for line in self.lines(body)]
            text = "".join(part["message"]["content"] for part in parts)
            self.send(200, parts[-1] | {"message": {"role": "assistant", "content": text}})

    def lines(self, body: dict[str, Any]) -> Iterator[str]:
        wire, start, count = self.wire, time.monotonic_ns(), 0
        messages = body.get("messages") or [{"role": "user", "content": body["prompt"]}]

        def line(text: str = "", **more: Any) -> str:
            value = {"model": body["model"], "created_at": datetime.now(UTC).isoformat()}
            said = more.pop("said", {})
            if "prompt" in body:
                return json.dumps({**value, "response": text, **said, "done": False, **more}) + "\n"
            spoken = {"role": "assistant", "content": text} | said
            return json.dumps({**value, "message": spoken, "done": False, **more}) + "\n"

        if wire.thinking is not None and body.get("think") is not False:
            for piece in wire.thinking:
                yield line(said={"thinking": piece})
        assert wire.reply is not None
        for count, piece in enumerate(wire.reply(messages, body), 1):
            while wire.gate and not wire.gate.acquire(timeout=0.02):
                self.look()
            self.look()
            yield line(piece)
            wire.tokens += 1
            if wire.mode == "reset" and count == 2:
                raise _Cut
            if wire.mode == "unfinished" and count == 2:
                return
            if wire.mode == "error_line" and count == 2:
                yield json.dumps({"error": "llama runner process has terminated: exit status 2"}) + "\n"
                return
            if wire.mode == "garbage" and count == 2:
                yield "<html>bad gateway</html>\n"
                return
        while wire.mode == "endless" and not wire.closing.is_set():
            yield line(" and")
        if wire.mode == "no_metrics":
            yield line(done=True, done_reason="stop")
            return
        spent = time.monotonic_ns() - start
        prompt = wire.counted or sum(len(message["content"].split()) for message in messages) + 1
        yield line(
            done=True, done_reason="stop", total_duration=spent, load_duration=1, prompt_eval_count=prompt,
            prompt_eval_duration=1, eval_count=max(count, 1), eval_duration=max(spent, 1),
        )  # fmt: skip


class _Cut(Exception):
    pass


class _OpenAI(_Handler):
    def do_POST(self) -> None:
        body = self.body()
        if self.stumble():
            return
        assert self.wire.reply is not None
        pieces = self.wire.reply(body["messages"], body)
        head = {"id": "1", "created": 1, "model": body["model"]}
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        if body.get("stream"):
            self.stream(_events(pieces, head, usage), "text/event-stream")
            return
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "".join(pieces)},
        }
        self.send(200, head | {"object": "chat.completion", "choices": [choice], "usage": usage})


def _events(pieces: Iterator[str], head: dict[str, Any], usage: dict[str, int]) -> Iterator[str]:
    def event(choices: Sequence[dict[str, Any]], **more: Any) -> str:
        return (
            f"data: {json.dumps(head | {'object': 'chat.completion.chunk', 'choices': choices} | more)}\n\n"
        )

    for piece in pieces:
        yield event([{"index": 0, "delta": {"role": "assistant", "content": piece}, "finish_reason": None}])
    yield event([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    yield event([], usage=usage)
    yield "data: [DONE]\n\n"
