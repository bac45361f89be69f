"""Shared by the tests: devices to run on, and a tiny policy that is made in a second and knows nothing."""

import pytest
import torch

from policy import load_policy

TINY = {"episodes": 80, "window_steps": 2, "episode_steps": 2, "hidden": 32, "vocabulary": 400}
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache folder of the tests' own, for what they build themselves."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny(cache):
    """The built-in policy's code path with next to no training: it babbles, which makes for ragged and malformed turns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACTFOCUS_CACHE", str(cache))
        return load_policy(**TINY)


@pytest.fixture(scope="session")
def tiny_folder(tiny, tmp_path_factory):
    """The tiny policy as a checkpoint folder, for `--model`."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.save(folder)
    return folder


@pytest.fixture(scope="session")
def built_in():
    """The policy that users get, with its full warm start; made once and kept in the user's cache."""
    return load_policy()
