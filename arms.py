"""The arms: every way of crediting tokens that the trainers know, one a line.

    python train_actfocus.py --arms grpo,placebo
    python train_ppo.py --arms ppo,grpo

An arm says how much a token counts (alpha, beta, the signal), where advantages come from (from
groups, or from PPO's critic), and, for other people's rules and for controls, what is done to the
weights at the end. A new arm is one line in ARMS, and, if it is a new rule, one function above it.

Whatever the weights are, the loss divides by their sum (actfocus.py). The papers behind
`top-entropy` and `low-prob` divide by the number of tokens. Adam cancels such a common factor, but
not beside the entropy bonus and the KL penalty, which are not weighted, nor where a gradient is so
long that it is clipped.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from actfocus import actfocus_weights
from energy import TokenStats
from rollout import Rollouts

SMALL = 0.1  # what ActFocus gives to reasoning, two controls give to actions

# What may tell how uncertain an action token is (paper, appendix): name, label.
SIGNALS = {"energy": "energy", "entropy": "entropy", "nll": "policy NLL", "shift": "log-prob shift"}


def token_signals(reference_stats: TokenStats, old_logprob: Tensor) -> dict[str, Tensor]:
    """Each of SIGNALS, as float32 of one shape. reference_stats: what the reference says of
    the tokens; old_logprob: of the policy that played, at the same temperature.

    >>> stats = TokenStats(torch.tensor([-3.0]), torch.tensor([-9.0]), torch.tensor([0.5]))
    >>> signals = token_signals(stats, torch.tensor([-2.0]))
    >>> {name: signal.item() for name, signal in signals.items()}
    {'energy': -9.0, 'entropy': 0.5, 'nll': 2.0, 'shift': 1.0}
    """
    return {
        "energy": reference_stats.energy,
        "entropy": reference_stats.entropy,
        "nll": -old_logprob,
        "shift": old_logprob - reference_stats.logprob,
    }


# ----------------------------------------------------------------------- what changes the weights
class Known(NamedTuple):
    """What a rule may look at, beside the weights that alpha and beta give."""

    rollouts: Rollouts
    seed: int  # for rules that draw at random
    policy_entropy: Tensor | None  # (B, T), of the policy that played; only for arms that need it
    advantages: Tensor | None  # (B, T); None where nothing is trained, as in an evaluation


def keep_top_entropy(weights: Tensor, known: Known) -> Tensor:
    """1 for the fifth of all sampled tokens at which the policy's entropy is highest, 0 for all
    others: "forking tokens", arXiv 2506.01939.

    As in TRL's `get_high_entropy_mask` (top_entropy_quantile=0.2): the limit is the 0.8 quantile of
    the entropy over all sampled tokens, whatever their class, and a token that just reaches it is
    kept, so that equal entropies keep all. TRL takes the quantile anew in each micro-batch, of the
    policy that is being updated and at the sampling temperature; here it is over an iteration, of
    the policy that played and of its raw logits (ours).
    """
    response, entropy = known.rollouts.response, known.policy_entropy
    limit = entropy[response].float().quantile(0.8)
    return (response & (entropy >= limit)).float()


def discount_unlikely(weights: Tensor, known: Known) -> Tensor:
    """a pi + 1 - a with a = 0.2: tokens that were unlikely when they were sampled weigh less.

    "Advantage reweighting" of arXiv 2505.12929. As in its authors' code (github.com/zhyang2226/
    AR-Lopti, compute_reweight_advantage): all sampled tokens, advantages of both signs, pi of the
    policy that played; 0.2 is what its script for logic puzzles has.
    """
    response, logprob = known.rollouts.response, known.rollouts.old_logprob
    return torch.where(response, 0.2 * logprob.exp() + 0.8, 0.0)


def discount_actions(weights: Tensor, known: Known) -> Tensor:
    """A tenth for action tokens: the inverse of ActFocus's discount (ours)."""
    return weights.masked_fill(known.rollouts.action, SMALL)


def scatter_weights(weights: Tensor, known: Known) -> Tensor:
    """The same weights, on random tokens: what is left of an arm if only their spread helps."""
    generator = torch.Generator().manual_seed(known.seed)
    response, scattered = known.rollouts.response, weights.clone()
    order = torch.randperm(int(response.sum()), generator=generator).to(weights.device)
    scattered[response] = weights[response][order]
    return scattered


def move_into_thought(weights: Tensor, known: Known) -> Tensor:
    """In each turn the weights of its action tokens, in their order, go to one stretch of its
    reasoning tokens that begins at random, and the action tokens get a tenth (ours).

    A better control than scattered weights, since as many tokens lie together as in a call. A turn
    whose reasoning is shorter than its call has all of it weighted as the call's first tokens are;
    one without reasoning, or without a call, has no such stretch.
    """
    rollouts, rng = known.rollouts, random.Random(known.seed)
    moved = weights.masked_fill(rollouts.action, SMALL)
    numbers = turn_numbers(rollouts.response)  # (B, T)
    for row, turns in enumerate(numbers.amax(dim=1).tolist()):
        for turn in range(1, turns + 1):
            here = numbers[row] == turn
            call = (here & rollouts.action[row]).nonzero().squeeze(1)
            thought = (here & rollouts.reasoning[row]).nonzero().squeeze(1)
            length = min(len(call), len(thought))
            first = rng.randrange(len(thought) - length + 1)
            moved[row, thought[first : first + length]] = weights[row, call[:length]]
    return moved


def blame_silence(weights: Tensor, known: Known) -> Tensor:
    """Weight 1 in turns without an action token. Most such turns never leave their thought, and
    ActFocus blames them with a tenth of the weight only. (Our decision: results/worlds.md.)"""
    response = known.rollouts.response
    turn = turn_numbers(response)  # (B, T)
    action = known.rollouts.action.long()
    calls = torch.zeros_like(turn).scatter_reduce(1, turn, action, "amax")  # (B, T), by turn
    return weights.masked_fill(response & (calls.gather(1, turn) == 0), 1.0)


def turn_numbers(response: Tensor) -> Tensor:
    """(B, T) int64: which turn, from 1, a sampled token belongs to; at any other position, the last
    turn before it. response: (B, T) bool.

    >>> turn_numbers(torch.tensor([[0, 1, 1, 0, 0, 1, 0]]).bool())
    tensor([[0, 1, 1, 1, 1, 2, 2]])
    """
    before = torch.nn.functional.pad(response, (1, 0))[:, :-1]
    return (response & ~before).cumsum(1)


# ---------------------------------------------------------------------------------------- the table
@dataclass(frozen=True)
class Arm:
    """One way of crediting tokens."""

    label: str  # in pictures
    color: str
    alpha: float = 1.0  # weight of a reasoning token
    beta: float = 0.0  # how much more an action token weighs where the signal is high
    signal: str = "energy"  # of SIGNALS
    critic: bool = False  # PPO: advantages come from a critic, and not from groups
    change: Callable[[Tensor, Known], Tensor] | None = None  # the last step, of a rule or a control
    needs_policy_entropy: bool = False  # does `change` look at it? That is one more forward pass.

    @property
    def uniform(self) -> bool:
        """Do all tokens weigh alike?"""
        return self.alpha == 1 and self.beta == 0 and self.change is None

    @property
    def needs_reference(self) -> bool:
        """Does the frozen reference have to read the rollouts?"""
        return self.beta > 0 and self.signal != "nll"  # that is the policy's own

    def weights(
        self,
        rollouts: Rollouts,
        reference_stats: TokenStats | None,
        seed: int,
        policy_entropy: Tensor | None = None,
        advantages: Tensor | None = None,
    ) -> Tensor:
        """The weight of every token, (B, T) float32: stage 6b of the training loop.

        reference_stats: what the reference says of at least the action tokens, (B, T) each; None
        for an arm that does not need it. policy_entropy: (B, T), of the policy that played, at all
        sampled tokens; None likewise. seed and advantages, (B, T): for rules that look at them (the
        advantages are for rules of yours: none here does). Raises ValueError if the arm needs
        something and is given None.
        """
        if self.needs_reference and reference_stats is None:
            raise ValueError(f"the arm {self.label!r} needs reference_stats, which is None")
        if self.needs_policy_entropy and policy_entropy is None:
            raise ValueError(f"the arm {self.label!r} needs policy_entropy, which is None")
        if reference_stats is None:
            signal = -rollouts.old_logprob  # the policy NLL, or of no consequence, with beta 0
        else:
            signal = token_signals(reference_stats, rollouts.old_logprob)[self.signal]
        weights = actfocus_weights(
            signal, rollouts.reasoning, rollouts.action, rollouts.response, self.alpha, self.beta
        )
        if self.change is None:
            return weights
        return self.change(weights, Known(rollouts, seed, policy_entropy, advantages))


ARMS = {
    # the paper's two baselines, and its method on both
    "grpo": Arm("GRPO", "tab:gray"),
    "ppo": Arm("PPO", "tab:blue", critic=True),
    "actfocus": Arm("ActFocus", "tab:red", alpha=0.1, beta=0.5),
    "ppo-actfocus": Arm("PPO, ActFocus", "tab:green", alpha=0.1, beta=0.5, critic=True),
    # its parts
    "discount": Arm("discount alone", "tab:orange", alpha=0.1, beta=0.0),
    "energy": Arm("energy alone", "tab:purple", alpha=1.0, beta=0.5),
    # the paper's other signals
    "entropy": Arm("with entropy", "tab:cyan", alpha=0.1, beta=0.5, signal="entropy"),
    "nll": Arm("with policy NLL", "tab:olive", alpha=0.1, beta=0.5, signal="nll"),
    "shift": Arm("with log-prob shift", "tab:pink", alpha=0.1, beta=0.5, signal="shift"),
    # what others do
    "top-entropy": Arm("top entropy", "teal", change=keep_top_entropy, needs_policy_entropy=True),
    "low-prob": Arm("unlikely tokens less", "navy", change=discount_unlikely),
    # controls, all ours
    "actions": Arm("no reasoning", "salmon", alpha=0.0),
    "inverse": Arm("actions a tenth", "orchid", change=discount_actions),
    "span-placebo": Arm("span placebo", "peru", alpha=0.1, beta=0.5, change=move_into_thought),
    "placebo": Arm("placebo", "tab:brown", alpha=0.1, beta=0.5, change=scatter_weights),
    "blame": Arm("ActFocus, silence blamed", "gold", alpha=0.1, beta=0.5, change=blame_silence),
}
