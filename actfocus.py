"""The method on one screen: token weights, group advantages, the loss. Tensors in, tensors out.

    advantages = group_advantages(rewards, group_size)               # GRPO
    weights = actfocus_weights(energy, reasoning, action, response)  # ActFocus; GRPO: all 1
    loss = clipped_loss(logprob, old_logprob, advantages, weights)   # PPO's, a mean by weight

B episodes have T tokens each; masks say which of them the model wrote (`response`), and which of
those are reasoning and which action. `logprob` is the log-probability of each token now, and
`old_logprob` what it was when the token was sampled. The formulas are those of arXiv 2605.14558,
except where a line says "our decision".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 1e-6  # added to the std of rewards (the paper's) and to the variance of energies (ours)


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """A = (R - mean) / (std + 1e-6) within each group of rollouts of one prompt.

    rewards: (B,). Returns (B,) float32. Groups are consecutive runs of `group_size` rewards; std is
    the unbiased one. A group whose rewards are all equal, a group of one included, gets exactly 0.
    Raises ValueError if B is not a multiple of group_size.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 5.0, 5.0, 5.0]), 4)
    tensor([ 0.8660, -0.8660, -0.8660,  0.8660,  0.0000,  0.0000,  0.0000,  0.0000])
    """
    if rewards.ndim != 1 or group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"{tuple(rewards.shape)} rewards do not split into groups of {group_size}")
    groups = rewards.float().view(-1, group_size)  # (P, G)
    spread = groups - groups.mean(dim=1, keepdim=True)
    std = (spread.square().sum(dim=1, keepdim=True) / max(group_size - 1, 1)).sqrt()
    # NOTE: equal rewards leave a spread of 1e-8 by rounding, which dividing by 1e-6 would blow up.
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    return torch.where(equal, 0.0, spread / (std + EPS)).flatten()  # (B,)


def most_varied_groups(rewards: Tensor, group_size: int, share: float) -> Tensor:
    """Indices, in order, of the rollouts in that share (rounded up) of the groups whose rewards
    vary most: the paper's reward-variance filter. rewards: (B,).

    >>> most_varied_groups(torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 4.0]), 2, share=0.5)
    tensor([2, 3, 6, 7])
    """
    groups = torch.arange(len(rewards), device=rewards.device).view(-1, group_size)  # (P, G)
    order = rewards[groups].float().var(dim=1, correction=0).argsort(descending=True, stable=True)
    kept = math.ceil(round(share * len(groups), 9))  # 0.07 * 100 is a little more than 7
    return groups[order[:kept].sort().values].flatten()


def actfocus_weights(
    signal: Tensor,
    reasoning: Tensor,
    action: Tensor,
    response: Tensor,
    alpha: float = 0.1,
    beta: float = 0.5,
) -> Tensor:
    """The weight of every token: (B, T) float32, 0 outside `response`.

    reasoning: alpha. action: 1 + beta * sigmoid((signal - mu) / sigma), mu and sigma over all
    action tokens of the batch (population, sqrt(var + eps)). Any other response token (tags, white
    space, end of turn): 1 (our decision).

    signal: (B, T) float, the uncertainty of each token. ActFocus takes the frozen reference's
    energy; arms.py has other signals. It is read at action tokens only. reasoning, action,
    response: (B, T) bool.
    Raises ValueError for shapes that differ, alpha outside [0, 1] or beta < 0.

    >>> reasoning = torch.tensor([[1, 1, 0, 0, 0, 0]]).bool()
    >>> action = torch.tensor([[0, 0, 1, 1, 0, 0]]).bool()
    >>> response = torch.tensor([[1, 1, 1, 1, 1, 0]]).bool()
    >>> energy = torch.tensor([[0.0, 0.0, -9.0, -7.0, 0.0, 0.0]])
    >>> actfocus_weights(energy, reasoning, action, response)
    tensor([[0.1000, 0.1000, 1.1345, 1.3655, 1.0000, 0.0000]])
    """
    shapes = [tuple(x.shape) for x in (signal, reasoning, action, response)]
    if len(set(shapes)) != 1:
        raise ValueError(f"signal, reasoning, action and response differ in shape: {shapes}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}: it must be in [0, 1]")
    if not beta >= 0:
        raise ValueError(f"beta is {beta}: it must not be negative")
    action = action & response
    weights = response.float()
    weights[reasoning & response] = alpha
    chosen = signal[action].float()  # (number of action tokens,)
    if len(chosen):
        mu, sigma = chosen.mean(), (chosen.var(correction=0) + EPS).sqrt()
        weights[action] = 1 + beta * torch.sigmoid((chosen - mu) / sigma)
    return weights


def clipped_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """L = -sum(w * min(rho * A, clip(rho, 1 - low, 1 + high) * A)) / sum(w), rho = pi / pi_old.

    logprob, old_logprob, weights: (B, T); advantages: (B,), one per episode, or (B, T). All four
    may also be flat, (N,) for N tokens without padding. Returns a scalar. Where a weight is 0,
    log-probs and advantages are never looked at. normalizer: what to divide by, by default
    weights.sum(). Where a mini-batch is split into micro-batches, whose gradients add up, pass the
    sum of weights of the whole mini-batch. A normalizer of 0 gives a loss of 0.

    >>> old = torch.zeros(1, 3)
    >>> new = torch.tensor([[0.0, 0.5, -0.5]])  # ratios 1, 1.65, 0.61
    >>> good, bad, alike = torch.tensor([1.0]), torch.tensor([-1.0]), torch.ones(1, 3)
    >>> clipped_loss(new, old, good, alike)  # -(1 + 1.28 + 0.61) / 3: clipped above
    tensor(-0.9622)
    >>> clipped_loss(new, old, bad, alike)  # (1 + 1.65 + 0.8) / 3: clipped below
    tensor(1.1496)
    """
    if advantages.ndim == logprob.ndim - 1:
        advantages = advantages[:, None]  # (B, 1)
    # NOTE: zero weights must mask before exp: inf * 0 is nan, and padding may hold anything.
    counts = weights > 0
    ratio = torch.where(counts, logprob - old_logprob, 0.0).exp()
    advantages = torch.where(counts, advantages, 0.0)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    total = weights.sum() if normalizer is None else torch.as_tensor(normalizer)
    return -(weights * gain).sum() / torch.where(total > 0, total, 1.0)


def reweight_advantages(advantages: Tensor, weights: Tensor, response: Tensor) -> Tensor:
    """A_t -> A_t * w_t * N / sum(w), (B, T): the same update for any trainer that takes per-token
    advantages and averages over tokens.

    advantages: (B,) or (B, T); weights: (B, T) from `actfocus_weights`; response: (B, T) bool, N of
    them True. This is exact, because a weight that is not negative may move inside the minimum of
    the clipped loss. N and sum(w) are those of the tensors that are passed, which must hold all
    that is averaged over. Where a token has no weight the advantage is never looked at, and the
    result is 0.

    >>> weights, response = torch.tensor([[0.5, 1.5, 0.0]]), torch.tensor([[True, True, False]])
    >>> reweight_advantages(torch.tensor([2.0]), weights, response)
    tensor([[1., 3., 0.]])
    """
    if advantages.ndim == 1:
        advantages = advantages[:, None]  # (B, 1)
    total = weights.sum()
    advantages = torch.where(response & (weights > 0), advantages, 0.0)  # not nan * 0, which is nan
    return advantages * weights * response * (response.sum() / torch.where(total > 0, total, 1.0))
