"""Signal and noise of the policy gradient, by kind of token and by weighting.

    python -m studies.diagnose --env frozenlake      # uses this to make signal.csv and signal.png

Which tokens teach? Play some prompts and split them into K blocks of whole groups. Block i has the
policy gradient g_i, a vector of P numbers. The blocks are independent, so what their gradients have
in common is signal, and the rest is noise:

    g_i = mu + e_i         mu: the expected gradient;  e_i: independent, with mean 0
    signal = |mu|^2        noise = E |e_i|^2           ratio R = signal / noise

Two different blocks share only mu, while a block shares its noise with itself:

    E[g_i . g_j] = |mu|^2  for i != j                  E[g_i . g_i] = |mu|^2 + E |e_i|^2

So with the inner products p_ij = g_i . g_j, means over blocks estimate both without bias:

    S = sum_{i != j} p_ij / (K (K - 1))                signal
    Q = sum_i p_ii / K                                 signal and noise together
    R = S / (Q - S)

R is the ratio for the gradient of a single block; averaging n blocks multiplies it by n. Hence
(rollouts of a block) / R is the number of rollouts at which signal and noise are equal. (1 / R is
the "gradient noise scale" of McCandlish et al. 2018, arXiv 1812.06162, in blocks.)

The interval is a jackknife's. R_k is the estimate without block k, where all pairs with k fall out,
each of which occurs twice in the double sum:

    S_k = (sum_{i != j} p_ij - 2 sum_{j != k} p_kj) / ((K - 1) (K - 2))
    Q_k = (sum_i p_ii - p_kk) / (K - 1)
    R_k = S_k / (Q_k - S_k)

The pseudo-values v_k = K R - (K - 1) R_k scatter about R as K independent observations would, so

    R +- t sd(v) / sqrt(K)         t: the 97.5 % quantile of Student's t, K - 1 degrees of freedom

holds the true ratio in 95 % of experiments, about. Two weightings are compared on the same blocks:
the same formulas with R - R' in place of R and R_k - R'_k in place of R_k. What a lucky block does
to both then cancels.

Adam divides each coordinate of the gradient by its own size, so for its steps the same ratio counts
after each coordinate has been divided by its root mean square over the blocks: "as Adam sees it".
As in Adam, a gradient is part of its own scale. (With the scale of the other blocks alone, a
coordinate that only one block moves, of a rare word say, would be divided by next to nothing and
decide everything.) This makes the ratio a little biased, upwards or downwards; how much is seen
from the same ratio with the rewards shuffled within each group, where the true signal is 0.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from actfocus import actfocus_weights, group_advantages
from arms import ARMS, SIGNALS, Arm, Known, token_signals
from energy import TokenStats, token_stats
from fused_loss import LossSettings, fused_policy_loss
from policy import Policy
from rollout import Rollouts, scored_hidden
from studies.stats import t_interval

PROMPTS_PER_BLOCK = 2
COORDINATES = 2**20  # a larger model's gradient is looked at in so many random coordinates
CLASSES = {  # the tokens of one class alone: label, color
    "reasoning": ("reasoning tokens alone", "tab:blue"),
    "action": ("action tokens alone", "tab:red"),
    "format": ("format tokens alone", "tab:gray"),
}
NULLS = {  # rewards shuffled within each group: no token has earned its credit. Label, color
    "grpo-null": ("GRPO, rewards shuffled", "tab:gray"),
    "actfocus-null": ("ActFocus, rewards shuffled", "tab:gray"),
}
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
    "span-placebo": replace(ARMS["span-placebo"], label="span placebo: in the thought"),
    "inverse": replace(ARMS["inverse"], label="inverse: actions a tenth"),
    "top-entropy": replace(ARMS["top-entropy"], label="top entropy: a fifth of the tokens"),
    "low-prob": replace(ARMS["low-prob"], label="unlikely tokens less"),
}


class Settings(Protocol):
    """What is read of a config."""

    group_size: int
    temperature: float
    micro_tokens: int


# --------------------------------------------------------------------- what weightings are made of
# The gradient is linear in the weights, and most weightings are a sum of a few components: the
# tokens of a class, and for each signal what beta adds. So one gradient per component and block
# gives that of every such weighting. One with a rule of its own is a component of its own.
def weight_components(
    rollouts: Rollouts, reference_stats: TokenStats, player: TokenStats
) -> dict[str, Tensor]:
    """The components of all weightings, (B, T) float32 each.

    By name: a class has 1 at its tokens; a signal has at action tokens the sigmoid that beta
    multiplies; a weighting with a rule has its weights. reference_stats, player: (B, T) each, of
    the reference and of the policy that played. The mean and deviation of a signal, and the
    quantile of the entropy, are of these rollouts, a block; in training they are of a whole
    iteration.
    """
    response, reasoning, action = rollouts.response, rollouts.reasoning, rollouts.action
    components = {
        "reasoning": reasoning.float(),
        "action": action.float(),
        "format": (response & ~reasoning & ~action).float(),
    }
    signals = token_signals(reference_stats, player.logprob)
    for name in SIGNALS:
        if name == "shift" and not signals[name].any():
            continue  # the reference itself played, and has not shifted from itself
        weights = actfocus_weights(signals[name], reasoning, action, response, alpha=1.0, beta=1.0)
        components[name] = (weights - 1) * action
    # The sampler's log-probs round otherwise than those of a full forward pass.
    rescored = replace(rollouts, old_logprob=player.logprob)
    known = Known(rescored, seed=0, policy_entropy=player.entropy, advantages=None)
    for name, arm in WEIGHTINGS.items():
        if arm.change is not None:
            weights = combine(components, mixture(replace(arm, change=None)))
            components[name] = arm.change(weights, known)
    return components


def mixture(arm: Arm) -> dict[str, float]:
    """How much of each component a weighting has. Raises ValueError for a rule that is none.

    >>> mixture(ARMS["actfocus"])
    {'reasoning': 0.1, 'action': 1.0, 'format': 1.0, 'energy': 0.5}
    """
    if arm.change is not None:
        for name, weighting in WEIGHTINGS.items():
            if weighting.change is arm.change:
                return {name: 1.0}
        raise ValueError(f"{arm.label}: its rule is not among WEIGHTINGS")
    shares = {"reasoning": arm.alpha, "action": 1.0, "format": 1.0}
    if arm.beta:
        shares[arm.signal] = arm.beta
    return shares


def combine(components: dict[str, Tensor], shares: dict[str, float]) -> Tensor:
    """The sum of components, each times its share."""
    return sum(share * components[name] for name, share in shares.items())


# ---------------------------------------------------------------------------- gradients of a block
class Block(NamedTuple):
    """What the prompts of one block say of each component."""

    gradients: dict[str, Tensor]  # (P,) float32 each, of -sum(component * advantage * log pi)
    totals: dict[str, float]  # sum(component)

    def gradient(self, shares: dict[str, float]) -> Tensor:
        """(P,) float64: of the loss under a weighting, which divides by the sum of the weights. It
        is that of the first update after playing, where all ratios are 1."""
        total = sum(share * self.totals[name] for name, share in shares.items())
        gradient = sum(share * self.gradients[name].double() for name, share in shares.items())
        return gradient / (total or 1.0)


def block_size(config: Settings) -> int:
    """The rollouts of a block."""
    return PROMPTS_PER_BLOCK * config.group_size


def measure_blocks(
    policy: Policy,
    rollouts: Rollouts,
    reference_stats: TokenStats,
    player: TokenStats,
    config: Settings,
    most: int,
) -> list[Block]:
    """Split rollouts into blocks of PROMPTS_PER_BLOCK whole groups, and measure at most so many;
    what is left over is not measured. reference_stats, player: (B, T) each, as in
    `measure_block`."""
    size = block_size(config)
    number = min(most, len(rollouts.ids) // size)
    blocks = []
    for i in tqdm(range(number), desc="gradients", unit="block", leave=False):
        indices = torch.arange(i * size, (i + 1) * size, device=policy.device)
        of_block = [
            TokenStats(*(values[indices] for values in each)) for each in (reference_stats, player)
        ]
        blocks.append(measure_block(policy, rollouts.take(indices), *of_block, config))
    return blocks


def measure_block(
    policy: Policy,
    rollouts: Rollouts,
    reference_stats: TokenStats,
    player: TokenStats,
    config: Settings,
) -> Block:
    """The gradient of each component and of each of NULLS. reference_stats, player: (B, T) each, of
    the reference and of the policy that played.

    It is summed over the rollouts that have an advantage, their own or a shuffled one. The others
    have no gradient: all of a group that ends alike, and in other groups, by chance, some whose
    reward is the mean.
    """
    components = weight_components(rollouts, reference_stats, player)
    advantages = group_advantages(rollouts.rewards, config.group_size)  # (B,)
    advantage_of = dict.fromkeys(components, advantages)
    for name in NULLS:
        weighting = WEIGHTINGS[name.removesuffix("-null")]
        components[name] = combine(components, mixture(weighting))
        seed = int(rollouts.ids.sum())
        advantage_of[name] = shuffled(advantages, config.group_size, seed)
    credits = {name: components[name] * advantage_of[name][:, None] for name in components}
    learning = torch.stack([*advantage_of.values()]).any(dim=0).nonzero().squeeze(1)
    return Block(
        gradients=credit_gradients(policy, rollouts, credits, learning, config),
        totals={name: component.sum().item() for name, component in components.items()},
    )


def credit_gradients(
    policy: Policy,
    rollouts: Rollouts,
    credits: dict[str, Tensor],
    indices: Tensor,
    config: Settings,
) -> dict[str, Tensor]:
    """The gradient of -sum(credit * log pi) for each of several credits, (B, T): one forward pass
    for all, and a backward pass for each. indices: the rollouts that are summed over. Returns (P,)
    float32 each, on the CPU."""
    response = rollouts.response
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    coordinates = choose_coordinates(parameters)
    gradients = {name: torch.zeros(sum(map(len, coordinates))) for name in credits}
    if not len(indices):
        return gradients
    for batch in rollouts.micro_batches(indices.cpu(), config.micro_tokens):
        hidden, targets = scored_hidden(policy, rollouts, batch, response)  # (N, H), (N,)
        with policy.autocast():
            stats = token_stats(hidden, policy.head, targets, temperature=config.temperature)
        for name, credit in credits.items():
            of_tokens = credit[batch][response[batch]]  # (N,)
            with policy.autocast():
                loss = fused_policy_loss(
                    hidden, policy.head, targets,
                    stats.logprob, of_tokens, torch.ones_like(of_tokens),
                    LossSettings(temperature=config.temperature), normalizer=1.0,
                ).loss  # fmt: skip
            by_parameter = torch.autograd.grad(
                loss,
                parameters,
                retain_graph=True,
                materialize_grads=True,
            )
            flat = torch.cat(
                [g.flatten()[some] for g, some in zip(by_parameter, coordinates, strict=True)]
            )
            del by_parameter  # as large as the model: free it before the next is made
            gradients[name] += flat.float().cpu()
    return gradients


def shuffled(advantages: Tensor, group_size: int, seed: int) -> Tensor:
    """(B,): the advantages of each group in a random order."""
    groups = advantages.view(-1, group_size)
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(groups.shape, generator=generator).argsort(1).to(groups.device)
    return groups.gather(1, order).flatten()


def choose_coordinates(parameters: list[Tensor], limit: int = COORDINATES) -> list[Tensor]:
    """For each parameter, the indices of the elements to look at: all of them, or for a large model
    about `limit` in total, drawn at random. On average this keeps the ratios of inner products."""
    total = sum(p.numel() for p in parameters)
    if total <= limit:
        return [torch.arange(p.numel(), device=p.device) for p in parameters]
    generator = torch.Generator().manual_seed(0)
    coordinates = []
    for p in parameters:
        count = math.ceil(limit * p.numel() / total)
        drawn = torch.randint(p.numel(), (count,), generator=generator)
        coordinates.append(drawn.to(p.device))
    return coordinates


# -------------------------------------------------------------------------------- signal and noise
class Ratio(NamedTuple):
    """Signal over noise of the gradient of a block, in the symbols of this file's docstring."""

    value: float  # R; nan without a gradient
    without: np.ndarray  # (K,): R_k

    def interval(self, baseline: Ratio | None = None) -> tuple[float, float, float]:
        """The low end of the 95 % interval, the value, and the high end: of the ratio, or of its
        difference to another over the same blocks."""
        value, without = self.value, self.without
        if baseline is not None:
            value = value - baseline.value
            without = without - baseline.without
        blocks = len(without)
        with np.errstate(invalid="ignore"):
            pseudo_values = blocks * value - (blocks - 1) * without  # (K,)
            half = t_interval(pseudo_values)
            return value - half, value, value + half


def signal_to_noise(gradients: Tensor, as_adam: bool) -> Ratio:
    """The ratio from the gradients of K >= 4 blocks, (K, P) float64, by the formulas of this file's
    docstring.

    >>> g = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [1.0, -1.0]]).double()
    >>> round(signal_to_noise(g, as_adam=False).value, 4)  # S = 4 / 6 over the pairs, Q = 2
    0.5
    """
    if as_adam:
        scale = (gradients**2).mean(0).sqrt()  # (P,)
        gradients = gradients / torch.where(scale > 0, scale, 1.0)
    p = (gradients @ gradients.T).numpy()  # (K, K)
    K = len(p)
    own = p.diagonal()  # (K,): p_kk
    others = p.sum(1) - own  # (K,): the sum of p_kj over j != k
    with np.errstate(invalid="ignore", divide="ignore"):
        S = others.sum() / (K * (K - 1))
        Q = own.mean()
        S_k = (others.sum() - 2 * others) / ((K - 1) * (K - 2))
        Q_k = (own.sum() - own) / (K - 1)
        return Ratio(float(S / (Q - S)), S_k / (Q_k - S_k))


def measure_signal(blocks: list[Block]) -> dict[str, tuple[Ratio, Ratio]]:
    """For each of CLASSES, WEIGHTINGS and NULLS: its ratio as Adam sees it, and raw. Leaves out
    what needs the log-prob shift where the reference itself played."""
    mixtures = {name: {name: 1.0} for name in CLASSES}
    mixtures |= {name: mixture(arm) for name, arm in WEIGHTINGS.items()}
    mixtures |= {name: {name: 1.0} for name in NULLS}
    ratios = {}
    for name, shares in mixtures.items():
        if shares.keys() <= blocks[0].totals.keys():
            gradients = torch.stack([block.gradient(shares) for block in blocks])  # (K, P)
            as_adam = signal_to_noise(gradients, as_adam=True)
            raw = signal_to_noise(gradients, as_adam=False)
            ratios[name] = as_adam, raw
    return ratios


def signal_rows(blocks: list[Block], block_size: int) -> list[dict]:
    """signal.csv: a row for each class and weighting. The columns *_ratio are signal over noise of
    a block of block_size rollouts; *_gain are these less GRPO's; *_rollouts say how many rollouts
    make signal and noise equal."""
    tokens = sum(block.totals[name] for block in blocks for name in CLASSES)
    ratios = measure_signal(blocks)
    rows = []
    for name, by_scale in ratios.items():
        row = {"name": name, "alpha": "", "beta": "", "signal": "", "token_share": 1.0}
        if name in CLASSES:
            row["token_share"] = sum(block.totals[name] for block in blocks) / tokens
        elif name in WEIGHTINGS:
            arm = WEIGHTINGS[name]
            row |= {"alpha": arm.alpha, "beta": arm.beta, "signal": arm.signal}
        for scale, ratio, grpo in zip(("adam", "raw"), by_scale, ratios["grpo"], strict=True):
            row |= interval_columns(f"{scale}_ratio", ratio.interval())
            row |= interval_columns(f"{scale}_gain", ratio.interval(grpo))
            row[f"{scale}_rollouts"] = block_size / ratio.value if ratio.value > 0 else math.inf
        rows.append(row)
    return rows


def interval_columns(name: str, interval: tuple[float, float, float]) -> dict[str, float]:
    """An interval as three columns.

    >>> interval_columns("ratio", (0.1, 0.2, 0.3))
    {'ratio_low': 0.1, 'ratio': 0.2, 'ratio_high': 0.3}
    """
    low, value, high = interval
    return {f"{name}_low": low, name: value, f"{name}_high": high}


# ----------------------------------------------------------------------- the table and the picture
def summary(rows: list[dict], block_size: int) -> str:
    """The table that is printed, as Adam sees it."""
    lines = [
        f"signal / noise of the policy gradient of {block_size} rollouts, as Adam sees it, "
        "[95 % interval]",
        f"{'':32}{'tokens':>8}{'ratio':>8}{'less GRPO':>29}{'rollouts for 1':>34}",
    ]
    for row in rows:
        ratio = f"[{row['adam_ratio_low']:.3f}, {row['adam_ratio_high']:.3f}]"
        label, _ = style_of(row["name"])
        line = f"{label:32}{row['token_share']:>8.1%}{row['adam_ratio']:>8.3f}{ratio:>18}"
        if row["name"] == "grpo":
            line += " " * 30
        else:
            gain = f"[{row['adam_gain_low']:+.3f}, {row['adam_gain_high']:+.3f}]"
            line += f"{row['adam_gain']:>+11.3f}{gain:>19}"
        lines.append(f"{line}{rollouts_needed(row, 'adam'):>15}")
    return "\n".join(lines)


def rollouts_needed(row: dict, scale: str) -> str:
    """How many rollouts make signal and noise equal; "?" if the interval of the ratio holds 0."""
    return f"{row[f'{scale}_rollouts']:,.0f}" if row[f"{scale}_ratio_low"] > 0 else "?"


def style_of(name: str) -> tuple[str, str]:
    """The label and the color of a row."""
    if name in WEIGHTINGS:
        return WEIGHTINGS[name].label, WEIGHTINGS[name].color
    return (CLASSES | NULLS)[name]


def draw_signal(path: Path, rows: list[dict], block_size: int, title: str) -> None:
    """signal.png: classes and weightings, side by side as Adam sees them and raw."""
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
    """A dot with its interval for each row, and at the right how many rollouts it needs."""
    at_the_right = {"transform": axes.get_yaxis_transform(), "va": "center"}
    for y, row in enumerate(rows):
        _, color = style_of(row["name"])
        low, value, high = (row[f"{scale}_ratio{end}"] for end in ("_low", "", "_high"))
        bars = [[value - low], [high - value]]
        axes.errorbar([value], [y], xerr=bars, fmt="o", color=color, capsize=3)
        axes.text(1.01, y, rollouts_needed(row, scale), fontsize=9, **at_the_right)
        if row["name"] == "grpo":
            axes.axvline(value, color=color, linestyle="--", linewidth=0.8)
    axes.text(1.01, -1, "rollouts for\nsignal = noise", fontsize=8, **at_the_right)
    axes.axhline(len(CLASSES) - 0.5, color="black", linewidth=0.8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [style_of(row["name"])[0] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    set_limits(axes, rows, scale)
    axes.grid(alpha=0.3, axis="x")


def set_limits(axes: Axes, rows: list[dict], scale: str) -> None:
    """Show all intervals but that of format tokens. They are few, and their interval may be wider
    than all others together."""
    shown = []
    for row in rows:
        if row["name"] != "format" and row[f"{scale}_ratio_low"] > -math.inf:
            shown.append(row)
    if shown:
        low = min(0.0, *(row[f"{scale}_ratio_low"] for row in shown))
        high = max(0.0, *(row[f"{scale}_ratio_high"] for row in shown))
        axes.set_xlim(1.1 * low - 0.1 * high, 1.1 * high - 0.1 * low)
