"""The parent's side of the engine process: starts the child, keeps it alive, and leaves no orphan.

The parent holds the listening socket, so that address and key outlive a crash, and requests that arrive
meanwhile wait for the next child; when adapters join, a second child is ready on the same socket before the
first one drains. Knows processes; knows nothing of what a child answers.
"""

from __future__ import annotations

import atexit
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Self

from rag_kit.errors import ModelError, language
from rag_kit.models.llamacpp.adapter_gguf import check_adapter_gguf
from rag_kit.models.llamacpp.child import Child
from rag_kit.models.llamacpp.gguf import explain
from rag_kit.models.llamacpp.link import OUT_OF_MEMORY

CRASHES, WINDOW_S = 3, 60.0  # so many restarts within so many seconds


class EngineProcess:
    """One child process that runs llama.cpp over one GGUF and speaks Ollama's wire on loopback.

    `name` is the model's name on the wire, `context` its tokens (None: the model's own, at most 8,192);
    `adapters` are the GGUF adapters served over it, by name. `public` is the (host, port) to listen on for
    others, without a key; else the port is free and the key a secret. `url` is empty before the first start;
    `restarts` counts the times that a crashed child was replaced.
    """

    def __init__(
        self,
        gguf: Path,
        *,
        name: str,
        context: int | None = None,
        adapters: Mapping[str, Path] = MappingProxyType({}),
        public: tuple[str, int] | None = None,
    ) -> None:
        self.gguf, self.name, self.context, self.public = gguf, name, context, public
        self.adapters, self.url, self.restarts = dict(adapters), "", 0
        self._key = secrets.token_urlsafe(32)
        self._lock = threading.Lock()
        self._owner = os.getpid()  # a fork of it may ask the child, and must not end it
        self._child: Child | None = None
        self._draining: set[Child] = set()
        self._listener: socket.socket | None = None
        self._failure: ModelError | None = None
        self._crashes: list[float] = []
        self._died = float("-inf"), ""  # when a child crashed last, and of what

    @property
    def headers(self) -> dict[str, str]:
        """What every request needs: the key of this engine alone."""
        return {"Authorization": f"Bearer {self._key}"}

    @property
    def pid(self) -> int | None:
        """The child's process id, None where there is no child."""
        child = self._child
        return child.process.pid if child else None

    @property
    def alive(self) -> bool:
        """Whether the child runs now."""
        child = self._child
        return child is not None and child.alive

    @property
    def log(self) -> str:
        """The last lines that the child wrote."""
        child = self._child
        return "\n".join(child.log) if child else ""

    def start(self) -> Self:
        """Start the child and wait until its model is loaded; does nothing where it runs.

        Raises ModelError that tells why the file cannot be served, or that the child crashed too often:
        after `stop` it can be started again.
        """
        if os.getpid() != self._owner:
            return self
        with self._lock:
            if self._failure:
                raise self._failure
            if not self.alive:
                self._check(self.adapters)
                if self._listener is None:
                    self._listen()
                try:
                    self._child = self._spawn(self.adapters)
                except BaseException:
                    self._close()
                    raise
        return self

    def set_adapters(self, adapters: Mapping[str, Path], context: int | None = None) -> None:
        """Serve these adapters and no others from now on; running requests end where they began.

        `context` is how many tokens a context holds from now on (None: as many as before).
        What is asked after the return is answered by a child that has them. Raises ModelError that tells
        why it could not be, and leaves all as it was.
        """
        if os.getpid() != self._owner:
            return
        with self._lock:
            before, self.context = self.context, context or self.context
            try:
                self._check(adapters)
                old = self._child
                if old is not None and old.alive and (self.adapters, before) != (adapters, self.context):
                    self._child = self._spawn(adapters)
                    self._draining.add(old)
                    old.drain()
            except BaseException:
                self.context = before
                raise
            self.adapters = dict(adapters)

    def lost(self, error: Exception) -> ModelError:
        """Return why a child that broke off with `error` did so: for want of memory, most often."""
        since = time.monotonic() - 1
        while self._died[0] < since and time.monotonic() < since + 2:
            time.sleep(0.01)  # the kernel closes connections before it tells of the death
        last = self.log.rpartition("\n")[2]
        told = last if OUT_OF_MEMORY.search(last) else str(error) or type(error).__name__
        reason = self._died[1] if self._died[0] >= since else told
        memory = "SIGKILL" in reason or OUT_OF_MEMORY.search(reason)
        return ModelError("engine_memory" if memory else "engine_crashed", name=self.name, reason=reason)

    def stop(self) -> None:
        """End the child and give its port back; does nothing where none runs."""
        if os.getpid() != self._owner:
            return
        with self._lock:
            children = [*self._draining, *([self._child] if self._child else [])]
            self._child, self._failure = None, None
            self._draining.clear()
            self._crashes.clear()
            self._close()
            for child in children:
                child.end()
        atexit.unregister(self.stop)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *failure: object) -> None:
        self.stop()

    def _close(self) -> None:
        if self._listener:
            self._listener.close()
        self._listener = None

    def _listen(self) -> None:
        # a free port of the system's choice: these are far above Ollama's
        host, port = self.public or ("127.0.0.1", 0)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family)
        except OSError as error:
            raise ModelError("engine_port", host=host, port=port, reason=error.strerror or error) from error
        here = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        self.url = f"http://{here}:{self._listener.getsockname()[1]}"
        atexit.register(self.stop)

    def _check(self, adapters: Mapping[str, Path]) -> None:
        explain(self.gguf, self.context)
        for path in adapters.values():
            check_adapter_gguf(path, self.gguf)

    def _spawn(self, adapters: Mapping[str, Path]) -> Child:
        """Start a child and wait for its word; whatever goes wrong, no child is left."""
        assert self._listener is not None
        child = Child(self._listener, self._ended)
        child.configure(
            {
                "gguf": str(self.gguf.absolute()),
                "name": self.name,
                "context": self.context,
                "adapters": {name: str(path.absolute()) for name, path in adapters.items()},
                "key": self._key,
                "public": self.public and self.public[0],
                "language": language(),
            }
        )
        return child

    def _ended(self, child: Child) -> None:
        """Put another child in the place of the newest one; one that drains is only buried."""
        with self._lock:
            if self._child is child:
                self._replace(child)
            elif child in self._draining:
                self._draining.discard(child)
                self._bury(child)

    def _bury(self, child: Child) -> None:
        child.end()
        if child.process.returncode:
            self._died = time.monotonic(), child.reason

    def _replace(self, child: Child) -> None:
        self._bury(child)
        now = time.monotonic()
        self._crashes = [*(when for when in self._crashes if now - when < WINDOW_S), now]
        try:
            if len(self._crashes) > CRASHES:
                told = {"name": self.name, "times": len(self._crashes), "reason": child.reason}
                raise ModelError("engine_gave_up", **told)
            self._child = self._spawn(self.adapters)
            self.restarts += 1
        except ModelError as error:
            self._failure, self._child = error, None
            self._close()
