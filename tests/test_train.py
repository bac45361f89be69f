"""train_grpo.py and train_actfocus.py: the scripts as a user runs them, on tiny settings, and the parts of the loop."""

import csv
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from actfocus import clipped_loss, group_advantages, policy_loss
from energy import token_stats
from envs import make_env
from rollout import Rollouts, rollout, score_all, scored_hidden
from segment import Segment
from train_actfocus import ActFocusConfig, actfocus
from train_grpo import GRPO, Config, column, parse, run, update

ROOT = Path(__file__).parents[1]
SMALL = "--iterations 2 --prompts 2 --group-size 4 --minibatch 4 --eval-episodes 4 --eval-every 1 --max-turn-tokens 60 --lr 1e-3"
ISSUE_COLUMNS = (
    "iteration seconds train_success train_reward eval_success entropy kl clip_fraction grad_norm response_tokens action_fraction "
    "reasoning_weight_share reasoning_accuracy turns_without_facts train_finished"
).split()


def run_script(script, model, out, *flags):
    command = [sys.executable, script, "--model", str(model), "--out", str(out), "--device", "cpu", *SMALL.split(), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def model_folder(built_in, tmp_path_factory):
    """The warm-started built-in model as a checkpoint folder, so that runs earn rewards."""
    folder = tmp_path_factory.mktemp("model")
    built_in.save(folder)
    return folder


@pytest.fixture(scope="module")
def both_arms(model_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "new" / "folder"
    result = run_script("train_actfocus.py", model_folder, out, "--save")
    assert result.returncode == 0, result.stderr
    return out, result


def test_one_command_trains_both_arms_and_leaves_everything_behind(both_arms):
    out, result = both_arms
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "grpo.csv", "actfocus.csv", "curves.png", "samples.txt", "grpo", "actfocus"}
    assert json.loads((out / "config.json").read_text())["prompts"] == 2
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG") and (out / "curves.png").stat().st_size > 20_000
    samples = (out / "samples.txt").read_text()
    for title in ("grpo after 0", "grpo after 2", "actfocus after 0", "actfocus after 2"):
        assert f"===== {title} iterations: " in samples
    assert "<|im_start|>assistant" in samples and "<tool_response>" in samples
    assert result.stdout.count("The loss says little") == 1
    assert "warm start" in result.stdout and "actfocus" in result.stdout.splitlines()[-2]


def test_logs_have_their_columns_and_make_sense(both_arms):
    for name in ("grpo", "actfocus"):
        rows = read(both_arms[0] / f"{name}.csv")
        assert [row["iteration"] for row in rows] == ["0", "1", "2"] and set(ISSUE_COLUMNS) <= set(rows[0])
        for row in rows[:2]:
            values = {key: float(row[key]) for key in ISSUE_COLUMNS}
            assert all(math.isfinite(value) for value in values.values())
            assert 0 <= values["train_success"] <= 1 and 0 < values["action_fraction"] < 0.5 and values["response_tokens"] > 10
            assert 0.5 < values["reasoning_accuracy"] <= 1 and 0 <= values["turns_without_facts"] < 0.2
            assert values["train_success"] <= values["train_finished"] <= 1
            assert values["seconds"] > 0 and values["entropy"] > 0 and values["kl"] >= 0 and 0 <= values["clip_fraction"] < 1
        assert rows[2]["seconds"] == "" and rows[2]["eval_success"] != ""
    share = {name: column(both_arms[0] / f"{name}.csv", "reasoning_weight_share")[1][0] for name in ("grpo", "actfocus")}
    assert share["actfocus"] < 0.25 < 0.5 < share["grpo"]


def test_both_arms_start_alike_and_part(both_arms):
    grpo, focus = (read(both_arms[0] / f"{name}.csv") for name in ("grpo", "actfocus"))
    for key in ("train_success", "train_reward", "eval_success", "response_tokens", "action_fraction"):
        assert grpo[0][key] == focus[0][key]
    assert grpo[1]["entropy"] != focus[1]["entropy"]


def test_saved_policies_load_again(both_arms):
    out = both_arms[0]
    again = run_script("train_grpo.py", out / "actfocus", out / "again", "--iterations", "1")
    assert again.returncode == 0, again.stderr
    last = read(out / "actfocus.csv")[-1]
    assert read(out / "again" / "grpo.csv")[0]["eval_success"] == last["eval_success"]  # same weights, same episodes


def test_alpha_one_beta_zero_is_the_grpo_run_bit_for_bit(both_arms, model_folder, tmp_path):
    focus = run_script("train_actfocus.py", model_folder, tmp_path / "a", "--no-baseline", "--alpha", "1", "--beta", "0", "--save")
    grpo = run_script("train_grpo.py", model_folder, tmp_path / "b", "--save")
    assert focus.returncode == grpo.returncode == 0, focus.stderr + grpo.stderr
    assert not (tmp_path / "a" / "grpo.csv").exists() and not (tmp_path / "b" / "actfocus.csv").exists()
    ignored = {"seconds", "seconds_play"}
    rows = [[{k: v for k, v in row.items() if k not in ignored} for row in read(path)]
            for path in (tmp_path / "a" / "actfocus.csv", tmp_path / "b" / "grpo.csv", both_arms[0] / "grpo.csv")]  # fmt: skip
    assert rows[0] == rows[1] == rows[2]
    weights = [(tmp_path / path / "model.safetensors").read_bytes() for path in ("a/actfocus", "b/grpo")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--alpha 1.5", "--alpha is 1.5: it must be at least 0 and at most 1"),
        ("--beta -1", "--beta is -1.0"),
        ("--lr nan", "--lr is nan"),
        ("--iterations 0", "--iterations is 0: it must be at least 1"),
        ("--keep-groups 2", "--keep-groups is 2.0"),
        ("--temperature 0", "--temperature is 0.0"),
        ("--env pong", "there is no environment 'pong'"),
        ("--device nonsense", "--device nonsense cannot be used"),
        ("--iterations many", "invalid int value: 'many'"),
        ("--alhpa 1", "unrecognized arguments"),
    ],
)
def test_wrong_flags_are_refused_before_anything_runs(flags, said, capsys):
    with pytest.raises(SystemExit):
        parse(ActFocusConfig, "", flags.split())
    assert said in capsys.readouterr().err


def test_an_earlier_run_is_never_overwritten(both_arms, model_folder, tiny_folder):
    before = (both_arms[0] / "grpo.csv").read_bytes()
    result = run_script("train_grpo.py", model_folder, both_arms[0])
    assert result.returncode == 2 and "holds an earlier run: choose another folder" in result.stderr
    assert (both_arms[0] / "grpo.csv").read_bytes() == before


def test_a_model_that_is_not_there_is_one_sentence(tmp_path):
    result = run_script("train_grpo.py", tmp_path / "nowhere", tmp_path / "out")
    assert result.returncode == 1 and "the policy cannot be loaded" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_policy_that_only_babbles_trains_without_a_crash(tiny_folder, tmp_path):
    """No action tokens, all rewards equal, every turn malformed and cut."""
    result = run_script("train_actfocus.py", tiny_folder, tmp_path / "out", "--max-turn-tokens", "3", "--kl-coef", "0.01")
    assert result.returncode == 0, result.stderr
    row = read(tmp_path / "out" / "actfocus.csv")[0]
    assert float(row["action_fraction"]) == 0 and float(row["train_reward"]) == pytest.approx(-0.6)
    assert math.isfinite(float(row["loss"])) and math.isfinite(float(row["kl_reference"]))


def test_group_filter_and_reference_run(model_folder, tmp_path):
    result = run_script("train_actfocus.py", model_folder, tmp_path / "out", "--keep-groups", "0.5", "--micro-tokens", "1")
    assert result.returncode == 0, result.stderr


# --------------------------------------------------------------------------------------------------- the parts of the loop
@pytest.fixture(scope="module")
def played(built_in):
    return rollout(built_in, lambda: make_env("frozenlake"), [s for s in (11, 12, 13) for _ in range(4)])


def test_score_matches_the_full_logits_of_single_rows(built_in, played):
    everything = score_all(built_in, played, played.response, 0.7, 2000)
    for row, length in enumerate(played.lengths.tolist()):
        ids, response = played.ids[row, :length], played.response[row, 1:length]
        with torch.no_grad():
            logits = built_in.model(ids[None]).logits[0, :-1].double()
        logp = logits.log_softmax(-1)
        exact = (
            (logits / 0.7).log_softmax(-1).gather(1, ids[1:, None]).squeeze(1),
            -logits.logsumexp(-1),
            -(logp.exp() * logp).sum(-1),
        )
        for full, expected in zip(everything, exact, strict=True):
            torch.testing.assert_close(full[row, 1:length][response].double(), expected[response], atol=1e-4, rtol=1e-5)
            assert (full[row][~played.response[row]] == 0).all()
    action = played.labels == Segment.ACTION
    some = score_all(built_in, played, action, 0.7, 2000)  # as ActFocus reads the reference: the action tokens alone
    torch.testing.assert_close(some.energy, everything.energy * action, atol=1e-4, rtol=1e-5)


def test_micro_batches_hold_every_row_once_within_the_limit(played):
    for limit in (1, 1000, 2000, 10**6):
        batches = played.micro_batches(torch.arange(12), limit)
        assert sorted(torch.cat(batches).tolist()) == list(range(12))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * played.lengths[batch].max() <= limit
    assert len(played.micro_batches(torch.arange(12), 10**6)) == 1 and len(played.micro_batches(torch.arange(12), 1)) == 12


def gradients(policy, rollouts, arm, **options):
    """Gradient and logged row of one mini-batch step over everything, without changing the policy."""
    config = ActFocusConfig(**({"minibatch": 100, "entropy_coef": 0.01, "kl_coef": 0.1, "max_grad_norm": 1e9} | options))
    frozen = score_all(policy, rollouts, rollouts.response, 1.0, 10**5)
    advantages = group_advantages(rollouts.rewards, 4)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    caught = []
    optimizer.register_step_pre_hook(lambda *_: caught.extend(p.grad.clone() for p in policy.model.parameters()))
    row = update(policy, optimizer, rollouts, advantages, arm.weigh(rollouts, frozen), frozen, config, random.Random(0))
    return caught, row


def test_micro_batching_does_not_change_the_gradient(built_in, played):
    whole, row = gradients(built_in, played, actfocus(ActFocusConfig()), micro_tokens=10**6)
    parts, other = gradients(built_in, played, actfocus(ActFocusConfig()), micro_tokens=1)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    for key in row:
        assert row[key] == pytest.approx(other[key], abs=1e-5), key


def test_the_update_follows_the_gradient_of_the_written_formula(built_in, played):
    """A plain full-logits GRPO loss with autograd, against the loop's packed, chunked, micro-batched one."""
    caught, row = gradients(built_in, played, GRPO, kl_coef=0.0, entropy_coef=0.001, micro_tokens=1500)
    logits = built_in.model(played.ids).logits[:, :-1]
    logp, response = logits.log_softmax(-1), played.response[:, 1:]
    logprob = logp.gather(2, played.ids[:, 1:, None]).squeeze(2)
    loss = clipped_loss(logprob, played.old_logprob[:, 1:], group_advantages(played.rewards, 4), response.float())
    entropy = -(logp.exp() * logp).sum(-1)[response].mean()
    expected = torch.autograd.grad(loss - 0.001 * entropy, list(built_in.model.parameters()))
    for a, b in zip(caught, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    assert row["entropy"] == pytest.approx(entropy.item(), abs=1e-4)
    assert row["loss"] == pytest.approx((loss - 0.001 * entropy).item(), abs=1e-5)
    assert row["kl"] == pytest.approx(0, abs=1e-6) and row["clip_fraction"] == 0 and "kl_reference" not in row


def test_the_kl_penalty_pulls_towards_the_reference(built_in, played):
    """With the ratio before it, k1's gradient is the policy's: where log pi > log ref, a token's log-prob is pushed down."""
    frozen = score_all(built_in, played, played.response, 1.0, 10**5)
    shifted = frozen._replace(logprob=frozen.logprob - 1.0)  # as if the reference found every token e times less likely
    config = Config(minibatch=100, entropy_coef=0.0, kl_coef=1.0)
    optimizer, caught = torch.optim.SGD(built_in.model.parameters(), lr=0.0), []
    optimizer.register_step_pre_hook(lambda *_: caught.extend(p.grad.clone() for p in built_in.model.parameters()))
    row = update(built_in, optimizer, played, torch.zeros(12), GRPO.weigh(played, None), shifted, config, random.Random(0))
    hidden, targets = scored_hidden(built_in, played, torch.arange(12), played.response)
    logprob = token_stats(hidden, built_in.head, targets).logprob
    expected = torch.autograd.grad(2 * logprob.mean(), list(built_in.model.parameters()))  # d(ratio * k1) = (k1 + 1) d logprob
    scale = caught[0].norm() / expected[0].norm()  # the gradient was clipped to norm 1
    torch.testing.assert_close(caught[0], expected[0] * scale, atol=1e-4, rtol=1e-2)
    assert row["kl_reference"] == pytest.approx(1.0, abs=1e-3) and row["loss"] == pytest.approx(1.0, abs=1e-3)


def test_a_step_with_a_bad_gradient_is_skipped(built_in, played):
    before = [p.detach().clone() for p in built_in.model.parameters()]
    advantages = torch.full((12,), float("nan"))
    optimizer = torch.optim.Adam(built_in.model.parameters(), lr=0.1)
    update(built_in, optimizer, played, advantages, GRPO.weigh(played, None), None, Config(minibatch=6), random.Random(0))
    assert all(torch.equal(a, b) for a, b in zip(before, built_in.model.parameters(), strict=True))


def test_arms_differ_in_their_weights_only(built_in, played):
    frozen = score_all(built_in, played, played.response, 1.0, 10**5)
    assert torch.equal(GRPO.weigh(played, None), played.response.float())
    weights = actfocus(ActFocusConfig(alpha=0.2, beta=1.0)).weigh(played, frozen)
    assert (weights[played.labels == Segment.REASONING] == 0.2).all() and (weights[played.labels == Segment.FORMAT] == 1).all()
    action = weights[played.labels == Segment.ACTION]
    assert ((action > 1) & (action < 2)).all() and action.std() > 0
    assert (weights[~played.response] == 0).all()
    assert isinstance(played, Rollouts)


def test_the_fused_loss_trains_as_the_plain_one(model_folder, tmp_path, monkeypatch):
    """A fixed-seed run gives the same CSV within float tolerance, whether the loss is fused or written out."""

    def plain(hidden, weight, targets, *per_token, return_stats, **options):
        stats = token_stats(hidden, weight, targets, temperature=options["temperature"])
        return policy_loss(hidden, weight, targets, *per_token, **options), stats.logprob.detach(), stats.entropy.detach()

    logs = []
    for folder in ("fused", "plain"):
        config = parse(ActFocusConfig, "", ["--model", str(model_folder), "--out", str(tmp_path / folder), *SMALL.split(), "--kl-coef", "0.01"])
        run(config, [actfocus(config)])
        logs.append(read(tmp_path / folder / "actfocus.csv"))
        monkeypatch.setattr("train_grpo.fused_policy_loss", plain)
    for one, other in zip(*logs, strict=True):
        for name in one:
            if one[name] and not name.startswith("seconds"):
                assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-3, abs=1e-4, nan_ok=True), name
