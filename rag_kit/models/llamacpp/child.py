"""One child of the engine process: how it is started, what it wrote, what it died of.

Knows pipes and the words `ready`, `drain` and `drained`; knows nothing of who follows it.
"""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rag_kit.errors import ModelError
from rag_kit.models.llamacpp.link import OUT_OF_MEMORY

START_S = 300.0  # a large model on a slow disk
DRAIN_S = 30.0  # to say that nothing more is accepted
LOG_LINES = 200
# On a busy machine threads that spin for each other are ten times slower; sleeping soon costs little.
SPIN = {"GOMP_SPINCOUNT": "1000"}
ROOT = Path(__file__).parents[3]


class Child:
    """A process that runs `server.py`; `ended` is called when it writes no more, on a thread of its own."""

    def __init__(self, listener: socket.socket, ended: Callable[[Child], object]) -> None:
        windows = sys.platform == "win32"
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rag_kit.models.llamacpp.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=() if windows else (listener.fileno(),),
            env=SPIN | os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUTF8": "1"},
            start_new_session=True,  # an interrupt of the notebook is not meant for it
            encoding="utf-8",
            errors="replace",
        )
        self.log: deque[str] = deque(maxlen=LOG_LINES)
        self.shared: int | str = listener.fileno()
        if sys.platform == "win32":
            self.shared = base64.b64encode(listener.share(self.process.pid)).decode()
        self._ended, self._read = ended, threading.Event()
        threading.Thread(target=self._follow, daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether it runs now."""
        return self.process.poll() is None

    @property
    def reason(self) -> str:
        """What it died of: memory, where it wrote of that, else the signal or the status."""
        code = self.process.returncode
        status = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return next((line for line in self.log if OUT_OF_MEMORY.search(line)), status)

    def configure(self, config: dict[str, Any]) -> None:
        """Tell it what to serve, and wait until it does; raises ModelError where it ends instead."""
        try:
            if not self._said(json.dumps({**config, "socket": self.shared}), START_S):
                self.end()
                self._read.wait()
                raise self._explained(config["gguf"])
        except BaseException:
            self.end()
            raise

    def drain(self) -> None:
        """Have it accept nothing more; it ends when it has answered what it was asked."""
        self._said("drain", DRAIN_S)

    def end(self) -> None:
        """End it; it has nothing to clean up."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with suppress(BrokenPipeError):  # what it never read
                    pipe.close()

    def _said(self, line: str, seconds: float) -> str:
        """Write a line and return the one that comes back, nothing where it ends instead."""
        assert self.process.stdin is not None and self.process.stdout is not None
        patience = threading.Timer(seconds, self.process.kill)
        patience.start()
        try:
            with suppress(BrokenPipeError):
                self.process.stdin.write(line + "\n")
                self.process.stdin.flush()
            return self.process.stdout.readline()
        finally:
            patience.cancel()

    def _follow(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            self.log.extend(line.rstrip() for line in lines)
        self._read.set()
        self._ended(self)

    def _explained(self, path: str) -> ModelError:
        log = "\n".join(self.log)
        if missing := re.search(r"^(?:ImportError|ModuleNotFoundError): (.+)", log, re.MULTILINE):
            return ModelError("engine_no_library", reason=missing[1])
        if unknown := re.search(r"unknown model architecture: '(.+?)'", log):
            return ModelError("gguf_architecture", path=path, architecture=unknown[1])
        if OUT_OF_MEMORY.search(self.reason):
            return ModelError("engine_memory", reason=self.reason)
        own = re.search(r"error loading model: (.+)", log)
        reason = own[1] if own else self.log[-1] if self.log else self.reason
        return ModelError("engine_start_failed", path=path, reason=reason)
