"""The parent's side of the engine process: starts the child, keeps it alive, and leaves no orphan.

The parent holds the listening socket, so that address and key outlive a crash, and requests that arrive
meanwhile wait for the next child. Knows processes; knows nothing of what the child answers.
"""

from __future__ import annotations

import atexit
import base64
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Self

from rag_kit.errors import ModelError, language
from rag_kit.models.llamacpp.gguf import explain

START_S = 300.0  # a large model on a slow disk
CRASHES, WINDOW_S = 3, 60.0  # so many restarts within so many seconds
LOG_LINES = 200
# On a busy machine threads that spin for each other are ten times slower; sleeping soon costs little.
SPIN = {"GOMP_SPINCOUNT": "1000"}
ROOT = Path(__file__).parents[3]


class EngineProcess:
    """One child process that runs llama.cpp over one GGUF and speaks Ollama's wire on loopback.

    `name` is the model's name on the wire, `context` its tokens (None: the model's own, at most 8,192).
    `url` is empty before the first start; `restarts` counts the times that a crashed child was replaced.
    """

    def __init__(self, gguf: Path, *, name: str, context: int | None = None) -> None:
        self.gguf, self.name, self.context = gguf, name, context
        self.url, self.restarts = "", 0
        self._key = secrets.token_urlsafe(32)
        self._lock = threading.Lock()
        self._owner = os.getpid()  # a fork of it may ask the child, and must not end it
        self._process: subprocess.Popen[str] | None = None
        self._listener: socket.socket | None = None
        self._failure: ModelError | None = None
        self._crashes: list[float] = []
        self._log: deque[str] = deque(maxlen=LOG_LINES)

    @property
    def headers(self) -> dict[str, str]:
        """What every request needs: the key of this engine alone."""
        return {"Authorization": f"Bearer {self._key}"}

    @property
    def pid(self) -> int | None:
        """The child's process id, None where there is no child."""
        process = self._process
        return process.pid if process else None

    @property
    def alive(self) -> bool:
        """Whether the child runs now."""
        process = self._process
        return process is not None and process.poll() is None

    @property
    def log(self) -> str:
        """The last lines that the child wrote."""
        return "\n".join(self._log)

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
                explain(self.gguf, self.context)
                if self._listener is None:
                    # a free port of the system's choice: these are far above Ollama's
                    self._listener = socket.create_server(("127.0.0.1", 0))
                    self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
                    atexit.register(self.stop)
                try:
                    self._spawn()
                except BaseException:
                    self._close()
                    raise
        return self

    def stop(self) -> None:
        """End the child and give its port back; does nothing where none runs."""
        if os.getpid() != self._owner:
            return
        with self._lock:
            process, self._process = self._process, None
            self._failure = None
            self._crashes.clear()
            self._close()
            if process:
                _end(process)
        atexit.unregister(self.stop)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *failure: object) -> None:
        self.stop()

    def _close(self) -> None:
        if self._listener:
            self._listener.close()
        self._listener = None

    def _spawn(self) -> None:
        """Start a child and wait for its word; whatever goes wrong, no child is left."""
        assert self._listener is not None
        windows = sys.platform == "win32"
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rag_kit.models.llamacpp.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=() if windows else (self._listener.fileno(),),
            env=SPIN | os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUTF8": "1"},
            start_new_session=True,  # an interrupt of the notebook is not meant for it
            encoding="utf-8",
            errors="replace",
        )
        assert process.stdin is not None and process.stdout is not None
        follower = threading.Thread(target=self._follow, args=(process,), daemon=True)
        follower.start()
        patience = threading.Timer(START_S, process.kill)
        patience.start()
        config = {"gguf": str(self.gguf.absolute()), "name": self.name, "context": self.context,
                  "key": self._key, "socket": self._shared(process.pid), "language": language()}  # fmt: skip
        try:
            with suppress(BrokenPipeError):  # it is told below why it reads no more
                process.stdin.write(json.dumps(config) + "\n")
                process.stdin.flush()
            if not process.stdout.readline():
                _end(process)
                follower.join()
                raise self._explained(process)
            process.stdout.close()
        except BaseException:
            _end(process)
            raise
        finally:
            patience.cancel()
        self._process = process

    def _shared(self, pid: int) -> int | str:
        assert self._listener is not None
        if sys.platform == "win32":
            return base64.b64encode(self._listener.share(pid)).decode()
        return self._listener.fileno()

    def _explained(self, process: subprocess.Popen[str]) -> ModelError:
        if missing := re.search(r"^(?:ImportError|ModuleNotFoundError): (.+)", self.log, re.MULTILINE):
            return ModelError("engine_no_library", reason=missing[1])
        if unknown := re.search(r"unknown model architecture: '(.+?)'", self.log):
            return ModelError("gguf_architecture", path=self.gguf, architecture=unknown[1])
        own = re.search(r"error loading model: (.+)", self.log)
        last = self._log[-1] if self._log else _status(process)
        return ModelError("engine_start_failed", path=self.gguf, reason=own[1] if own else last)

    def _follow(self, process: subprocess.Popen[str]) -> None:
        """Keep what the child writes; when it ends by itself, put another in its place."""
        assert process.stderr is not None
        with process.stderr as lines:
            self._log.extend(line.rstrip() for line in lines)
        if self._process is process:
            with self._lock:
                if self._process is process:
                    self._replace(process)

    def _replace(self, process: subprocess.Popen[str]) -> None:
        _end(process)
        now = time.monotonic()
        self._crashes = [*(when for when in self._crashes if now - when < WINDOW_S), now]
        try:
            if len(self._crashes) > CRASHES:
                told = {"name": self.name, "times": len(self._crashes), "reason": _status(process)}
                raise ModelError("engine_gave_up", **told)
            self._spawn()
            self.restarts += 1
        except ModelError as error:
            self._failure, self._process = error, None
            self._close()


def _end(process: subprocess.Popen[str]) -> None:
    """End the child, which has nothing to clean up."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            with suppress(BrokenPipeError):  # what it never read
                pipe.close()


def _status(process: subprocess.Popen[str]) -> str:
    code = process.returncode
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"
