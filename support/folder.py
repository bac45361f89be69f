"""The folder of a run: one run at a time has it, and what cannot be written there is known as such.

    with hold(out):                  # makes the folder; another run that wants it is refused
        with writing(out / "a.csv"): # around whatever writes there
            ...

A run can lose its folder while it lasts: somebody removes it, and begins another run of the same
name. The logs of the two would then mix, since each row is appended to a file found by its name.
So a run keeps a lock file open in its folder, and `writing` looks whether that file is still there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows, where a folder with an open file cannot be removed anyway
    fcntl = None

LOCK = "lock"  # its name in the folder; it holds the number of the process
_held: dict[Path, int] = {}  # the folders that this process holds, and the open lock file of each


class RunFolderError(OSError):
    """Something could not be written to the folder of a run; the message says why."""


@contextlib.contextmanager
def hold(out: Path) -> Iterator[None]:
    """Make a folder if it is not there, and keep other runs out of it for a while.

    Raises SystemExit if another process holds it, or if it cannot be written. On a system or a disk
    without locks, nobody is kept out. A folder that this process holds already stays held.
    """
    out = Path(os.path.abspath(out))
    if out in _held:
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = take_lock(out / LOCK) if fcntl else None
    except OSError as error:
        raise SystemExit(f"{out} cannot be used: {error}") from None
    if descriptor is None:
        yield
        return
    _held[out] = descriptor
    try:
        yield
    finally:
        del _held[out]
        if is_open_as(out / LOCK, descriptor):
            (out / LOCK).unlink()
        os.close(descriptor)


def take_lock(path: Path) -> int:
    """Lock a file, which is made if it is not there, and write this process's number to it.

    The system lets go of the lock when the process ends, however it ends. Returns the open
    descriptor. Raises OSError if another process has the lock or the file cannot be written.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace")
            os.close(descriptor)
            raise OSError(f"process {holder or 'another'} is running in it") from None
        except OSError:  # a disk without locks
            pass
        if is_open_as(path, descriptor):
            os.truncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
            return descriptor
        os.close(descriptor)  # its holder ended and removed it just before we locked it: once more


def is_open_as(path: Path, descriptor: int) -> bool:
    """Is the file of this name the one that is open, and not a later one or none?"""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def is_lost(path: Path) -> bool:
    """Is this path in a folder that this process held, and that was removed or taken since? Of
    several such folders the innermost counts, which is that of one arm in a run of several."""
    path = Path(os.path.abspath(path))
    for folder in (path, *path.parents):
        if folder in _held:
            return not is_open_as(folder / LOCK, _held[folder])
    return False


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around whatever writes to a path in the folder of a run.

    Raises RunFolderError, before anything is written, if the folder is not this run's any more; and
    in place of any OSError or SafetensorError within.
    """
    if is_lost(path):
        raise RunFolderError("it was removed, or taken by another run, while this one wrote to it")
    try:
        yield
    except RunFolderError:
        raise
    except (OSError, SafetensorError) as error:
        raise RunFolderError(str(error)) from error
