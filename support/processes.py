"""Scripts in processes of their own, several at a time: arms of a run, cells of a comparison.

    with Interruption() as interruption:
        for finished in side_by_side(work, jobs, usable_cores(), interruption):
            ...                                  # work calls `run_script`

A process that is killed cannot tell its children, and on their own they would train on. But the
system closes the pipes that a dead process held. So `run_script` keeps a pipe to the standard input
of the child open, without ever writing to it, and the child runs its script inside this module:

    python -m support.processes SCRIPT FLAGS     # what `run_script` starts

When the pipe ends, because the parent died or because it asks the child to end, the script gets a
SIGTERM, on which a trainer finishes its iteration and saves a checkpoint.
"""

from __future__ import annotations

import math
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TextIO, TypeVar

ROOT = Path(__file__).parents[1]
Job = TypeVar("Job")
Result = TypeVar("Result")


# ------------------------------------------------------------------------------------ interruptions
class Interruption:
    """Notes Ctrl-C and SIGTERM while it is entered as a context manager, in the main thread.

    asked: has there been one? Then what is being done is to be brought to a good end. at_once: has
    there been a second one? Work in processes is then ended, and other work by a KeyboardInterrupt.
    patient: False if there is no good end, so that the first one counts as a second.
    """

    def __init__(self, patient: bool = True) -> None:
        self.patient = patient
        self.asked = False
        self.at_once = False
        self.in_processes = False

    def __enter__(self) -> Interruption:
        both = (signal.SIGINT, signal.SIGTERM)
        self.handlers_before = {each: signal.signal(each, self.handle) for each in both}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame) -> None:
        """What a signal calls."""
        if self.asked or not self.patient:
            self.asked = True
            self.at_once = True
            if not self.in_processes:
                raise KeyboardInterrupt
            return
        self.asked = True
        # not `print`, which this signal may have interrupted
        os.write(2, b"\nending after this iteration; once more ends at once\n")


# ------------------------------------------------------------------------------- several at a time
def side_by_side(
    work: Callable[[Job], Result], jobs: Sequence[Job], at_once: int, interruption: Interruption
) -> Iterator[list[tuple[Job, Result | None]]]:
    """Call `work` on each job, in `at_once` threads, so that as many processes run.

    Yields a list at least twice a second: the jobs that have finished since the one before, each
    with what `work` returned. Once there is an interruption, no more jobs begin: for each of them
    the result is None. Whatever ends this early, such as an error in `work`, ends the jobs as an
    interruption does.
    """

    def begin(job: Job) -> Result | None:
        if interruption.asked:
            return None
        try:
            return work(job)
        except BaseException:
            interruption.asked = True
            raise

    interruption.in_processes = True
    with ThreadPoolExecutor(at_once) as pool:
        running = {pool.submit(begin, job): job for job in jobs}
        try:
            while running:
                done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                yield [(running.pop(task), task.result()) for task in done]
        except BaseException:  # also what is raised where this is iterated over
            interruption.asked = True
            raise
    interruption.in_processes = False


def run_script(
    command: Sequence[str], output: TextIO, interruption: Interruption, threads: int | None = None
) -> int:
    """Run a script in a process of its own, until its end. Returns its exit code.

    command: the script and its flags. output: the file that stdout and stderr go to, in UTF-8.
    threads: that torch may use; None for as many as without a parent. The process ends if this one
    does, and an interruption is passed on to it: it may end well on the first, not on a second.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONIOENCODING": "utf-8",
        "PYTHONUNBUFFERED": "1",  # so that what it says can be read while it runs
        "TQDM_DISABLE": "1",  # a bar is for a terminal
    }
    if threads is not None:
        environ["OMP_NUM_THREADS"] = str(threads)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "support.processes", *command],
        env=environ,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        # Ctrl-C in a terminal reaches this process alone, which passes it on once.
        process_group=0,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
    )
    with process.stdin as pipe:
        while process.poll() is None:
            if interruption.asked:
                pipe.close()
            if interruption.at_once:
                process.kill()
            time.sleep(0.1)
    return process.wait()


def last_line(path: Path) -> str:
    """The last line that a script has said; "" if it said nothing."""
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


# ------------------------------------------------------------------------------------------- cores
def usable_cores(system: Path = Path("/")) -> int:
    """How many cores this process can keep busy, at least 1: as many as it may run on, and no more
    than the quota of its control group, which is how a container is limited. On systems without
    either, it is the number of cores of the machine. system: where /proc and /sys are.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, int(min(cores, quota(system))))


def quota(system: Path) -> float:
    """How many cores' time the control groups of this process allow; infinity without a limit.

    A limit may stand at the group itself or at any group above it. Inside a container the group
    may be mounted as the uppermost one, under another path than the process is told.
    """
    try:
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return math.inf
    least = math.inf
    for line in lines:  # as 0::/user.slice (version 2) or 4:cpu,cpuacct:/docker/1f (version 1)
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = system / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            least = min(least, quota_of_group(folder))
            if folder == top:
                break
    return least


def quota_of_group(folder: Path) -> float:
    """The limit of one control group, which gives microseconds of computing in a period."""
    try:
        if (folder / "cpu.max").exists():  # version 2
            allowed, period = (folder / "cpu.max").read_text().split()
        else:
            allowed = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return math.inf if int(allowed) < 0 else int(allowed) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return math.inf


# --------------------------------------------------------------------------------------- the child
def end_with_parent() -> None:
    """Wait until standard input ends, then ask this process to end."""
    while os.read(0, 1024):  # not sys.stdin, whose lock would be held when Python shuts down
        pass
    signal.raise_signal(signal.SIGTERM)  # unlike os.kill, it can be handled on Windows as well


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    del sys.argv[0]  # the script sees its own name and flags
    runpy.run_path(sys.argv[0], run_name="__main__")
