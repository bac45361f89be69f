"""Token energy: the paper's measure of how unsure a frozen reference is of what comes next.

    energy = token_energy(reference_logits)                         # if you have the logits
    energy = token_stats(reference_hidden, head, targets).energy    # if they would not fit

The energy of a position is E = -logsumexp(logits). It is low where a logit stands out, which is
where the model is sure. But it also sees how large all logits are together: a constant that is
added to each of them changes the energy, and neither softmax nor the entropy.

The logits of N tokens over a vocabulary of V are by far the largest tensor of a training step, so
`token_stats` computes them for one chunk of tokens at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24  # how many logits are held at a time by default: 64 MB in float32


class TokenStats(NamedTuple):
    """Statistics of each token, (N,) float32 each, in nats."""

    logprob: Tensor  # log-probability of the target at the given temperature
    energy: Tensor  # -logsumexp of the raw logits
    entropy: Tensor  # of softmax(raw logits)


def token_energy(logits: Tensor) -> Tensor:
    """E = -logsumexp(logits) over the last axis: (..., V) -> (...), float32 whatever the dtype.

    In the paper, the energy of a token y_t comes from the reference's raw logits at the position
    that *predicts* y_t, without a temperature. A single high logit makes the energy low
    (the reference is confident), and so do several high ones.

    >>> token_energy(torch.tensor([[0.0, 0.0], [9.0, 0.0], [9.0, 9.0]]))
    tensor([-0.6931, -9.0001, -9.6931])
    """
    return -torch.logsumexp(logits.float(), dim=-1)


@torch.no_grad()
def token_stats(
    hidden: Tensor, head: Tensor, targets: Tensor, *,
    temperature: float = 1.0, chunk_size: int | None = None,
) -> TokenStats:  # fmt: skip
    """Log-probability, energy and entropy of each target without ever holding the (N, V) logits.

    hidden: (N, H), the hidden states that predict the targets. head: (V, H), the output embedding.
    Both are float32 or bfloat16; under autocast they take its dtype. Their products are kept in
    float32. targets: (N,) int64. temperature: divides the logits for `logprob` only; energy and
    entropy are of the raw logits. chunk_size: for how many tokens the logits are held at a time, by
    default as many as fill 64 MB. The statistics carry no gradient: fused_loss.py has one.
    Raises ValueError for shapes that do not fit, a temperature that is not positive, a chunk_size
    below 1, or float16.

    >>> stats = token_stats(torch.zeros(1, 8), torch.zeros(4, 8), torch.tensor([2]))
    >>> [round(x.item(), 4) for x in stats]  # four equal logits of 0: log 1/4, -log 4, log 4
    [-1.3863, -1.3863, 1.3863]
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden = hidden.to(dtype)
        head = head.to(dtype)
    check_token_arguments(hidden, head, targets, temperature, chunk_size)
    if chunk_size is None:
        chunk_size = max(1, CHUNK_ELEMENTS // len(head))
    logprob, energy, entropy = hidden.new_empty(3, len(hidden), dtype=torch.float32)
    with torch.autocast(device, enabled=False):
        for chunk in chunks_of(len(hidden), chunk_size):
            logits = matmul(hidden[chunk], head.T)  # (n, V)
            lse = logits.logsumexp(-1)  # (n,)
            tempered_lse = lse if temperature == 1.0 else (logits / temperature).logsumexp(-1)
            target_logits = logits.gather(-1, targets[chunk, None]).squeeze(-1)  # (n,)
            p = (logits - lse[:, None]).exp_()  # (n, V)
            logprob[chunk] = target_logits / temperature - tempered_lse
            energy[chunk] = -lse
            entropy[chunk] = lse - torch.linalg.vecdot(p, logits)
    return TokenStats(logprob, energy, entropy)


def chunks_of(n: int, size: int) -> list[slice]:
    """Cut n positions into consecutive slices of at most `size`.

    >>> chunks_of(5, size=2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(first, min(first + size, n)) for first in range(0, n, size)]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in float32."""
    if a.is_cuda and a.dtype != torch.float32:  # tensor cores, and the result is not rounded
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def check_token_arguments(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, chunk_size: int | None
) -> None:
    """Raises ValueError if the arguments of `token_stats` do not fit together."""
    fits = hidden.ndim == head.ndim == 2 and hidden.shape[1] == head.shape[1]
    if not fits or targets.shape != hidden.shape[:1]:
        shapes = f"{tuple(hidden.shape)}, head {tuple(head.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"expected hidden (N, H), head (V, H), targets (N,), got hidden {shapes}")
    if torch.float16 in (hidden.dtype, head.dtype):  # gradients underflow before a GradScaler acts
        raise ValueError("hidden or head is float16: give float32 or bfloat16")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be positive")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: it must be at least 1")
