"""warm_start.py: the committed starts, the cache of others, and how they are made."""

import copy
import json
import math
import random
import re
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import TINY
from test_policy import THINKING_TEMPLATE, as_text, foreign_checkpoint

from envs import read_call, write_turn
from policy import load_policy
from rollout import rollout
from support import warm_start as warm_start_module
from support.warm_start import (
    CHAT_TEMPLATE,
    EVAL_SEEDS,
    STARTS,
    WARM_START_SEEDS,
    Judged,
    Liveness,
    WarmStart,
    build,
    demonstrations,
    fingerprint,
    imitate,
    imitation_target,
    main,
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
    assert f"python -m support.warm_start --env {env}" in (folder / "README.md").read_text()


def test_the_fingerprint_is_of_words_and_settings(monkeypatch):
    shape = fingerprint(WarmStart("shop"))
    assert fingerprint(WarmStart("shop")) == shape and re.fullmatch(r"[0-9a-f]{16}", shape)
    for other in (WarmStart("sudoku"), WarmStart("shop", seed=1), WarmStart("shop", thoughts=0)):
        assert fingerprint(other) != shape
    monkeypatch.setattr(ENVIRONMENTS["shop"], "unit", "visit")
    assert fingerprint(WarmStart("shop")) != shape


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_asking_for_the_worlds_own_is_asking_for_nothing(env, tmp_path, monkeypatch):
    """The same model, and so the same fingerprint: the committed one serves."""
    monkeypatch.setenv("ACTFOCUS_CACHE", str(tmp_path))
    monkeypatch.setattr(warm_start_module, "build", lambda *_: pytest.fail("it is made anew"))
    world = make_env(env)
    usual = fingerprint(WarmStart(env))
    for asked in ({"thoughts": world.thoughts}, {"skill": world.skill}):
        assert fingerprint(WarmStart(env, **asked)) == usual
        assert start_folder(env, **asked) == start_folder(env)
    both = {"thoughts": world.thoughts, "skill": world.skill, "seed": 1}
    assert fingerprint(WarmStart(env, **both)) == fingerprint(WarmStart(env, seed=1)) != usual
    for other in ({"thoughts": world.thoughts - 1}, {"skill": 0.9}):
        assert fingerprint(WarmStart(env, **other)) != usual


AIMS = {  # least and most success, least share of true facts, largest share of action tokens
    "frozenlake": (0.25, 0.5, 0.9, 0.16),
    "sokoban": (0.12, 0.5, 0.9, 0.16),
    "sudoku": (0.15, 0.5, 0.95, 0.25),
    "shop": (0.12, 0.5, 0.65, 0.25),
    "frozenlake-planned": (0.25, 0.5, 0.9, 0.16),
}


SAID = re.compile(
    r"temperature 0\.5: success (.+)%, (.+)% of the (?:stated )?facts true, "
    r"(.+)% of the turns without(?: facts)?, (?:.+% malformed, )?(.+)% (?:action tokens|of the)"
)


def said_of(env):
    """What the README of a start says of its 128 episodes at temperature 0.5, as shares: success,
    true facts, turns without a fact, action tokens."""
    found = SAID.search((STARTS / env / "README.md").read_text())
    return [float(each) / 100 for each in found.groups()]


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_the_starts_speak_well_and_leave_room(env):
    """True facts, next to no turns without any, the paper's small share of action tokens, and
    success that can rise: by what their READMEs say."""
    least, most, truth, largest = AIMS[env]
    success, facts, silent, share = said_of(env)
    assert least <= success <= most and facts > truth and silent < 0.03 and share <= largest
    assert load_policy(STARTS / env).model.num_parameters() < 1_000_000


class Listening:
    """A world, and of each of its turns whether it named the player's and the goal's cell truly,
    as the turns of the lake do."""

    def __init__(self, name, truths):
        self.env, self.truths = make_env(name), truths
        self.system, self.tools, self.reset = self.env.system, self.env.tools, self.env.reset

    def step(self, reply):
        if hasattr(self.env, "goal"):
            named = re.findall(r"on ([a-i]\d)", reply)
            cells = (self.env.player, self.env.goal)
            true = [f"{'abcdefghi'[column]}{row + 1}" for row, column in cells]
            self.truths.append(named == true)
        return self.env.step(reply)


@pytest.fixture(scope="module", params=ENVIRONMENTS)
def replayed(request):
    """The first 32 of the 128 episodes that a start's README speaks of, played again."""
    truths = []
    seeds = range(EVAL_SEEDS, EVAL_SEEDS + 32)
    policy, env = load_policy(STARTS / request.param), request.param
    return env, rollout(policy, lambda: Listening(env, truths), seeds, 0.5), truths


def test_a_start_plays_as_its_readme_says(replayed):
    """Within what 32 episodes of 128 can differ: three standard errors of the success, and little
    in what is measured on hundreds of turns and thousands of tokens."""
    env, rollouts, _ = replayed
    success, facts, silent, share = said_of(env)
    found = rollouts.success.float().mean().item()
    assert found > 0 and abs(found - success) < 3 * math.sqrt(success * (1 - success) / 32)
    found_facts = (rollouts.true_facts.sum() / rollouts.facts.sum()).item()
    assert found_facts == pytest.approx(facts, abs=0.03)
    found_silent = (rollouts.turns_without_facts.sum() / rollouts.turns.sum()).item()
    assert found_silent == pytest.approx(silent, abs=0.02)
    found_share = (rollouts.action.sum() / rollouts.response.sum()).item()
    assert found_share == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("replayed", ["frozenlake"], indirect=True)
def test_the_start_names_both_cells_truly_and_speaks_the_protocol(replayed):
    _, rollouts, truths = replayed
    penalties = (rollouts.rewards - rollouts.success.float()).sum() / rollouts.turns.sum() / -0.1
    reasoning = rollouts.reasoning.sum() / rollouts.response.sum()
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


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "start.json"])
@pytest.mark.parametrize("how", ["cut", "a flipped bit"])
def test_a_damaged_cache_is_named_and_made_anew(name, how, tiny_folder, empty_cache, capsys):
    folder = shutil.copytree(tiny_folder, empty_cache / tiny_folder.name)
    assert start_folder("frozenlake", **TINY) == folder
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    content = bytearray(good[name])
    if how == "cut":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 4] ^= 4
    (folder / name).write_bytes(content)
    assert start_folder("frozenlake", **TINY) == folder
    assert f"note: {folder} is damaged and is made anew" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == good


def test_a_damaged_committed_start_is_refused(empty_cache, tmp_path, monkeypatch):
    shutil.copytree(STARTS / "frozenlake", tmp_path / "starts" / "frozenlake")
    monkeypatch.setattr(warm_start_module, "STARTS", tmp_path / "starts")
    weights = tmp_path / "starts" / "frozenlake" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    assert start_folder("frozenlake") == weights.parent
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: `git checkout"):
        start_folder("frozenlake")


def test_the_home_folder_is_only_asked_for_without_a_cache_of_ones_own(tmp_path, monkeypatch):
    """A service's user may have none: Path.home() raises there."""
    home = warm_start_module.Path.home
    monkeypatch.setattr(warm_start_module.Path, "home", lambda: pytest.fail("home was asked for"))
    monkeypatch.setenv("ACTFOCUS_CACHE", str(tmp_path))
    assert warm_start_module.cache_folder() == tmp_path
    monkeypatch.setattr(warm_start_module.Path, "home", home)
    monkeypatch.delenv("ACTFOCUS_CACHE")
    assert warm_start_module.cache_folder() == home() / ".cache" / "actfocus"


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


# --------------------------------------------------------------------------------- is a start live?
@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_the_scripted_player_plays_best_calls_as_often_as_its_skill_says(env):
    """By the same judge as a model: always with skill 1, never with skill 0 (where there are other
    calls), and no call is written of that the world would not take."""
    for skill, expected in ((1.0, 1.0), (0.0, 0.0)):
        world, rng = Judged(make_env(env)), random.Random(0)
        for seed in range(20):
            world.reset(seed)
            while not world.env.done:
                for call in world.env.choices()[1]:
                    turn = write_turn("", call.name, call.arguments)
                    assert read_call(turn, world.tools)[0] == call
                world.step(world.env.demonstrate(rng, skill))
        assert sum(world.hits) / len(world.hits) == expected
        assert all(0 < chance < 1 for chance in world.chances)


def test_chance_is_what_calls_at_random_come_to():
    world, rng = Judged(make_env("sokoban")), random.Random(0)
    for seed in range(300):
        world.reset(seed)
        while not world.env.done:
            call = rng.choice(world.env.choices()[1])
            world.step(write_turn("", call.name, call.arguments))
    chance = sum(world.chances) / len(world.chances)
    assert sum(world.hits) / len(world.hits) == pytest.approx(chance, abs=0.03)


def test_a_turn_without_a_call_is_no_best_one_and_a_lost_level_has_none():
    world = Judged(make_env("frozenlake"))
    world.reset(0)
    world.step("no call")
    assert world.hits == [False] and world.chances[0] in (0.25, 0.5)
    level = Judged(make_env("sokoban"))
    level.reset(0)
    level.env.boxes = ((-9, -9),)  # out of reach
    level.step("no call")
    assert level.hits == [] == level.chances


@pytest.mark.parametrize(
    "figures, live",
    [
        ((0.31, 0.20, 0.45, 0.30), True),
        ((0.29, 0.20, 0.45, 0.30), False),  # a ratio of 1.45
        ((0.31, 0.20, 0.39, 0.30), False),  # nine points above chance
        ((0.10, 0.00, 0.45, 0.30), True),
        ((0.00, 0.00, 0.45, 0.30), False),
    ],
)
def test_the_rule_of_live_starts(figures, live):
    assert Liveness(*figures).live == live
    assert str(Liveness(*figures)).startswith("live: " if live else "not live: ")


def test_the_script_checks_a_start_and_writes_nothing(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACTFOCUS_CACHE", str(tmp_path))
    main(["--env", "frozenlake", "--check"])
    said = capsys.readouterr().out
    assert said.startswith("frozenlake is ") and "of the calls at 1 are best ones" in said
    assert not any(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        main(["--env", "frozenlake", "--check", "--model", "any"])
    assert "leave out --model" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- the script
@pytest.fixture
def quick(monkeypatch):
    """Measured over four episodes and checked over two, instead of hundreds, of at most 900 tokens:
    untaught models babble as long as they may."""
    check = warm_start_module.check
    monkeypatch.setattr(warm_start_module, "check", lambda policy, where: check(policy, where, 2))
    measure = warm_start_module.measure

    def quickly(policy, settings, temperature, episodes=0, max_tokens=0):
        return measure(policy, settings, temperature, episodes=4, max_tokens=900)

    monkeypatch.setattr(warm_start_module, "measure", quickly)


def test_the_script_makes_a_start_with_all_that_belongs_to_it(quick, tmp_path, monkeypatch):
    small = ["--episodes", "320", "--window-steps", "1", "--episode-steps", "1"]
    main(["--env", "shop", "--thoughts", "2", *small, "--out", str(tmp_path / "shop")])
    stamp = json.loads((tmp_path / "shop" / "start.json").read_text())
    settings = WarmStart("shop", thoughts=2, episodes=320, window_steps=1, episode_steps=1)
    assert stamp["fingerprint"] == fingerprint(settings) and stamp["vocabulary"] == 800
    text = (tmp_path / "shop" / "README.md").read_text()
    assert "python -m support.warm_start --env shop" in text and text.count("success") == 3
    assert "Over 512 other boards it is not live: " in text
    monkeypatch.setattr(warm_start_module, "STARTS", tmp_path)
    found = start_folder("shop", thoughts=2, episodes=320, window_steps=1, episode_steps=1)
    assert found == tmp_path / "shop" and load_policy(found).model.num_parameters() > 300_000


def test_the_script_teaches_a_checkpoint_without_writing_over_it(
    quick, tiny_folder, tmp_path, capsys
):
    before = (tiny_folder / "model.safetensors").read_bytes()
    command = ["--env", "sokoban", "--model", str(tiny_folder)]
    with pytest.raises(SystemExit):
        main(command)
    assert "needs --out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--env", "sokoban", "--seed", "1"])  # would replace starts/sokoban
    assert "needs --out" in capsys.readouterr().err
    small = ["--episodes", "6", "--window-steps", "12", "--lr", "1e-3"]
    main([*command, *small, "--out", str(tmp_path / "taught")])
    said = capsys.readouterr().out
    assert "before: temperature 0.5" in said and "after:  temperature 0.5" in said
    assert said.count("100.0% malformed") == 2  # it still babbles
    assert (tiny_folder / "model.safetensors").read_bytes() == before
    taught, untaught = load_policy(tmp_path / "taught"), load_policy(tiny_folder)
    env = make_env("sokoban")
    seen, turns = play_demonstration(env, WARM_START_SEEDS, random.Random(0), 1.0)
    losses = []
    for policy in (untaught, taught):  # of a demonstrated turn
        frame, reply = policy.result(seen[0]), policy.encode(turns[0])
        hidden = policy.hidden(torch.tensor([frame + reply]))[0, len(frame) - 1 : -1]
        logprob = (hidden @ policy.head.T).log_softmax(-1)
        losses.append(-logprob.gather(1, torch.tensor(reply)[:, None]).mean().item())
    assert losses[1] < losses[0] - 0.1


def test_what_cannot_be_taught_is_refused_in_a_sentence(tiny_folder, tmp_path, capsys, monkeypatch):
    class Mute:  # a user's world, which demonstrates nothing
        system, tools, done = "s", [], False

    monkeypatch.setitem(ENVIRONMENTS, "mute", Mute)
    teach = ["--model", str(tiny_folder), "--out", str(tmp_path / "out")]
    for flags, said in (
        (["--env", "mute", *teach], "mute has no demonstrations"),
        (["--window-steps", "0", *teach], "there must be a step"),
        (["--episodes", "3", *teach], "at least 4 --episodes"),
        (["--episodes", "7", "--out", str(tmp_path / "out")], "at least 8 --episodes"),
        (["--device", "cuda:99", *teach], "CUDA"),
        (["--thoughts", "99", *teach], "thoughts is 99"),
        (["--model", str(tmp_path), "--out", str(tmp_path / "out")], "config.json"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(flags)
        assert ended.value.code == 2 and said in capsys.readouterr().err, flags
    assert not (tmp_path / "out").exists()


def test_lengths_that_a_model_cannot_carry_are_refused(tmp_path, capsys):
    """GPT-2 has a learned vector for each of its 1100 positions, and then an IndexError."""
    folder = foreign_checkpoint(tmp_path / "gpt2", "byte-level", CHAT_TEMPLATE)
    tokenizer = load_policy(folder).tokenizer
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=2, n_positions=1100, vocab_size=len(tokenizer),
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    teach = ["--env", "frozenlake", "--model", str(folder), "--out", str(tmp_path / "out")]
    teach += ["--episodes", "4", "--window-steps", "1"]
    for flags, said in (
        ([], "has no more than 1100 positions: --max-tokens is 4096, lower it to 1100"),
        (["--max-tokens", "1101"], "--max-tokens is 1101, lower it to 1100"),
        (["--max-tokens", "300"], "max_tokens is 300, raise it"),
        (
            ["--max-tokens", "1100", "--episode-steps", "1", "--thoughts", "30"],
            "--max-tokens is 1100: raise it, or lower --thoughts",
        ),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*teach, *flags])
        assert ended.value.code == 2 and said in capsys.readouterr().err, flags
    assert not (tmp_path / "out").exists()


def test_any_number_of_steps_is_a_schedule(tiny):
    """OneCycleLR divides by zero where its warm-up is one step long, as with 20."""
    env = make_env("shop")
    for steps in (1, 20):
        settings = WarmStart("shop", episodes=4, window_batch=1, window_steps=steps)
        settings = replace(settings, episode_steps=0)
        imitate(copy.deepcopy(tiny), env, demonstrations(env, settings), settings)


def test_a_thought_that_the_template_opens_is_not_opened_twice(tmp_path, monkeypatch):
    policy = load_policy(foreign_checkpoint(tmp_path, "byte-level", THINKING_TEMPLATE))
    env, settings = make_env("shop"), WarmStart("shop", episodes=4, window_batch=1, window_steps=1)
    targets = []

    def recorded(frames, replies):
        targets.append((frames, replies))
        return imitation_target(frames, replies)

    monkeypatch.setattr(warm_start_module, "imitation_target", recorded)
    imitate(policy, env, demonstrations(env, settings), replace(settings, episode_steps=0))
    assert policy.opening == b"<think>\n"
    for frames, replies in targets:
        for frame, reply in zip(frames, replies, strict=True):
            turn = as_text(policy, frame + reply).rpartition("assistant\n")[2]
            assert turn.startswith("<think>\n") and turn.count("<think>") == 1
