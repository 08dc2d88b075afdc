"""llama.cpp's own port, as one reads it token by token: a connection a question, closed to call it off.

Knows the few things of HTTP that llama.cpp's server does; knows nothing of what is asked. A general client
takes a third of a millisecond a token from the core that llama.cpp computes on, this one a twentieth.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from rag_kit.errors import ModelError

OUT_OF_MEMORY = re.compile(
    r"bad_alloc|(?:failed|unable) to allocate|out of memory|MemoryError", re.IGNORECASE
)
Part = dict[str, Any]


class Link:
    """The way to the server at `address`, whose key is `key`; raises ModelError where it refuses."""

    def __init__(self, address: str, key: str) -> None:
        found = urlsplit(address)
        self._at = found.hostname, found.port
        self._head = (
            f"HTTP/1.1\r\nHost: {found.netloc}\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
        )

    @asynccontextmanager
    async def _asked(self, route: str, body: Part | None) -> AsyncIterator[tuple[bool, asyncio.StreamReader]]:
        reader, writer = await asyncio.open_connection(*self._at, limit=2**20)
        try:
            data = b"" if body is None else json.dumps(body).encode()
            sized = f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            writer.write(f"{'GET' if body is None else 'POST'} {route} {self._head}{sized}".encode() + data)
            status = (await reader.readline()).split()[1:2]
            while (await reader.readline()).strip():
                pass
            yield status == [b"200"], reader
        finally:
            writer.close()

    async def raw(self, route: str, body: Part | None = None) -> bytes:
        """Return the answer's own bytes, for who can read them faster than JSON."""
        async with self._asked(route, body) as (fine, reader):
            told = await reader.read()
        return told if fine else refuse(json.loads(told or b"{}"))

    async def ask(self, route: str, body: Part | None = None) -> Any:
        """Return the answer to one question."""
        return json.loads(await self.raw(route, body))

    async def events(self, route: str, body: Part) -> AsyncGenerator[Part]:
        """Yield what is told piece by piece; each stands on a line of its own, whatever is round it."""
        async with self._asked(route, body) as (fine, reader):
            if not fine:
                refuse(json.loads(await reader.read() or b"{}"))
            while line := await reader.readline():
                kind, _, data = line.partition(b": ")
                if kind in (b"data", b"error"):
                    part = json.loads(data)
                    yield refuse(part) if kind == b"error" or "error" in part else part


def refuse(reply: Part) -> Any:
    """Raise the ModelError for llama.cpp's own refusal."""
    error = reply.get("error") or reply
    reason = str(error.get("message") or error or "it hung up")
    raise ModelError("engine_memory" if OUT_OF_MEMORY.search(reason) else "engine_refused", reason=reason)
