"""energy.py against float64 references: values, gradients, dtypes, chunks, memory."""

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
    coefficients = torch.randn(3, n, generator=generator)  # of a loss that mixes all three outputs
    return (
        *(x.to(device, dtype).requires_grad_() for x in (hidden, weight)),
        targets.to(device),
        coefficients.to(device),
    )


def mixed_loss(outputs, coefficients):
    return sum((c * x).sum() for c, x in zip(coefficients, outputs, strict=True))


def relative_error(x, exact):
    return ((x.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
@pytest.mark.parametrize("chunk_size", [None, 1, 8, 37, 1000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_matches_float64(device, temperature, chunk_size, scale):
    hidden, weight, targets, coefficients = inputs(device, scale=scale)
    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = reference(*exact_inputs, targets, temperature)
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
    mixed_loss(outputs, coefficients).backward()
    mixed_loss(exact, coefficients.double()).backward()
    for x, expected in zip((hidden, weight), exact_inputs, strict=True):
        assert relative_error(x.grad, expected.grad) < 1e-4


@pytest.mark.parametrize("only", [0, 1, 2])
def test_gradient_through_each_output_alone(only):
    hidden, weight, targets, coefficients = inputs("cpu")
    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    (
        token_stats(hidden, weight, targets, temperature=0.7, chunk_size=10)[only]
        * coefficients[only]
    ).sum().backward()
    (reference(*exact_inputs, targets, 0.7)[only] * coefficients[only].double()).sum().backward()
    for x, expected in zip((hidden, weight), exact_inputs, strict=True):
        assert relative_error(x.grad, expected.grad) < 1e-4


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_inputs_with_float32_accumulation(device):
    hidden, weight, targets, coefficients = inputs(device, dtype=torch.bfloat16, n=200)
    exact_inputs = [
        x.detach().double().requires_grad_() for x in (hidden, weight)
    ]  # of the rounded inputs
    exact = reference(*exact_inputs, targets)
    outputs = token_stats(hidden, weight, targets, chunk_size=7)
    for x, expected in zip(outputs, exact, strict=True):
        torch.testing.assert_close(
            x.double(), expected, rtol=1e-5, atol=1e-4
        )  # nothing is rounded to bfloat16 on the way
    mixed_loss(outputs, coefficients).backward()
    mixed_loss(exact, coefficients.double()).backward()
    for x, expected in zip((hidden, weight), exact_inputs, strict=True):
        assert x.grad.dtype == torch.bfloat16 and relative_error(x.grad, expected.grad) < 1e-2


def test_autocast_lends_its_dtype():
    hidden, weight, targets, _ = inputs("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        under = token_stats(hidden, weight, targets)
    by_hand = token_stats(hidden.bfloat16(), weight.bfloat16(), targets)
    assert all(torch.equal(a, b) for a, b in zip(under, by_hand, strict=True))
    under.logprob.sum().backward()
    assert hidden.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="is float16"):
        token_stats(hidden, weight, targets)


def test_extreme_logits_stay_finite():
    hidden, weight, targets, coefficients = inputs("cpu", scale=1e4)
    outputs = token_stats(hidden, weight, targets, temperature=0.5)
    mixed_loss(outputs, coefficients).backward()
    assert all(x.isfinite().all() for x in (*outputs, hidden.grad, weight.grad))
    assert (outputs.entropy > -1).all()


def test_nothing_to_score_and_frozen_inputs():
    hidden, weight, targets, _ = inputs("cpu", n=0)
    outputs = token_stats(hidden, weight, targets)
    assert [tuple(x.shape) for x in outputs] == [(0,)] * 3
    sum(x.sum() for x in outputs).backward()
    assert weight.grad.abs().sum() == 0
    hidden, weight, targets, _ = inputs("cpu")
    token_stats(hidden, weight.detach(), targets).logprob.sum().backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert not token_stats(hidden, weight, targets).logprob.requires_grad


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
    hidden, weight, targets, _ = inputs("cpu")
    with pytest.raises(ValueError, match=r"expected hidden \(N, H\)"):
        token_stats(hidden[None], weight, targets)
    with pytest.raises(ValueError, match=r"targets \(36,\)"):
        token_stats(hidden, weight, targets[1:])
    with pytest.raises(ValueError, match="temperature is 0"):
        token_stats(hidden, weight, targets, temperature=0)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        token_stats(hidden, weight, targets, chunk_size=0)


def test_memory_is_under_an_eighth_of_the_full_logits_way():
    """The ratio depends on N, H and the number of chunks, not on V: a ninth of Qwen's vocabulary,
    in as many chunks.

    `python -m studies.bench loss` measures the full size.
    """
    extra = {}
    for way in ("full", "recomputed", "fused"):
        size = ["4096", "16384", "896", "cpu", "float32"] + ["110"] * (way != "full")
        command = [
            sys.executable,
            "-m",
            "studies.bench",
            "--child",
            way,
            *size,
        ]
        runs = [
            subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            for _ in range(1 + (way != "full"))
        ]
        extra[way] = min(
            json.loads(run.stdout)[1] for run in runs
        )  # the system's count of pages is some 5 % off, upwards
    assert 0 < extra["recomputed"] < extra["full"] / 8 and 0 < extra["fused"] < extra["full"] / 8, (
        extra
    )
