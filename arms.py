"""The arms: every way of crediting tokens that the trainers know, one a line.

    python train_actfocus.py --arms grpo,placebo
    python train_ppo.py --arms ppo,grpo

An arm says how much a token counts (alpha, beta, the signal), where advantages come from (from
groups, or from PPO's critic), and, for a control, what is done to the weights at the end. A new
arm is one line in ARMS, and, if it is a new rule, one function above it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from actfocus import actfocus_weights
from energy import TokenStats
from rollout import Rollouts
from segment import Segment

# What may tell how uncertain an action token is (paper, appendix): name, label.
SIGNALS = {"energy": "energy", "entropy": "entropy", "nll": "policy NLL", "shift": "log-prob shift"}


def token_signals(frozen: TokenStats, old_logprob: Tensor) -> dict[str, Tensor]:
    """Each of SIGNALS, as float32 of one shape. frozen: of the reference; old_logprob: of the
    policy that played, at the same temperature.

    >>> frozen = TokenStats(torch.tensor([-3.0]), torch.tensor([-9.0]), torch.tensor([0.5]))
    >>> signals = token_signals(frozen, torch.tensor([-2.0]))
    >>> {name: signal.item() for name, signal in signals.items()}
    {'energy': -9.0, 'entropy': 0.5, 'nll': 2.0, 'shift': 1.0}
    """
    return {
        "energy": frozen.energy,
        "entropy": frozen.entropy,
        "nll": -old_logprob,
        "shift": old_logprob - frozen.logprob,
    }


# ------------------------------------------------------------------------------------- for controls
def scatter_weights(weights: Tensor, rollouts: Rollouts, seed: int) -> Tensor:
    """The same weights, on random tokens: what is left of an arm if only their spread helps."""
    generator = torch.Generator().manual_seed(seed)
    response, scattered = rollouts.response, weights.clone()
    order = torch.randperm(int(response.sum()), generator=generator).to(weights.device)
    scattered[response] = weights[response][order]
    return scattered


def blame_silence(weights: Tensor, rollouts: Rollouts, seed: int) -> Tensor:
    """Weight 1 in turns without an action token. Most such turns never leave their thought, and
    ActFocus blames them with a tenth of the weight only. (Our decision: results/worlds.md.)"""
    response, turn = rollouts.response, turn_numbers(rollouts.response)  # (B, T)
    action = (rollouts.labels == Segment.ACTION).long()
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
    change: Callable[[Tensor, Rollouts, int], Tensor] | None = None  # a control's last step

    @property
    def uniform(self) -> bool:
        """Do all tokens weigh alike?"""
        return self.alpha == 1 and self.beta == 0

    @property
    def needs_reference(self) -> bool:
        """Does the frozen reference have to read the rollouts?"""
        return self.beta > 0

    def weights(self, rollouts: Rollouts, frozen: TokenStats | None, seed: int) -> Tensor:
        """The weight of every token, (B, T) float32: stage 6b of the training loop.

        frozen: what the reference says of at least the action tokens, (B, T) each; None for an arm
        that does not need it. seed: for controls that draw at random.
        """
        if frozen is None:
            signal = torch.zeros_like(rollouts.old_logprob)
        else:
            signal = token_signals(frozen, rollouts.old_logprob)[self.signal]
        weights = actfocus_weights(
            signal, rollouts.reasoning, rollouts.action, rollouts.response, self.alpha, self.beta
        )
        return self.change(weights, rollouts, seed) if self.change else weights


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
    # controls, both ours
    "placebo": Arm("placebo", "tab:brown", alpha=0.1, beta=0.5, change=scatter_weights),
    "blame": Arm("ActFocus, silence blamed", "gold", alpha=0.1, beta=0.5, change=blame_silence),
}
