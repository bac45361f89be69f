"""Shared by the tests: devices to run on, and a tiny policy that is made in a second and knows
nothing."""

import os

import pytest

# One thread, unless it is set: two are slower for models this small, beside any other process.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
import torch  # noqa: E402

from policy import load_policy
from support.warm_start import start_folder

TINY = {
    "episodes": 80,
    "window_steps": 2,
    "episode_steps": 2,
    "hidden": 32,
    "layers": 2,
    "vocabulary": 400,
}
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache folder of the tests' own, for what they build themselves."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_folder(cache):
    """A start with next to no training as a checkpoint folder: it babbles, which makes for ragged
    and malformed turns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACTFOCUS_CACHE", str(cache))
        return start_folder("frozenlake", **TINY)


@pytest.fixture(scope="session")
def bytes_folder(cache):
    """The same with single bytes for tokens: no tag is one token, so babble never opens a call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACTFOCUS_CACHE", str(cache))
        return start_folder("frozenlake", **TINY | {"vocabulary": 259, "episode_steps": 0})


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """The same as a policy."""
    return load_policy(tiny_folder)


@pytest.fixture(scope="session")
def start():
    """The committed checkpoint folder of FrozenLake's built-in model."""
    return start_folder("frozenlake")


@pytest.fixture(scope="session")
def built_in(start):
    """The policy that users get."""
    return load_policy(start)
