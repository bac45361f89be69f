"""arms.py: every rule against hand-computed weights, and what holds for any rollouts."""

import math
from types import SimpleNamespace

import pytest
import torch

from actfocus import actfocus_weights
from arms import (
    ARMS,
    Known,
    blame_silence,
    discount_actions,
    discount_unlikely,
    keep_top_entropy,
    move_into_thought,
    scatter_weights,
    turn_numbers,
)
from energy import TokenStats
from rollout import rollout, score_all
from segment import Segment
from worlds import make_env

O, F, R, A = Segment.OTHER, Segment.FORMAT, Segment.REASONING, Segment.ACTION  # noqa: E741


def of_labels(labels, logprob=None):
    """Stand-in for rollouts with these (B, T) labels."""
    labels = torch.tensor(labels)
    return SimpleNamespace(
        labels=labels,
        response=labels != O,
        reasoning=labels == R,
        action=labels == A,
        old_logprob=torch.zeros(labels.shape) if logprob is None else torch.tensor(logprob),
    )


def known(rollouts, seed=0, entropy=None):
    return Known(rollouts, seed, policy_entropy=entropy, advantages=None)


def random_rollouts(seed):
    """Ragged rows of random labels with log-probs, weights and entropies at the sampled tokens."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([O, F, R, R, R, A, A])[torch.randint(7, (5, 40), generator=generator)]
    logprob = -3 * torch.rand(5, 40, generator=generator)
    rollouts = of_labels(labels.tolist(), logprob.tolist())
    weights = (0.5 + torch.rand(5, 40, generator=generator)) * rollouts.response
    weights[rollouts.reasoning] = 0.1
    return rollouts, weights, 2 * torch.rand(5, 40, generator=generator)


# -------------------------------------------------------------------------------- what others do
def test_top_entropy_keeps_the_fifth_that_trl_keeps():
    """By hand: of ten sampled tokens with the entropies 0 to 9 the 0.8 quantile is 7.2, so that 8
    and 9 are kept, one of them reasoning and one the end of a turn. What is not sampled has the
    highest entropy, and neither counts nor weighs."""
    rollouts = of_labels([[O, R, R, R, A, F, O], [O, R, A, A, F, F, O]])
    entropy = torch.tensor([[99.0, 3, 9, 0, 5, 1, 99], [99.0, 2, 4, 6, 7, 8, 99]])
    weights = keep_top_entropy(torch.ones(2, 7), known(rollouts, entropy=entropy))
    assert weights.tolist() == [[0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0]]


@pytest.mark.parametrize("seed", range(10))
def test_top_entropy_is_the_mask_of_trl(seed):
    """Against TRL's formula: entropies at or above the 0.8 quantile over the sampled tokens."""
    rollouts, weights, entropy = random_rollouts(seed)
    mask = rollouts.response
    expected = ((entropy * mask) >= torch.quantile(entropy[mask], 0.8)) & mask
    kept = keep_top_entropy(weights, known(rollouts, entropy=entropy))
    assert torch.equal(kept, expected.float())
    assert kept.sum() == pytest.approx(0.2 * mask.sum(), abs=1)


def test_equal_entropies_keep_every_token():
    rollouts = of_labels([[O, R, A, F]])
    kept = keep_top_entropy(torch.ones(1, 4), known(rollouts, entropy=torch.zeros(1, 4)))
    assert kept.tolist() == [[0, 1, 1, 1]]


def test_unlikely_tokens_weigh_less_by_hand():
    """a pi + 1 - a with a = 0.2: from 0.8 for pi = 0 to 1 for pi = 1, for every class."""
    logprob = [[0.0, 0.0, math.log(0.5), math.log(0.25), -math.inf]]
    rollouts = of_labels([[O, R, A, F, R]], logprob)
    weights = discount_unlikely(torch.ones(1, 5), known(rollouts))
    torch.testing.assert_close(weights, torch.tensor([[0.0, 1.0, 0.9, 0.85, 0.8]]))


# ------------------------------------------------------------------------------------- controls
def test_actions_alone_and_inverse_by_hand():
    rollouts = of_labels([[O, F, R, A, A, F]])
    assert ARMS["actions"].weights(rollouts, None, seed=0).tolist() == [[0, 1, 0, 1, 1, 1]]
    inverse = ARMS["inverse"].weights(rollouts, None, seed=0)
    torch.testing.assert_close(inverse, torch.tensor([[0.0, 1, 1, 0.1, 0.1, 1]]))
    assert not ARMS["inverse"].needs_reference and not ARMS["actions"].needs_reference


def test_the_span_takes_the_weights_of_the_call_in_their_order():
    """Where the reasoning is as long as the call there is one place for it; where it is shorter it
    takes the first weights of the call; without it, or without a call, nothing is moved."""
    labels = [
        [O, R, R, A, A, F, O, O, O, O, O, O],  # as long as the call
        [O, R, A, A, A, F, O, A, A, F, O, O],  # shorter; then a turn without reasoning
        [O, R, R, R, F, O, R, F, A, O, O, O],  # a turn without a call; one with format between
    ]
    rollouts = of_labels(labels)
    weights = torch.where(rollouts.reasoning, 0.1, rollouts.response.float())
    weights[rollouts.action] = torch.tensor([1.1, 1.2, 1.3, 1.4, 1.5, 1.25, 1.35, 1.45])
    expected = torch.tensor(
        [
            [0, 1.1, 1.2, 0.1, 0.1, 1, 0, 0, 0, 0, 0, 0],
            [0, 1.3, 0.1, 0.1, 0.1, 1, 0, 0.1, 0.1, 1, 0, 0],
            [0, 0.1, 0.1, 0.1, 1, 0, 1.45, 1, 0.1, 0, 0, 0],
        ]
    )
    for seed in range(3):
        torch.testing.assert_close(move_into_thought(weights, known(rollouts, seed)), expected)


def test_the_span_is_one_stretch_of_its_own_turn_and_begins_anywhere():
    labels = [[O, F] + [R] * 6 + [F, A, A, F, O, O, F] + [R] * 4 + [F, A, A, A, F]]
    rollouts = of_labels(labels)
    weights = torch.where(rollouts.reasoning, 0.1, rollouts.response.float())
    weights[rollouts.action] = torch.tensor([1.2, 1.4, 1.1, 1.3, 1.5])
    starts = set()
    for seed in range(60):
        moved = move_into_thought(weights, known(rollouts, seed))
        assert torch.equal(moved, move_into_thought(weights, known(rollouts, seed)))
        first, second = moved[0, 2:8].tolist(), moved[0, 15:19].tolist()
        spans = [[i for i, w in enumerate(turn) if w > 1] for turn in (first, second)]
        assert spans[0] == list(range(spans[0][0], spans[0][0] + 2))
        assert spans[1] == list(range(spans[1][0], spans[1][0] + 3))
        assert [first[i] for i in spans[0]] == pytest.approx([1.2, 1.4])
        assert [second[i] for i in spans[1]] == pytest.approx([1.1, 1.3, 1.5])
        starts.add((spans[0][0], spans[1][0]))
    assert {first for first, _ in starts} == {0, 1, 2, 3, 4}
    assert {second for _, second in starts} == {0, 1}


@pytest.mark.parametrize("seed", range(20))
def test_what_the_span_placebo_leaves_alone(seed):
    """In any rollouts: format keeps its weight, actions get a tenth, as many reasoning tokens of a
    turn are lifted as its call is long (if it has so many), and they are next to each other."""
    rollouts, weights, _ = random_rollouts(seed)
    moved = move_into_thought(weights, known(rollouts, seed))
    classes = rollouts.reasoning | rollouts.action
    assert torch.equal(moved[~classes], weights[~classes])
    assert (moved[rollouts.action] == torch.tensor(0.1)).all()
    numbers = turn_numbers(rollouts.response)
    for row in range(5):
        for turn in range(1, int(numbers[row].max()) + 1):
            here = numbers[row] == turn
            thought = moved[row][here & rollouts.reasoning[row]]
            call = weights[row][here & rollouts.action[row]]
            lifted = (thought > 0.2).nonzero().squeeze(1).tolist()
            assert len(lifted) == min(len(thought), len(call))
            assert lifted == list(range(lifted[0], lifted[0] + len(lifted))) if lifted else True
            assert torch.equal(thought[lifted], call[: len(lifted)])


def test_turns_are_counted_and_those_without_a_call_found():
    rollouts = of_labels([[O, R, F, O, O, R, A, F, O, F], [O, O, A, A, O, R, R, O, O, O]])
    assert turn_numbers(rollouts.response).tolist() == [
        [0, 1, 1, 1, 1, 2, 2, 2, 2, 3],
        [0, 0, 1, 1, 1, 2, 2, 2, 2, 2],
    ]
    energy = torch.arange(20, dtype=torch.float32).reshape(2, 10)
    weights = actfocus_weights(
        energy, rollouts.reasoning, rollouts.action, rollouts.response, alpha=0.1, beta=0.0
    )
    weights = blame_silence(weights, known(rollouts))
    assert weights[0].tolist() == pytest.approx([0, 1, 1, 0, 0, 0.1, 1, 1, 0, 1])
    assert weights[1].tolist() == pytest.approx([0, 0, 1, 1, 0, 1, 1, 0, 0, 0])


def test_the_placebo_moves_the_weights_and_keeps_them():
    """Random tokens in the place of action tokens: the same weights, drawn once a seed."""
    rollouts, weights, _ = random_rollouts(0)
    response = rollouts.response
    moved = scatter_weights(weights, known(rollouts, seed=3))
    assert torch.equal(moved[response].sort().values, weights[response].sort().values)
    assert not torch.equal(moved, weights) and (moved[~response] == 0).all()
    assert torch.equal(moved, scatter_weights(weights, known(rollouts, seed=3)))
    assert not torch.equal(moved, scatter_weights(weights, known(rollouts, seed=4)))


# ------------------------------------------------------------------------------------ every arm
@pytest.fixture(scope="module")
def played(built_in):
    rollouts = rollout(built_in, lambda: make_env("frozenlake"), [5, 5, 6, 6])
    return rollouts, score_all(built_in, rollouts, rollouts.response, 1.0, 4096)


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_weighs_real_rollouts(name, played):
    """No weight is negative, none lies outside the sampled tokens, and an arm whose advantages are
    unknown, as in an evaluation, has the weights that it has in training."""
    rollouts, stats = played
    arm, entropy = ARMS[name], stats.entropy
    advantages = torch.randn(rollouts.ids.shape, generator=torch.Generator().manual_seed(0))
    weights = arm.weights(rollouts, stats, 7, policy_entropy=entropy, advantages=advantages)
    assert weights.shape == rollouts.ids.shape and weights.dtype == torch.float32
    assert (weights >= 0).all() and (weights[~rollouts.response] == 0).all() and weights.any()
    assert torch.equal(weights, arm.weights(rollouts, stats, 7, policy_entropy=entropy))
    if arm.uniform:
        assert torch.equal(weights, rollouts.response.float())
    else:
        assert weights[rollouts.response].std() > 0


def test_an_arm_that_needs_the_reference_is_not_weighed_without_it(played):
    """Without it, its weights would be those of another method. The policy's own log-probability
    needs no reference."""
    rollouts, stats = played
    for name, arm in ARMS.items():
        if name in ("nll", "grpo", "ppo", "discount", "low-prob", "actions", "inverse"):
            assert not arm.needs_reference
            weights = arm.weights(rollouts, None, seed=0)
            torch.testing.assert_close(weights, arm.weights(rollouts, stats, seed=0))
        elif name != "top-entropy":
            with pytest.raises(ValueError, match="needs reference_stats, which is None"):
                arm.weights(rollouts, None, seed=0)


def test_only_the_arm_that_looks_at_the_policys_entropy_needs_it(played):
    rollouts, stats = played
    nothing_else = TokenStats(*(values * rollouts.action for values in stats))
    for name, arm in ARMS.items():
        if name == "top-entropy":
            with pytest.raises(ValueError, match="'top entropy' needs policy_entropy"):
                arm.weights(rollouts, None, seed=0)
        else:
            assert not arm.needs_policy_entropy
            arm.weights(rollouts, nothing_else if arm.needs_reference else None, seed=0)


def test_labels_and_colours_tell_arms_apart():
    for values in ([arm.label for arm in ARMS.values()], [arm.color for arm in ARMS.values()]):
        assert len(set(values)) == len(ARMS)


def test_an_inverse_of_the_discount_has_its_weights_the_other_way_round(played):
    rollouts, _ = played
    ones = rollouts.response.float()
    weights = discount_actions(ones, known(rollouts))
    assert (weights[rollouts.action] == torch.tensor(0.1)).all()
    assert torch.equal(weights[~rollouts.action], ones[~rollouts.action])
