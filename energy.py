"""Token energy: the paper's measure of how unsure a frozen reference is of what comes next.

    energy = token_energy(reference_logits)                         # if you have the logits
    energy = token_stats(reference_hidden, head, targets).energy    # if they would not fit

The energy of a position is E = -logsumexp(logits): the size of the raw logits, which softmax, and
with it the entropy, does not see. `token_stats` works through chunks of tokens, for the logits of N
tokens over a vocabulary of V are by far the largest tensors of a training step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**24  # logits held at a time by default: 64 MB in float32


class TokenStats(NamedTuple):
    """Per-token statistics, each (N,) float32, in nats."""

    logprob: Tensor  # log-probability of the target at the given temperature
    energy: Tensor  # -logsumexp of the raw logits
    entropy: Tensor  # of softmax(raw logits)


def token_energy(logits: Tensor) -> Tensor:
    """E = -logsumexp(logits) over the last axis: (..., V) -> (...), float32 whatever the dtype.

    Paper: the energy of token y_t comes from the reference's raw logits at the position that
    *predicts* y_t, without a temperature. One high logit makes it low (confident); so do several.

    >>> token_energy(torch.tensor([[0.0, 0.0], [9.0, 0.0], [9.0, 9.0]]))
    tensor([-0.6931, -9.0001, -9.6931])
    """
    return -torch.logsumexp(logits.float(), dim=-1)


def token_stats(
    hidden: Tensor, head: Tensor, targets: Tensor, *,
    temperature: float = 1.0, chunk_size: int | None = None,
) -> TokenStats:  # fmt: skip
    """Log-probability, energy and entropy of each target without ever holding the (N, V) logits.

    hidden: (N, H), the hidden states that predict the targets; head: (V, H), the output embedding;
    both float32 or bfloat16. targets: (N,) int64. temperature > 0 divides the logits for `logprob`
    only; energy and entropy are of the raw logits. chunk_size: tokens whose logits are held at a
    time, by default 64 MB of them. Differentiable, once, in `hidden` and `head`. Products of
    bfloat16 inputs are kept in float32. Under autocast the inputs take its dtype. Raises ValueError
    for shapes that do not fit, a temperature that is not positive or a chunk_size below 1.

    >>> stats = token_stats(torch.zeros(1, 8), torch.zeros(4, 8), torch.tensor([2]))
    >>> [round(x.item(), 4) for x in stats]  # four equal logits of 0: log 1/4, -log 4, log 4
    [-1.3863, -1.3863, 1.3863]
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, head = hidden.to(dtype), head.to(dtype)
    chunk_size = checked_chunk_size(hidden, head, targets, temperature, chunk_size, CHUNK_ELEMENTS)
    with torch.autocast(device, enabled=False):
        return TokenStats(*_TokenStats.apply(hidden, head, targets, temperature, chunk_size))


class _TokenStats(torch.autograd.Function):
    """Values chunk by chunk; in backward the same chunks again, with a closed-form gradient by the
    logits z. (torch.utils.checkpoint would spare the formula, for 2x the memory, 1.5x the time.)"""

    @staticmethod
    def forward(ctx, hidden, head, targets, temperature, chunk_size):
        ctx.save_for_backward(hidden, head, targets)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        logprob, energy, entropy = hidden.new_empty(3, len(hidden), dtype=torch.float32)
        for rows in chunks(len(hidden), chunk_size):
            z = matmul(hidden[rows], head.T)  # (n, V)
            lse = z.logsumexp(-1)
            target_z = z.gather(-1, targets[rows, None]).squeeze(-1)
            tempered_lse = lse if temperature == 1.0 else (z / temperature).logsumexp(-1)
            logprob[rows] = target_z / temperature - tempered_lse
            energy[rows] = -lse
            p = (z - lse[:, None]).exp_()
            entropy[rows] = lse - torch.linalg.vecdot(p, z)
        return logprob, energy, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_energy, grad_entropy):
        # d logprob / dz = (onehot(target) - q) / temperature,  q = softmax(z / temperature)
        # d energy  / dz = -p,                                  p = softmax(z)
        # d entropy / dz = -p * (z - sum(p * z))
        hidden, head, targets = ctx.saved_tensors
        grad_hidden, wants_head = torch.empty_like(hidden), ctx.needs_input_grad[1]
        grad_head = torch.zeros_like(head, dtype=torch.float32) if wants_head else None
        for rows in chunks(len(hidden), ctx.chunk_size):
            z = matmul(hidden[rows], head.T)  # (n, V)
            on_logprob = (grad_logprob[rows] / ctx.temperature)[:, None]  # (n, 1), as the next two
            on_energy, on_entropy = grad_energy[rows, None], grad_entropy[rows, None]
            p = z.softmax(-1)
            q = p if ctx.temperature == 1.0 else (z / ctx.temperature).softmax(-1)
            mean_z = torch.linalg.vecdot(p, z)[:, None]
            grad_z = z.sub_(mean_z).mul_(on_entropy)  # in the memory of z, as all that follows
            grad_z.add_(on_energy).mul_(p)  # p * (on_entropy * (z - mean_z) + on_energy)
            grad_z.addcmul_(q, on_logprob).neg_()
            grad_z.scatter_add_(-1, targets[rows, None], on_logprob)
            grad_z = grad_z.to(hidden.dtype)
            grad_hidden[rows] = matmul(grad_z, head).to(hidden.dtype)
            if wants_head:
                add_matmul(grad_head, grad_z.T, hidden[rows])
        return grad_hidden, grad_head.to(head.dtype) if wants_head else None, None, None, None


# -------------------------------------------------------------- what fused_loss.py works with, too
def checked_chunk_size(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: float,
    size: int | None, budget: int,
) -> int:  # fmt: skip
    """How many tokens' logits to hold at a time, by default as many as make `budget` numbers.
    Raises ValueError if the arguments of `token_stats` do not fit together."""
    shaped = hidden.ndim == head.ndim == 2 and hidden.shape[1] == head.shape[1]
    if not shaped or targets.shape != hidden.shape[:1]:
        shapes = f"{tuple(hidden.shape)}, head {tuple(head.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"expected hidden (N, H), head (V, H), targets (N,), got hidden {shapes}")
    if torch.float16 in (hidden.dtype, head.dtype):  # gradients underflow before a GradScaler acts
        raise ValueError("hidden or head is float16: give float32 or bfloat16")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be positive")
    if size is not None and size < 1:
        raise ValueError(f"chunk_size is {size}: it must be at least 1")
    return size or max(1, budget // len(head))


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, accumulated and returned in float32, in the memory of `out` if it is given."""
    if a.is_cuda and a.dtype != torch.float32:  # tensor cores, no rounding of the result
        if out is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in float32, without another tensor of total's size."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def chunks(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
