"""The frame of every benchmark: sides in processes of their own that take turns, and the arithmetic.

A side is a function `module:function`, called in a fresh process, that returns another, which answers
requests with numbers; both speak JSON, a line each. Knows processes, clocks and medians; knows nothing of
what is measured.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

from rag_kit.errors import message

Row = dict[str, Any]
LIMIT_S = 300.0  # for one reply: a model may come from a slow disk


@dataclass(frozen=True)
class Side:
    """One side of a comparison: `target` is `module:function`, called with `arguments` in its process."""

    name: str
    target: str
    arguments: dict[str, Any] = field(default_factory=dict)


class SideFailed(Exception):
    """A side that raised, died or hung; its text is the reason."""


class Worker:
    """The process of a side, with `threads` threads; `load_s` are the seconds from its start to ready."""

    def __init__(self, side: Side, threads: int) -> None:
        self.start = time.perf_counter()
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        told = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONUTF8": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        command = [sys.executable, "-m", "rag_kit.ops.measure"]
        self.process = subprocess.Popen(command, env=os.environ | told, encoding="utf-8", **pipes)
        try:
            self.ask(asdict(side))
        except BaseException:
            self.close()
            raise
        self.load_s = time.perf_counter() - self.start

    def ask(self, request: Row) -> Row:
        """Return the reply to `request`; raises SideFailed, after LIMIT_S at the latest."""
        assert self.process.stdin and self.process.stdout
        timer = threading.Timer(LIMIT_S, self.process.kill)
        timer.start()
        reply: Row = {}
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            reply = json.loads(self.process.stdout.readline() or "{}")
        except OSError:  # it is gone
            pass
        finally:
            timer.cancel()
        if "numbers" in reply:
            return dict(reply["numbers"])
        raise SideFailed(reply.get("error") or self._last_words())

    def peak_mb(self) -> float:
        """Return the most memory (MB, resident) that the process and its children held, each at its peak."""
        import psutil

        total, process = 0.0, psutil.Process(self.process.pid)
        for one in (process, *process.children(recursive=True)):
            memory = one.memory_info()
            peak = told_by_linux(f"{one.pid}/status", r"VmHWM:\s+(\d+) kB")
            total += int(peak) * 1024 if peak else getattr(memory, "peak_wset", memory.rss)
        return total / 1e6

    def close(self) -> None:
        """End the process, which ends at the end of its input."""
        assert self.process.stdin and self.process.stdout
        with suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self._errors.close()

    def _last_words(self) -> str:
        self.process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return f"exit status {self.process.returncode}: {lines[-1] if lines else '-'}"


def take_turns(sides: Sequence[Side], requests: Sequence[Row], *, cold: int, threads: int) -> list[Row]:
    """Measure every side in turn and return a row for each reply: `side`, `phase`, `repeat`, its numbers.

    `cold` times round, each side answers the first request in a fresh process: there `cold_s` are the
    seconds from the process's start to the answer, `load_s` those until it was ready. The last processes
    stay and, so warmed up, answer the other requests, every side the same one before the next. A side that
    fails leaves a row with its `error` and is asked no more.
    """
    from tqdm.auto import tqdm

    rows: list[Row] = []
    workers: dict[str, Worker] = {}
    plan = list(product(range(cold + len(requests) - 1), sides))
    try:
        for repeat, side in tqdm(plan, desc=message("bench_running")):
            row: Row = {"side": side.name, "phase": "cold" if repeat < cold else "warm", "repeat": repeat}
            former = workers.pop(side.name, None)
            if repeat and former is None:
                continue
            try:
                if former and repeat < cold:
                    former.close()
                worker = Worker(side, threads) if repeat < cold else former
                assert worker
                workers[side.name] = worker
                row |= worker.ask(requests[max(repeat - cold + 1, 0)])
                if repeat < cold:
                    seconds = time.perf_counter() - worker.start
                    row |= {"load_s": worker.load_s, "cold_s": seconds, "peak_mb": worker.peak_mb()}
            except SideFailed as error:
                row["error"] = str(error)
                if side.name in workers:
                    workers.pop(side.name).close()
            rows.append(row)
    finally:
        for worker in workers.values():
            worker.close()
    return rows


def samples(rows: Sequence[Row], side: str, metric: str, phase: str) -> list[float]:
    """Return the seconds of one side; raises SideFailed with the reason where there are none."""
    mine = [row for row in rows if row["side"] == side]
    if found := [row[metric] for row in mine if row["phase"] == phase and metric in row]:
        return found
    errors = [row["error"] for row in mine if "error" in row]
    raise SideFailed(errors[0] if errors else message("bench_no_numbers", side=side))


def p95(numbers: Sequence[float]) -> float:
    """Return the least number that 95 % are not above (nearest rank)."""
    return sorted(numbers)[math.ceil(0.95 * len(numbers)) - 1]


def ratio(ours: Sequence[float], other: Sequence[float]) -> float:
    """Return how many times faster we are: the other's median seconds over ours."""
    return statistics.median(other) / statistics.median(ours)


def more_ms(ours: Sequence[float], other: Sequence[float]) -> float:
    """Return how many milliseconds more the median of ours takes than the other's."""
    return (statistics.median(ours) - statistics.median(other)) * 1e3


def machine(threads: int) -> dict[str, Any]:
    """Return what the numbers depend on: processor, cores, threads used, memory, system."""
    import psutil

    cpu = told_by_linux("cpuinfo", r"model name\s*: (.*)") or platform.processor()
    memory = round(psutil.virtual_memory().total / 1e9, 1)
    told = {"cpu": cpu, "cores": psutil.cpu_count(logical=False), "threads": threads, "memory_gb": memory}
    return told | {"system": platform.platform(), "python": platform.python_version()}


def told_by_linux(file: str, pattern: str) -> str:
    """Return what a file below /proc says; empty on other systems."""
    path = Path("/proc") / file
    found = re.search(pattern, path.read_text(encoding="utf-8")) if path.is_file() else None
    return found[1] if found else ""


def main() -> int:
    """Be a side: its description comes as the first line of input, then a request a line."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no reply
    answer: Callable[[Row], Row] | None = None
    for line in sys.stdin:
        request, reply = json.loads(line), Row()
        try:
            if answer is None:
                module, _, name = request["target"].partition(":")
                answer = getattr(import_module(module), name)(**request["arguments"])
                reply["numbers"] = {}
            else:
                reply["numbers"] = answer(request)
        except Exception as error:
            reply["error"] = " ".join(str(error).split()) or type(error).__name__
        print(json.dumps(reply), file=replies, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
