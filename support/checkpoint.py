"""Checkpoints: a run that was interrupted or killed is resumed as if nothing had happened.

    python train_actfocus.py --resume runs/20261125-120000-frozenlake-seed0

A checkpoint holds the state of one arm between two iterations: weights, optimizer, random state,
the critic if there is one, and how long each log was. It is written under another name, synced to
the disk and then renamed, so that a half-written one is never taken for a whole one. The last two
are kept while the run lasts, and none after its end.

Resuming cuts the logs back to where the checkpoint was made and continues from there. On a CPU, and
with as many threads as before, the run then writes the same bytes as one that nothing stopped.

A run of several arms is a folder of runs of one arm each, and each of them has its own checkpoints.
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
from typing import Any, Protocol

import torch

from support.folder import is_lost, writing
from support.processes import Interruption
from worlds.imported import is_imported


class Stateful(Protocol):
    """Anything that training changes: a model, an optimizer, a critic."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> Any: ...


class Checkpoints:
    """The checkpoints of a run of one arm, in out/checkpoints.

    out: the run's folder. whole: the folder that --resume is given to go on with it: `out`, or the
    folder above it, of a run of several arms. every: the number of iterations between checkpoints;
    0 for none. origin: what the run starts from (its settings, a hash of its weights); a resumed
    run must have the same. list_logs(out): the files that the run appends to, as far as they exist.
    interruption: once it is asked for, the run ends after the present iteration, with a checkpoint.
    """

    def __init__(
        self,
        out: Path,
        whole: Path,
        every: int,
        origin: dict,
        list_logs: Callable[[Path], list[Path]],
        interruption: Interruption,
    ) -> None:
        self.out = out
        self.whole = whole
        self.every = every
        self.origin = origin
        self.list_logs = list_logs
        self.interruption = interruption
        self.folder = out / "checkpoints"
        self.loaded: dict = {"iteration": 0}  # from `load_latest` until `restore` has used it

    # ------------------------------------------------------------------------------------ resuming
    def load_latest(self) -> None:
        """Load the newest undamaged checkpoint, and cut the logs back to it.

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

    def newest_undamaged(self) -> Path:
        """The newest checkpoint whose checksum, which its name ends with, is right."""
        for path in sorted(self.folder.glob("*.pt"), reverse=True):
            if path.stem.endswith(checksum(path)):
                return path
            print(f"note: {path} is damaged; resuming from the one before it", file=sys.stderr)
        raise ValueError(f"{self.folder} holds no checkpoint: the run is done, or never began")

    def restore(self, stateful: dict[str, Stateful], rng: random.Random) -> int:
        """Give the arm the state that `load_latest` has found.

        stateful: what training changes, by name; changed in place, as rng is. Returns the iteration
        that comes next: 0 if the arm had not begun.
        """
        loaded = self.loaded
        self.loaded = {"iteration": 0}  # frees what may be large
        if loaded["iteration"] == 0:
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
            if due or last or self.interruption.asked:
                states = {name: each.state_dict() for name, each in stateful.items()}
                state = {"iteration": next_iteration, "stateful": states, "rng": rng.getstate()}
                self.save(state)
        if self.interruption.asked:
            row = next_iteration - 1
            raise SystemExit(f"interrupted after row {row} of {arm}.csv; {self.how_to_resume()}")

    def how_to_resume(self) -> str:
        """What to do about a run that has ended early, as the end of a sentence."""
        return how_to_resume(self.whole, self.every, self.origin.get("env", ""))

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


def how_to_resume(out: Path, every: int, env: str) -> str:
    """What to do about a run that has ended early, as the end of a sentence. out: its folder.
    every: the number of iterations between its checkpoints."""
    if not every:
        return "it cannot be resumed, since --checkpoint-every is 0"
    if is_lost(out):
        return "it cannot be resumed, since its checkpoints were there"
    command = ["python", sys.argv[0], "--resume", str(out)]
    if is_imported(env):
        command += ["--env", env]
    return f"resume it with: {shlex.join(command)}"


def has_checkpoint(out: Path) -> bool:
    """Is there something to resume in the folder of a run of one arm?"""
    return any((out / "checkpoints").glob("*.pt"))


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
