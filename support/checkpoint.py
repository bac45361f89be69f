"""Stop and go on: what a run keeps, so that one that was killed goes on as if nothing had happened.

    python train_actfocus.py --resume runs/20261125-120000-frozenlake-seed0

A checkpoint is an arm between two iterations: weights, optimizer, random state, critic, the lengths
of the logs. It is written aside, synced and renamed; two are kept, none once the run is done. Going
on cuts the logs back and plays on from there: the same bytes, on a CPU with as many threads.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import sys
from pathlib import Path
from signal import SIGINT, SIGTERM, signal

import torch


class Checkpoints:
    """Those of one run. origin: what it starts from (settings, weights), which must not change.
    logs(out): the files that it appends to. While entered, Ctrl-C or SIGTERM ends it after the
    iteration; a second one, at once."""

    def __init__(self, out: Path, every: int, origin: dict, logs):
        self.out, self.every, self.origin, self.logs = out, every, origin, logs
        self.folder, self.interrupted, self.state = out / "checkpoints", False, {"arm": None}

    def go_on(self) -> str:
        """Take up the last checkpoint and return its arm. ValueError: the run cannot go on."""
        for path in sorted(self.folder.glob("*.pt"), reverse=True):
            if path.stem.endswith(checksum(path)):
                break
            print(f"note: {path} is damaged; going on from the one before it", file=sys.stderr)
        else:
            raise ValueError(f"{self.folder} holds no checkpoint: the run is done, or never began")
        try:
            self.state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} is no checkpoint: {str(error).splitlines()[0]}") from None
        for name, was in self.state["origin"].items():
            if self.origin[name] != was:
                raise ValueError(f"{name} was {was} and is now {self.origin[name]}")
        cut_back(self.logs(self.out), self.state["logs"])
        return self.state["arm"]

    def restore(self, arm: str, parts: dict, rng: random.Random) -> int:
        """Make an arm's parts what they were; returns its next iteration (0: it had not begun)."""
        state, self.state = self.state, {"arm": None}  # it may be large
        if state["arm"] != arm or state["iteration"] == 0:
            return 0
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        rng.setstate(state["rng"])
        return state["iteration"]

    def keep(self, arm: str, iteration: int, parts: dict, rng, last: bool, sound: bool) -> None:
        """Save what comes before an iteration if it is time; end the run if it was interrupted."""
        if self.every and sound and (iteration % self.every == 0 or last or self.interrupted):
            states = {name: part.state_dict() for name, part in parts.items()}
            self.save({"arm": arm, "iteration": iteration, "parts": states, "rng": rng.getstate()})
        if self.interrupted:
            raise SystemExit(f"interrupted after row {iteration - 1} of {arm}.csv; {self.again()}")

    def again(self) -> str:
        """What to do about a run that has ended early."""
        if self.every:
            return f"to go on: python {sys.argv[0]} --resume {self.out}"
        return "it cannot go on, since --checkpoint-every is 0"

    def save(self, state: dict) -> None:
        """Write a checkpoint, then forget the third last. Raises OSError."""
        self.folder.mkdir(exist_ok=True)
        lengths = {log.name: sync(log) for log in self.logs(self.out)}
        earlier, partial = sorted(self.folder.glob("*.pt")), self.folder / "half-written"
        try:
            torch.save(state | {"origin": self.origin, "logs": lengths}, partial)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(f"{partial}: {error}") from None
        number = int(earlier[-1].stem.partition("-")[0]) + 1 if earlier else 0
        partial.rename(self.folder / f"{number:06}-{checksum(partial)}.pt")
        sync(self.folder)
        for old in earlier[:-1]:
            old.unlink()

    def __enter__(self) -> Checkpoints:
        self.before = {each: signal(each, self.interrupt) for each in (SIGINT, SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal(number, handler)

    def interrupt(self, number: int, frame) -> None:
        if self.interrupted or not self.every:
            raise KeyboardInterrupt
        self.interrupted = True
        os.write(2, b"\nending after this iteration; once more ends at once\n")  # amid a print?


def cut_back(logs: list[Path], lengths: dict[str, int]) -> None:
    """Cut logs to these lengths in bytes, by name; remove one without. ValueError: one is less."""
    found = {log.name: log.stat().st_size for log in logs}
    lost = [name for name, length in lengths.items() if found.get(name, 0) < length]
    if lost:
        raise ValueError(f"{', '.join(lost)} is shorter than when it was saved: put it back")
    for log in logs:
        if log.name in lengths:
            os.truncate(log, lengths[log.name])
        else:
            log.unlink()


def sync(path: Path) -> int:
    """Have a file, or the names in a folder, survive a power cut. Returns its length in bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return path.stat().st_size


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
