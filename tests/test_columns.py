"""The columns and flags that tell a larger step from a better one: KL and entropy by class, the
distance from the start, the evaluation at the end, and no step where nothing varies."""

import math
import random
from dataclasses import replace

import pytest
import torch
from test_train import read, run_script

from actfocus import group_advantages
from arms import ARMS
from fused_loss import PolicyLoss
from rollout import rollout, scored_hidden
from segment import Segment
from studies.stats import measures
from support.config import Config
from support.logs import UpdateMeter, standard_error
from train_grpo import Batch, Guard, distance_from, policy_entropy, update, weigh
from worlds import make_env

R, A, F = Segment.REASONING, Segment.ACTION, Segment.FORMAT


@pytest.fixture(scope="module")
def played(built_in):
    """Two groups of two, with rewards that differ in the first alone."""
    rollouts = rollout(built_in, lambda: make_env("frozenlake"), [5, 5, 6, 6], max_tokens=680)
    return replace(rollouts, rewards=torch.tensor([1.0, 0.0, 1.0, 1.0]))


def updated(policy, rollouts, **settings):
    """The columns of one update, and how far it moved the weights; the policy gets them back."""
    config = Config(minibatch=2, device="cpu", **settings)
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    advantages = group_advantages(rollouts.rewards, 2)[:, None].expand(rollouts.ids.shape)
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=1e-3)
    batch = Batch(rollouts, advantages, rollouts.response.float(), None)
    row = update(policy, optimizer, batch, config, random.Random(0), Guard("grpo"))
    moved = distance_from(before, policy.model)
    policy.model.load_state_dict(before)
    return row, moved


# ------------------------------------------------------------------------------ columns by class
def test_kl_and_entropy_of_a_class_by_hand():
    """Two micro-batches; k3 is ratio - 1 - log ratio. No token is in the log under two classes."""
    meter = UpdateMeter(clip_low=0.2, clip_high=0.28)
    for labels, logprob, entropy in (
        ([R, A], [0.5, -0.5], [1.0, 2.0]),
        ([F, R], [3.0, 0.0], [8.0, 0.5]),
    ):
        result = PolicyLoss(torch.tensor(0.0), torch.tensor(logprob), torch.tensor(entropy))
        zeros = torch.zeros(2)
        meter.add_micro_batch(result, zeros, zeros, torch.tensor(labels), torch.tensor(4))
    meter.add_step(1.0)
    columns = meter.columns(tokens=4)
    k3 = [math.exp(x) - 1 - x for x in (0.5, -0.5, 3.0)]
    assert columns["kl_reasoning"] == pytest.approx(k3[0] / 2)
    assert columns["kl_action"] == pytest.approx(k3[1])
    assert columns["kl"] == pytest.approx(sum(k3) / 4)
    assert columns["entropy_reasoning"] == pytest.approx(1.5 / 2)
    assert columns["entropy_action"] == 2.0
    assert columns["entropy"] == pytest.approx(11.5 / 4)
    assert not any(name.startswith("tokens") for name in columns)


def test_a_class_without_a_token_has_no_columns():
    meter = UpdateMeter(clip_low=0.2, clip_high=0.28)
    one = torch.ones(1)
    result = PolicyLoss(torch.tensor(0.0), one, one)
    meter.add_micro_batch(result, one, one, torch.tensor([R]), torch.tensor(1))
    meter.add_step(1.0)
    columns = meter.columns(tokens=1)
    assert "kl_reasoning" in columns and "kl_action" not in columns


def test_columns_of_classes_are_those_of_the_written_formula(built_in, played):
    """With a learning rate of 0 the policy stays as it is: the entropies are those of its logits,
    whatever the mini-batches are."""
    config = Config(minibatch=2, micro_tokens=700, device="cpu")
    optimizer = torch.optim.SGD(built_in.model.parameters(), lr=0.0)
    advantages = group_advantages(played.rewards, 2)[:, None].expand(played.ids.shape)
    batch = Batch(played, advantages, played.response.float(), None)
    row = update(built_in, optimizer, batch, config, random.Random(0), Guard("grpo"))
    with torch.no_grad():
        hidden, _ = scored_hidden(built_in, played, torch.arange(4), played.response)
        logp = (hidden @ built_in.head.T).double().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)  # (N,)
    labels = played.labels[played.response]
    for name, kind in (("reasoning", R), ("action", A)):
        expected = entropy[labels == kind].mean().item()
        assert row[f"entropy_{name}"] == pytest.approx(expected, rel=1e-5)
        assert row[f"kl_{name}"] == pytest.approx(0, abs=1e-6)
    assert row["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-5)
    again = policy_entropy(built_in, played, config)[played.response]
    torch.testing.assert_close(again.double(), entropy, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------- the distance
def test_the_distance_is_of_what_is_trained_and_relative():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    assert distance_from(start, model) == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert distance_from(start, model) == pytest.approx(0.5)
    model[0].requires_grad_(False)  # as the frozen weights under an adapter
    with torch.no_grad():
        model[0].weight.add_(7.0)
    assert distance_from(start, model) == pytest.approx(0.5)


# ------------------------------------------------------------------- no step where nothing varies
def test_without_a_group_that_varies_skip_equal_leaves_the_weights(built_in, played):
    alike = replace(played, rewards=torch.ones(4))
    row, moved = updated(built_in, alike)
    assert moved > 1e-4  # the entropy bonus alone moves them
    skipped, stayed = updated(built_in, alike, skip_equal=True)
    assert stayed == 0 and skipped["grad_norm"] > 0
    assert skipped["entropy"] == pytest.approx(row["entropy"], rel=0.05)


def test_with_a_group_that_varies_skip_equal_changes_nothing(built_in, played):
    assert updated(built_in, played, skip_equal=True) == updated(built_in, played)


# ---------------------------------------------------------------------------- the last evaluation
FINAL = ("--iterations", "1", "--eval-episodes", "4", "--final-eval-episodes", "12")


def test_the_last_evaluation_plays_more_and_the_usual_episodes_first(start, tmp_path):
    arms = ("--arms", "top-entropy")  # the one arm that takes a forward pass of its own
    long = run_script("train_actfocus.py", start, tmp_path / "long", *arms, *FINAL)
    usual = run_script("train_actfocus.py", start, tmp_path / "usual", *arms, *FINAL[:-2])
    assert long.returncode == usual.returncode == 0, long.stderr + usual.stderr
    first, last = read(tmp_path / "long" / "top-entropy.csv")
    same, plain = read(tmp_path / "usual" / "top-entropy.csv")
    for name in ("eval_success", "eval_reward", "eval_stderr", "eval_finished"):
        assert (first[name], last[name]) == (same[name], plain[name])
    assert first["final_success"] == "" == plain["final_success"]
    played = [
        float(row["success"])
        for row in read(tmp_path / "long" / "evaluations.csv")
        if row["iteration"] == "1"
    ]
    assert len(played) == 12
    assert float(last["final_success"]) == pytest.approx(sum(played) / 12, abs=1e-5)
    error = standard_error(torch.tensor(played).bool(), group_size=1)
    assert float(last["final_stderr"]) == pytest.approx(error, abs=1e-5)
    assert sum(played[:4]) / 4 == pytest.approx(float(last["eval_success"]), abs=1e-5)
    assert float(first["distance"]) > 0 and first["kl_action"] != "" != first["kl_reasoning"]
    log = tmp_path / "long" / "top-entropy.csv"
    assert measures(log, 0.5)["final"] == pytest.approx(100 * float(last["final_success"]))
    log = tmp_path / "usual" / "top-entropy.csv"
    assert measures(log, 0.5)["final"] == pytest.approx(100 * float(plain["eval_success"]))


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"final_eval_episodes": 64}, "--final-eval-episodes is 64: it must be at least"),
        ({"final_eval_episodes": 0}, "--final-eval-episodes is 0"),
        (
            {"final_eval_episodes": 129, "eval_group_size": 2},
            "--final-eval-episodes is 129: it must be a multiple of --eval-group-size",
        ),
    ],
)
def test_a_last_evaluation_that_cannot_be_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Config(device="cpu", **settings).validate()
    Config(device="cpu", final_eval_episodes=128).validate()


# ------------------------------------------------------------------------- what an arm may look at
def test_the_loop_shows_an_arm_the_entropy_that_it_asks_for(built_in, played, monkeypatch):
    """And computes it for no other."""
    passes = []
    score = weigh.__globals__["score"]

    def counted(*arguments):
        passes.append(arguments)
        return score(*arguments)

    monkeypatch.setitem(weigh.__globals__, "score", counted)
    config = Config(device="cpu")
    advantages = torch.zeros(played.ids.shape)
    rest = (played, None, advantages, built_in, config, 0)
    grpo = weigh(ARMS["grpo"], *rest)
    assert torch.equal(grpo, played.response.float()) and not passes
    kept = weigh(ARMS["top-entropy"], *rest)
    assert len(passes) == 1
    entropy = policy_entropy(built_in, played, config)
    assert (entropy[kept.bool()].min() >= entropy[played.response & ~kept.bool()].max()).item()
    assert kept.sum() / played.response.sum() == pytest.approx(0.2, abs=0.01)
