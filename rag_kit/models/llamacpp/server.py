"""The child of the engine process: lets in who has the key, and ends with its parent.

Knows sockets, keys and the parent; knows nothing of what is answered. Run by `process.py` alone: a line of
configuration comes on standard input, the word `ready` goes out, and the end of the input is the end.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from secrets import compare_digest
from typing import TYPE_CHECKING, Any, TextIO

from rag_kit.errors import message, use_language
from rag_kit.models.llamacpp.gguf import explain
from rag_kit.models.llamacpp.routes import application, opened
from rag_kit.models.llamacpp.runner import Runner

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOK_S = 0.5  # between two looks at whether the parent lives
KEEP_S = 60  # longer than clients keep idle connections, so that none is closed under a request


def guarded(app: ASGIApp, key: str, port: int) -> ASGIApp:
    """Let in requests of this machine that have the key, and end the work of a client that goes away."""
    hosts = {f"{host}:{port}".encode() for host in ("127.0.0.1", "localhost", "[::1]")}

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.responses import JSONResponse

        headers = dict(scope["headers"])
        local = headers.get(b"host") in hosts
        if not local or not compare_digest(headers.get(b"authorization", b""), f"Bearer {key}".encode()):
            refused = JSONResponse({"error": message("engine_closed")}, 401 if local else 403)
            return await refused(scope, receive, send)
        # Ollama reads JSON under any name, such as the one that `curl -d` gives it
        scope["headers"] = [*{**headers, b"content-type": b"application/json"}.items()]
        events: asyncio.Queue[Message] = asyncio.Queue()
        opened.set([])

        async def relay() -> None:
            while (event := await receive())["type"] != "http.disconnect":
                await events.put(event)

        tasks = asyncio.ensure_future(app(scope, events.get, send)), asyncio.ensure_future(relay())
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        failed, _ = await asyncio.gather(*tasks, return_exceptions=True)
        if isinstance(failed, Exception):  # it was told to the client; here is where
            traceback.print_exception(failed)
        for lines in opened.get():  # which a response that was cancelled leaves open
            await lines.aclose()
        return None

    return guard


async def serve(config: dict[str, Any], ready: TextIO) -> None:
    """Load the model, say so, and serve on the parent's socket until the parent ends or ends us."""
    listener, path = _socket(config["socket"]), Path(config["gguf"])
    runner = Runner(explain(path, config["context"]), config["context"])
    loading = asyncio.ensure_future(runner.load())
    await asyncio.sleep(0)  # what follows is imported while the model loads

    import uvicorn

    app = guarded(application(runner, config["name"]), config["key"], listener.getsockname()[1])
    quiet: dict[str, Any] = {"lifespan": "off", "ws": "none", "log_level": "warning", "access_log": False}
    server = uvicorn.Server(uvicorn.Config(app, timeout_keep_alive=KEEP_S, **quiet))
    await loading
    print("ready", file=ready, flush=True)
    await server.serve(sockets=[listener])


def _socket(shared: int | str) -> socket.socket:
    if sys.platform == "win32":
        return socket.fromshare(base64.b64decode(shared))
    return socket.socket(fileno=int(shared))


def _stay_with(parent: int) -> None:
    """End when standard input does, or when the parent is another: whichever is seen first."""

    def listen() -> None:
        sys.stdin.read()
        os._exit(0)

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        os._exit(0)

    for watch in (listen, look):
        threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    parent, config = os.getppid(), json.loads(sys.stdin.readline())
    use_language(config["language"])
    ready = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp may write there
    _stay_with(parent)
    asyncio.run(serve(config, ready))
