"""The process that executes one notebook, and ends with whoever started it.

Knows papermill, kernels and their sockets; knows nothing of runs. The order is a line of JSON on stdin;
stdin's end means that the runner is gone, however it died, and takes the kernel along.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any


def main() -> None:
    """Execute a notebook; a failing cell stands in the copy, all else is status 1 and a last line."""
    order = json.loads(sys.stdin.readline())
    Thread(target=_end_with_the_runner, args=(order["sockets"],), daemon=True).start()
    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of `X | None` parameters
    paths = [order[name].replace("{", "{{").replace("}", "}}") for name in ("notebook", "copy")]  # templates
    how = {"cwd": Path(order["notebook"]).parent, "kernel_name": "python3", "language": "python"}
    config = kernel_config(order["sockets"])
    try:
        papermill.execute_notebook(*paths, order["parameters"], progress_bar=False, config=config, **how)
    except papermill.PapermillExecutionError:
        pass  # the runner has rules of its own for what is an error
    except Exception as error:  # a kernel that died or never came up
        raise SystemExit(f"{type(error).__name__}: {error}") from None


def kernel_config(sockets: Path | str) -> Any:
    """Return the configuration of a kernel that talks over sockets in a folder: no ports, so no races.

    On Windows, and where the folder's name is too long for a socket, it is encrypted TCP.
    """
    from traitlets.config import Config

    if os.name == "nt" or len(str(sockets)) > 80:
        return Config(KernelManager={"transport_encryption": "auto"})
    return Config(KernelManager={"transport": "ipc", "connection_file": str(Path(sockets) / "kernel.json")})


def _end_with_the_runner(sockets: str) -> None:
    while os.read(0, 1024):
        pass
    import psutil

    for one in psutil.Process().children(recursive=True):
        with suppress(OSError, AttributeError):  # a kernel leads a group, where its children's orphans may be
            os.killpg(one.pid, signal.SIGKILL)
        with suppress(psutil.NoSuchProcess):
            one.kill()
    shutil.rmtree(sockets, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    main()
