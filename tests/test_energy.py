"""energy.py against float64 references: values, dtypes, chunks, memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEVICES

from energy import token_energy, token_stats

ROOT = Path(__file__).parents[1]


def reference(hidden, weight, targets, temperature=1.0):
    """The same three numbers from the full logits, in whatever dtype the inputs have."""
    logits = hidden @ weight.T
    logprob = (logits / temperature).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    logp = logits.log_softmax(-1)
    return logprob, -logits.logsumexp(-1), -(logp.exp() * logp).sum(-1)


def inputs(device, n=37, width=16, vocabulary=101, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(n, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    targets = torch.randint(0, vocabulary, (n,), generator=generator)
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
@pytest.mark.parametrize("chunk_size", [None, 1, 8, 37, 1000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_matches_float64(device, temperature, chunk_size, scale):
    hidden, weight, targets = inputs(device, scale=scale)
    exact = reference(hidden.double(), weight.double(), targets, temperature)
    outputs = token_stats(hidden, weight, targets, temperature=temperature, chunk_size=chunk_size)
    for name, x, expected in zip(outputs._fields, outputs, exact, strict=True):
        assert x.dtype == torch.float32 and x.shape == targets.shape
        # 1e-5 of what the number is made of: an entropy of 1e-3 is the difference of two numbers of
        # about 100
        torch.testing.assert_close(
            x.double(),
            expected,
            rtol=1e-5,
            atol=1e-5 * max(1.0, exact[1].abs().max().item()),
            msg=name,
        )


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_inputs_with_float32_accumulation(device):
    hidden, weight, targets = inputs(device, dtype=torch.bfloat16, n=200)
    exact = reference(hidden.double(), weight.double(), targets)  # of the rounded inputs
    outputs = token_stats(hidden, weight, targets, chunk_size=7)
    for x, expected in zip(outputs, exact, strict=True):
        torch.testing.assert_close(
            x.double(), expected, rtol=1e-5, atol=1e-4
        )  # nothing is rounded to bfloat16 on the way


def test_autocast_lends_its_dtype():
    hidden, weight, targets = inputs("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        under = token_stats(hidden, weight, targets)
    by_hand = token_stats(hidden.bfloat16(), weight.bfloat16(), targets)
    assert all(torch.equal(a, b) for a, b in zip(under, by_hand, strict=True))
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="is float16"):
        token_stats(hidden, weight, targets)


def test_extreme_logits_stay_finite():
    hidden, weight, targets = inputs("cpu", scale=1e4)
    outputs = token_stats(hidden, weight, targets, temperature=0.5)
    assert all(x.isfinite().all() for x in outputs)
    assert (outputs.entropy > -1).all()


def test_nothing_to_score():
    outputs = token_stats(*inputs("cpu", n=0))
    assert [tuple(x.shape) for x in outputs] == [(0,)] * 3


def test_the_statistics_carry_no_gradient():
    hidden, weight, targets = inputs("cpu")
    outputs = token_stats(hidden.requires_grad_(), weight.requires_grad_(), targets)
    assert not any(x.requires_grad for x in outputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_token_energy(dtype):
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    energy = token_energy(logits)
    assert energy.dtype == torch.float32 and energy.shape == (2, 3)
    torch.testing.assert_close(
        energy.double(), -logits.double().logsumexp(-1), rtol=1e-6, atol=1e-6
    )
    # A constant added to all logits is uncertainty that softmax cannot see, and energy does.
    torch.testing.assert_close(token_energy(logits.float() + 3), token_energy(logits) - 3)


def test_refuses_what_does_not_fit():
    hidden, weight, targets = inputs("cpu")
    with pytest.raises(ValueError, match=r"expected hidden \(N, H\)"):
        token_stats(hidden[None], weight, targets)
    with pytest.raises(ValueError, match=r"targets \(36,\)"):
        token_stats(hidden, weight, targets[1:])
    with pytest.raises(ValueError, match="temperature is 0"):
        token_stats(hidden, weight, targets, temperature=0)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        token_stats(hidden, weight, targets, chunk_size=0)


SCORE = """
import sys
import torch
from energy import token_stats

def most():  # memory that this process has used, in kB
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

def peak(tokens, vocabulary, way):
    hidden, head = torch.randn(tokens, 896), torch.randn(vocabulary, 896).mul_(0.02)
    targets = torch.randint(vocabulary, (tokens,))
    before = most()
    if way == "full":
        logp = (hidden @ head.T).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
    else:
        token_stats(hidden, head, targets, chunk_size=110)
    return most() - before

peak(64, 1024, sys.argv[1])  # the libraries set themselves up
print(peak(4096, 16384, sys.argv[1]))
"""


def memory_of_scoring(way):
    """What a child process takes in addition, in kB."""
    command = [sys.executable, "-c", SCORE, way]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(child.stdout)


def test_memory_of_scoring_is_under_an_eighth_of_the_full_logits_way():
    """The ratio depends on N, H and the number of chunks, not on V: a ninth of Qwen's vocabulary,
    in as many chunks."""
    full, chunked = memory_of_scoring("full"), memory_of_scoring("chunked")
    if chunked >= full / 8:  # the system's count is some 5 % off, upwards: once more
        chunked = memory_of_scoring("chunked")
    assert 0 < chunked < full / 8, (chunked, full)
