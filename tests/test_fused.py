"""fused_policy_loss against policy_loss, the plain version of it, in float64."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEVICES

from fused_loss import LossSettings, fused_policy_loss, policy_loss

ROOT = Path(__file__).parents[1]


def case(seed, n=50, width=16, vocabulary=40, dtype=torch.float32):
    """Hidden states, head, targets and per-token arguments of tokens at ratios around 1, some of
    weight 0, of either sign."""
    rng = torch.Generator().manual_seed(seed)
    hidden, head = (
        torch.randn(n, width, generator=rng).to(dtype),
        torch.randn(vocabulary, width, generator=rng).to(dtype),
    )
    targets = torch.randint(vocabulary, (n,), generator=rng)
    logprob = (
        (hidden.float() @ head.float().T).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    )
    old, reference = (logprob + 0.3 * torch.randn(n, generator=rng) for _ in range(2))
    advantages, weights = (
        torch.randn(n, generator=rng),
        torch.rand(n, generator=rng).sub(0.2).clamp(min=0),
    )
    return hidden, head, targets, old, advantages, weights, reference


def with_settings(options):
    """Keyword arguments of a loss: those that are fields of LossSettings become one `settings`."""
    fields = {name: value for name, value in options.items() if name in LossSettings._fields}
    others = {name: value for name, value in options.items() if name not in fields}
    return others | {"settings": LossSettings(**fields)}


def run(loss_of, case, dtype, device="cpu", **options):
    """Value and gradients of a loss, in float64."""
    hidden, head, targets, *rest = (x.to(device) for x in case)
    leaves = [x.detach().clone().to(dtype).requires_grad_() for x in (hidden, head)]
    *per_token, reference = [x.to(dtype if dtype == torch.float64 else torch.float32) for x in rest]
    if options.get("kl_coef"):
        options["ref_logprob"] = reference
    loss = loss_of(*leaves, targets, *per_token, **with_settings(options)).loss
    loss.backward()
    return loss.item(), *(leaf.grad.double().cpu() for leaf in leaves)


def far(a, b):
    return ((a - b).norm() / b.norm()).item()


OPTIONS = [
    {},
    {"temperature": 0.7},
    {"kl_coef": 0.1},
    {"entropy_coef": 0.01},
    {"temperature": 1.3, "kl_coef": 0.1, "entropy_coef": 0.05},
    {
        "clip_low": 0.05,
        "clip_high": 0.05,
        "normalizer": 7.0,
        "count": 123,
        "kl_coef": 0.1,
        "entropy_coef": 0.05,
    },
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed, n, chunk_size", [(0, 50, 7), (1, 50, None), (2, 1, 1), (3, 64, 64)])
def test_value_and_gradient_are_those_of_the_plain_loss(options, seed, n, chunk_size, device):
    some = case(seed, n)
    exact, *expected = run(policy_loss, some, torch.float64, **options)
    loss, *found = run(
        fused_policy_loss, some, torch.float32, device, chunk_size=chunk_size, **options
    )
    assert loss == pytest.approx(exact, rel=1e-4, abs=1e-6)
    for a, b in zip(found, expected, strict=True):
        assert far(a, b) < 1e-4 or b.norm() == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS)
def test_bfloat16_keeps_two_digits(options, device):
    some = case(4, n=400, dtype=torch.bfloat16)  # the inputs are rounded before both
    _, *expected = run(policy_loss, some, torch.float64, **options)
    _, *found = run(fused_policy_loss, some, torch.bfloat16, device, chunk_size=100, **options)
    for a, b in zip(found, expected, strict=True):
        assert far(a, b) < 1e-2


@pytest.mark.parametrize("device", DEVICES)
def test_the_head_gradient_is_summed_in_float32_under_autocast(device):
    """A float32 head under autocast, in chunks of one: a bfloat16 sum of so many small parts would
    be far off."""
    some = case(5, n=3000)
    _, _, whole = run(
        policy_loss, (some[0].bfloat16(), some[1].bfloat16(), *some[2:]), torch.float64
    )
    with torch.autocast(device, torch.bfloat16):
        _, _, found = run(fused_policy_loss, some, torch.float32, device, chunk_size=1)
    assert far(found, whole) < 3e-3


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(
    "ratio, gains",
    [(1.0, {1.0: 1.0, -1.0: -1.0}), (2.0, {1.0: 1.28, -1.0: -2.0}), (0.5, {1.0: 0.5, -1.0: -0.8})],
)
def test_clipping_by_hand(advantage, ratio, gains):
    """Four equal logits: the log-prob is log 1/4. Where the clip is active the gradient is 0."""
    hidden, head = torch.zeros(1, 8, requires_grad=True), torch.eye(4, 8)
    old = torch.tensor([math.log(0.25 / ratio)])
    loss = fused_policy_loss(
        hidden, head, torch.tensor([2]), old, torch.tensor([advantage]), torch.tensor([0.1])
    ).loss
    assert loss.item() == pytest.approx(
        -gains[advantage], abs=1e-5
    )  # one token: its weight cancels
    loss.backward()
    clipped = abs(gains[advantage]) != ratio
    assert hidden.grad[0, 2].item() == pytest.approx(
        0 if clipped else -0.75 * advantage * ratio, abs=1e-5
    )


def test_float16_is_refused_under_autocast_too():
    """Its gradient would be rounded to 0 before a GradScaler acts."""
    hidden, head, zero = torch.zeros(1, 8), torch.zeros(4, 8), torch.zeros(1)
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="is float16"):
        fused_policy_loss(hidden, head, torch.tensor([1]), zero, zero, zero)


def test_entropy_and_kl_by_hand():
    hidden, head, zero = torch.zeros(1, 8), torch.zeros(4, 8), torch.zeros(1)
    old = torch.tensor([math.log(0.25)])
    options = {"entropy_coef": 0.5, "kl_coef": 2.0, "ref_logprob": old - 1}
    loss, logprob, entropy = fused_policy_loss(
        hidden, head, torch.tensor([1]), old, zero, zero, **with_settings(options)
    )
    assert loss.item() == pytest.approx(2.0 - 0.5 * math.log(4), abs=1e-6)
    assert logprob.item() == pytest.approx(
        math.log(0.25), abs=1e-6
    ) and entropy.item() == pytest.approx(math.log(4), abs=1e-6)


def test_micro_batches_add_up():
    hidden, head, targets, *per_token, reference = case(6)
    options = {"kl_coef": 0.1, "entropy_coef": 0.01, "normalizer": per_token[2].sum(), "count": 50}
    whole, _, expected = run(
        fused_policy_loss, (hidden, head, targets, *per_token, reference), torch.float32, **options
    )
    parts = []
    for rows in (slice(0, 20), slice(20, 50)):
        some = [hidden[rows], head, *(x[rows] for x in (targets, *per_token, reference))]
        parts.append(run(fused_policy_loss, some, torch.float32, **options))
    assert sum(part[0] for part in parts) == pytest.approx(whole, abs=1e-6)
    torch.testing.assert_close(parts[0][2] + parts[1][2], expected)


def test_it_scales_with_the_gradient_that_comes_back_and_gives_it_once():
    hidden, head, targets, *per_token, _ = case(7)
    leaf = hidden.clone().requires_grad_()
    loss = fused_policy_loss(leaf, head, targets, *per_token).loss
    (3 * loss).backward(retain_graph=True)
    _, expected, _ = run(fused_policy_loss, case(7), torch.float32)
    torch.testing.assert_close(leaf.grad.double(), 3 * expected)
    with pytest.raises(RuntimeError, match="gives its gradient once"):
        loss.backward()


def test_only_the_gradients_that_are_wanted():
    hidden, head, targets, *per_token, _ = case(8)
    _, on_hidden, on_head = run(fused_policy_loss, case(8), torch.float32)
    for frozen, leaf, expected in ((head, hidden, on_hidden), (hidden, head, on_head)):
        leaf = leaf.clone().requires_grad_()
        fused_policy_loss(
            *((leaf, frozen) if leaf.shape == hidden.shape else (frozen, leaf)), targets, *per_token
        ).loss.backward()
        torch.testing.assert_close(leaf.grad.double(), expected)
    assert not fused_policy_loss(hidden, head, targets, *per_token).loss.requires_grad


def test_no_tokens_and_no_weight_give_zero():
    hidden, head, targets, *per_token, _ = case(9)
    none = fused_policy_loss(
        hidden[:0].requires_grad_(), head, targets[:0], *(x[:0] for x in per_token)
    ).loss
    assert none.item() == 0
    none.backward()
    leaf = hidden.clone().requires_grad_()
    nothing = fused_policy_loss(leaf, head, targets, *per_token[:2], torch.zeros(50)).loss
    nothing.backward()
    assert nothing.item() == 0 and (leaf.grad == 0).all()


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"old_logprob": torch.zeros(3)},
            r"old_logprob is \(3,\): expected one number a target, \(50,\)",
        ),
        ({"weights": torch.zeros(50, 1)}, r"weights is \(50, 1\)"),
        ({"kl_coef": 0.1}, "ref_logprob is None"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "expected hidden"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    names = ("hidden", "head", "targets", "old_logprob", "advantages", "weights")
    with pytest.raises(ValueError, match=said):
        arguments = dict(zip(names, case(10)[:-1], strict=True)) | change
        fused_policy_loss(**with_settings(arguments))


def test_both_losses_give_the_same_statistics():
    *inputs, reference = case(11)
    options = {"temperature": 0.8, "kl_coef": 0.1, "entropy_coef": 0.05, "ref_logprob": reference}
    plain = policy_loss(*inputs, **with_settings(options))
    fused = fused_policy_loss(*inputs, chunk_size=7, **with_settings(options))
    for name, a, b in zip(plain._fields, plain, fused, strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert not fused.logprob.requires_grad and not plain.logprob.requires_grad


def test_a_second_derivative_is_refused_and_not_silently_zero():
    hidden, head, targets, *per_token, _ = case(12)
    leaf = hidden.clone().requires_grad_()
    loss = fused_policy_loss(leaf, head, targets, *per_token).loss
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()


def test_memory_is_under_an_eighth_of_the_full_logits_way():
    """The ratio depends on N / H and the number of chunks, not on V: half of N and of Qwen's H, and
    a ninth of its vocabulary, in as many chunks.

    `python -m studies.bench loss` measures the full size.
    """

    def extra(way, *chunk_size):
        size = ["2048", "16384", "448", "cpu", "float32", *chunk_size]
        command = [sys.executable, "-m", "studies.bench", "--child", way, *size]
        child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return json.loads(child.stdout)[1]

    full, fused = extra("full"), extra("fused", "55")
    if fused >= full / 8:  # the system's count is some 5 % off, upwards: once more
        fused = extra("fused", "55")
    assert 0 < fused < full / 8, (fused, full)
