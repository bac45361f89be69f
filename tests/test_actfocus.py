"""actfocus.py: hand-computed values, both signs of the advantage with both clips, and the
identities the method rests on."""

import math

import pytest
import torch

from actfocus import (
    actfocus_weights,
    clipped_loss,
    group_advantages,
    most_varied_groups,
    reweight_advantages,
)


def random_batch(seed: int, rows: int = 6, length: int = 20, dtype=torch.float32):
    """logprob (a leaf), old_logprob, advantages, energy, reasoning, action, response: ragged, with
    some rows without actions."""
    generator = torch.Generator().manual_seed(seed)
    logprob = (-3 * torch.rand(rows, length, generator=generator)).to(dtype).requires_grad_()
    old = (logprob.detach() + 0.4 * torch.randn(rows, length, generator=generator)).to(dtype)
    kind = torch.randint(
        0, 4, (rows, length), generator=generator
    )  # 0 other, 1 format, 2 reasoning, 3 action
    kind[0][kind[0] == 3] = 2
    advantages = torch.randn(rows, generator=generator).to(dtype)
    energy = -20 + 5 * torch.randn(rows, length, generator=generator)
    return logprob, old, advantages, energy, kind == 2, kind == 3, kind > 0


# --------------------------------------------------------------------------------------- advantages
def test_advantages_by_hand():
    # mean 0.25, unbiased std sqrt((0.75^2 + 3 * 0.25^2) / 3) = 0.5
    expected = torch.tensor([1.5, -0.5, -0.5, -0.5]) * (0.5 / (0.5 + 1e-6))
    torch.testing.assert_close(
        group_advantages(torch.tensor([1.0, 0, 0, 0]), 4), expected, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -0.3, 1e8, 1 / 3])
def test_equal_rewards_get_exactly_zero(value):
    assert group_advantages(torch.full((14,), value), 7).tolist() == [0.0] * 14


def test_groups_do_not_mix_and_a_group_of_one_gets_zero():
    assert group_advantages(torch.tensor([1.0, 2.0, 3.0]), 1).tolist() == [0.0] * 3
    both = group_advantages(torch.tensor([0.0, 1.0, 10.0, 30.0]), 2)
    torch.testing.assert_close(
        both, torch.tensor([-1.0, 1.0, -1.0, 1.0]) / math.sqrt(2), rtol=1e-5, atol=0
    )


def test_advantages_of_integers_halves_and_nothing():
    assert group_advantages(torch.tensor([0, 1]), 2).dtype == torch.float32
    assert (
        group_advantages(torch.tensor([0.0, 1.0], dtype=torch.bfloat16), 2).dtype == torch.float32
    )
    assert group_advantages(torch.zeros(0), 4).shape == (0,)


@pytest.mark.parametrize("shape, size", [((5,), 2), ((4,), 0), ((2, 2), 2)])
def test_advantages_refuse_what_does_not_split(shape, size):
    with pytest.raises(ValueError, match=f"groups of {size}"):
        group_advantages(torch.zeros(shape), size)


# ------------------------------------------------------------------------------------------ weights
def test_weights_by_hand():
    reasoning = torch.tensor([[True, False, False, False], [True, False, False, False]])
    action = torch.tensor([[False, True, False, False], [False, True, True, False]])
    response = torch.tensor([[True, True, True, False], [True, True, True, False]])
    energy = torch.tensor(
        [[99.0, -1.0, 99.0, 99.0], [99.0, -2.0, -6.0, 99.0]]
    )  # action energies -1, -2, -6
    mu, sigma = -3.0, math.sqrt((4 + 1 + 9) / 3 + 1e-6)
    focus = [1 + 0.5 / (1 + math.exp(-(e - mu) / sigma)) for e in (-1.0, -2.0, -6.0)]
    expected = torch.tensor([[0.1, focus[0], 1.0, 0.0], [0.1, focus[1], focus[2], 0.0]])
    torch.testing.assert_close(actfocus_weights(energy, reasoning, action, response), expected)


def test_weights_ignore_the_signal_where_there_is_no_action():
    _, _, _, energy, reasoning, action, response = random_batch(3)
    spoiled = energy.masked_fill(~action, float("nan"))
    assert torch.equal(
        actfocus_weights(energy, reasoning, action, response),
        actfocus_weights(spoiled, reasoning, action, response),
    )


def test_weights_without_any_action_token():
    _, _, _, energy, reasoning, _, response = random_batch(4)
    weights = actfocus_weights(energy, reasoning, torch.zeros_like(response), response, alpha=0.25)
    assert torch.equal(weights, torch.where(reasoning, 0.25, response.float()))


def test_weights_of_equally_unsure_actions_are_half_way():
    everything = torch.ones(1, 3, dtype=torch.bool)
    weights = actfocus_weights(
        torch.full((1, 3), -7.0), ~everything, everything, everything, beta=2.0
    )
    assert weights.tolist() == [[2.0, 2.0, 2.0]]


def test_weights_stay_in_their_range_and_rise_with_energy():
    for seed in range(50):
        _, _, _, energy, reasoning, action, response = random_batch(seed)
        weights = actfocus_weights(energy, reasoning, action, response, 0.3, 2.0)
        assert (
            weights.dtype == torch.float32
            and (weights[~response] == 0).all()
            and (weights[reasoning] == 0.3).all()
        )
        assert (weights[response & ~reasoning & ~action] == 1).all()
        assert ((weights[action] > 1) & (weights[action] < 3)).all()
        order = energy[action].argsort()
        assert (weights[action][order].diff() >= 0).all()


def test_weights_of_action_marked_outside_the_response_are_zero():
    yes, no = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.bool)
    assert actfocus_weights(torch.zeros(1, 2), no, yes, no).tolist() == [[0.0, 0.0]]


def test_weights_take_bfloat16_signals():
    _, _, _, energy, reasoning, action, response = random_batch(5)
    low = actfocus_weights(energy.bfloat16(), reasoning, action, response)
    torch.testing.assert_close(
        low, actfocus_weights(energy, reasoning, action, response), atol=0.01, rtol=0
    )


@pytest.mark.parametrize(
    "alpha, beta, said",
    [(-0.1, 0.5, "alpha is -0.1"), (1.1, 0.5, "alpha is 1.1"), (0.1, -1.0, "beta is -1")],
)
def test_weights_refuse(alpha, beta, said):
    masks = [torch.zeros(1, 2, dtype=torch.bool)] * 3
    with pytest.raises(ValueError, match=said):
        actfocus_weights(torch.zeros(1, 2), *masks, alpha=alpha, beta=beta)
    with pytest.raises(ValueError, match="differ in shape"):
        actfocus_weights(torch.zeros(2, 2), *masks)


# --------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize(
    "ratio, advantage, gain, moves",
    [
        (1.0, 2.0, 2.0, True),
        (1.5, 2.0, 1.28 * 2, False),  # a good action, already more likely: clipped above
        (1.27, 2.0, 1.27 * 2, True),
        (0.5, 2.0, 0.5 * 2, True),  # a good action that became less likely: never clipped
        (0.5, -2.0, 0.8 * -2, False),  # a bad action, already less likely: clipped below
        (0.81, -2.0, 0.81 * -2, True),
        (1.5, -2.0, 1.5 * -2, True),  # a bad action that became more likely: never clipped
        (1.5, 0.0, 0.0, False),
    ],
)
def test_clip_by_hand(ratio, advantage, gain, moves):
    logprob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss = clipped_loss(logprob, torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1))
    loss.backward()
    assert loss.item() == pytest.approx(-gain, rel=1e-6)
    assert logprob.grad.item() == pytest.approx(-ratio * advantage if moves else 0.0, rel=1e-6)


def plain_grpo(logprob, old, advantages, response):
    """GRPO as its papers write it, token by token, without weights."""
    ratio = (logprob - old).exp()
    gain = torch.min(ratio * advantages[:, None], ratio.clamp(0.8, 1.28) * advantages[:, None])
    return -(gain * response).sum() / response.sum()


@pytest.mark.parametrize("seed", range(10))
def test_alpha_one_beta_zero_is_grpo_bit_for_bit(seed):
    logprob, old, advantages, energy, reasoning, action, response = random_batch(seed)
    weights = actfocus_weights(energy, reasoning, action, response, alpha=1.0, beta=0.0)
    assert torch.equal(weights, response.float())
    loss = clipped_loss(logprob, old, advantages, weights)
    (gradient,) = torch.autograd.grad(loss, logprob)
    expected = plain_grpo(logprob, old, advantages, response.float())
    (expected_gradient,) = torch.autograd.grad(expected, logprob)
    assert torch.equal(loss, expected) and torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("seed", range(10))
def test_reweighted_advantages_give_the_same_update(seed):
    logprob, old, advantages, energy, reasoning, action, response = random_batch(seed)
    weights = actfocus_weights(energy, reasoning, action, response)
    loss = clipped_loss(logprob, old, advantages, weights)
    scaled = reweight_advantages(advantages, weights, response)
    other = clipped_loss(logprob, old, scaled, response.float())
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(*(torch.autograd.grad(each, logprob)[0] for each in (loss, other)))
    torch.testing.assert_close(
        reweight_advantages(advantages[:, None].expand_as(weights), weights, response), scaled
    )


def test_micro_batches_add_up_to_the_mini_batch():
    logprob, old, advantages, energy, reasoning, action, response = random_batch(11)
    weights = actfocus_weights(energy, reasoning, action, response)
    whole = clipped_loss(logprob, old, advantages, weights)
    parts = [
        clipped_loss(
            logprob[i : i + 2],
            old[i : i + 2],
            advantages[i : i + 2],
            weights[i : i + 2],
            normalizer=weights.sum(),
        )
        for i in (0, 2, 4)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_packed_tokens_give_the_same_loss():
    logprob, old, advantages, energy, reasoning, action, response = random_batch(12)
    weights = actfocus_weights(energy, reasoning, action, response)
    packed = clipped_loss(
        logprob[response],
        old[response],
        advantages[:, None].expand_as(old)[response],
        weights[response],
    )
    torch.testing.assert_close(packed, clipped_loss(logprob, old, advantages, weights))


def test_padding_may_hold_anything():
    logprob, old, advantages, energy, reasoning, action, response = random_batch(13)
    weights = actfocus_weights(energy, reasoning, action, response)
    clean = clipped_loss(logprob, old, advantages, weights)
    spoiled = logprob.detach().masked_fill(~response, float("inf")).requires_grad_()
    loss = clipped_loss(spoiled, old.masked_fill(~response, float("nan")), advantages, weights)
    loss.backward()
    assert (
        torch.equal(loss, clean)
        and spoiled.grad.isfinite().all()
        and (spoiled.grad[~response] == 0).all()
    )


def test_an_advantage_without_weight_may_be_anything():
    """alpha = 0 takes reasoning out of the loss: what stands there is no part of it."""
    logprob, old, _, energy, reasoning, action, response = random_batch(15)
    weights = actfocus_weights(energy, reasoning, action, response, alpha=0.0)
    advantages = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))
    spoiled = advantages.masked_fill(weights == 0, math.nan)
    assert (response & (weights == 0)).any()
    losses = [clipped_loss(logprob, old, each, weights) for each in (advantages, spoiled)]
    assert torch.equal(*losses)
    (gradient,) = torch.autograd.grad(losses[1], logprob)
    assert gradient.isfinite().all() and gradient.any()
    same = [reweight_advantages(each, weights, response) for each in (advantages, spoiled)]
    assert torch.equal(*same)


def test_loss_of_nothing_is_zero():
    logprob = torch.zeros(2, 3, requires_grad=True)
    loss = clipped_loss(logprob, torch.zeros(2, 3), torch.ones(2), torch.zeros(2, 3))
    loss.backward()
    assert loss.item() == 0 and logprob.grad.abs().sum() == 0
    assert (
        reweight_advantages(
            torch.ones(2), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
        ).tolist()
        == [[0.0] * 3] * 2
    )


def test_loss_against_float64():
    logprob, old, advantages, energy, reasoning, action, response = random_batch(14)
    weights = actfocus_weights(energy, reasoning, action, response)
    exact = clipped_loss(logprob.double(), old.double(), advantages.double(), weights.double())
    assert clipped_loss(logprob, old, advantages, weights).item() == pytest.approx(
        exact.item(), abs=1e-6
    )


def test_loss_takes_other_clips_and_per_token_advantages():
    logprob, old = torch.log(torch.tensor([[1.5, 0.5]])), torch.zeros(1, 2)
    loss = clipped_loss(
        logprob, old, torch.tensor([[1.0, -1.0]]), torch.ones(1, 2), clip_low=0.4, clip_high=0.1
    )
    assert loss.item() == pytest.approx(-(1.1 - 0.6) / 2)


def test_rewards_may_be_whole_numbers():
    rewards = torch.tensor([1, 1, 0, 1])
    assert most_varied_groups(rewards, 2, share=0.5).tolist() == [2, 3]
    torch.testing.assert_close(group_advantages(rewards, 2), group_advantages(rewards.float(), 2))


def test_the_filter_keeps_a_group_even_if_all_end_alike():
    for share in (0.01, 0.25, 1.0):
        kept = most_varied_groups(torch.ones(16), group_size=2, share=share)
        assert len(kept) == 2 * math.ceil(share * 8)
    assert most_varied_groups(torch.ones(16), group_size=2, share=0.01).tolist() == [0, 1]
    for groups, share, count in ((100, 0.07, 7), (25, 0.28, 7), (100, 0.55, 55), (3, 0.67, 3)):
        assert len(most_varied_groups(torch.ones(groups), group_size=1, share=share)) == count
