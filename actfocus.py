"""The method: token weights, group advantages, the loss. Tensors in, tensors out.

    advantages = group_advantages(rewards, group_size)                       # GRPO
    weights    = actfocus_weights(energy, reasoning, action, response)       # the one thing that ActFocus adds
    loss       = clipped_loss(logprob, old_logprob, advantages, weights)     # alpha = 1, beta = 0 is GRPO exactly

`policy_loss` is the whole loss with KL and entropy, from hidden states; `fused_policy_loss` is the same without the logits.

The trainer counts B trajectories of T tokens; the masks say which of them the model wrote (`response`), and which of those
are reasoning and which action. Formulas: arXiv 2605.14558; what the paper leaves open is marked "our decision".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from energy import CHUNK_ELEMENTS, add_matmul, checked_chunk_size, chunks, matmul

EPS = 1e-6  # in the two standardisations (the paper's value for advantages; our decision for the signal's variance)


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """A = (R - mean) / (std + 1e-6) within each group of rollouts of one prompt: (B,) -> (B,), float32.

    Groups are consecutive runs of `group_size` rewards; std is the unbiased one. A group whose rewards are all equal, a group
    of one included, gets exactly 0. Raises ValueError if B is not a multiple of group_size.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 5.0, 5.0, 5.0]), 4)
    tensor([ 0.8660, -0.8660, -0.8660,  0.8660,  0.0000,  0.0000,  0.0000,  0.0000])
    """
    if rewards.ndim != 1 or group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"{tuple(rewards.shape)} rewards do not split into groups of {group_size}")
    groups = rewards.float().view(-1, group_size)  # (P, G)
    spread = groups - groups.mean(dim=1, keepdim=True)
    std = (spread.square().sum(dim=1, keepdim=True) / max(group_size - 1, 1)).sqrt()
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)  # rounding leaves a spread of 1e-8, which 1e-6 would blow up
    return torch.where(equal, 0.0, spread / (std + EPS)).flatten()  # (B,)


def most_varied_groups(rewards: Tensor, group_size: int, share: float) -> Tensor:
    """Indices of the rollouts in that share of the groups whose rewards vary most, in order: the paper's reward-variance filter.

    >>> most_varied_groups(torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 4.0]), 2, share=0.5)
    tensor([2, 3, 6, 7])
    """
    groups = torch.arange(len(rewards), device=rewards.device).view(-1, group_size)  # (P, G)
    order = rewards[groups].var(dim=1, correction=0).argsort(descending=True, stable=True)
    return groups[order[: math.ceil(share * len(groups))].sort().values].flatten()


def actfocus_weights(
    signal: Tensor, reasoning: Tensor, action: Tensor, response: Tensor, alpha: float = 0.1, beta: float = 0.5
) -> Tensor:
    """The weight of every token: (B, T) float32, 0 outside `response`.

    reasoning: alpha. action: 1 + beta * sigmoid((signal - mu) / sigma), mu and sigma over all action tokens of the batch
    (population, sqrt(var + eps)). Any other response token (tags, white space, end of turn): 1 (our decision).

    signal: (B, T) float, the uncertainty of each token, by default the frozen reference's energy; read at action tokens only.
    reasoning, action, response: (B, T) bool. Raises ValueError for shapes that differ, alpha outside [0, 1] or beta < 0.

    >>> reasoning, action = torch.tensor([[1, 1, 0, 0, 0, 0]]).bool(), torch.tensor([[0, 0, 1, 1, 0, 0]]).bool()
    >>> response = torch.tensor([[1, 1, 1, 1, 1, 0]]).bool()
    >>> actfocus_weights(torch.tensor([[0.0, 0.0, -9.0, -7.0, 0.0, 0.0]]), reasoning, action, response)
    tensor([[0.1000, 0.1000, 1.1345, 1.3655, 1.0000, 0.0000]])
    """
    shapes = [tuple(x.shape) for x in (signal, reasoning, action, response)]
    if len(set(shapes)) != 1:
        raise ValueError(f"signal, reasoning, action and response differ in shape: {', '.join(map(str, shapes))}")
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
    """L = -sum(w * min(rho * A, clip(rho, 1 - low, 1 + high) * A)) / sum(w), rho = pi / pi_old: a scalar.

    logprob, old_logprob, weights: (B, T); advantages: (B,), one per trajectory, or (B, T). Where a weight is 0 the log-probs are
    never looked at. normalizer: what to divide by, by default weights.sum(); pass the whole mini-batch's sum of weights when
    micro-batches are accumulated. If it is 0 the loss is 0. With packed tokens, all arguments may be (N,).

    >>> old = torch.zeros(1, 3)
    >>> new = torch.tensor([[0.0, 0.5, -0.5]])  # ratios 1, 1.65, 0.61
    >>> clipped_loss(new, old, torch.tensor([1.0]), torch.ones(1, 3))  # -(1 + 1.28 + 0.61) / 3: a good action is clipped above
    tensor(-0.9622)
    >>> clipped_loss(new, old, torch.tensor([-1.0]), torch.ones(1, 3))  # (1 + 1.65 + 0.8) / 3: a bad one below
    tensor(1.1496)
    """
    if advantages.ndim == logprob.ndim - 1:
        advantages = advantages[:, None]  # (B, 1)
    # NOTE: zero weights must mask before exp: inf * 0 is nan, and padding may hold anything.
    ratio = torch.where(weights > 0, logprob - old_logprob, 0.0).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    total = weights.sum() if normalizer is None else torch.as_tensor(normalizer)
    return -(weights * gain).sum() / torch.where(total > 0, total, 1.0)


def stats_loss(
    logprob: Tensor, entropy: Tensor | None, old_logprob: Tensor, advantages: Tensor, weights: Tensor, *,
    clip_low: float = 0.2, clip_high: float = 0.28, normalizer: Tensor | float | None = None, count: Tensor | float | None = None,
    ref_logprob: Tensor | None = None, kl_coef: float = 0.0, entropy_coef: float = 0.0,
) -> Tensor:  # fmt: skip
    """`clipped_loss` plus kl_coef times the mean KL to the reference, minus entropy_coef times the mean entropy: a scalar.

    All per-token arguments are (N,), without padding. The two means are over all tokens, unweighted: count is what to divide
    their sums by, by default N; pass the whole mini-batch's tokens when micro-batches are accumulated.
    """
    count = len(logprob) if count is None else count
    loss = clipped_loss(logprob, old_logprob, advantages, weights, clip_low, clip_high, normalizer)
    if kl_coef:
        # k1 = log pi - log ref. NOTE: its gradient is 0 on average unless the ratio stands before it (our decision).
        loss = loss + kl_coef * ((logprob - old_logprob).exp() * (logprob - ref_logprob)).sum() / count
    return loss - entropy_coef * entropy.sum() / count if entropy_coef else loss


def policy_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, old_logprob: Tensor, advantages: Tensor, weights: Tensor, *,
    temperature: float = 1.0, **options,
) -> Tensor:  # fmt: skip
    """The loss of N tokens, written out: all logits at once, gradients by autograd. options: those of `stats_loss`.

    hidden: (N, H), what predicts the targets (N,); weight: (V, H), the output embedding; the others (N,).
    """
    logits = (hidden @ weight.T).float()  # (N, V): by far the largest tensor of a training step
    logp = logits.log_softmax(-1)
    logq = logp if temperature == 1.0 else (logits / temperature).log_softmax(-1)
    logprob = logq.gather(-1, targets[:, None]).squeeze(-1)  # (N,)
    entropy = -(logp.exp() * logp).sum(-1) if options.get("entropy_coef") else None  # (N,): of the raw logits
    return stats_loss(logprob, entropy, old_logprob, advantages, weights, **options)


def fused_policy_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, old_logprob: Tensor, advantages: Tensor, weights: Tensor, *,
    temperature: float = 1.0, clip_low: float = 0.2, clip_high: float = 0.28, normalizer: Tensor | float | None = None,
    count: Tensor | float | None = None, ref_logprob: Tensor | None = None, kl_coef: float = 0.0, entropy_coef: float = 0.0,
    chunk_size: int | None = None, return_stats: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`policy_loss`, its value and gradient computed chunk by chunk: the (N, V) logits never exist.

    hidden: (N, H), what predicts the targets, and weight: (V, H), the output embedding: float32 or bfloat16; the head's
    gradient is summed in float32. targets: (N,) int64. The rest as in `stats_loss`: (N,) float32. temperature divides the
    logits of the log-probs; the entropy is of the raw ones. chunk_size: tokens at a time, by default 128 MB of logits
    (CUDA: 512).
    return_stats: also give logprob and entropy, (N,) each, detached. Under autocast the inputs take its dtype.

    The loss is a sum over tokens, so the gradient of a chunk is known in the forward pass, and backward only hands it on (once:
    a second backward raises RuntimeError). Raises ValueError for shapes that do not fit or for KL without ref_logprob.

    >>> hidden, head = torch.zeros(1, 8, requires_grad=True), torch.zeros(4, 8)
    >>> fused_policy_loss(hidden, head, torch.tensor([2]), torch.tensor([0.25]).log(), torch.ones(1), torch.ones(1))
    tensor(-1., grad_fn=<_FusedPolicyLossBackward>)
    """
    at_once = 8 * CHUNK_ELEMENTS if hidden.is_cuda else 2 * CHUNK_ELEMENTS  # a GPU wants few products, and large ones
    chunk_size = checked_chunk_size(hidden, weight, targets, temperature, chunk_size, at_once)
    per_token = {"old_logprob": old_logprob, "advantages": advantages, "weights": weights}
    per_token |= {"ref_logprob": ref_logprob} if kl_coef else {}
    for name, values in per_token.items():
        if values is None or values.shape != targets.shape:
            found = None if values is None else tuple(values.shape)
            raise ValueError(f"{name} is {found}: expected one number a target, {tuple(targets.shape)}")
    normalizer = weights.sum() if normalizer is None else normalizer
    options = {"clip_low": clip_low, "clip_high": clip_high, "normalizer": normalizer, "kl_coef": kl_coef}
    options |= {"entropy_coef": entropy_coef, "count": len(targets) if count is None else count}

    def loss_of(rows: slice, logprob: Tensor, entropy: Tensor) -> Tensor:
        return stats_loss(logprob, entropy, **{name: values[rows] for name, values in per_token.items()}, **options)

    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        outputs = _FusedPolicyLoss.apply(hidden, weight, targets, temperature, chunk_size, loss_of)
    return outputs if return_stats else outputs[0]


class _FusedPolicyLoss(torch.autograd.Function):
    """Per chunk: the logits z, the loss and its gradient by z in their place, and from it those by hidden and weight."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk_size, loss_of):
        head, wanted = weight.to(hidden.dtype), ctx.needs_input_grad
        ctx.grads = torch.zeros_like(hidden), torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        ctx.dtype, loss = weight.dtype, hidden.new_zeros((), dtype=torch.float32)
        logprob, entropy = hidden.new_empty(2, len(hidden), dtype=torch.float32)
        room = hidden.new_empty(min(chunk_size, len(hidden)), len(weight), dtype=torch.float32)
        block = chunk_size if hidden.is_cuda else max(1, 2**22 // len(weight))  # a processor likes 16 MB at a time
        for rows in chunks(len(hidden), chunk_size):
            z = matmul(hidden[rows], head.T, out=room[: rows.stop - rows.start])  # (n, V)
            for some in chunks(len(z), block):
                part = slice(rows.start + some.start, rows.start + some.stop)
                values = _to_gradient(z[some], targets[part, None], temperature, partial(loss_of, part))
                loss, logprob[part], entropy[part] = loss + values[0], *values[1:]
            if any(wanted[:2]):
                grad_z = z.to(hidden.dtype)
                ctx.grads[0][rows] = matmul(grad_z, head).to(hidden.dtype)
            if wanted[1]:
                add_matmul(ctx.grads[1], grad_z.T, hidden[rows])
        ctx.mark_non_differentiable(logprob, entropy)
        return loss, logprob, entropy

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if ctx.grads is None:
            raise RuntimeError("fused_policy_loss gives its gradient once: call it again before another backward")
        (on_hidden, on_weight), ctx.grads = ctx.grads, None  # so that the head's gradient can become .grad without a copy
        on_weight = None if on_weight is None else on_weight.mul_(grad_loss).to(ctx.dtype)
        return on_hidden.mul_(grad_loss), on_weight, None, None, None, None


def _to_gradient(z: Tensor, targets: Tensor, temperature: float, loss_of: Callable) -> tuple[Tensor, ...]:
    """(loss, logprob, entropy) of the tokens whose logits are z (n, V); z is overwritten with the loss's gradient by it."""
    logp = z.log_softmax(-1)
    logq = logp if temperature == 1.0 else (z / temperature).log_softmax(-1)
    p = torch.exp(logp, out=z)
    stats = logq.gather(-1, targets).squeeze(-1), -torch.linalg.vecdot(p, logp)
    with torch.enable_grad():
        loss = loss_of(*(each.requires_grad_() for each in stats))
        on_logprob, on_entropy = torch.autograd.grad(loss, stats, allow_unused=True, materialize_grads=True)
    # d logprob / dz = (onehot(target) - q) / temperature,  q = softmax(z / temperature)
    # d entropy / dz = -p * (log p + entropy),              p = softmax(z)
    on_logprob, on_entropy = on_logprob[:, None] / temperature, on_entropy[:, None]  # (n, 1)
    on_p = logp.add_(stats[1].detach()[:, None]).mul_(on_entropy)  # (n, V)
    if temperature == 1.0:  # q is p
        p.mul_(on_p.add_(on_logprob)).neg_()
    else:
        p.mul_(on_p).addcmul_(logq.exp_(), on_logprob).neg_()
    z.scatter_add_(-1, targets, on_logprob)
    return loss.detach(), *(each.detach() for each in stats)


def reweight_advantages(advantages: Tensor, weights: Tensor, response: Tensor) -> Tensor:
    """A_t -> A_t * w_t * N / sum(w): (B, T), the same update for any trainer that averages per-token advantages over tokens.

    advantages: (B,) or (B, T); weights: (B, T) from `actfocus_weights`; response: (B, T) bool, N of them True. Since w >= 0,
    the clipped loss of these advantages with uniform weights equals the weighted loss of the plain ones. N and sum(w) must be
    those of the whole batch that the trainer averages over.

    >>> reweight_advantages(torch.tensor([2.0]), torch.tensor([[0.5, 1.5, 0.0]]), torch.tensor([[True, True, False]]))
    tensor([[1., 3., 0.]])
    """
    if advantages.ndim == 1:
        advantages = advantages[:, None]  # (B, 1)
    total = weights.sum()
    return advantages * weights * response * (response.sum() / torch.where(total > 0, total, 1.0))
