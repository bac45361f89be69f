"""The loss of a training step from hidden states: written out, and the same without the logits.

    result = policy_loss(hidden, head, targets, old_logprob, advantages, weights)        # to read
    result = fused_policy_loss(hidden, head, targets, old_logprob, advantages, weights)  # to use
    result.loss.backward()

Both compute `clipped_loss` of actfocus.py plus a KL penalty and an entropy bonus, and both give the
same numbers (up to rounding: in bfloat16 the first rounds its logits, and the fused one does not).
The first one holds the logits of all tokens. The fused one never does. It can avoid that because
the loss is a sum over tokens: as soon as the logits of one chunk are known, so is the gradient of
their part of the loss, and the logits can be thrown away.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from actfocus import clipped_loss
from energy import CHUNK_ELEMENTS, check_token_arguments, chunks_of, matmul

BLOCK_ELEMENTS = 2**22  # a processor works on this many logits of a chunk at a time: 16 MB


class LossSettings(NamedTuple):
    """What stays the same from one mini-batch to the next."""

    temperature: float = 1.0  # divides the logits for log-probs; the entropy is of the raw logits
    clip_low: float = 0.2  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.28
    entropy_coef: float = 0.0  # of the entropy bonus
    kl_coef: float = 0.0  # of the penalty on the KL divergence from the reference


DEFAULT_SETTINGS = LossSettings()


class PolicyLoss(NamedTuple):
    """A loss and what it was made of."""

    loss: Tensor  # scalar, with gradient
    logprob: Tensor  # (N,) float32, log-probability of each target, without gradient
    entropy: Tensor  # (N,) float32, of softmax(raw logits), without gradient


def token_loss(
    logprob: Tensor, entropy: Tensor | None,
    old_logprob: Tensor, advantages: Tensor, weights: Tensor, settings: LossSettings, *,
    normalizer: Tensor | float | None = None, count: Tensor | float | None = None,
    ref_logprob: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`clipped_loss` + kl_coef * mean KL to the reference - entropy_coef * mean entropy: a scalar.

    All tensors are (N,), one number a token, without padding. entropy and ref_logprob may be None
    where their coefficient is 0. normalizer is what the clipped loss is divided by, and count what
    the sums of KL and entropy are divided by; by default they are sum(weights) and N. When a
    mini-batch is split into micro-batches, pass those of the whole mini-batch for each of them.
    """
    loss = clipped_loss(
        logprob, old_logprob, advantages, weights,
        clip_low=settings.clip_low, clip_high=settings.clip_high, normalizer=normalizer,
    )  # fmt: skip
    if count is None:
        count = len(logprob)
    if settings.kl_coef:
        # NOTE: the ratio is our decision. Without it, the gradient of k1 would be 0 on average.
        ratio = (logprob - old_logprob).exp()
        k1 = logprob - ref_logprob
        loss = loss + settings.kl_coef * (ratio * k1).sum() / count
    if settings.entropy_coef:
        loss = loss - settings.entropy_coef * entropy.sum() / count
    return loss


def policy_loss(
    hidden: Tensor, head: Tensor, targets: Tensor,
    old_logprob: Tensor, advantages: Tensor, weights: Tensor,
    settings: LossSettings = DEFAULT_SETTINGS, *,
    normalizer: Tensor | float | None = None, count: Tensor | float | None = None,
    ref_logprob: Tensor | None = None,
) -> PolicyLoss:  # fmt: skip
    """The loss of N tokens, written out: all logits at once, gradients by autograd.

    hidden: (N, H), the hidden states that predict the targets (N,); head: (V, H), the output
    embedding; everything else is as in `token_loss`.
    """
    logits = (hidden @ head.T).float()  # (N, V): by far the largest tensor of a training step
    logp = logits.log_softmax(-1)
    temperature = settings.temperature
    tempered_logp = logp if temperature == 1.0 else (logits / temperature).log_softmax(-1)
    logprob = tempered_logp.gather(-1, targets[:, None]).squeeze(-1)  # (N,)
    entropy = -(logp.exp() * logp).sum(-1)  # (N,)
    loss = token_loss(
        logprob, entropy, old_logprob, advantages, weights, settings,
        normalizer=normalizer, count=count, ref_logprob=ref_logprob,
    )  # fmt: skip
    return PolicyLoss(loss, logprob.detach(), entropy.detach())


def fused_policy_loss(
    hidden: Tensor, head: Tensor, targets: Tensor,
    old_logprob: Tensor, advantages: Tensor, weights: Tensor,
    settings: LossSettings = DEFAULT_SETTINGS, *,
    normalizer: Tensor | float | None = None, count: Tensor | float | None = None,
    ref_logprob: Tensor | None = None, chunk_size: int | None = None,
) -> PolicyLoss:  # fmt: skip
    """`policy_loss`, its value and gradient computed chunk by chunk: the (N, V) logits never exist.

    hidden: (N, H) and head: (V, H) are float32 or bfloat16; under autocast they take its
    dtype. Their products are kept in float32, and so is the sum that is the head's gradient.
    targets: (N,) int64. All else is as in `token_loss`, (N,) float32. chunk_size: for how many
    tokens the logits are held at a time, by default as many as fill 128 MB (512 MB on CUDA, which
    wants few and large products).

    The gradient is already computed in the forward pass; backward only hands it on. It does so
    once, and a second backward raises RuntimeError. Raises ValueError for shapes that do not fit
    and for a kl_coef without ref_logprob.

    >>> hidden, head = torch.zeros(1, 8, requires_grad=True), torch.zeros(4, 8)
    >>> old_logprob, one = torch.tensor([0.25]).log(), torch.ones(1)
    >>> fused_policy_loss(hidden, head, torch.tensor([2]), old_logprob, one, one).loss
    tensor(-1., grad_fn=<_FusedPolicyLossBackward>)
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    check_token_arguments(hidden, head, targets, settings.temperature, chunk_size)
    per_token = {"old_logprob": old_logprob, "advantages": advantages, "weights": weights}
    if settings.kl_coef:
        per_token["ref_logprob"] = ref_logprob
    for name, values in per_token.items():
        if values is None or values.shape != targets.shape:
            found = None if values is None else tuple(values.shape)
            expected = f"expected one number a target, {tuple(targets.shape)}"
            raise ValueError(f"{name} is {found}: {expected}")
    if chunk_size is None:
        elements = CHUNK_ELEMENTS * (8 if hidden.is_cuda else 2)
        chunk_size = max(1, elements // len(head))
    if normalizer is None:
        normalizer = weights.sum()
    if count is None:
        count = len(targets)
    with torch.autocast(device, enabled=False):
        result = _FusedPolicyLoss.apply(
            hidden, head, targets, per_token, settings, normalizer, count, chunk_size
        )
    return PolicyLoss(*result)


class _FusedPolicyLoss(torch.autograd.Function):
    """The loss and, in the same pass over the chunks, its gradients by hidden and head."""

    @staticmethod
    def forward(ctx, hidden, head, targets, per_token, settings, normalizer, count, chunk_size):
        wants_hidden, wants_head, *_ = ctx.needs_input_grad
        ctx.head_dtype = head.dtype
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if wants_head else None
        head = head.to(hidden.dtype)
        loss = hidden.new_zeros((), dtype=torch.float32)
        logprob, entropy = hidden.new_empty(2, len(hidden), dtype=torch.float32)
        memory = hidden.new_empty(min(chunk_size, len(hidden)), len(head), dtype=torch.float32)
        for chunk in chunks_of(len(hidden), chunk_size):
            logits = memory[: chunk.stop - chunk.start]  # (n, V)
            multiply_into(logits, hidden[chunk], head.T)
            # A processor goes through the logits in blocks of 16 MB, a GPU takes a chunk at once.
            block_size = chunk_size if hidden.is_cuda else max(1, BLOCK_ELEMENTS // len(head))
            for block in chunks_of(len(logits), block_size):
                tokens = slice(chunk.start + block.start, chunk.start + block.stop)
                loss += loss_and_dlogits(
                    logits[block], targets[tokens], logprob[tokens], entropy[tokens],
                    {name: values[tokens] for name, values in per_token.items()},
                    settings, normalizer, count,
                )  # fmt: skip
            dlogits = logits.to(hidden.dtype)  # each block has been overwritten by its gradient
            if wants_hidden:
                grad_hidden[chunk] = matmul(dlogits, head).to(hidden.dtype)
            if wants_head:
                add_matmul(grad_head, dlogits.T, hidden[chunk])
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
        if grad_hidden is not None:
            grad_hidden.mul_(grad_loss)
        if grad_head is not None:
            grad_head = grad_head.mul_(grad_loss).to(ctx.head_dtype)
        return grad_hidden, grad_head, None, None, None, None, None, None


def loss_and_dlogits(
    logits: Tensor, targets: Tensor, logprob: Tensor, entropy: Tensor,
    per_token: dict[str, Tensor], settings: LossSettings,
    normalizer: Tensor | float, count: Tensor | float,
) -> Tensor:  # fmt: skip
    """The part of m tokens in the loss, a scalar.

    Overwrites `logits` (m, V) with the gradient of the loss by them, and fills logprob and entropy,
    (m,) each. per_token: the other tensors of `token_loss` by name, (m,) each.

    The gradient by the logits z is
        d loss / d logprob * (onehot(target) - q) / temperature      q = softmax(z / temperature)
      - d loss / d entropy * p * (log p + entropy)                   p = softmax(z)
    and the two derivatives of the loss, (m,) each, come from autograd.
    """
    temperature = settings.temperature
    logp = logits.log_softmax(-1)  # (m, V)
    tempered_logp = logp if temperature == 1.0 else (logits / temperature).log_softmax(-1)
    logprob.copy_(tempered_logp.gather(-1, targets[:, None]).squeeze(-1))
    p = torch.exp(logp, out=logits)  # the logits are not needed any more
    entropy.copy_(torch.linalg.vecdot(p, logp).neg_())
    with torch.enable_grad():
        leaves = logprob.detach().requires_grad_(), entropy.detach().requires_grad_()
        loss = token_loss(
            *leaves, settings=settings, normalizer=normalizer, count=count, **per_token
        )
        dlogprob, dentropy = torch.autograd.grad(loss, leaves, materialize_grads=True)
    dlogprob = dlogprob[:, None] / temperature  # (m, 1)
    dentropy = dentropy[:, None]  # (m, 1)
    # From here on, results are written over p and log p. With a tensor of its own for each product,
    # the whole loss takes 1.35 to 1.7 times as long (one core, vocabularies of 40,000 and 800).
    if temperature == 1.0:  # q is p
        factor = logp.add_(entropy[:, None]).mul_(dentropy).add_(dlogprob)
        dlogits = p.mul_(factor).neg_()
    else:
        q = tempered_logp.exp_()
        factor = logp.add_(entropy[:, None]).mul_(dentropy)
        dlogits = p.mul_(factor).addcmul_(q, dlogprob).neg_()
    dlogits.scatter_add_(-1, targets[:, None], dlogprob)
    return loss.detach()


def multiply_into(result: Tensor, a: Tensor, b: Tensor) -> None:
    """result = a @ b, accumulated in float32, in the memory of `result`."""
    if a.is_cuda and a.dtype != torch.float32:  # tensor cores, and the result is not rounded
        torch.mm(a, b, out_dtype=torch.float32, out=result)
    else:
        torch.mm(a.float(), b.float(), out=result)


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in float32, without another tensor of total's size."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
