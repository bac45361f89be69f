"""Which tokens teach: signal and noise of the policy gradient, by kind of token and by weighting.

    python -m studies.diagnose --env frozenlake      # calls this and writes signal.csv, signal.png

Play some prompts, split them into blocks, and take the gradient of each block. What the blocks
agree on is signal, the rest is noise: g_i . g_j of two different blocks is |E g|^2 on average, and
|g_i|^2 is larger than that by the variance of a block. (Their ratio is one over the "gradient noise
scale" of McCandlish et al. 2018, arXiv 1812.06162, in blocks.) Doing so with the gradient of some
tokens alone shows which of them teach, and with any weighting of tokens what it gains, before a
single step of training.

Adam divides every coordinate by its own size, so what counts for its steps is the same ratio after
dividing each coordinate by its root mean square over the blocks, "as Adam sees it". (As in Adam, a
gradient is part of its own scale. With that of the other blocks alone, a coordinate that a single
block moves, of a rare word say, is divided by next to nothing and decides everything. That scale
makes the ratio a little biased, both ways: so the same is measured with rewards shuffled, too.)
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from actfocus import actfocus_weights, group_advantages
from arms import ARMS, SIGNALS, Arm, scatter_weights, token_signals
from energy import TokenStats, token_stats
from fused_loss import LossSettings, fused_policy_loss
from policy import Policy
from rollout import Rollouts, scored_hidden
from segment import Segment
from studies.stats import t_interval

PROMPTS_PER_BLOCK = 2
COORDINATES = 2**20  # of a larger model's gradient, a random choice of this many
CLASSES = {  # of tokens, taken alone
    "reasoning": ("reasoning tokens alone", "tab:blue"),
    "action": ("action tokens alone", "tab:red"),
    "format": ("format tokens alone", "tab:gray"),
}
NULLS = {  # rewards shuffled within each group: no token earned its credit, so this is bias
    "grpo-null": ("GRPO, rewards shuffled", "tab:gray"),
    "actfocus-null": ("ActFocus, rewards shuffled", "tab:gray"),
}
PARTS = CLASSES | NULLS
actfocus = ARMS["actfocus"]
WEIGHTINGS = {  # the first is what the others are compared with
    "grpo": replace(ARMS["grpo"], label="GRPO: all tokens alike"),
    "discount": replace(ARMS["discount"], label="ActFocus, beta 0"),
    "actfocus": replace(actfocus, label="ActFocus (alpha 0.1, beta 0.5)"),
    "actfocus-beta2": replace(actfocus, beta=2.0, label="ActFocus, beta 2"),
    "no-reasoning": replace(actfocus, alpha=0.0, beta=0.0, label="alpha 0, beta 0"),
    "energy": replace(ARMS["energy"], label="ActFocus, alpha 1"),
    "entropy": replace(ARMS["entropy"], label="ActFocus with entropy"),
    "nll": replace(ARMS["nll"], label="ActFocus with policy NLL"),
    "shift": replace(ARMS["shift"], label="ActFocus with log-prob shift"),
    "entropy-beta2": replace(ARMS["entropy"], beta=2.0, label="beta 2 with entropy"),
    "placebo": replace(ARMS["placebo"], label="placebo: on random tokens"),
}


# ------------------------------------------------------------------------- gradients of the parts
def token_parts(rollouts: Rollouts, frozen: TokenStats, old_logprob: Tensor) -> dict[str, Tensor]:
    """What every weighting is a sum of, each (B, T): masks of the three classes; for each signal
    the sigmoid that beta multiplies, at action tokens; and the weights of the placebo. Mean and
    deviation of a signal are of these rollouts, a block; in training, of the whole iteration."""
    response = rollouts.response
    reasoning = rollouts.labels == Segment.REASONING
    action = rollouts.labels == Segment.ACTION
    masks = {"reasoning": reasoning, "action": action, "format": response & ~reasoning & ~action}
    parts = {name: mask.float() for name, mask in masks.items()}
    signals = token_signals(frozen, old_logprob)
    for name in SIGNALS:
        weights = actfocus_weights(signals[name], reasoning, action, response, alpha=1.0, beta=1.0)
        if name != "shift" or signals[name].any():  # a policy has not shifted from itself
            parts[name] = (weights - 1) * action
    arm = WEIGHTINGS["placebo"]
    weights = blend(parts, mixture(replace(arm, change=None)))
    return parts | {"placebo": scatter_weights(weights, rollouts, seed=0)}


def blend(parts: dict[str, Tensor], shares: dict[str, float]) -> Tensor:
    """The weights (B, T) of a mixture of parts."""
    return sum(share * parts[part] for part, share in shares.items())


def mixture(arm: Arm) -> dict[str, float]:
    """How much of each part a weighting takes.

    >>> mixture(ARMS["actfocus"])
    {'reasoning': 0.1, 'action': 1.0, 'format': 1.0, 'energy': 0.5}
    """
    if arm.change is scatter_weights:
        return {"placebo": 1.0}
    if arm.change is not None:
        raise ValueError(f"{arm.label}: of the controls only the placebo is a part here")
    shares = {"reasoning": arm.alpha, "action": 1.0, "format": 1.0}
    return shares | ({arm.signal: arm.beta} if arm.beta else {})


class Block(NamedTuple):
    """What the prompts of one block say of each part."""

    gradients: dict[str, Tensor]  # (P,) each, of -sum(part * A * log pi)
    totals: dict[str, float]  # sum(part): a weighting is divided by that of its weights

    def gradient(self, shares: dict[str, float]) -> Tensor:
        """(P,) float64, of the loss under a weighting (ratio 1: the first update after playing)."""
        total = sum(share * self.totals[part] for part, share in shares.items())
        gradient = sum(share * self.gradients[part].double() for part, share in shares.items())
        return gradient / (total or 1.0)


def measure_blocks(
    policy: Policy, rollouts: Rollouts, frozen: TokenStats, logprob: Tensor,
    config, most: int,
) -> list[Block]:  # fmt: skip
    """The gradients of at most so many blocks of rollouts, PROMPTS_PER_BLOCK whole groups each.
    logprob: (B, T), of the policy that played."""
    blocks = []
    rows = torch.arange(len(rollouts.ids), device=policy.device)[: most * block_size(config)]
    for some in tqdm(rows.split(block_size(config)), desc="gradients", unit="block", leave=False):
        if len(some) == block_size(config):
            stats = TokenStats(*(values[some] for values in frozen))
            block = measure_block(policy, rollouts.take(some), stats, logprob[some], config)
            blocks.append(block)
    return blocks


def block_size(config) -> int:
    """Rollouts in a block."""
    return PROMPTS_PER_BLOCK * config.group_size


def measure_block(
    policy: Policy, rollouts: Rollouts, frozen: TokenStats, old_logprob: Tensor, config
) -> Block:
    """The gradient of each part, one backward pass each. frozen, old_logprob: (B, T). config: has
    group_size, temperature and micro_tokens."""
    response = rollouts.response
    advantages = group_advantages(rollouts.rewards, config.group_size)  # (B,)
    parts = token_parts(rollouts, frozen, old_logprob)
    earned = dict.fromkeys(parts, advantages)
    for name in NULLS:
        parts[name] = blend(parts, mixture(WEIGHTINGS[name.removesuffix("-null")]))
        earned[name] = shuffled(advantages, config.group_size, seed=int(rollouts.ids.sum()))
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    chosen = choose_coordinates(parameters)
    gradients = {name: torch.zeros(sum(map(len, chosen))) for name in parts}
    teaching = advantages.nonzero().squeeze(1).cpu()  # a group that ends alike has no gradient
    for rows in rollouts.micro_batches(teaching, config.micro_tokens) if len(teaching) else ():
        hidden, targets = scored_hidden(policy, rollouts, rows, response)  # (N, H), (N,)
        with policy.autocast():
            stats = token_stats(hidden, policy.head, targets, temperature=config.temperature)
        for name, part in parts.items():
            credit = (part * earned[name][:, None])[rows][response[rows]]  # (N,)
            with policy.autocast():
                loss = fused_policy_loss(
                    hidden, policy.head, targets,
                    stats.logprob, credit, torch.ones_like(credit),
                    LossSettings(temperature=config.temperature), normalizer=1.0,
                ).loss  # fmt: skip
            by_parameter = torch.autograd.grad(
                loss, parameters, retain_graph=True, materialize_grads=True
            )
            flat = [g.flatten()[some] for g, some in zip(by_parameter, chosen, strict=True)]
            del by_parameter  # as large as the model: not to be there beside the next
            gradients[name] += torch.cat(flat).float().cpu()
    return Block(gradients, {name: part.sum().item() for name, part in parts.items()})


def shuffled(advantages: Tensor, group_size: int, seed: int) -> Tensor:
    """(B,), each group's in a random order."""
    groups = advantages.view(-1, group_size)
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(groups.shape, generator=generator).argsort(1).to(groups.device)
    return groups.gather(1, order).flatten()


def choose_coordinates(parameters: list[Tensor], limit: int = COORDINATES) -> list[Tensor]:
    """Of each parameter, the indices of the elements to look at: all, or of a large model `limit`
    in all, drawn at random, which keeps the ratios of inner products on average."""
    total = sum(p.numel() for p in parameters)
    if total <= limit:
        return [torch.arange(p.numel(), device=p.device) for p in parameters]
    generator = torch.Generator().manual_seed(0)
    counts = [math.ceil(limit * p.numel() / total) for p in parameters]
    return [
        torch.randint(p.numel(), (count,), generator=generator).to(p.device)
        for p, count in zip(parameters, counts, strict=True)
    ]


# -------------------------------------------------------------------------------- signal and noise
class Ratio(NamedTuple):
    """Signal over noise of the gradient of a block."""

    value: float  # nan without a gradient
    without: np.ndarray  # (K,), without the pairs of each block in turn

    def interval(self, baseline: Ratio | None = None) -> tuple[float, float, float]:
        """The ratio, or its difference to another, between the ends of its 95 % interval
        (delete-one-block jackknife)."""
        value, without = self
        if baseline is not None:
            value, without = value - baseline.value, without - baseline.without
        blocks = len(without)
        with np.errstate(invalid="ignore"):
            # pseudo-values err as independent observations of the estimate would
            half = t_interval(blocks * value - (blocks - 1) * without)
            return value - half, value, value + half


def signal_to_noise(gradients: Tensor, as_adam: bool) -> Ratio:
    """Of the gradients of K >= 4 blocks, (K, P) float64.

    >>> g = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [1.0, -1.0]]).double()
    >>> round(signal_to_noise(g, as_adam=False).value, 4)  # signal 4 / 6 pairs, noise 2 - 4 / 6
    0.5
    """
    if as_adam:
        scale = (gradients**2).mean(0).sqrt()  # (P,)
        gradients = gradients / torch.where(scale > 0, scale, 1.0)
    products = (gradients @ gradients.T).numpy()  # (K, K)
    own, others = products.diagonal(), products.sum(1) - products.diagonal()
    blocks, total = len(own), others.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        # over all pairs, and over those without each block; means, since a block has one square
        signal, power = total / (blocks * (blocks - 1)), own.mean()
        value = signal / (power - signal)
        signal = (total - 2 * others) / ((blocks - 1) * (blocks - 2))  # (K,)
        power = (own.sum() - own) / (blocks - 1)  # (K,)
        return Ratio(float(value), signal / (power - signal))


def measure_signal(blocks: list[Block]) -> dict[str, tuple[Ratio, Ratio]]:
    """Signal to noise of each of CLASSES, WEIGHTINGS, NULLS: as Adam sees it, and raw. Leaves out
    the log-prob shift of a policy from itself, which is 0."""
    mixtures = {name: {name: 1.0} for name in CLASSES}
    mixtures |= {name: mixture(arm) for name, arm in WEIGHTINGS.items()}
    mixtures |= {name: {name: 1.0} for name in NULLS}
    ratios = {}
    for name, shares in mixtures.items():
        if shares.keys() <= blocks[0].totals.keys():
            gradients = torch.stack([block.gradient(shares) for block in blocks])  # (K, P)
            ratios[name] = tuple(signal_to_noise(gradients, as_adam) for as_adam in (True, False))
    return ratios


def signal_rows(blocks: list[Block], block_size: int) -> list[dict]:
    """signal.csv: a row a class and a weighting. Columns *_ratio: signal over noise of a block of
    block_size rollouts; *_gain: less GRPO's; *_rollouts: as many make signal and noise equal."""
    tokens = sum(block.totals[name] for block in blocks for name in CLASSES)
    rows, ratios = [], measure_signal(blocks)
    for name, (as_adam, raw) in ratios.items():
        row = {"name": name, "alpha": "", "beta": "", "signal": "", "token_share": 1.0}
        if name in CLASSES:
            row["token_share"] = sum(block.totals[name] for block in blocks) / tokens
        elif name in WEIGHTINGS:
            arm = WEIGHTINGS[name]
            row |= {"alpha": arm.alpha, "beta": arm.beta, "signal": arm.signal}
        scales = zip(("adam", "raw"), (as_adam, raw), ratios["grpo"], strict=True)
        for scale, ratio, grpo in scales:
            for column, numbers in (("ratio", ratio.interval()), ("gain", ratio.interval(grpo))):
                for end, number in zip(("_low", "", "_high"), numbers, strict=True):
                    row[f"{scale}_{column}{end}"] = number
            row[f"{scale}_rollouts"] = block_size / ratio.value if ratio.value > 0 else math.inf
        rows.append(row)
    return rows


# ------------------------------------------------------------------------- what a person looks at
def summary(rows: list[dict], block_size: int) -> str:
    """The table, as Adam sees it."""
    lines = [
        f"signal / noise of the policy gradient of {block_size} rollouts, as Adam sees it, "
        "[95 % interval]",
        f"{'':32}{'tokens':>8}{'ratio':>8}{'less GRPO':>29}{'rollouts for 1':>34}",
    ]
    for row in rows:
        ratio = f"[{row['adam_ratio_low']:.3f}, {row['adam_ratio_high']:.3f}]"
        line = f"{label_of(row['name']):32}{row['token_share']:>8.1%}"
        line += f"{row['adam_ratio']:>8.3f}{ratio:>18}"
        if row["name"] != "grpo":
            gain = f"[{row['adam_gain_low']:+.3f}, {row['adam_gain_high']:+.3f}]"
            line += f"{row['adam_gain']:>+11.3f}{gain:>19}"
        else:
            line += " " * 30
        lines.append(f"{line}{rollouts_needed(row, 'adam'):>15}")
    return "\n".join(lines)


def rollouts_needed(row: dict, scale: str) -> str:
    """As many make signal and noise equal; "?" if the ratio's interval holds 0."""
    return f"{row[f'{scale}_rollouts']:,.0f}" if row[f"{scale}_ratio_low"] > 0 else "?"


def label_of(name: str) -> str:
    return PARTS[name][0] if name in PARTS else WEIGHTINGS[name].label


def draw_signal(path: Path, rows: list[dict], block_size: int, title: str) -> None:
    """signal.png: classes and weightings side by side, as Adam sees them and raw."""
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 2, sharey=True)
    draw_ratios(panels[0], rows, "adam")
    draw_ratios(panels[1], rows, "raw")
    panels[0].set_title("as Adam sees it: each coordinate by its own size")
    panels[1].set_title("raw")
    for axes in panels:
        axes.set_xlabel(f"signal / noise of the gradient of {block_size} rollouts")
    figure.savefig(path, dpi=110)


def draw_ratios(axes: Axes, rows: list[dict], scale: str) -> None:
    """A dot with its interval per row, and at the right the rollouts that make signal = noise."""
    for y, row in enumerate(rows):
        name = row["name"]
        color = PARTS[name][1] if name in PARTS else WEIGHTINGS[name].color
        low, value, high = (row[f"{scale}_ratio{end}"] for end in ("_low", "", "_high"))
        bars = [[value - low], [high - value]]
        axes.errorbar([value], [y], xerr=bars, fmt="o", color=color, capsize=3)
        said = rollouts_needed(row, scale)
        axes.text(1.01, y, said, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
        if name == "grpo":
            axes.axvline(value, color=color, linestyle="--", linewidth=0.8)
    axes.text(1.01, -1, "rollouts for\nsignal = noise", transform=axes.get_yaxis_transform(),
              va="center", fontsize=8)  # fmt: skip
    axes.axhline(len(CLASSES) - 0.5, color="black", linewidth=0.8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [label_of(row["name"]) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    # few tokens are format, and their interval may be wider than all others together
    seen = [
        row for row in rows if row["name"] != "format" and row[f"{scale}_ratio_low"] > -math.inf
    ]
    if seen:
        low = min(0.0, *(row[f"{scale}_ratio_low"] for row in seen))
        high = max(0.0, *(row[f"{scale}_ratio_high"] for row in seen))
        axes.set_xlim(1.1 * low - 0.1 * high, 1.1 * high - 0.1 * low)
    axes.grid(alpha=0.3, axis="x")
