"""PPO: the same loop with advantages of a critic, without and with the weights of ActFocus.

    python train_ppo.py                            # PPO and PPO with ActFocus side by side
    python train_ppo.py --arms ppo,grpo,placebo    # any arms of arms.py

Group advantages need several rollouts of a prompt and give one number a rollout. A critic instead
predicts, at every token, what the episode will still earn; the advantage of a token is what came
out beyond that. ActFocus weighs the policy's loss alone: never advantages, nor the critic's loss.

Simplified away: no clipping of the value loss, no early stop, no warm-up of the critic.
"""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from policy import Policy
from rollout import Rollouts, scored_hidden
from support.config import ActFocusConfig, check_range, flag, parse, same_flag
from train_grpo import Guard, run


@dataclass
class PPOConfig(ActFocusConfig):
    # PPO was measured in FrozenLake (results/evidence.md), so that is what it plays by default.
    env: str = same_flag(ActFocusConfig, "env", "frozenlake")
    iterations: int = same_flag(ActFocusConfig, "iterations", 10)
    eval_every: int = same_flag(ActFocusConfig, "eval_every", 5)
    arms: str = same_flag(ActFocusConfig, "arms", "ppo,ppo-actfocus")
    critic_lr: float | None = flag(
        None,
        "The learning rate of the critic. Without this flag it is 1e-3 for a built-in model and "
        "1e-5 with --model.",
    )
    critic_passes: int = flag(
        2, "How many times the critic is fitted to the rollouts of an iteration."
    )
    gae_lambda: float = flag(
        1.0,
        "The lambda of generalised advantage estimation. At 1, an advantage is the return minus "
        "the critic's value.",
    )
    with_critic = True

    def validate(self) -> None:
        """Raise ValueError for settings that cannot run; it names the flag, its value and a fix."""
        super().validate()
        check_range(self, 0, 10, "critic_lr")
        check_range(self, 1, math.inf, "critic_passes")
        check_range(self, 0, 1, "gae_lambda")

    def resolve(self) -> None:
        super().resolve()
        if self.critic_lr is None:
            self.critic_lr = 1e-5 if self.model else 1e-3


def gae(
    rewards: Tensor, values: Tensor, response: Tensor, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the tokens that the model wrote.

    delta_t = r_t + gamma V(c_u) - V(c_t), A_t = delta_t + gamma lam A_u, where u is the next
    *response* token: prompts and tool responses in between are skipped and discount nothing. After
    the last one V and A are 0 (paper; gamma = lam = 1 there). returns = A + V: with lam = 1, what
    the critic should have said.

    rewards, values: (B, T) float; values[:, t] is V(c_t), of all that stands before token t.
    response: (B, T) bool. Returns (advantages, returns), (B, T) float32, zero outside `response`.
    Raises ValueError for shapes that differ, or gamma or lam outside [0, 1].

    >>> response = torch.tensor([[False, True, False, True]])
    >>> rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    >>> values = torch.tensor([[9.0, 0.25, 9.0, 0.75]])
    >>> gae(rewards, values, response, lam=0.0)
    (tensor([[0.0000, 0.5000, 0.0000, 0.2500]]), tensor([[0.0000, 0.7500, 0.0000, 1.0000]]))
    """
    if not rewards.shape == values.shape == response.shape or response.ndim != 2:
        shapes = [tuple(x.shape) for x in (rewards, values, response)]
        raise ValueError(f"rewards, values and response must share one shape (B, T): {shapes}")
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma is {gamma} and lam {lam}: both must be in [0, 1]")
    advantages = torch.zeros_like(values, dtype=torch.float32)
    value_after, advantage_after = torch.zeros(2, len(values), device=values.device)  # (B,) each
    for t in range(values.shape[1] - 1, -1, -1):
        here = response[:, t]
        delta = rewards[:, t] + gamma * value_after - values[:, t]
        advantage_after = torch.where(here, delta + gamma * lam * advantage_after, advantage_after)
        value_after = torch.where(here, values[:, t], value_after)
        advantages[:, t] = torch.where(here, advantage_after, 0.0)
    return advantages, torch.where(response, advantages + values, 0.0)


def reward_at_end(rewards: Tensor, response: Tensor) -> Tensor:
    """(B, T): the reward of each episode, (B,), at its last response token; nowhere if it has none.

    >>> reward_at_end(torch.tensor([2.0]), torch.tensor([[False, True, True, False]]))
    tensor([[0., 0., 2., 0.]])
    """
    left = response.flip(1).cumsum(1).flip(1)  # (B, T): response tokens from here on
    return torch.where(response & (left == 1), rewards[:, None], 0.0)


def whiten(advantages: Tensor, response: Tensor) -> Tensor:
    """(B, T): mean 0 and standard deviation 1 over all response tokens of the batch, as other
    trainers do (our decision: the paper does not say); all 0 if they are equal."""
    chosen = advantages[response]
    spread = (advantages - chosen.mean()) / (chosen.std(correction=0) + 1e-6)
    equal = (chosen == chosen[:1]).all()  # as in group_advantages: rounding is no advantage
    return torch.where(response & ~equal, spread, 0.0)


def explained_variance(returns: Tensor, values: Tensor) -> float:
    """The share of the variance of returns that the values predicted, both (N,).

    It is 1 if they predicted all of it, 0 if they are no better than the mean, and negative if they
    are worse. Returns that are all equal have no variance to explain, and it is nan: then they
    differ by rounding alone, since each is summed from many advantages and a value.

    >>> explained_variance(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.5]))
    0.75
    >>> explained_variance(torch.tensor([-0.6, -0.6000001]), torch.tensor([0.2, 0.1]))
    nan
    """
    largest = torch.maximum(returns.abs(), values.abs()).max()
    if returns.std(correction=0) <= 1e-5 * largest:
        return math.nan
    unexplained = (returns - values).var(correction=0) / returns.var(correction=0)
    return (1 - unexplained).item()


class Critic:
    """V(c_t): the policy's trunk, copied, under a linear layer with one output, which starts at 0.
    Trained on the returns with an optimizer of its own."""

    def __init__(self, policy: Policy, config: PPOConfig):
        self.config = config
        self.trunk = copy.copy(policy)  # so that `scored_hidden` serves it, too
        self.trunk.model = copy.deepcopy(policy.model)
        self.layer = torch.nn.Linear(policy.head.shape[1], 1, device=policy.device)
        torch.nn.init.zeros_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)
        self.learned = torch.nn.ModuleList([self.trunk.model, self.layer])
        self.optimizer = torch.optim.Adam(self.learned.parameters(), lr=config.critic_lr)
        self.guard = Guard("the critic", "--critic-lr")
        self.rng = random.Random(config.seed)  # its own: shuffling it leaves prompts as they are
        # Of the last `advantages`: what to fit to, (B, T), and how good the predictions were.
        self.returns: Tensor | None = None
        self.quality: dict[str, float] = {}

    def state_dict(self) -> dict:
        """All that training changes."""
        parts = {"trunk": self.trunk.model, "layer": self.layer, "optimizer": self.optimizer}
        state = {name: part.state_dict() for name, part in parts.items()}
        return state | {"rng": self.rng.getstate()}

    def load_state_dict(self, state: dict) -> None:
        self.trunk.model.load_state_dict(state["trunk"])
        self.layer.load_state_dict(state["layer"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.setstate(state["rng"])

    def predict(self, rollouts: Rollouts, indices: Tensor) -> Tensor:
        """(N,) float32: the value before each response token of some rollouts, in their order."""
        hidden, _ = scored_hidden(self.trunk, rollouts, indices, rollouts.response)  # (N, H)
        return self.layer(hidden.float()).squeeze(-1)

    @torch.no_grad()
    def values(self, rollouts: Rollouts) -> Tensor:
        """(B, T): V(c_t) at the response tokens, else 0."""
        values = torch.zeros(rollouts.ids.shape, device=rollouts.ids.device)
        everything = torch.arange(len(values))
        for indices in rollouts.micro_batches(everything, self.config.micro_tokens):
            filled = torch.zeros_like(values[indices])
            filled[rollouts.response[indices]] = self.predict(rollouts, indices)
            values[indices] = filled
        return values

    def advantages(self, rollouts: Rollouts) -> Tensor:
        """5. Whitened advantages, (B, T). The returns are kept for `fit`."""
        response = rollouts.response
        rewards = reward_at_end(rollouts.rewards, response)
        values = self.values(rollouts)
        advantages, returns = gae(rewards, values, response, lam=self.config.gae_lambda)
        self.returns = returns
        self.quality = {
            "value_loss": 0.5 * (returns - values)[response].square().mean().item(),
            "explained_variance": explained_variance(returns[response], values[response]),
        }
        return whiten(advantages, response)

    def fit(self, rollouts: Rollouts) -> dict[str, float]:
        """7b. Fit the values to the returns of these rollouts by their squared error, in
        mini-batches as the policy's. Returns columns of the log, of the values before this fit,
        which the advantages came from: their loss, and the share of the variance of the returns
        that they explain, see `explained_variance`. A mini-batch whose gradient is not finite is
        left out; the third in a row ends the run."""
        response, returns, config = rollouts.response, self.returns, self.config
        for _ in range(config.critic_passes):
            shuffled = torch.tensor(self.rng.sample(range(len(returns)), len(returns)))
            for minibatch in shuffled.split(config.minibatch):
                count = response[minibatch].sum()
                for indices in rollouts.micro_batches(minibatch, config.micro_tokens):
                    error = self.predict(rollouts, indices) - returns[indices][response[indices]]
                    loss = 0.5 * error.square().sum() / count
                    loss.backward()
                parameters = self.learned.parameters()
                norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                if self.guard.allows(norm.item(), loss.item(), self.learned):
                    self.optimizer.step()
                self.optimizer.zero_grad()
        return self.quality

    def healthy(self) -> bool:
        """Is this a state that is worth a checkpoint?"""
        return self.guard.healthy(self.learned)


if __name__ == "__main__":
    config = parse(PPOConfig, "PPO without and with ActFocus on a tool-calling environment.")
    run(config, config.chosen_arms(), make_critic=Critic, script=__file__)
