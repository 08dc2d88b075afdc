"""One question on its way through one arm, run by a thread beside the page.

Knows the states of an answer and how it is stopped; knows nothing of widgets.
"""

import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, Literal

from rag_kit.answer import Answer
from rag_kit.errors import RagKitError
from rag_kit.ollama import Line

State = Literal["idle", "waiting", "running", "done", "stopped", "failed"]


class Run:
    """What has come of a question so far: written by its worker, read by the page.

    `answer` is there when all is; `error` says why it failed.
    """

    def __init__(self, state: State = "waiting") -> None:
        self.state, self.text = state, ""
        self.answer: Answer | None = None
        self.error: RagKitError | None = None
        self._line, self._lock = Line(), threading.Lock()
        self._began = self._ended = 0.0

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.state not in ("waiting", "running")

    @property
    def seconds(self) -> float:
        """The seconds since the worker began, until it ended."""
        return (self._ended or time.perf_counter()) - self._began if self._began else 0.0

    def stop(self) -> None:
        """End at once; an engine that is in the midst of a step is closed after it."""
        self._end("stopped")
        self._line.cut()

    def work(self, ask: Callable[[], Any]) -> None:
        """Take in the pieces of `ask` as they come; closing that generator is what stops its engine."""
        with self._lock:
            if self.over:
                return
            self.state, self._began = "running", time.perf_counter()
        try:
            with self._line.watching(), closing(ask()) as pieces:
                for piece in pieces:
                    if not self._take(piece):
                        return
            self._end("done")
        except Exception as error:
            self._end("failed", explained(error))

    def _take(self, piece: str | Answer) -> bool:
        with self._lock:
            if not self.over and isinstance(piece, Answer):
                self.answer, self.text = piece, piece.text
            elif not self.over:
                self.text += str(piece)
            return not self.over

    def _end(self, state: State, error: RagKitError | None = None) -> None:
        with self._lock:
            if not self.over:
                self.state, self.error, self._ended = state, error, time.perf_counter()


def explained(error: Exception) -> RagKitError:
    """Return an error that has a remedy."""
    if isinstance(error, RagKitError):
        return error
    return RagKitError("dashboard_unexpected", kind=type(error).__name__, reason=str(error)[:300])


def beside(work: Callable[..., Any], *arguments: Any) -> threading.Thread:
    """Run `work` on a thread that never keeps the kernel from ending."""
    thread = threading.Thread(target=work, args=arguments, daemon=True, name="rag-kit-page")
    thread.start()
    return thread
