"""Token energy, and the batched token statistics that both the policy's loss and the reference's energy are made of.

The energy of a position is E = -logsumexp(logits): how much raw, unnormalised score the model has for whatever comes next. The
frozen reference's energy at an action token is ActFocus's measure of how unsure it is there (paper, "token energy").

`token_stats` goes from hidden states straight to what a loss needs of each token. The logits of N tokens over a vocabulary
of V are by far the largest tensors of a training step (4096 tokens of Qwen2.5: 2.5 GB, several times over), so it works
through chunks of tokens, keeps nothing of size (N, V), and computes each chunk's logits again in the backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24  # logits held at a time by default: 64 MB in float32


class TokenStats(NamedTuple):
    """Per-token statistics, each (N,) float32, in nats."""

    logprob: Tensor  # log-probability of the target at the given temperature
    energy: Tensor  # -logsumexp of the raw logits
    entropy: Tensor  # of softmax(raw logits)


def token_energy(logits: Tensor) -> Tensor:
    """E = -logsumexp(logits) over the last axis: (..., V) -> (...), float32 whatever the dtype of the logits.

    Paper: the energy of token y_t comes from the reference's raw logits at the position that *predicts* y_t, without a
    temperature. A confident position (one high logit) has low energy.

    >>> token_energy(torch.tensor([[0.0, 0.0], [9.0, 0.0]]))
    tensor([-0.6931, -9.0001])
    """
    return -torch.logsumexp(logits.float(), dim=-1)


def token_stats(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, chunk_size: int | None = None
) -> TokenStats:
    """Log-probability, energy and entropy of each target without ever holding the (N, V) logits.

    hidden: (N, H), the hidden states that predict the targets; weight: (V, H), the output embedding; both float32 or bfloat16.
    targets: (N,) int64. temperature > 0 divides the logits for `logprob` only; energy and entropy are of the raw logits.
    chunk_size: tokens whose logits are held at a time; by default as many as make 64 MB.
    Differentiable in `hidden` and `weight` through all three outputs. Products of bfloat16 inputs are accumulated and kept in
    float32. Under autocast the inputs take its dtype, as they would for a matrix product.
    Raises ValueError for shapes that do not fit, a temperature that is not positive or a chunk_size below 1.

    >>> stats = token_stats(torch.zeros(1, 8), torch.zeros(4, 8), torch.tensor([2]))
    >>> [round(x.item(), 4) for x in stats]  # four equal logits of 0: log 1/4, -log 4, log 4
    [-1.3863, -1.3863, 1.3863]
    """
    chunk_size = checked_chunk_size(hidden, weight, targets, temperature, chunk_size)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        return TokenStats(*_TokenStats.apply(hidden, weight, targets, temperature, chunk_size))


class _TokenStats(torch.autograd.Function):
    """Values chunk by chunk; in backward the same chunks again, with the closed-form gradient of the logits z."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk_size):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        logprob, energy, entropy = hidden.new_empty(3, len(hidden), dtype=torch.float32)
        for rows in chunks(len(hidden), chunk_size):
            z = matmul(hidden[rows], weight.T)  # (n, V)
            lse = z.logsumexp(-1)
            target_z = z.gather(-1, targets[rows, None]).squeeze(-1)
            tempered_lse = lse if temperature == 1.0 else (z / temperature).logsumexp(-1)
            logprob[rows] = target_z / temperature - tempered_lse
            energy[rows] = -lse
            p = (z - lse[:, None]).exp_()
            entropy[rows] = lse - torch.linalg.vecdot(p, z)
        return logprob, energy, entropy

    @staticmethod
    def backward(ctx, grad_logprob, grad_energy, grad_entropy):
        # d logprob / dz = (onehot(target) - q) / temperature,  q = softmax(z / temperature)
        # d energy  / dz = -p,                                  p = softmax(z)
        # d entropy / dz = -p * (z - sum(p * z))
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for rows in chunks(len(hidden), ctx.chunk_size):
            z = matmul(hidden[rows], weight.T)  # (n, V)
            on_logprob = (grad_logprob[rows] / ctx.temperature)[:, None]  # (n, 1), as are the next two
            on_energy, on_entropy = grad_energy[rows, None], grad_entropy[rows, None]
            p = z.softmax(-1)
            mean_z = torch.linalg.vecdot(p, z)[:, None]
            q = p if ctx.temperature == 1.0 else (z / ctx.temperature).softmax(-1)
            grad_z = z.sub_(mean_z).mul_(on_entropy).add_(on_energy).mul_(p).addcmul_(q, on_logprob).neg_()
            grad_z.scatter_add_(-1, targets[rows, None], on_logprob)
            grad_z = grad_z.to(hidden.dtype)
            grad_hidden[rows] = matmul(grad_z, weight).to(hidden.dtype)
            if grad_weight is not None:
                add_matmul(grad_weight, grad_z.T, hidden[rows])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def checked_chunk_size(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_size: int | None, elements: int = CHUNK_ELEMENTS
) -> int:
    """How many tokens' logits to hold at a time. Raises ValueError if the arguments of `token_stats` do not fit together."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"expected hidden (N, H), weight (V, H) and targets (N,), got {shapes}")
    if torch.float16 in (hidden.dtype, weight.dtype):  # its gradients underflow, and a GradScaler would come too late
        raise ValueError("hidden or weight is float16: give float32 or bfloat16")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be positive")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: it must be at least 1")
    return chunk_size or max(1, elements // len(weight))


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, accumulated and returned in float32, in the memory of `out` where possible."""
    if a.is_cuda and a.dtype != torch.float32:
        room = {} if out is None else {"out": out}
        return torch.mm(a, b, out_dtype=torch.float32, **room)  # tensor cores, no rounding of the result
    return torch.mm(a.float(), b.float(), out=out)


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in float32, without another tensor of total's size."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def chunks(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
