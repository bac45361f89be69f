"""gradient_signal.py: gradients against autograd; signal and noise by hand, and where known."""

import csv
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from actfocus import actfocus_weights, clipped_loss, group_advantages
from arms import ARMS
from rollout import rollout, score_all, scored_hidden
from studies import gradient_signal as gs
from studies.diagnose import DiagnoseConfig, diagnose
from worlds import make_env


@dataclass
class Settings:
    group_size: int = 4
    temperature: float = 0.9
    micro_tokens: int = 700


@pytest.fixture(scope="module")
def played(built_in):
    """Eight rollouts in two groups, one with either sign of the advantage, with their scores."""
    seeds = [5] * 4 + [6] * 4
    rollouts = rollout(built_in, lambda: make_env("frozenlake"), seeds, 0.9, max_tokens=680)
    rollouts.rewards[:] = torch.tensor([1.0, 0, 0, 0.5, 0.1, 0.9, 0.3, 0.3])
    reference_stats = score_all(built_in, rollouts, rollouts.response, 0.9, 4096)
    return rollouts, reference_stats


@pytest.fixture(scope="module")
def block(built_in, played):
    rollouts, reference_stats = played
    return gs.measure_block(built_in, rollouts, reference_stats, reference_stats, Settings())


def written_gradient(policy, rollouts, reference_stats, arm):
    """Of the loss of a whole batch under an arm's weights, as a single expression."""
    response = rollouts.response
    weights = actfocus_weights(
        reference_stats.energy, rollouts.reasoning, rollouts.action, response, arm.alpha, arm.beta
    )
    rows = torch.arange(len(response))
    hidden, targets = scored_hidden(policy, rollouts, rows, response)
    logp = (hidden @ policy.head.T / 0.9).log_softmax(-1)
    logprob = logp.gather(-1, targets[:, None]).squeeze(-1)
    advantages = group_advantages(rollouts.rewards, 4)[:, None].expand(response.shape)[response]
    loss = clipped_loss(logprob, logprob.detach(), advantages, weights[response])
    gradients = torch.autograd.grad(loss, list(policy.model.parameters()))
    return torch.cat([g.flatten() for g in gradients]).double()


@pytest.mark.parametrize("name", ["grpo", "discount", "actfocus", "energy", "no-reasoning"])
def test_a_mixture_of_components_is_the_gradient_of_the_weighted_loss(
    built_in, played, block, name
):
    rollouts, reference_stats = played
    arm = gs.WEIGHTINGS[name]
    mixed = block.gradient(gs.mixture(arm))
    written = written_gradient(built_in, rollouts, reference_stats, arm)
    assert (mixed - written).norm() < 1e-4 * written.norm()


def test_the_placebo_has_the_same_weights_and_no_signal_of_its_own_shift(built_in, played):
    rollouts, reference_stats = played
    components = gs.weight_components(rollouts, reference_stats, reference_stats)
    assert "shift" not in components  # a policy has not shifted from itself
    shifted = reference_stats._replace(logprob=reference_stats.logprob - torch.rand(8, 1))
    assert "shift" in gs.weight_components(rollouts, reference_stats, shifted)
    shares = gs.mixture(ARMS["actfocus"])
    weights = sum(share * components[name] for name, share in shares.items())
    response = rollouts.response
    assert torch.equal(components["placebo"][response].sort()[0], weights[response].sort()[0])
    assert not torch.equal(components["placebo"], weights)
    assert not components["placebo"][~response].any()
    classes = components["reasoning"] + components["action"] + components["format"]
    assert torch.equal(classes, response.float())


def test_a_batch_that_ends_alike_has_no_gradient(built_in, played):
    rollouts, reference_stats = played
    alike = rollouts.take(torch.arange(8))
    alike.rewards = torch.ones(8)
    block = gs.measure_block(built_in, alike, reference_stats, reference_stats, Settings())
    assert not any(gradient.any() for gradient in block.gradients.values())
    rows = gs.signal_rows([block] * 4, 8)
    assert all(math.isnan(row["adam_ratio"]) for row in rows)
    assert "nan" in gs.summary(rows, 8)


def test_some_coordinates_stand_for_all(built_in, played, monkeypatch):
    """Of a subset, inner products are what they are of all, but for its size."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(300, 40, generator=generator), torch.randn(2000, generator=generator)]
    other = [p + torch.randn(p.shape, generator=generator) for p in parameters]
    chosen = gs.choose_coordinates(parameters, limit=5000)
    assert [len(some) for some in chosen] == [4286, 715]  # in proportion to 12,000 and 2,000

    def product(a, b, some):
        return sum(
            (x.flatten()[i] @ y.flatten()[i]).item() for x, y, i in zip(a, b, some, strict=True)
        )

    everything = gs.choose_coordinates(parameters)
    whole = product(parameters, other, everything) / product(other, other, everything)
    part = product(parameters, other, chosen) / product(other, other, chosen)
    assert part == pytest.approx(whole, rel=0.05)
    # and of a model: the same ratios, within what the intervals say
    rollouts, reference_stats = played
    blocks = {}
    for limit in (gs.COORDINATES, 80_000):
        monkeypatch.setattr(gs.choose_coordinates, "__defaults__", (limit,))
        blocks[limit] = [
            gs.measure_block(built_in, rollouts.take(rows), stats, stats, Settings())
            for rows in torch.arange(8).split(4)
            for stats in [type(reference_stats)(*(values[rows] for values in reference_stats))]
        ]
    full, some = blocks.values()
    assert len(some[0].gradients["action"]) < 81_000 < len(full[0].gradients["action"])

    def cosine(pair):
        a, b = (block.gradient({"action": 1.0}) for block in pair)
        return torch.cosine_similarity(a, b, dim=0).item()

    assert cosine(full) > 0.5 and cosine(some) == pytest.approx(cosine(full), abs=0.05)


# -------------------------------------------------------------------------------- signal and noise
def test_signal_and_noise_by_hand():
    """Means (1, 0) with noise (0, +-1): every pair by hand."""
    gradients = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [1.0, -1.0]]).double()
    raw = gs.signal_to_noise(gradients, as_adam=False)
    # products of the six pairs: 0, 2, 0, 0, 2, 0; squares are all 2
    assert raw.value == pytest.approx((4 / 6) / (2 - 4 / 6))
    # without any block one pair with 2 and two with 0 are left
    assert raw.without == pytest.approx([(2 / 3) / (2 - 2 / 3)] * 4)
    # all coordinates have a mean square of 1: the scale changes nothing
    assert gs.signal_to_noise(gradients, as_adam=True).value == pytest.approx(raw.value)
    # but makes up for coordinates of different size
    scaled = gradients * torch.tensor([0.1, 10.0]).double()
    assert gs.signal_to_noise(scaled, as_adam=True).value == pytest.approx(raw.value)
    assert gs.signal_to_noise(scaled, as_adam=False).value < 0  # the noise drowns it


def test_leaving_a_block_out_is_the_estimate_of_the_others():
    """The docstring's formula for R_k, and the interval of its pseudo-values."""
    gradients = torch.randn(7, 30, generator=torch.Generator().manual_seed(5)).double() + 0.2
    ratio = gs.signal_to_noise(gradients, as_adam=False)
    for k in range(7):
        others = torch.cat([gradients[:k], gradients[k + 1 :]])
        assert ratio.without[k] == pytest.approx(gs.signal_to_noise(others, False).value)
    pseudo_values = [7 * ratio.value - 6 * without for without in ratio.without]
    half = 2.447 * np.std(pseudo_values, ddof=1) / math.sqrt(7)  # t of 6 degrees of freedom
    assert ratio.interval() == pytest.approx((ratio.value - half, ratio.value, ratio.value + half))


def test_a_coordinate_that_one_block_alone_moves_does_not_decide():
    """Beside 100 coordinates with a signal of half the noise; and one that never moves."""
    gradients = torch.randn(16, 100, generator=torch.Generator().manual_seed(0)).double() + 0.5
    rare = torch.zeros(16, 2).double()
    rare[3, 0] = 1e6
    both = [gs.signal_to_noise(g, True).value for g in (gradients, torch.cat([gradients, rare], 1))]
    assert both[1] == pytest.approx(both[0], rel=0.05)


@pytest.mark.parametrize("as_adam", [True, False])
@pytest.mark.parametrize("strength", [0.0, 0.1, 0.3])
def test_a_known_signal_in_known_noise_lies_in_the_interval(as_adam, strength):
    """40 experiments of 16 blocks: the mean is right, and 95 % intervals hold it nearly always.
    (As Adam sees it a strong signal is a little too small: it is part of its own scale.)"""
    rng, inside, values = np.random.default_rng(3), 0, []
    scale = np.exp(rng.normal(size=400))  # coordinates differ in size by far
    for _ in range(40):
        noisy = scale * (strength + rng.normal(size=(16, 400)))
        ratio = gs.signal_to_noise(torch.tensor(noisy), as_adam)
        low, value, high = ratio.interval()
        inside += low <= strength**2 <= high
        values.append(value)
    assert np.mean(values) == pytest.approx(strength**2, rel=0.12, abs=0.004)
    assert inside >= 33


def test_the_order_of_blocks_does_not_matter():
    gradients = torch.randn(9, 50, generator=torch.Generator().manual_seed(2)).double() + 0.1
    other = torch.randn(9, 50, generator=torch.Generator().manual_seed(3)).double()
    order = torch.tensor([4, 8, 0, 2, 6, 1, 7, 3, 5])
    for as_adam in (True, False):
        ratios = [gs.signal_to_noise(g, as_adam) for g in (gradients, gradients[order])]
        assert ratios[0].value == pytest.approx(ratios[1].value)
        assert ratios[0].interval() == pytest.approx(ratios[1].interval())
        others = [gs.signal_to_noise(g, as_adam) for g in (other, other[order])]
        gains = [ratio.interval(base) for ratio, base in zip(ratios, others, strict=True)]
        assert gains[0] == pytest.approx(gains[1])
    assert ratios[0].interval(ratios[0]) == (0, 0, 0)


def test_shuffled_rewards_stay_in_their_group():
    advantages = torch.tensor([3.0, -1, -1, -1, 5, 6, -5, -6])
    orders = {tuple(gs.shuffled(advantages, 4, seed).tolist()) for seed in range(50)}
    assert len(orders) > 25
    for order in orders:
        assert sorted(order[:4]) == [-1, -1, -1, 3] and sorted(order[4:]) == [-6, -5, 5, 6]


@pytest.mark.parametrize("middle", [False, True])
def test_a_null_is_the_gradient_of_its_weighting_with_shuffled_rewards(
    built_in, played, block, middle
):
    """Also where two rollouts have the mean of their group, and so no advantage of their own: they
    may get another's, or lose nothing."""
    rollouts, reference_stats = played
    if middle:
        rollouts = replace(rollouts)
        rollouts.rewards = torch.tensor([1.0, 0.5, 0.0, 0.5, 0.75, 0.5, 0.25, 0.5])
        assert (group_advantages(rollouts.rewards, 4) == 0).sum() == 4
        block = gs.measure_block(built_in, rollouts, reference_stats, reference_stats, Settings())
    mixed = replace(rollouts)
    seed = int(rollouts.ids.sum())
    mixed.rewards = gs.shuffled(group_advantages(rollouts.rewards, 4), 4, seed)
    for name in gs.NULLS:
        arm = gs.WEIGHTINGS[name.removesuffix("-null")]
        written = written_gradient(built_in, mixed, reference_stats, arm)
        found = block.gradient({name: 1.0})
        assert torch.cosine_similarity(found, written, dim=0) > 0.9999
        own = block.gradient(gs.mixture(arm))
        assert torch.cosine_similarity(found, own, dim=0) < 0.9


# ------------------------------------------------------------------------------------- the command
def test_diagnose_writes_the_signal(start, tmp_path, capsys):
    config = DiagnoseConfig(
        model=str(start), groups=8, blocks=4, group_size=4, play_batch=16, device="cpu",
        max_turn_tokens=120, max_tokens=680, out=str(tmp_path / "out"),
    )  # fmt: skip
    diagnose(config)
    with (tmp_path / "out" / "signal.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    weightings = [name for name in gs.WEIGHTINGS if name != "shift"]
    assert list(rows) == [*gs.CLASSES, *weightings, *gs.NULLS]
    shares = [float(rows[name]["token_share"]) for name in gs.CLASSES]
    assert sum(shares) == pytest.approx(1, abs=1e-4)
    assert float(rows["grpo"]["adam_gain"]) == 0
    assert math.isfinite(float(rows["actfocus"]["adam_gain"]))
    for row in rows.values():
        for scale in ("adam", "raw"):
            low, value, high = (float(row[f"{scale}_ratio{end}"]) for end in ("_low", "", "_high"))
            assert low <= value <= high or math.isnan(value)
    assert (tmp_path / "out" / "signal.png").stat().st_size > 20_000
    assert "reasoning tokens alone" in capsys.readouterr().out


def test_too_few_blocks_are_refused():
    with pytest.raises(ValueError, match="--blocks is 3: it must be 0, or at least 4"):
        DiagnoseConfig(blocks=3).validate()
