"""diagnose.py: the statistics against hand-computed values, the choice of tokens, what is refused,
and a real run. Its page is that of support/transcripts.py, which tests/test_transcripts.py takes
apart."""

import csv
import math
import random
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import worlds
from energy import TokenStats
from policy import load_policy
from rollout import Rollouts, score_all
from segment import Segment
from studies import diagnose
from studies.diagnose import (
    SIGNALS,
    TOKENS,
    Batch,
    DiagnoseConfig,
    correlations,
    measure_groups,
    partial_interval,
    partial_spearman,
    ranks,
    spearman,
    spearman_test,
    token_choices,
)
from support.config import parse
from support.warm_start import WarmStart

ROOT = Path(__file__).parents[1]
O, F, R, A = Segment.OTHER, Segment.FORMAT, Segment.REASONING, Segment.ACTION  # noqa: E741


# --------------------------------------------------------------------------------------- statistics
def test_spearman_by_hand():
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([4.0, 3, 2, 1])) == pytest.approx(-1)
    assert spearman(np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 4, 3, 5])) == pytest.approx(
        0.8
    )  # 1 - 6 * 4 / 120
    assert spearman(np.array([1.0, 1, 2, 2]), np.array([1.0, 2, 3, 4])) == pytest.approx(
        4 / math.sqrt(20)
    )  # ties share ranks
    assert math.isnan(spearman(np.array([1.0, 1, 1]), np.array([1.0, 2, 3])))


def test_a_true_correlation_is_found_and_noise_is_not():
    rng, found, inside, ps = np.random.default_rng(0), 0, 0, []
    for _ in range(40):
        a = rng.normal(size=100)
        rho, low, high, p = spearman_test(a, a + rng.normal(size=100), rng, resamples=200)
        assert -1 <= low < rho < high <= 1
        found, inside = (
            found + (p < 0.01),
            inside + (low < 6 / math.pi * math.asin(math.sqrt(0.5) / 2) < high),
        )
        ps.append(spearman_test(a, rng.normal(size=100), rng, resamples=200)[3])
    assert found == 40 and inside >= 34  # 95 % of 40 is 38
    assert 0.25 < np.mean(ps) < 0.75 and min(ps) < 0.3  # uniform under the null


# ------------------------------------------------------------------------------- what a group shows
def two_rollouts():
    """Two episodes of two turns each, five tokens a turn, hand-made; both form one group."""
    turn = [F, R, A, A, F]
    labels = torch.tensor([[O] + turn + [O] + turn, [O] + turn + [O, O, O, O, O, O]])
    numbers = torch.arange(24, dtype=torch.float32).reshape(2, 12)
    zeros, ones = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    rollouts = Rollouts(
        ids=torch.zeros(2, 12, dtype=torch.int64),
        labels=labels,
        old_logprob=-numbers,
        rewards=torch.tensor([0.0, 1.0]),
        success=torch.tensor([False, True]),
        lengths=torch.tensor([12, 6]),
        finished=torch.tensor([False, True]),
        turns=torch.tensor([2, 1]),
        turns_without_facts=zeros,
        facts=ones,
        true_facts=ones,
    )
    entropy = torch.zeros(2, 12)
    entropy[0, 3], entropy[0, 10], entropy[1, 4], entropy[0, 2] = (
        1.0,
        2.0,
        0.5,
        9.0,
    )  # 9 is on reasoning: it must not count
    return rollouts, TokenStats(logprob=-numbers - 1, energy=10 * numbers, entropy=entropy)


def test_the_decision_is_the_most_uncertain_action_token_of_each_turn():
    rollouts, reference_stats = two_rollouts()
    chosen = token_choices(rollouts, reference_stats)
    assert chosen["decision"].nonzero().tolist() == [[0, 3], [0, 10], [1, 4]]
    assert (
        chosen["action"].sum() == 6 and chosen["reasoning"].sum() == 3 and chosen["all"].sum() == 15
    )


def test_the_harder_worlds_are_diagnosed_and_take_the_options_of_their_own(monkeypatch):
    monkeypatch.setattr(worlds, "ENVIRONMENTS", dict(worlds.ENVIRONMENTS))
    configs = []
    monkeypatch.setattr(diagnose, "diagnose", configs.append)
    main = runpy.run_module("studies.harder")["main"]
    main()
    assert [(config.env, config.temperature, Path(config.out).name) for config in configs] == [
        ("sokoban-harder", 1.0, "sokoban-harder"),
        ("sokoban-harder", 0.5, "sokoban-harder-t05"),
        ("frozenlake-harder", 1.0, "frozenlake-harder"),
        ("frozenlake-harder", 0.5, "frozenlake-harder-t05"),
    ]
    for world in ("frozenlake-harder", "sokoban-harder"):
        env = WarmStart(world, thoughts=2).make_env()
        assert env.thoughts == 2
        env.reset(0)
        assert "<tool_call>" in env.demonstrate(random.Random(0), env.skill)


def test_group_means_by_hand():
    rollouts, reference_stats = two_rollouts()
    logprob = rollouts.old_logprob
    rollouts.old_logprob = torch.full_like(logprob, math.nan)  # what the sampler said is not read
    player = reference_stats._replace(logprob=logprob)
    (row,) = measure_groups(Batch(range(7, 8), rollouts, reference_stats, player), group_size=2)
    assert (row["seed"], row["success"], row["reward_variance"], row["turns"]) == (7, 0.5, 0.5, 1.5)
    assert row["action_fraction"] == pytest.approx(6 / 15) and row["tokens"] == 7.5
    assert row["energy_action"] == pytest.approx(10 * (3 + 4 + 9 + 10 + 15 + 16) / 6)
    assert row["energy_reasoning"] == pytest.approx(10 * (2 + 8 + 14) / 3)
    assert row["nll_decision"] == pytest.approx((3 + 10 + 16) / 3)
    assert row["shift_all"] == pytest.approx(1.0)


def test_with_one_turn_signals_are_of_the_first_turn_and_outcomes_of_whole_episodes():
    rollouts, reference_stats = two_rollouts()
    batch = Batch(range(7, 8), rollouts, reference_stats, reference_stats)
    (whole,), (two,), (one,) = (measure_groups(batch, 2, turns) for turns in (None, 2, 1))
    assert whole == two
    assert one["energy_action"] == pytest.approx(10 * (3 + 4 + 15 + 16) / 4)
    assert one["energy_reasoning"] == pytest.approx(10 * (2 + 14) / 2)
    for name in ("success", "reward_variance", "turns", "tokens", "action_fraction"):
        assert one[name] == whole[name]


def test_correlations_name_what_is_constant_or_missing():
    rng = np.random.default_rng(0)
    names = [f"{signal}_{tokens}" for signal in SIGNALS for tokens in TOKENS]
    groups = [{name: float(rng.normal()) for name in names} for _ in range(20)]
    for i, row in enumerate(groups):
        row["success"] = i / 20
        row["turns"] = float(rng.normal())
        row["reward_variance"] = row["energy_action"] ** 3
        row["shift_all"] = 0.0
        row["shift_action"] = 1e-9 * row["reward_variance"]  # small, but no rounding
        row["nll_reasoning"] = math.nan
    table = {(each.signal, each.tokens): each for each in correlations(groups, rng)}
    assert len(table) == len(SIGNALS) * len(TOKENS) + 1
    energy = table["energy", "action"]
    assert energy.rho == pytest.approx(1) and energy.p < 0.001
    assert math.isnan(table["shift", "all"].rho)
    assert table["shift", "action"].rho == pytest.approx(1)
    missing = table["nll", "reasoning"]
    assert math.isnan(missing.rho) and missing.groups == 0
    assert table["success", ""].rho_success == pytest.approx(1)
    assert math.isnan(table["success", ""].rho_given_success)  # nothing is left of it
    assert abs(energy.rho_given_turns) > 0.99 or math.isnan(energy.rho_given_turns)
    mixed = table["entropy", "all"]
    assert abs(mixed.rho_given_success) <= 1 and abs(mixed.rho_given_turns) <= 1


def test_a_partial_correlation_is_that_of_what_a_line_leaves():
    """Against residuals of ranks, on seeded random columns with ties; and where both columns only
    follow a third, next to nothing is left, and the interval holds 0."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        given = rng.integers(0, 9, size=60).astype(float)
        a, b = (given + 3 * rng.normal(size=60) for _ in range(2))
        ranked = [ranks(values) for values in (a, b, given)]
        left = [each - np.polyval(np.polyfit(ranked[2], each, 1), ranked[2]) for each in ranked[:2]]
        assert partial_spearman(a, b, given) == pytest.approx(np.corrcoef(*left)[0, 1])
    given = rng.normal(size=400)
    a, b = (given + 0.5 * rng.normal(size=400) for _ in range(2))
    assert spearman(a, b) > 0.7 and abs(partial_spearman(a, b, given)) < 0.15
    low, high = partial_interval(a, b, given, rng, resamples=200)
    assert -0.3 < low < partial_spearman(a, b, given) < high < 0.3
    assert math.isnan(partial_spearman(a, b, np.ones(400)))


# ------------------------------------------------------------------------------------- a real run
@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("diagnosis")
    flags = f"--model {tiny_folder} --groups 9 --group-size 4 --play-batch 12 --max-turn-tokens 40 "
    flags += "--max-tokens 640"
    command = [
        sys.executable,
        "-m",
        "studies.diagnose",
        *flags.split(),
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def test_a_run_leaves_tables_and_pictures(run):
    out, said = run
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "signal.csv",
        "signal.png",
        "groups.csv",
        "correlations.csv",
        "bottleneck.png",
        "tokens.html",
        "tokens.png",
    }
    groups = groups_of(out)
    assert len(groups) == 9 and len({row["seed"] for row in groups}) == 9
    with (out / "correlations.csv").open() as file:
        table = {(row["signal"], row["tokens"]): row for row in csv.DictReader(file)}
    assert table["shift", "all"]["rho"] == "nan" and len(table) == 17
    assert "9 groups" in said and "shift all" in said


# ------------------------------------------------------------------- who plays, and what is refused
SMALL = {"groups": 8, "group_size": 2, "play_batch": 16, "max_turn_tokens": 20, "max_tokens": 520}


def groups_of(out):
    with (out / "groups.csv").open() as file:
        return list(csv.DictReader(file))


def shifts(out):
    """The log-prob shift of every group over all its tokens."""
    return [float(row["shift_all"]) for row in groups_of(out)]


def small_run(out, **settings):
    diagnose.diagnose(DiagnoseConfig(**SMALL, **settings, device="cpu", out=str(out)))


def test_the_reference_does_not_shift_from_itself(run):
    """By rounding it did: decoding token by token and a whole forward pass differ."""
    for row in groups_of(run[0]):
        assert {row[f"shift_{tokens}"] for tokens in TOKENS} <= {"0", "nan"}
        assert float(row["nll_all"]) > 1  # it babbles


def test_a_sampler_that_rounds_otherwise_does_not_show_in_the_shift(
    tiny_folder, tmp_path, monkeypatch
):
    """As on CUDA, where sampling is in float32 and scoring in bfloat16."""
    play, said = diagnose.play, []

    def rough(*args):
        rollouts = play(*args)
        noise = 0.01 * torch.randn(rollouts.old_logprob.shape, generator=generator)
        said.append((rollouts.old_logprob.sum() / rollouts.response.sum()).item())
        rollouts.old_logprob += noise * rollouts.response
        return rollouts

    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(diagnose, "play", rough)
    small_run(tmp_path / "itself", model=str(tiny_folder), blocks=0)
    small_run(tmp_path / "same", model=str(tiny_folder), checkpoint=str(tiny_folder), blocks=0)
    assert shifts(tmp_path / "itself") == [0.0] * 8
    assert shifts(tmp_path / "same") == [0.0] * 8
    rows = groups_of(tmp_path / "itself")
    tokens = sum(float(row["tokens"]) for row in rows)
    nll = sum(float(row["nll_all"]) * float(row["tokens"]) for row in rows) / tokens
    assert nll == pytest.approx(-said[0], rel=1e-4)


def test_a_trained_policy_plays_and_its_shift_is_its_own(tiny_folder, tmp_path, monkeypatch):
    trained = load_policy(tiny_folder)
    with torch.no_grad():
        for weight in trained.model.parameters():
            weight.mul_(1.3)
    trained.save(tmp_path / "trained")
    play, played = diagnose.play, []

    def watched(*args):
        played.append(play(*args))
        return played[-1]

    monkeypatch.setattr(diagnose, "play", watched)
    small_run(tmp_path / "out", model=str(tiny_folder), checkpoint=str(tmp_path / "trained"))
    (rollouts,) = played
    reference = load_policy(tiny_folder)
    reference_stats = score_all(reference, rollouts, rollouts.response, 1.0, 8192)
    for g, row in enumerate(groups_of(tmp_path / "out")):
        group = slice(2 * g, 2 * g + 2)
        mask = rollouts.response[group]
        said = rollouts.old_logprob[group][mask]
        energy = reference_stats.energy[group][mask].mean().item()
        shift = said - reference_stats.logprob[group][mask]
        assert float(row["nll_all"]) == pytest.approx(-said.mean().item(), rel=1e-4)
        assert float(row["shift_all"]) == pytest.approx(shift.mean().item(), rel=1e-3)
        assert float(row["energy_all"]) == pytest.approx(energy, rel=1e-4)
        assert shift.mean() > 0.01  # who samples thinks more of the samples


def test_a_checkpoint_that_is_none_or_has_another_tokenizer_is_refused(
    tiny, tiny_folder, tmp_path, monkeypatch
):
    nowhere = DiagnoseConfig(model=str(tiny_folder), checkpoint=str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="the policy cannot be loaded: there is no folder .*nowh"):
        diagnose.diagnose(nowhere)

    foreign = load_policy(tiny_folder)
    foreign.bytes_of = foreign.bytes_of[1:] + foreign.bytes_of[:1]
    policies = iter([tiny, foreign])
    monkeypatch.setattr(diagnose, "load_policy", lambda *_: next(policies))
    config = DiagnoseConfig(model="any", checkpoint="other", out=str(tmp_path / "out"))
    with pytest.raises(SystemExit, match="--checkpoint other has another tokenizer"):
        diagnose.diagnose(config)


def test_episodes_longer_than_a_model_can_carry_are_refused(tiny_folder, tmp_path):
    """The frequencies of "dynamic" change beyond 700 tokens: of the reference, or of who plays."""
    short = load_policy(tiny_folder)
    coding = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    short.model.config.rope_parameters = coding
    short.model.config.max_position_embeddings = 700
    short.save(tmp_path / "short")
    for model, checkpoint in ((tmp_path / "short", None), (tiny_folder, str(tmp_path / "short"))):
        config = DiagnoseConfig(model=str(model), checkpoint=checkpoint, max_tokens=701)
        with pytest.raises(SystemExit, match="cannot be loaded: .* is 701, lower it to 700"):
            diagnose.load_policies(config)
        diagnose.load_policies(replace(config, max_tokens=700))


@pytest.mark.parametrize(
    "flag, value", [("--skill", "0.5"), ("--thoughts", "4"), ("--warm-start-seed", "0")]
)
def test_flags_of_the_built_in_model_are_refused_beside_model(flag, value, capsys):
    """They were ignored."""
    with pytest.raises(SystemExit) as stop:
        parse(DiagnoseConfig, "", ["--model", "any", flag, value, "--device", "cpu"])
    assert stop.value.code == 2
    assert f"error: {flag} shapes the built-in model" in capsys.readouterr().err
    assert parse(DiagnoseConfig, "", [flag, value, "--device", "cpu"])


def test_flags_of_the_built_in_model_reach_it_only_when_given(monkeypatch):
    asked = []

    def start_folder(env, **settings):
        asked.append((env, settings))
        raise ValueError("no model today")

    monkeypatch.setattr(diagnose, "start_folder", start_folder)
    shaped = DiagnoseConfig(env="shop", skill=0.0, thoughts=0, warm_start_seed=0)
    for config in (DiagnoseConfig(), shaped):
        with pytest.raises(SystemExit, match="the policy cannot be loaded: no model today"):
            diagnose.load_policies(config)
    assert asked == [("frozenlake", {}), ("shop", {"skill": 0.0, "thoughts": 0, "seed": 0})]


def test_other_flags_that_cannot_work_are_refused(tmp_path, capsys):
    (tmp_path / "grpo.csv").write_text("iteration\n")
    for flags, reason in (
        (["--env", "chess"], "there is no environment 'chess'"),
        (["--out", str(tmp_path)], "holds a training run"),
        (["--skill", "2"], "--skill is 2.0: it must be at least 0 and at most 1"),
    ):
        with pytest.raises(SystemExit):
            parse(DiagnoseConfig, "", [*flags, "--device", "cpu"])
        assert reason in capsys.readouterr().err
