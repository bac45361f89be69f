"""walkthrough.py, and the turn that train_actfocus.py shows before it trains: as a user runs them,
and every number that they print against one that is computed here."""

import io
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import read, run_script

import walkthrough
from actfocus import actfocus_weights, group_advantages
from arms import ARMS
from policy import load_policy
from rollout import rollout, score_all
from segment import Segment
from support import transcripts
from support.config import ActFocusConfig
from support.transcripts import first_turn, pieces
from support.warm_start import start_folder
from train_actfocus import show_one_turn
from train_grpo import run
from worlds import make_env

ROOT = Path(__file__).parents[1]
STAGES = ["1", "2", "3", "4", "5", "6a", "6b", "7", "8", "9"]


def walk(world):
    """The script in a process of its own, its output to a pipe that takes ASCII alone. Returns what
    it printed, and the seconds that it computed."""
    before = os.times()
    result = subprocess.run(
        [sys.executable, "walkthrough.py", "--env", world],
        cwd=ROOT,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    after = os.times()
    assert result.returncode == 0, result.stderr.decode()
    seconds = after.children_user + after.children_system
    seconds -= before.children_user + before.children_system
    return result.stdout.decode("ascii"), seconds


def split_into_stages(text):
    parts = re.split(r"^== (\d\w?) .*=$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture(scope="module", params=["frozenlake", "sudoku"])
def walked(request):
    """(world, its stages by number, seconds)"""
    text, seconds = walk(request.param)
    return request.param, split_into_stages(text), seconds


@pytest.fixture(scope="module")
def group(walked):
    """What the script played, played again: the first prompt whose rewards differ."""
    policy = load_policy(start_folder(walked[0]))
    for seed in range(20):
        rollouts = rollout(policy, lambda: make_env(walked[0]), [seed] * 4)
        if len(set(rollouts.rewards.tolist())) > 1:
            return policy, seed, rollouts
    raise AssertionError("no group whose rewards differ")


def numbers(text):
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", text)]


def test_every_stage_is_shown_in_time_and_plainly(walked):
    _, stages, seconds = walked
    assert list(stages) == STAGES
    assert seconds < 60  # some 11 on our machine
    for text in stages.values():
        assert "\x1b" not in text
        assert max(map(len, text.splitlines())) <= 80


def test_the_group_is_the_first_whose_rewards_differ(walked, group):
    _, stages, _ = walked
    policy, seed, rollouts = group
    assert f"Prompt {seed}, as the model reads it" in stages["3"]
    best = int(rollouts.rewards.argmax())
    prompt, turn, answer = first_turn(pieces(policy, rollouts, best))
    for text in (prompt, "".join(piece.text for piece in turn), answer):
        words = re.sub(r"[\s|]+", "", text)  # whatever the lines are broken into
        assert words in re.sub(r"[\s|]+", "", stages["3"])
    rows = re.findall(r"^ +\d +(\d+) +(\d+) +(\S+) +(\S+)$", stages["5"], re.M)
    assert [int(row[0]) for row in rows] == rollouts.turns.tolist()
    assert [int(row[1]) for row in rows] == rollouts.response.sum(1).tolist()
    assert [float(row[2]) for row in rows] == pytest.approx(rollouts.rewards.tolist(), abs=0.006)
    advantages = group_advantages(rollouts.rewards, 4).tolist()
    assert [float(row[3]) for row in rows] == pytest.approx(advantages, abs=0.006)


def test_tokens_have_their_class_and_action_tokens_their_energy_and_weights(walked, group):
    _, stages, _ = walked
    policy, _, rollouts = group
    best = int(rollouts.rewards.argmax())
    _, turn, _ = first_turn(pieces(policy, rollouts, best))
    counted = re.findall(r"^(format|reasoning|action) +(\d+)  ", stages["4"], re.M)
    assert sum(int(number) for _, number in counted) == len(turn)
    for name in ("FORMAT", "REASONING", "ACTION"):
        tokens = [p for p in turn if rollouts.labels[best, p.position] == Segment[name]]
        assert sum(int(number) for kind, number in counted if kind == name.lower()) == len(tokens)

    reasoning = rollouts.labels == Segment.REASONING
    action = rollouts.labels == Segment.ACTION
    reference_stats = score_all(policy, rollouts, action, 1.0, 8192)
    weights = actfocus_weights(reference_stats.energy, reasoning, action, rollouts.response)
    positions = [p.position for p in turn if action[best, p.position]]
    lines = re.findall(r"^action +(-\S+) +(\S+)   ", stages["6a"], re.M)
    energies = reference_stats.energy[best, positions].tolist()
    assert [float(line[0]) for line in lines] == pytest.approx(energies, abs=0.006)
    probabilities = reference_stats.logprob[best, positions].exp().tolist()
    assert [float(line[1]) for line in lines] == pytest.approx(probabilities, abs=0.006)
    lines = re.findall(r"^action +(-\S+) +(\d\S*) +(\d\S*)   ", stages["6b"], re.M)
    assert [float(line[0]) for line in lines] == pytest.approx(energies, abs=0.006)
    assert {line[1] for line in lines} == {"1.00"}
    expected = weights[best, positions].tolist()
    assert [float(line[2]) for line in lines] == pytest.approx(expected, abs=0.006)
    assert re.search(r"^reasoning +- +1\.00 +0\.10   ", stages["6b"], re.M)

    shares = dict(re.findall(r"^(format|reasoning|action) +\d+ +\S+% +(\S+)%$", stages["6b"], re.M))
    for label in (Segment.FORMAT, Segment.REASONING, Segment.ACTION):
        share = weights[rollouts.labels == label].sum() / weights.sum()
        assert float(shares[label.name.lower()]) == pytest.approx(100 * share.item(), abs=0.06)


def test_the_loss_is_the_same_by_all_three_ways_and_the_mean_of_advantages(walked, group):
    _, stages, _ = walked
    policy, _, rollouts = group
    reasoning = rollouts.labels == Segment.REASONING
    action = rollouts.labels == Segment.ACTION
    energy = score_all(policy, rollouts, action, 1.0, 8192).energy
    advantages = group_advantages(rollouts.rewards, 4)[:, None]
    for name, arm in (("GRPO", ARMS["grpo"]), ("ActFocus", ARMS["actfocus"])):
        line = re.search(rf"^{name} +[-+].*$", stages["7"], re.M).group()
        by_formula, by_function, fused = numbers(line)
        assert by_formula == pytest.approx(fused, abs=2e-6)
        assert by_formula == pytest.approx(by_function, abs=2e-6)
        w = actfocus_weights(energy, reasoning, action, rollouts.response, arm.alpha, arm.beta)
        assert fused == pytest.approx(-(w * advantages).sum().item() / w.sum().item(), abs=1e-4)


def test_an_update_of_actfocus_moves_calls_further_and_thoughts_less(walked):
    """What the table of stage 7 is there to show, in the groups that it shows by default."""
    rows = re.findall(r"^(calls|thoughts) that (\w+) +\d+ +(\S+) +(\S+)$", walked[1]["7"], re.M)
    change = {(kind, outcome): (float(grpo), float(focus)) for kind, outcome, grpo, focus in rows}
    assert len(change) == 4
    grpo, focus = change["calls", "won"]
    assert focus > 1.5 * grpo > 0
    for outcome in ("won", "lost"):
        grpo, focus = change["thoughts", outcome]
        assert abs(focus) < abs(grpo)


def walk_here(monkeypatch, capsys, *flags):
    """The stages that the script prints in this process."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["walkthrough.py", *flags])
    try:
        walkthrough.main()
    finally:
        torch.set_num_threads(threads)
    return split_into_stages(capsys.readouterr().out)


def test_it_prints_the_same_twice(walked, monkeypatch, capsys):
    world, stages, _ = walked
    assert walk_here(monkeypatch, capsys, "--env", world) == stages


@pytest.mark.parametrize("walked", ["frozenlake"], indirect=True)
def test_another_seed_plays_otherwise(walked, monkeypatch, capsys):
    _, stages, _ = walked
    other = walk_here(monkeypatch, capsys, "--env", "frozenlake", "--seed", "1")
    assert other["3"] != stages["3"]
    monkeypatch.setattr(sys, "argv", ["walkthrough.py", "--seed", "-1"])
    with pytest.raises(SystemExit):
        walkthrough.main()
    assert "must not be negative" in capsys.readouterr().err


# -------------------------------------------------------------------------- colour, and odd letters
class Terminal(io.StringIO):
    encoding = "ascii"

    def isatty(self):
        return True


def test_a_terminal_gets_colours_unless_it_says_no(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    turn = [transcripts.Piece("⏎ no\n", 0), transcripts.Piece("{", 1)]
    labels = torch.tensor([Segment.REASONING, Segment.ACTION])
    monkeypatch.setattr(sys, "stdout", Terminal())
    transcripts.print_tokens(turn, labels)
    colored = sys.stdout.getvalue()
    assert colored.isascii() and "\\u23ce no\\n\x1b[0m" in colored and "\x1b[1;31m{" in colored
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", Terminal())
    transcripts.print_tokens(turn, labels)
    plain = sys.stdout.getvalue()
    assert plain == re.sub("\x1b\\[[\\d;]*m", "", colored)
    assert plain.splitlines() == ["reasoning   1  \\u23ce no\\n", "action      1  {"]
    monkeypatch.setattr(sys, "stdout", Terminal())
    transcripts.print_token_table(turn, labels, {"energy": torch.tensor([torch.nan, -2.5])})
    assert sys.stdout.getvalue().splitlines() == [
        "class       energy   token",
        "reasoning        -   \\u23ce no\\n",
        "action       -2.50   {",
    ]


# ------------------------------------------------------------------- the turn of train_actfocus.py
def state(policy):
    return {name: value.clone() for name, value in policy.model.state_dict().items()}


# A run of a tiny model's babble: what is shown before it is not looked at closely.
BABBLES = {
    "env": "frozenlake", "device": "cpu", "lr": 1e-3, "iterations": 1, "prompts": 2,
    "group_size": 2, "minibatch": 2, "eval_episodes": 2, "max_turn_tokens": 16, "max_tokens": 380,
}  # fmt: skip


def test_training_shows_one_turn_and_trains_as_without_it(
    tiny_folder, tmp_path, monkeypatch, capsys
):
    arms = {"actfocus": ARMS["actfocus"]}
    monkeypatch.setenv("ACTFOCUS_CACHE", str(tmp_path))
    for name, show in (("with", show_one_turn), ("without", None)):
        config = ActFocusConfig(model=str(tiny_folder), out=str(tmp_path / name), **BABBLES)
        run(config, arms, show=show)
        printed = capsys.readouterr().out
        assert ("One turn of the policy before training" in printed) == (name == "with")
    shown, plain = (read(tmp_path / name / "actfocus.csv") for name in ("with", "without"))
    for one, other in zip(shown, plain, strict=True):
        for row in (one, other):
            del row["seconds"], row["seconds_play"]
        assert one == other


def test_a_resumed_run_does_not_show_the_turn_again(tiny_folder, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    config = ActFocusConfig(model=str(tiny_folder), out=str(tmp_path / "run"), **BABBLES)
    arms = {"actfocus": ARMS["actfocus"]}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("train_grpo.train", interrupted)
        run(config, arms, show=show_one_turn)
    assert "One turn of the policy before training" in capsys.readouterr().out
    run(replace(config, resume=config.out), arms, show=show_one_turn)
    assert "One turn of the policy" not in capsys.readouterr().out
    assert (tmp_path / "run" / "actfocus.csv").exists()


def test_the_script_shows_the_turn_before_it_trains(start, tmp_path):
    flags = "--iterations 1 --arms actfocus --prompts 1 --eval-episodes 2 --max-tokens 400"
    result = run_script("train_actfocus.py", start, tmp_path / "run", *flags.split())
    assert result.returncode == 0, result.stderr
    assert 0 < result.stdout.index("One turn of the policy") < result.stdout.index("results go to")
    assert result.stdout.count("\naction ") > 10


def test_the_weights_shown_are_those_of_the_arms(built_in, capsys):
    random.seed(3)
    torch.manual_seed(3)
    before, generators = state(built_in), (random.getstate(), torch.get_rng_state())
    arms = {name: ARMS[name] for name in ("grpo", "actfocus", "discount", "placebo", "entropy")}
    began = time.perf_counter()
    show_one_turn(built_in, ActFocusConfig(env="frozenlake", device="cpu"), arms)
    assert time.perf_counter() - began < 15
    printed = capsys.readouterr().out
    assert random.getstate() == generators[0]
    assert torch.equal(torch.get_rng_state(), generators[1])
    assert all(torch.equal(value, before[name]) for name, value in state(built_in).items())

    header = re.search(r"^class .*token$", printed, re.M).group().split()
    assert header == ["class", "energy", *arms, "token"]
    lines = re.findall(r"^action +(-\S+) +(\S+) +(\S+) +(\S+) +(\S+) +(\S+)   ", printed, re.M)
    table = torch.tensor([[float(number) for number in line] for line in lines])  # (tokens, 6)
    energy, grpo, focus, discount, _, _ = table.T
    assert len(table) > 10 and (grpo == 1).all() and (discount == 1).all()
    n = len(energy)
    ones, nothing = torch.ones(1, n).bool(), torch.zeros(1, n).bool()
    expected = actfocus_weights(energy[None], nothing, ones, ones)[0]
    assert torch.allclose(focus, expected, atol=0.012)  # of energies with two digits
    assert re.search(r"^reasoning +- +1\.00 +0\.10 +0\.10 ", printed, re.M)


def test_a_turn_without_a_call_says_so(tiny, capsys):
    arms = {"actfocus": ARMS["actfocus"]}
    show_one_turn(tiny, ActFocusConfig(env="frozenlake", device="cpu", max_turn_tokens=3), arms)
    assert "no token is an action" in capsys.readouterr().out
