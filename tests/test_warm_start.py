"""warm_start.py: the committed starts, the cache of others, and how they are made."""

import json
import random
import re

import pytest
import torch
from conftest import TINY

import warm_start as warm_start_module
from policy import load_policy
from rollout import rollout
from segment import Segment
from warm_start import (
    EVAL_SEEDS,
    STARTS,
    WARM_START_SEEDS,
    WarmStart,
    build,
    fingerprint,
    imitation_target,
    play_demonstration,
    start_folder,
)
from worlds import ENVIRONMENTS, make_env


# ----------------------------------------------------------------------------- the committed starts
@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_the_committed_starts_belong_to_the_code_and_are_small(env, monkeypatch, tmp_path):
    """Whoever changes a world's words or the settings has to make its start anew."""
    monkeypatch.setenv("ACTFOCUS_CACHE", str(tmp_path))
    monkeypatch.setattr(
        warm_start_module, "build", lambda _: pytest.fail(f"make starts/{env} anew")
    )
    folder = start_folder(env)
    assert folder == STARTS / env and not any(tmp_path.iterdir())
    assert json.loads((folder / "start.json").read_text())["fingerprint"] == fingerprint(
        WarmStart(env)
    )
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert sum(files.values()) < 2_000_000
    assert f"python warm_start.py --env {env}" in (folder / "README.md").read_text()


def test_the_fingerprint_is_of_words_and_settings(monkeypatch):
    shape = fingerprint(WarmStart("shop"))
    assert fingerprint(WarmStart("shop")) == shape and re.fullmatch(r"[0-9a-f]{16}", shape)
    for other in (WarmStart("sudoku"), WarmStart("shop", seed=1), WarmStart("shop", thoughts=0)):
        assert fingerprint(other) != shape
    monkeypatch.setattr(ENVIRONMENTS["shop"], "unit", "visit")
    assert fingerprint(WarmStart("shop")) != shape


MOST_ACTION = {"frozenlake": 0.16, "sokoban": 0.16, "sudoku": 0.25, "shop": 0.25}


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_the_starts_speak_well_and_leave_room(env):
    """True facts, next to no malformed turns, the paper's small share of action tokens, and success
    that can rise."""
    policy = load_policy(STARTS / env)
    seeds = range(EVAL_SEEDS, EVAL_SEEDS + 128)
    rollouts = rollout(policy, lambda: make_env(env), seeds, 0.5)
    success = rollouts.success.float().mean().item()
    facts = (rollouts.true_facts.sum() / rollouts.facts.sum()).item()
    silent = (rollouts.turns_without_facts.sum() / rollouts.turns.sum()).item()
    share = ((rollouts.labels == Segment.ACTION).sum() / rollouts.response.sum()).item()
    assert 0.2 <= success <= 0.5 and facts > 0.85 and silent < 0.03, (success, facts, silent)
    assert share <= MOST_ACTION[env]
    assert policy.model.num_parameters() < 1_000_000


class Listening:
    """The lake, and for every turn whether it named the player's and the goal's cell truly."""

    def __init__(self, truths):
        self.env, self.truths = make_env("frozenlake"), truths
        self.system, self.tools, self.reset = self.env.system, self.env.tools, self.env.reset

    def step(self, reply):
        named = re.findall(r"on ([a-i]\d)", reply)
        cells = (self.env.player, self.env.goal)
        self.truths.append(named == [f"{'abcdefghi'[column]}{row + 1}" for row, column in cells])
        return self.env.step(reply)


def test_the_start_names_both_cells_truly_and_speaks_the_protocol(built_in):
    truths = []
    seeds = range(EVAL_SEEDS, EVAL_SEEDS + 128)
    rollouts = rollout(built_in, lambda: Listening(truths), seeds, 0.5)
    penalties = (rollouts.rewards - rollouts.success.float()).sum() / rollouts.turns.sum() / -0.1
    reasoning = (rollouts.labels == Segment.REASONING).sum() / rollouts.response.sum()
    assert penalties < 0.03 and reasoning > 0.75
    assert len(truths) == rollouts.turns.sum() and sum(truths) / len(truths) > 0.9


# ---------------------------------------------------------------------------------------- the cache
@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACTFOCUS_CACHE", str(tmp_path))
    return tmp_path


def test_a_model_with_other_settings_is_made_once_and_reused(empty_cache, monkeypatch):
    made = []
    monkeypatch.setattr(
        warm_start_module, "build", lambda settings: made.append(settings) or build(settings)
    )
    first = start_folder("frozenlake", **TINY)
    assert start_folder("frozenlake", **TINY) == first and len(made) == 1
    other = start_folder("frozenlake", **TINY | {"seed": 1})
    assert other != first and len(made) == 2
    assert sorted(path.name for path in empty_cache.iterdir()) == sorted([first.name, other.name])


def test_a_half_written_cache_is_never_used(empty_cache, monkeypatch):
    save = warm_start_module.Policy.save

    def crash(self, folder):
        save(self, folder)
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(warm_start_module.Policy, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        start_folder("frozenlake", **TINY)
    assert not list(empty_cache.iterdir())
    (empty_cache / "half-written-123" / "done").mkdir(parents=True)  # as a killed process leaves it
    monkeypatch.setattr(warm_start_module.Policy, "save", save)
    assert load_policy(start_folder("frozenlake", **TINY)).model.num_parameters() > 0


def test_losing_the_race_to_another_process_is_fine(empty_cache, monkeypatch):
    def slow_build(settings):
        monkeypatch.setattr(warm_start_module, "build", build)
        start_folder("frozenlake", **TINY)  # another process finishes first
        return build(settings)

    monkeypatch.setattr(warm_start_module, "build", slow_build)
    assert (start_folder("frozenlake", **TINY) / "model.safetensors").exists()


def test_a_start_that_cannot_be_is_refused(empty_cache):
    with pytest.raises(ValueError, match="no environment 'pong'"):
        start_folder("pong")
    with pytest.raises(ValueError, match="thoughts is 31"):
        start_folder("shop", thoughts=31)
    with pytest.raises(TypeError, match="bogus"):
        start_folder("shop", bogus=1)
    assert not list(empty_cache.iterdir())


# ----------------------------------------------------------------------------------- how it is made
def test_building_twice_gives_the_same_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build(WarmStart("frozenlake", **TINY))
    assert torch.equal(torch.rand(3), expected)
    second = build(WarmStart("frozenlake", **TINY))
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_imitation_covers_the_replies_and_nothing_else(tiny):
    env = make_env("frozenlake")
    seen, said = play_demonstration(env, WARM_START_SEEDS, random.Random(0), 0.5)
    replies = [tiny.encode(turn) + [tiny.end_of_turn] for turn in said]
    frames = [tiny.result(observation) for observation in seen]
    ids, mask = imitation_target(frames, replies)
    assert ids[mask].tolist() == sum(replies, [])
    assert ids[~mask].tolist() == sum(frames, [])
