"""Run a script that ends when the process that started it ends.

studies/compare.py starts it with the script and the script's flags.

A process that is killed cannot tell its children, and on their own they would train on. But the
system closes the pipes that a dead process held. So the parent keeps a pipe to this process's
standard input open, without ever writing to it; when the pipe ends, so does the script. It gets
a SIGTERM, on which a trainer finishes its iteration and saves a checkpoint.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading


def end_with_parent() -> None:
    """Wait until standard input ends, then ask this process to end."""
    while os.read(0, 1024):  # not sys.stdin, whose lock would be held when Python shuts down
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    del sys.argv[0]  # the script sees its own name and flags
    runpy.run_path(sys.argv[0], run_name="__main__")
