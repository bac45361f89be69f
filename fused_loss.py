"""The loss of a training step from hidden states: written out, and the same without the logits.

    result = policy_loss(hidden, head, targets, old_logprob, advantages, weights)        # to read
    result = fused_policy_loss(hidden, head, targets, old_logprob, advantages, weights)  # to use
    result.loss.backward()

Both are `clipped_loss` of actfocus.py with KL penalty and entropy bonus, and give the same numbers.
The fused one never holds the logits of all tokens: the loss is a sum over tokens, so the gradient
of a chunk is known as soon as its logits are, and is written over them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from actfocus import clipped_loss
from energy import CHUNK_ELEMENTS, add_matmul, checked_chunk_size, chunks, matmul


class PolicyLoss(NamedTuple):
    """A loss and what it was made of."""

    loss: Tensor  # scalar, with gradient
    logprob: Tensor  # (N,) float32, log-probability of each target, without gradient
    entropy: Tensor  # (N,) float32, of softmax(raw logits), without gradient


def token_loss(
    logprob: Tensor, entropy: Tensor | None,
    old_logprob: Tensor, advantages: Tensor, weights: Tensor, *,
    clip_low: float = 0.2, clip_high: float = 0.28,
    normalizer: Tensor | float | None = None, count: Tensor | float | None = None,
    ref_logprob: Tensor | None = None, kl_coef: float = 0.0, entropy_coef: float = 0.0,
) -> Tensor:  # fmt: skip
    """`clipped_loss` + kl_coef * mean KL to the reference - entropy_coef * mean entropy: a scalar.

    Per-token arguments are (N,), without padding. normalizer and count: what the clipped loss and
    the two means divide by, else sum(w) and N; pass the mini-batch's for each micro-batch of it.
    """
    count = len(logprob) if count is None else count
    loss = clipped_loss(logprob, old_logprob, advantages, weights, clip_low, clip_high, normalizer)
    if kl_coef:
        # NOTE: the ratio is ours: without it, the gradient of k1 would be 0 on average.
        k1 = logprob - ref_logprob
        loss = loss + kl_coef * ((logprob - old_logprob).exp() * k1).sum() / count
    if entropy_coef:
        loss = loss - entropy_coef * entropy.sum() / count
    return loss


def policy_loss(
    hidden: Tensor, head: Tensor, targets: Tensor,
    old_logprob: Tensor, advantages: Tensor, weights: Tensor, *,
    temperature: float = 1.0, clip_low: float = 0.2, clip_high: float = 0.28,
    normalizer: Tensor | float | None = None, count: Tensor | float | None = None,
    ref_logprob: Tensor | None = None, kl_coef: float = 0.0, entropy_coef: float = 0.0,
) -> PolicyLoss:  # fmt: skip
    """The loss of N tokens, written out: all logits at once, gradients by autograd.

    hidden: (N, H), what predicts the targets (N,); head: (V, H), the output embedding; the others
    as in `token_loss`. temperature: of the log-probs; the entropy is of the raw logits.
    """
    logits = (hidden @ head.T).float()  # (N, V): by far the largest tensor of a training step
    logp = logits.log_softmax(-1)
    logq = logp if temperature == 1.0 else (logits / temperature).log_softmax(-1)
    logprob = logq.gather(-1, targets[:, None]).squeeze(-1)  # (N,)
    entropy = -(logp.exp() * logp).sum(-1)  # (N,)
    loss = token_loss(
        logprob, entropy, old_logprob, advantages, weights,
        clip_low=clip_low, clip_high=clip_high, normalizer=normalizer, count=count,
        ref_logprob=ref_logprob, kl_coef=kl_coef, entropy_coef=entropy_coef,
    )  # fmt: skip
    return PolicyLoss(loss, logprob.detach(), entropy.detach())


def fused_policy_loss(
    hidden: Tensor, head: Tensor, targets: Tensor,
    old_logprob: Tensor, advantages: Tensor, weights: Tensor, *,
    temperature: float = 1.0, clip_low: float = 0.2, clip_high: float = 0.28,
    normalizer: Tensor | float | None = None, count: Tensor | float | None = None,
    ref_logprob: Tensor | None = None, kl_coef: float = 0.0, entropy_coef: float = 0.0,
    chunk_size: int | None = None,
) -> PolicyLoss:  # fmt: skip
    """`policy_loss`, its value and gradient computed chunk by chunk: the (N, V) logits never exist.

    hidden: (N, H) and head: (V, H) are float32 or bfloat16; the head's gradient is summed in
    float32. targets: (N,) int64, the rest as in `token_loss`: (N,) float32. chunk_size: tokens at a
    time, by default 128 MB of logits (CUDA: 512). Under autocast the inputs take its dtype.

    The gradient is computed in the forward pass, and backward only hands it on (once: a second one
    raises RuntimeError). Raises ValueError for shapes that do not fit or KL without ref_logprob.

    >>> hidden, head = torch.zeros(1, 8, requires_grad=True), torch.zeros(4, 8)
    >>> old_logprob, one = torch.tensor([0.25]).log(), torch.ones(1)
    >>> fused_policy_loss(hidden, head, torch.tensor([2]), old_logprob, one, one).loss
    tensor(-1., grad_fn=<_FusedPolicyLossBackward>)
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    elements = CHUNK_ELEMENTS * (8 if hidden.is_cuda else 2)  # a GPU wants few and large products
    chunk_size = checked_chunk_size(hidden, head, targets, temperature, chunk_size, elements)
    per_token = {"old_logprob": old_logprob, "advantages": advantages, "weights": weights}
    if kl_coef:
        per_token["ref_logprob"] = ref_logprob
    for name, values in per_token.items():
        if values is None or values.shape != targets.shape:
            found = values if values is None else tuple(values.shape)
            expected = f"expected one number a target, {tuple(targets.shape)}"
            raise ValueError(f"{name} is {found}: {expected}")
    with torch.autocast(device, enabled=False):
        loss, logprob, entropy = _FusedPolicyLoss.apply(
            hidden, head, targets,
            old_logprob, advantages, weights,
            temperature, clip_low, clip_high,
            weights.sum() if normalizer is None else normalizer,
            len(targets) if count is None else count,
            ref_logprob if kl_coef else None, kl_coef, entropy_coef, chunk_size,
        )  # fmt: skip
    return PolicyLoss(loss, logprob, entropy)


class _FusedPolicyLoss(torch.autograd.Function):
    """Per chunk: the logits z, the loss and its gradient by z in their place, and from it those
    by hidden and head."""

    @staticmethod
    def forward(
        ctx, hidden, head, targets, old_logprob, advantages, weights,
        temperature, clip_low, clip_high, normalizer, count,
        ref_logprob, kl_coef, entropy_coef, chunk_size,
    ):  # fmt: skip
        wants_hidden, wants_head, *_ = ctx.needs_input_grad
        grad_hidden = torch.zeros_like(hidden)
        grad_head = torch.zeros_like(head, dtype=torch.float32) if wants_head else None
        ctx.head_dtype = head.dtype
        head = head.to(hidden.dtype)
        loss = hidden.new_zeros((), dtype=torch.float32)
        logprob, entropy = hidden.new_empty(2, len(hidden), dtype=torch.float32)
        buffer = hidden.new_empty(min(chunk_size, len(hidden)), len(head), dtype=torch.float32)
        # A processor goes through the logits in blocks of 16 MB, a GPU takes a chunk at once.
        block = chunk_size if hidden.is_cuda else max(1, 2**22 // len(head))
        for rows in chunks(len(hidden), chunk_size):
            z = matmul(hidden[rows], head.T, out=buffer[: rows.stop - rows.start])  # (n, V)
            for part in chunks(len(z), block):
                here = slice(rows.start + part.start, rows.start + part.stop)
                logp = z[part].log_softmax(-1)  # (m, V)
                logq = logp if temperature == 1.0 else (z[part] / temperature).log_softmax(-1)
                token_logprob = logq.gather(-1, targets[here, None]).squeeze(-1)  # (m,)
                p = torch.exp(logp, out=z[part])  # from here on in the memory of z
                token_entropy = -torch.linalg.vecdot(p, logp)  # (m,)
                with torch.enable_grad():  # of the few operations per token, by autograd
                    token_logprob.requires_grad_()
                    token_entropy.requires_grad_()
                    value = token_loss(
                        token_logprob, token_entropy,
                        old_logprob[here], advantages[here], weights[here],
                        clip_low=clip_low, clip_high=clip_high, normalizer=normalizer, count=count,
                        ref_logprob=None if ref_logprob is None else ref_logprob[here],
                        kl_coef=kl_coef, entropy_coef=entropy_coef,
                    )  # fmt: skip
                    on_logprob, on_entropy = torch.autograd.grad(
                        value, (token_logprob, token_entropy), materialize_grads=True
                    )
                loss += value.detach()
                logprob[here] = token_logprob.detach()
                entropy[here] = token_entropy.detach()
                # d logprob / dz = (onehot(target) - q) / temperature, q = softmax(z / temperature)
                # d entropy / dz = -p * (log p + entropy),             p = softmax(z)
                on_logprob = on_logprob[:, None] / temperature  # (m, 1)
                q = p if temperature == 1.0 else logq.exp_()  # in the memory of log q
                of_entropy = logp.add_(entropy[here, None]).mul_(on_entropy[:, None])  # / -p
                if q is p:
                    grad_z = p.mul_(of_entropy.add_(on_logprob)).neg_()  # z's memory holds it now
                else:
                    grad_z = p.mul_(of_entropy).addcmul_(q, on_logprob).neg_()
                grad_z.scatter_add_(-1, targets[here, None], on_logprob)  # + onehot * on_logprob
            grad_z = z.to(hidden.dtype)  # of all parts
            if wants_hidden:
                grad_hidden[rows] = matmul(grad_z, head).to(hidden.dtype)
            if wants_head:
                add_matmul(grad_head, grad_z.T, hidden[rows])
        ctx.grads = grad_hidden, grad_head
        ctx.mark_non_differentiable(logprob, entropy)
        return loss, logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.grads is None:
            raise RuntimeError("fused_policy_loss gives its gradient once: call it again")
        grad_hidden, grad_head = ctx.grads
        ctx.grads = None  # so that the head's gradient can become .grad without a copy
        grad_hidden.mul_(grad_loss)
        if grad_head is not None:
            grad_head = grad_head.mul_(grad_loss).to(ctx.head_dtype)
        return grad_hidden, grad_head, *[None] * 13
