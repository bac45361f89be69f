"""Checkpoints: a run that was interrupted or killed is resumed as if nothing had happened.

    python train_actfocus.py --resume runs/20261125-120000-frozenlake-seed0

A checkpoint holds the state of one arm between two iterations: weights, optimizer, random state,
the critic if there is one, and how long each log was. It is written under another name, synced to
the disk and then renamed, so that a half-written one is never taken for a whole one. The last two
are kept while the run lasts, and none after its end.

Resuming cuts the logs back to where the checkpoint was made and continues from there. On a CPU, and
with as many threads as before, the run then writes the same bytes as one that nothing stopped.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT, SIGTERM, signal
from typing import Any, Protocol

import torch

from support.folder import is_lost, writing
from worlds.imported import is_imported


class Stateful(Protocol):
    """Anything that training changes: a model, an optimizer, a critic."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> Any: ...


class Checkpoints:
    """The checkpoints of one run, in out/checkpoints.

    out: the run's folder. every: the number of iterations between checkpoints; 0 for none. origin:
    what the run starts from (its settings, a hash of its weights); a resumed run must have the
    same. list_logs(out): the files that the run appends to, as far as they exist.

    While it is entered as a context manager, Ctrl-C or SIGTERM ends the run after the present
    iteration, with a checkpoint; a second one ends it at once.
    """

    def __init__(
        self, out: Path, every: int, origin: dict, list_logs: Callable[[Path], list[Path]]
    ) -> None:
        self.out = out
        self.every = every
        self.origin = origin
        self.list_logs = list_logs
        self.folder = out / "checkpoints"
        self.interrupted = False
        self.loaded: dict = {"arm": None}  # from `load_latest` until `restore` has used it

    # ------------------------------------------------------------------------------------ resuming
    def load_latest(self) -> str:
        """Load the newest undamaged checkpoint, cut the logs back to it, and return its arm.

        Raises ValueError if there is none, or if the run had another origin; nothing is changed
        then.
        """
        path = self.newest_undamaged()
        try:
            self.loaded = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        except (RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} is no checkpoint: {str(error).splitlines()[0]}") from None
        for name, before in self.loaded["origin"].items():
            now = self.origin.get(name)
            if now != before:
                raise ValueError(
                    f"{name} was {before} and is now {now}: a run is resumed with what it began "
                    "with, from the commit that began it"
                )
        cut_back(self.list_logs(self.out), self.loaded["logs"])
        return self.loaded["arm"]

    def newest_undamaged(self) -> Path:
        """The newest checkpoint whose checksum, which its name ends with, is right."""
        for path in sorted(self.folder.glob("*.pt"), reverse=True):
            if path.stem.endswith(checksum(path)):
                return path
            print(f"note: {path} is damaged; resuming from the one before it", file=sys.stderr)
        raise ValueError(f"{self.folder} holds no checkpoint: the run is done, or never began")

    def restore(self, arm: str, stateful: dict[str, Stateful], rng: random.Random) -> int:
        """Give an arm the state that `load_latest` found, if it found this arm's.

        stateful: what training changes, by name; changed in place, as rng is. Returns the iteration
        that comes next: 0 for an arm that had not begun.
        """
        loaded = self.loaded
        self.loaded = {"arm": None}  # frees what may be large
        if loaded["arm"] != arm or loaded["iteration"] == 0:
            return 0
        for name, each in stateful.items():
            each.load_state_dict(loaded["stateful"][name])
        rng.setstate(loaded["rng"])
        return loaded["iteration"]

    # -------------------------------------------------------------------------------------- saving
    def maybe_save(
        self, arm: str, next_iteration: int, stateful: dict[str, Stateful], rng: random.Random,
        *, last: bool, healthy: bool,
    ) -> None:  # fmt: skip
        """Save the state before the next iteration if it is time for it.

        last: is the arm done? Then it is always time. healthy: is this a state to resume from (the
        weights are finite, and the last update was not left out)? Nothing else is saved. Raises
        SystemExit if the run was interrupted.
        """
        if self.every and healthy:
            due = next_iteration % self.every == 0
            if due or last or self.interrupted:
                states = {name: each.state_dict() for name, each in stateful.items()}
                state = {"arm": arm, "iteration": next_iteration}
                self.save(state | {"stateful": states, "rng": rng.getstate()})
        if self.interrupted:
            row = next_iteration - 1
            raise SystemExit(f"interrupted after row {row} of {arm}.csv; {self.how_to_resume()}")

    def how_to_resume(self) -> str:
        """What to do about a run that has ended early, as the end of a sentence."""
        if not self.every:
            return "it cannot be resumed, since --checkpoint-every is 0"
        if is_lost(self.out):
            return "it cannot be resumed, since its checkpoints were there"
        command = ["python", sys.argv[0], "--resume", str(self.out)]
        if is_imported(self.origin.get("env", "")):
            command += ["--env", self.origin["env"]]
        return f"resume it with: {shlex.join(command)}"

    def save(self, state: dict) -> None:
        """Write a checkpoint and delete all but the newest two. Raises RunFolderError, which is an
        OSError, on a full disk."""
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
            lengths = {log.name: sync(log) for log in self.list_logs(self.out)}
            earlier = sorted(self.folder.glob("*.pt"))
            number = int(earlier[-1].stem.partition("-")[0]) + 1 if earlier else 0
            half_written = self.folder / "half-written"
            try:
                torch.save(state | {"origin": self.origin, "logs": lengths}, half_written)
            except RuntimeError as error:  # torch's name for a full disk
                raise OSError(f"{half_written}: {error}") from None
            sync(half_written)
            half_written.rename(self.folder / f"{number:06}-{checksum(half_written)}.pt")
            sync(self.folder)
            for old in earlier[:-1]:
                old.unlink()

    # ------------------------------------------------------------------------------- interruptions
    def __enter__(self) -> Checkpoints:
        self.handlers_before = {each: signal(each, self.interrupt) for each in (SIGINT, SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers_before.items():
            signal(number, handler)

    def interrupt(self, number: int, frame) -> None:
        """Handle a signal: the first one is noted, a second one ends the run at once."""
        if self.interrupted or not self.every:
            raise KeyboardInterrupt
        self.interrupted = True
        # not `print`, which this signal may have interrupted
        os.write(2, b"\nending after this iteration; once more ends at once\n")


def cut_back(logs: list[Path], lengths: dict[str, int]) -> None:
    """Cut logs back to their lengths, in bytes by name; a log without a length is removed.

    Raises ValueError, before anything is changed, if a log is shorter than that or missing.
    """
    sizes = {log.name: log.stat().st_size for log in logs}
    lost = [name for name, length in lengths.items() if sizes.get(name, 0) < length]
    if lost:
        raise ValueError(f"{', '.join(lost)} is shorter than when it was saved: put it back")
    for log in logs:
        if log.name in lengths:
            os.truncate(log, lengths[log.name])
        else:
            log.unlink()


def sync(path: Path) -> int:
    """Make a file, or the names in a folder, survive a power cut. Returns its length in bytes.

    Windows can neither open a folder nor sync a file that is open for reading; it is left to
    write them when it likes.
    """
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return path.stat().st_size


def checksum(path: Path) -> str:
    """The first 16 hex digits of the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
