"""A bench of toys: sides that answer with numbers written down beforehand, or fail in every way."""

import os
import subprocess
import sys
import threading
from pathlib import Path

from rag_kit.ops.bench import Plan
from rag_kit.ops.measure import Side

HERE = "tests.ops.sides"
SECONDS = {"ours": [9.0, 1.0, 2.0, 6.0], "other": [8.0, 2.0, 8.0, 6.0]}  # the first is the cold answer


def plan(settings, quick, repeats, threads):
    log = str(settings.root / "log.txt")
    sides = [Side(name, f"{HERE}:steady", {"name": name, "log": log}) for name in SECONDS]
    sides.append(Side("broken", f"{HERE}:raises", {}))
    requests = [{"turn": turn} for turn in range(4)]
    ratios = {
        "speed": (("ours", "answer_s", "warm"), ("other", "answer_s", "warm")),
        "share": (("ours", "answer_s", "warm"), [1.0, 3.0]),
        "lost": (("broken", "answer_s", "warm"), ("other", "answer_s", "warm")),
        "unmeasured": (("nobody", "answer_s", "warm"), [1.0]),
        "later": "尚未测量",
    }
    return Plan("玩具 about", sides, requests, 1 if quick else 2, ratios, ["a note"])


def steady(name, log):
    sys.stdout.write("a library's chatter\n")  # is no reply
    os.write(1, b"and that of C code\n")

    def answer(request):
        with Path(log).open("a", encoding="utf-8") as file:
            file.write(f"{request['turn']} {name}\n")
        threads = float(os.environ["OMP_NUM_THREADS"])
        return {"answer_s": SECONDS[name][request["turn"]], "tokens_per_s": 3.0, "threads": threads}

    return answer


def raises():
    raise ValueError("模型\n坏了")


def dies():
    def answer(request):
        sys.stderr.write("GGML_ASSERT failed\n")
        sys.stderr.flush()
        os._exit(3)

    return answer


def hangs():
    return lambda request: threading.Event().wait()


def heavy(megabytes):
    """Hold some memory, and as much again in a child."""
    hold = f"import sys\nheld = b'x' * {megabytes << 20}\nprint('held', flush=True)\nsys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    held = b"x" * (megabytes << 20)
    return lambda request: {"child": child.pid, "held": len(held)}
