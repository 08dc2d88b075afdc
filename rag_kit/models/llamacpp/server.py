"""The child of the engine process: lets in who has the key, and ends with its parent.

Knows sockets, keys and the parent; knows nothing of what is answered. Run by `process.py` alone: a line of
configuration comes on standard input, the word `ready` goes out, and the end of the input is the end. After
the line `drain`, because another child serves from now on, no connection is accepted any more; `drained` goes
out when every request that can still come here has begun, and what has begun is finished.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from secrets import compare_digest
from typing import TYPE_CHECKING, Any, TextIO
from urllib.parse import urlsplit

from rag_kit.errors import message, use_language
from rag_kit.models.llamacpp.gguf import explain
from rag_kit.models.llamacpp.routes import application, opened
from rag_kit.models.llamacpp.runner import Runner

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOK_S = 0.5  # between two looks at whether the parent lives
LINGER_S = 2.0  # for a connection that asks nothing
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def guarded(app: ASGIApp, key: str, port: int, public: str | None = None) -> ASGIApp:
    """Let in requests of this machine that have the key, and end the work of a client that goes away.

    Where `public` is the host that others may use, Ollama's routes need no key; it, this machine's name and,
    if it is beyond loopback, any address will do as Host: no page of the web can come by one of those names.
    """
    names = {*LOOPBACK, *([public.lower(), socket.gethostname().lower()] if public else [])}

    def welcome(host: bytes | None) -> bool:
        try:
            found = urlsplit("//" + (host or b"").decode())
            if public is None and found.port != port:
                return False
            return found.hostname in names or bool(
                public not in (None, *LOOPBACK) and ipaddress.ip_address(found.hostname or "")
            )
        except ValueError:
            return False

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.responses import JSONResponse

        headers = dict(scope["headers"])
        local = welcome(headers.get(b"host"))
        if b"origin" in headers:  # a browser says which page asks
            local = local and welcome(headers[b"origin"].rpartition(b"//")[2])
        free = public is not None and not scope["path"].startswith("/engine")
        known = compare_digest(headers.get(b"authorization", b""), f"Bearer {key}".encode())
        if not local or not (free or known):
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


async def serve(config: dict[str, Any], ready: TextIO, parent: int) -> None:
    """Load the model, say so, and serve on the parent's socket until the parent ends or ends us."""
    listener, path, drain = _socket(config["socket"]), Path(config["gguf"]), asyncio.Event()
    loop = asyncio.get_running_loop()
    _stay_with(parent, lambda: loop.call_soon_threadsafe(drain.set))
    adapters = {name: Path(path) for name, path in config["adapters"].items()}
    runner = Runner(explain(path, config["context"]), config["context"], adapters)
    loading = asyncio.ensure_future(runner.load())
    await asyncio.sleep(0)  # what follows is imported while the model loads

    import uvicorn

    routes = application(runner, config["name"])
    app = guarded(routes, config["key"], listener.getsockname()[1], config["public"])
    quiet: dict[str, Any] = {"lifespan": "off", "ws": "none", "log_level": "warning", "access_log": False}
    # No connection waits for a second request, so that none can be closed, or drained, under one.
    server = uvicorn.Server(uvicorn.Config(app, headers=[("Connection", "close")], **quiet))
    await loading
    print("ready", file=ready, flush=True)
    draining = asyncio.ensure_future(_drained(server, listener, drain, ready))
    await server.serve(sockets=[listener])
    draining.cancel()


async def _drained(server: Any, listener: socket.socket, drain: asyncio.Event, ready: TextIO) -> None:
    await drain.wait()
    with suppress(NotImplementedError):  # on Windows, where closing the socket below does it
        asyncio.get_running_loop().remove_reader(listener)
    end = time.monotonic() + LINGER_S
    await asyncio.sleep(0.02)  # until what has just been accepted is a connection
    while time.monotonic() < end and any(one.cycle is None for one in server.server_state.connections):
        await asyncio.sleep(0.01)
    print("drained", file=ready, flush=True)
    server.should_exit = True  # when every answer has been given


def _socket(shared: int | str) -> socket.socket:
    if sys.platform == "win32":
        return socket.fromshare(base64.b64decode(shared))
    return socket.socket(fileno=int(shared))


def _stay_with(parent: int, drain: Callable[[], object]) -> None:
    """End when standard input does, or when the parent is another; call `drain` when a line comes in."""

    def listen() -> None:
        for _ in sys.stdin:
            drain()
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
    asyncio.run(serve(config, ready, parent))
    os._exit(0)  # drained: there is nothing to tidy up
