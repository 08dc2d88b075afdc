"""What the tests of embeddings and indexes share."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rag_kit.index.contract import ContractEmbeddings
from rag_kit.index.embeddings import load_embeddings
from rag_kit.settings import Settings


@pytest.fixture(scope="session")
def embedder() -> ContractEmbeddings:
    """The embedded multilingual-e5-small."""
    return load_embeddings("embedded", Settings.load())


class FakeOllama(ThreadingHTTPServer):
    """A server on loopback that speaks as much of Ollama's wire as an embedder hears.

    `embed` answers `/api/embed`: it gets the request and returns (status, body), or raises to break off.
    """

    def __init__(self, model: str = "bge-m3:latest", context: int = 512) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.context = model, context
        self.requests: list[dict[str, Any]] = []
        self.embed: Callable[[dict[str, Any]], tuple[int, Any]] = self.unit_vectors
        self.url = f"http://127.0.0.1:{self.server_port}"

    def unit_vectors(self, request: dict[str, Any]) -> tuple[int, Any]:
        """One vector a text, that depends on its characters."""
        vectors = [[float(sum(map(ord, text)) % 7 + 1), float(len(text)), 2.0] for text in request["input"]]
        return 200, {"model": self.model, "embeddings": vectors, "prompt_eval_count": len(vectors)}


class _Handler(BaseHTTPRequestHandler):
    server: FakeOllama

    def do_GET(self) -> None:
        digest = "d" * 64
        self._send(
            200, {"models": [{"model": self.server.model, "name": self.server.model, "digest": digest}]}
        )

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append({"path": self.path, **request})
        name = request["model"] if ":" in request["model"] else request["model"] + ":latest"
        if name != self.server.model:
            self._send(404, {"error": f"model '{request['model']}' not found"})
        elif self.path == "/api/show":
            self._send(200, {"model_info": {"bert.context_length": self.server.context}})
        else:
            try:
                self._send(*self.server.embed(request))
            except ConnectionAbortedError:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
                self.close_connection = True

    def _send(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def ollama() -> Iterator[FakeOllama]:
    server = FakeOllama()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
