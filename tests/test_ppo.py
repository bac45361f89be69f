"""train_ppo.py: advantages by hand on ragged rows of several turns, a critic that learns, and PPO's
loop as a user runs it."""

import math

import pytest
import torch
from test_train import read, run_script

from rollout import rollout
from support.config import parse
from train_ppo import Critic, PPOConfig, gae, reward_at_end, whiten
from worlds import make_env


def test_gae_by_hand_on_ragged_turns():
    """Two turns with a tool's response between them, a shorter row, and one without a response."""
    response = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    rewards = torch.zeros(3, 6)
    rewards[0, 4], rewards[1, 1], rewards[2, 3] = 1.0, -0.5, 7.0  # 7 is outside: it must not count
    values = torch.full((3, 6), 99.0)
    values[0, 1], values[0, 2], values[0, 4], values[1, 1] = 0.5, 0.2, 0.6, 0.1
    advantages, returns = gae(rewards, values, response)
    expected = [[0, 0.5, 0.8, 0, 0.4, 0], [0, -0.6, 0, 0, 0, 0], [0] * 6]
    torch.testing.assert_close(advantages, torch.tensor(expected))
    expected = [[0, 1.0, 1.0, 0, 1.0, 0], [0, -0.5, 0, 0, 0, 0], [0] * 6]
    torch.testing.assert_close(returns, torch.tensor(expected))
    # deltas 0.9 * 0.2 - 0.5, 0.9 * 0.6 - 0.2, 1 - 0.6: the observation discounts nothing
    advantages, _ = gae(rewards, values, response, gamma=0.9, lam=0.5)
    third, second = 0.4, 0.34 + 0.45 * 0.4
    first = -0.32 + 0.45 * second
    expected = torch.tensor([0, first, second, 0, third, 0])
    torch.testing.assert_close(advantages[0], expected)


def test_gae_is_the_sum_of_discounted_deltas():
    """Seeded random cases against the definition, in float64."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        response = torch.rand(3, 9, generator=generator) < 0.6
        rewards, values = torch.randn(2, 3, 9, generator=generator)
        gamma, lam = torch.rand(2, generator=generator).tolist()
        advantages, returns = gae(rewards, values, response, gamma, lam)
        for row in range(3):
            places = response[row].nonzero().flatten().tolist()
            v = [values[row, t].item() for t in places] + [0.0]
            deltas = [
                rewards[row, t].item() + gamma * v[i + 1] - v[i] for i, t in enumerate(places)
            ]
            for i, t in enumerate(places):
                expected = sum((gamma * lam) ** k * d for k, d in enumerate(deltas[i:]))
                assert advantages[row, t].item() == pytest.approx(expected, abs=1e-5)
                assert returns[row, t].item() == pytest.approx(expected + v[i], abs=1e-5)
        assert (advantages[~response] == 0).all() and (returns[~response] == 0).all()


@pytest.mark.parametrize(
    "shapes, options, said",
    [
        (((2, 3), (2, 3), (2, 4)), {}, "must share one shape"),
        (((3,), (3,), (3,)), {}, "must share one shape"),
        (((2, 3), (2, 3), (2, 3)), {"gamma": 1.5}, "gamma is 1.5"),
        (((2, 3), (2, 3), (2, 3)), {"lam": -1.0}, "lam -1.0"),
    ],
)
def test_what_does_not_fit_is_refused(shapes, options, said):
    rewards, values, response = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=said):
        gae(rewards, values, response.bool(), **options)


def test_rewards_stand_at_the_last_token_and_whitening_looks_at_response_tokens_alone():
    response = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
    at_end = reward_at_end(torch.tensor([2.0, 3.0]), response)
    assert at_end.tolist() == [[0, 0, 0, 2, 0], [0] * 5]
    for value, n in ((-0.1, 64), (-0.6, 5003), (0.3, 1)):  # rounding must not become a gradient
        assert not whiten(torch.full((1, n), value), torch.ones(1, n).bool()).any()
    white = whiten(torch.tensor([[50.0, 1.0, 50.0, 3.0, 50.0], [50.0] * 5]), response)
    torch.testing.assert_close(white, torch.tensor([[0.0, -1, 0, 1, 0], [0.0] * 5]))


@pytest.fixture(scope="module")
def played(built_in):
    """Three episodes whose prompts differ; tests give them rewards."""
    return rollout(
        built_in, lambda: make_env("frozenlake"), [5, 6, 7], max_turn_tokens=30, max_tokens=500
    )


def test_a_critic_fits_a_known_value_and_leaves_the_policy_alone(built_in, played):
    """Returns that are 1 in every other episode."""
    rollouts = played.take(torch.arange(2))
    before = [p.detach().clone() for p in built_in.model.parameters()]
    critic = Critic(built_in, PPOConfig(critic_lr=1e-3, critic_passes=30, minibatch=2))
    assert (critic.values(rollouts) == 0).all()
    rollouts.rewards = torch.tensor([1.0, 0.0])
    critic.advantages(rollouts)
    assert torch.equal(critic.returns, rollouts.response * rollouts.rewards[:, None])
    first = critic.fit(rollouts)
    assert first["explained_variance"] == pytest.approx(0, abs=1e-6)
    critic.advantages(rollouts)
    after = critic.fit(rollouts)
    assert after["explained_variance"] > 0.9 and after["value_loss"] < 0.1 * first["value_loss"]
    values = critic.values(rollouts)
    assert (values[~rollouts.response] == 0).all()
    for p, q in zip(before, built_in.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_equal_returns_have_no_variance_to_explain(built_in, played):
    """Returns of episodes that end alike differ by rounding, since each is a sum over tokens."""
    rollouts = played.take(torch.arange(3))
    critic = Critic(built_in, PPOConfig(critic_lr=1e-3))
    torch.nn.init.normal_(critic.layer.weight, generator=torch.Generator().manual_seed(0))
    for reward in (-0.6, 0.3, 1.0):
        rollouts.rewards = torch.full((3,), reward)
        critic.advantages(rollouts)
        assert critic.returns[rollouts.response].var() > 0  # by rounding
        assert math.isnan(critic.quality["explained_variance"])
        assert critic.quality["value_loss"] > 0
    rollouts.rewards = torch.tensor([0.3, 0.3, 0.4])
    critic.advantages(rollouts)
    assert math.isfinite(critic.quality["explained_variance"])


def test_three_bad_updates_of_the_critic_in_a_row_end_the_run(built_in, played, capsys):
    rollouts = played.take(torch.arange(2))
    critic = Critic(built_in, PPOConfig(critic_lr=1e-3, critic_passes=2, minibatch=2))
    critic.advantages(rollouts)
    good = critic.returns
    critic.fit(rollouts)
    assert critic.healthy()
    critic.returns = good * math.nan
    before = [p.detach().clone() for p in critic.learned.parameters()]
    critic.fit(rollouts)  # two
    assert not critic.healthy()
    assert all(map(torch.equal, before, critic.learned.parameters()))
    said = r"the critic: left out an update, since the gradient \(last loss: nan\) is not finite, "
    said += "for the third time in a row; a lower --critic-lr may help"
    with pytest.raises(SystemExit, match=said):
        critic.fit(rollouts)
    critic.returns = good
    critic.fit(rollouts)
    assert critic.healthy()


def test_one_command_trains_ppo_with_and_without_actfocus(start, tmp_path):
    """Alpha 1, beta 0 is PPO bit for bit; the prompts are those of every other arm."""
    flags = ("--arms", "ppo,ppo-actfocus", "--alpha", "1", "--beta", "0", "--save")
    flags += ("--iterations", "1")
    same = run_script("train_ppo.py", start, tmp_path / "same", *flags)
    assert same.returncode == 0, same.stderr
    out = tmp_path / "same"
    plain, focus = (read(out / name / f"{name}.csv") for name in ("ppo", "ppo-actfocus"))
    for rows in (plain, focus):
        for row in rows:
            row.update(seconds="", seconds_play="")
    assert plain == focus
    weights = [
        (out / arm / "policy" / "model.safetensors").read_bytes() for arm in ("ppo", "ppo-actfocus")
    ]
    assert weights[0] == weights[1]
    assert float(plain[0]["value_loss"]) > 0 and float(plain[0]["advantage_mean"]) == pytest.approx(
        0, abs=1e-5
    )
    assert (
        "ppo-actfocus minus ppo, in percentage points" in same.stdout
        and (out / "curves.png").exists()
    )
    flags = ("--arms", "ppo-actfocus,grpo", "--iterations", "1")
    other = run_script("train_ppo.py", start, tmp_path / "other", *flags)
    assert other.returncode == 0, other.stderr
    folders = {name: tmp_path / "other" / name for name in ("ppo-actfocus", "grpo")}
    row, grpo = (read(folder / f"{name}.csv")[0] for name, folder in folders.items())
    assert float(row["mean_weight"]) < 0.45 and float(grpo["mean_weight"]) == 1
    assert row["train_success"] == grpo["train_success"] == plain[0]["train_success"]
    prompts = {name: read(folder / "prompts.csv") for name, folder in folders.items()}
    for name, rows in prompts.items():
        assert [each["arm"] for each in rows] == [name] * 2
    one, other = ([each["prompt"] for each in rows] for rows in prompts.values())
    assert one == other


def test_flags_of_the_critic_are_checked(capsys):
    assert parse(PPOConfig, "", []).with_critic
    with pytest.raises(SystemExit):
        parse(PPOConfig, "", ["--gae-lambda", "2"])
    assert "--gae-lambda is 2.0" in capsys.readouterr().err
    assert parse(PPOConfig, "", ["--group-size", "1"]).group_size == 1  # nothing to compare with
    with pytest.raises(SystemExit):
        parse(PPOConfig, "", ["--group-size", "1", "--arms", "ppo,grpo"])
    assert (
        "the arm grpo compares the rollouts of a prompt and needs at least 2"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        parse(PPOConfig, "", ["--group-size", "1", "--keep-groups", "0.25"])
    said = capsys.readouterr().err
    assert "--keep-groups is 0.25" in said and "groups of one rollout (--group-size 1)" in said
    config = PPOConfig()
    config.resolve()
    assert config.critic_lr == 1e-3
