"""Where a worker process begins: it ends with its parent, also when that is killed and the worker is at work."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time

LOOK_EVERY_S = 0.5


def main() -> None:
    """Serve the parent: the arguments are its process id, then the two pipes, as TVM's worker takes them."""
    parent = int(sys.argv.pop(1))
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    from tvm.exec import popen_worker  # slow: the parent may be gone by then

    with contextlib.suppress(OSError):  # nobody reads the answer any more
        popen_worker.main()


def _end_with(parent: int) -> None:
    """End this process and what it began, once its parent has."""
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY_S)
    os.killpg(0, signal.SIGKILL)
