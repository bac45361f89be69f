"""The Action Bottleneck (paper, Figures 1 and 2): where is the reference unsure, and do the prompts where it is teach more?

    python diagnose.py --env sokoban                                    # the warm-started policy plays and is the reference
    python diagnose.py --env sokoban --checkpoint runs/mine/actfocus    # a trained policy plays (train_actfocus.py --save)

GRPO learns from a prompt only if its rollouts end differently: the variance of a group's rewards is what there is to learn. The
paper finds that the reference's mean energy over a group's action tokens goes along with that variance, and over its reasoning
tokens does not. This measures it on any environment and model: rank correlations with bootstrap intervals and permutation
p-values, of four signals over four choices of tokens. In the output folder:

    groups.csv  correlations.csv  bottleneck.png     one row a group; one row a signal and choice of tokens; their picture
    tokens.html  tokens.png                          transcripts, every token coloured by its ActFocus weight
"""

from __future__ import annotations

import csv
import html
import json
import textwrap
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from actfocus import actfocus_weights
from energy import TokenStats
from policy import Policy, load_policy
from rollout import Rollouts, score_all
from segment import Segment
from train_grpo import option, parse, play

DIAGNOSE_SEEDS = 3_000_000_000  # and on: seeds that nothing else draws
SIGNALS = {"energy": "energy", "entropy": "entropy", "nll": "policy NLL", "shift": "log-prob shift"}
TOKENS = {"action": "tab:red", "decision": "tab:orange", "reasoning": "tab:blue", "all": "tab:gray"}  # choices of tokens: color


@dataclass
class DiagnoseConfig:
    """Every flag of the command line."""

    env: str = option("frozenlake", "environment to play")
    model: str = option("", "the reference: checkpoint folder or hub id of a causal LM; the built-in model if not given")
    checkpoint: str = option("", "folder of a trained policy that plays instead of the reference")
    skill: float = option(0.0, "of the built-in model's demonstrator, which sets how well it plays; 0 means the world's own", 0, 1)
    warm_start_seed: int = option(0, "of the built-in model: another one is another model", 0)
    groups: int = option(128, "prompts", 8)
    group_size: int = option(16, "rollouts of each prompt", 2)
    temperature: float = option(1.0, "sampling temperature", 0.01)
    alpha: float = option(0.1, "weight of reasoning tokens in the pictures of tokens", 0, 1)
    beta: float = option(0.5, "how much more an uncertain action token weighs there", 0)
    batch: int = option(256, "rollouts played at once", 1)
    micro_tokens: int = option(8192, "tokens a forward pass, padding included; lower it if memory runs out", 1)
    max_turn_tokens: int = option(160, "a turn is cut after this many tokens", 1)
    max_tokens: int = option(4096, "an episode is cut after this many tokens, prompt included", 1)
    seed: int = option(0, "of sampling", 0)
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    out: str = option("", "folder for results; runs/<time>-<env>-diagnosis if not given")


def diagnose(config: DiagnoseConfig) -> None:
    """Play the groups, measure each, correlate, draw."""
    try:
        shape = {"skill": config.skill, "seed": config.warm_start_seed}
        reference = load_policy(config.model or None, config.env, config.device, **shape)
        policy = load_policy(config.checkpoint, config.env, config.device) if config.checkpoint else reference
    except (OSError, ValueError) as error:
        raise SystemExit(f"the policy cannot be loaded: {error}") from None
    if policy is not reference and policy.bytes_of != reference.bytes_of:
        raise SystemExit(f"--checkpoint {config.checkpoint} has another tokenizer than the reference: choose one trained from it")
    out = Path(config.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{config.env}-diagnosis")
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    groups, at_once = [], max(1, config.batch // config.group_size)
    for start in tqdm(range(0, config.groups, at_once), desc="groups", unit="batch", dynamic_ncols=True):
        prompts = range(DIAGNOSE_SEEDS + start, DIAGNOSE_SEEDS + min(start + at_once, config.groups))
        seeds = [seed for seed in prompts for _ in range(config.group_size)]
        rollouts = play(policy, config, seeds, config.temperature, config.seed)
        frozen = score_all(reference, rollouts, rollouts.response, config.temperature, config.micro_tokens)
        if not groups:  # pictures of tokens come from the first batch
            draw_transcripts(out, policy, rollouts, frozen, config)
        groups += measure(rollouts, frozen, prompts, config.group_size)
        write_csv(out / "groups.csv", groups)  # anew each time: an interrupted run keeps what it played
    table = correlations(groups, np.random.default_rng(config.seed))
    write_csv(out / "correlations.csv", [result._asdict() for result in table])
    draw_bottleneck(out / "bottleneck.png", groups, table, config)
    print(summary(groups, table), f"pictures and tables are in {out}", sep="\n")


# -------------------------------------------------------------------------------------------------------- what a group shows
def turn_numbers(rollouts: Rollouts) -> Tensor:
    """(B, T) int64: which turn, from 1, a sampled token belongs to; at any other position, the last turn before it."""
    starts = rollouts.response & ~torch.nn.functional.pad(rollouts.response, (1, 0))[:, :-1]
    return starts.cumsum(1)


def token_choices(rollouts: Rollouts, frozen: TokenStats) -> dict[str, Tensor]:
    """Masks (B, T). `decision` is the action token of each turn at which the reference's entropy is highest: in a JSON call
    most tokens are boilerplate, and this one decides."""
    action, turn = rollouts.labels == Segment.ACTION, turn_numbers(rollouts)
    entropy = frozen.entropy.masked_fill(~action, -1.0)
    highest = torch.full_like(entropy, -1.0).scatter_reduce(1, turn, entropy, "amax").gather(1, turn)
    reasoning = rollouts.labels == Segment.REASONING
    return {"action": action, "decision": action & (entropy == highest), "reasoning": reasoning, "all": rollouts.response}


def measure(rollouts: Rollouts, frozen: TokenStats, seeds: range, group_size: int) -> list[dict[str, float]]:
    """A row per group: how it ended, and the mean of each signal over each choice of its tokens (nan where it has none)."""
    old = rollouts.old_logprob
    signals = {"energy": frozen.energy, "entropy": frozen.entropy, "nll": -old, "shift": old - frozen.logprob}
    choices = token_choices(rollouts, frozen)
    rows = []
    for g, seed in enumerate(seeds):
        some = slice(g * group_size, (g + 1) * group_size)
        rewards = rollouts.rewards[some]
        row = {"success": rollouts.success[some].float().mean(), "reward": rewards.mean(), "reward_variance": rewards.var()}
        row |= {"turns": rollouts.turns[some].float().mean(), "tokens": choices["all"][some].sum() / group_size}
        row["action_fraction"] = choices["action"][some].sum() / choices["all"][some].sum()
        for signal, values in signals.items():
            row |= {f"{signal}_{name}": values[some][mask[some]].mean() for name, mask in choices.items()}
        rows.append({"seed": seed} | {name: float(value) for name, value in row.items()})
    return rows


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0])
        writer.writerows([f"{value:.6g}" if isinstance(value, float) else value for value in row.values()] for row in rows)


# -------------------------------------------------------------------------------------------------------------- statistics
class Correlation(NamedTuple):
    """Spearman's rho of a signal with the reward variance of the groups, and with their success rate for comparison."""

    signal: str
    tokens: str
    rho: float
    low: float  # 95 % bootstrap interval over groups
    high: float
    p: float  # two-sided, by permutation
    groups: int
    rho_success: float


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing their mean rank.

    >>> ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist()
    [3.5, 1.0, 3.5, 2.0]
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; nan if either is constant.

    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 9.0]))
    1.0
    """
    a, b = ranks(a) - (len(a) + 1) / 2, ranks(b) - (len(b) + 1) / 2
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else float("nan")


def spearman_test(a: np.ndarray, b: np.ndarray, rng: np.random.Generator, resamples: int = 2000) -> tuple[float, ...]:
    """(rho, low, high, p): 95 % percentile bootstrap interval over pairs, two-sided permutation p-value. nan if one is constant."""
    rho = spearman(a, b)
    if np.isnan(rho):
        return rho, rho, rho, rho
    draws = rng.integers(len(a), size=(resamples, len(a)))
    low, high = np.nanpercentile([spearman(a[draw], b[draw]) for draw in draws], [2.5, 97.5])
    centred = [ranks(values) - (len(a) + 1) / 2 for values in (a, b)]
    shuffled = rng.permuted(np.tile(centred[0], (5 * resamples, 1)), axis=1)  # (5 resamples, n)
    null = shuffled @ centred[1] / np.sqrt((centred[0] @ centred[0]) * (centred[1] @ centred[1]))
    return rho, float(low), float(high), float((1 + (abs(null) >= abs(rho) - 1e-12).sum()) / (1 + len(null)))


def correlations(groups: list[dict[str, float]], rng: np.random.Generator) -> list[Correlation]:
    """Each signal over each choice of tokens against the reward variance; last, the success rate itself."""
    column = {name: np.array([row[name] for row in groups]) for name in groups[0]}
    column["success_"] = column["success"]
    table = []
    for signal, tokens in [(signal, tokens) for signal in SIGNALS for tokens in TOKENS] + [("success", "")]:
        values = column[f"{signal}_{tokens}"]
        if np.nanmax(abs(values), initial=0) < 1e-4:  # the shift of a policy from itself is rounding
            values = 0 * values
        known = ~np.isnan(values)
        a, variance, success = values[known], column["reward_variance"][known], column["success"][known]
        table.append(Correlation(signal, tokens, *spearman_test(a, variance, rng), int(known.sum()), spearman(a, success)))
    return table


def summary(groups: list[dict[str, float]], table: list[Correlation]) -> str:
    def mean(name: str) -> float:
        return float(np.mean([row[name] for row in groups]))

    varied = np.mean([row["reward_variance"] > 0 for row in groups])
    lines = [
        f"{len(groups)} groups: success {mean('success'):.1%}, action tokens {mean('action_fraction'):.1%} of those generated, "
        f"rewards differ in {varied:.1%} of the groups",
        f"{'Spearman with the reward variance':34}{'rho':>7}{'95 % interval':>18}{'p':>9}{'rho with success':>18}",
    ]
    for each in table:
        if np.isnan(each.rho):
            lines.append(f"{each.signal + ' ' + each.tokens:34}{'constant: no correlation':>34}")
        else:
            interval = f"[{each.low:+.2f}, {each.high:+.2f}]"
            name = f"{each.signal} {each.tokens}"
            lines.append(f"{name:34}{each.rho:>+7.2f}{interval:>18}{each.p:>9.4f}{each.rho_success:>+18.2f}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- pictures
def draw_bottleneck(path: Path, groups: list[dict[str, float]], table: list[Correlation], config: DiagnoseConfig) -> None:
    """Above, a point per group: energy against reward variance. Below, every correlation with its interval."""
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1))
    results = {(each.signal, each.tokens): each for each in table}
    success, variance = ([row[name] for row in groups] for name in ("success", "reward_variance"))
    axes = above.subplots(1, 3, sharey=True)
    for each, tokens in zip(axes, ("action", "reasoning", "all"), strict=True):
        energy = [row[f"energy_{tokens}"] for row in groups]
        points = each.scatter(energy, variance, c=success, cmap="viridis", vmin=0, vmax=1, s=22)
        result = results["energy", tokens]
        each.set_title(f"{tokens} tokens\nρ = {result.rho:+.2f} [{result.low:+.2f}, {result.high:+.2f}], p = {result.p:.2g}", fontsize=11)
        each.locator_params(axis="x", nbins=5)
        each.set(xlabel="mean reference energy of the group", ylabel="variance of the group's rewards" * (tokens == "action"))
        each.grid(alpha=0.3)
    above.colorbar(points, ax=axes, label="success rate of the group")
    share = 100 * np.mean([row["action_fraction"] for row in groups])
    who = "a trained policy" if config.checkpoint else "the reference"
    above.suptitle(
        f"{config.env}: {len(groups)} groups of {config.group_size} rollouts by {who}, temperature {config.temperature:g}, "
        f"success {100 * np.mean(success):.0f} %; {share:.0f} % of generated tokens are action tokens"
    )
    axes = below.subplots()
    for i, signal in enumerate(SIGNALS):
        for j, (tokens, color) in enumerate(TOKENS.items()):
            result, x = results[signal, tokens], i + (j - 1.5) / 6
            if not np.isnan(result.rho):
                bars = [[result.rho - result.low], [result.high - result.rho]]
                axes.errorbar([x], [result.rho], np.abs(bars), fmt="o", color=color, capsize=3)
        if np.isnan(result.rho):  # the shift is 0 where the reference itself played
            axes.text(i, 0.04, "constant" if signal == "shift" else "no variance", ha="center", color="dimgray")
    names = {"decision": "most uncertain action\ntoken of each turn"}
    for tokens, color in TOKENS.items():
        axes.plot([], [], "o", color=color, label=names.get(tokens, f"{tokens} tokens"))
    control = results["success", ""]
    axes.axhline(control.rho, color="tab:green", linestyle="--", label="success rate of the\ngroup, for comparison")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(ylim=(-1, 1), xlim=(-0.6, len(SIGNALS) - 0.4))
    axes.set_title("Rank correlation with the reward variance, 95 % bootstrap intervals")
    axes.set(ylabel="Spearman's ρ", xlabel="signal, averaged over the chosen tokens of the group")
    axes.set_xticks(range(len(SIGNALS)), SIGNALS.values())
    axes.grid(alpha=0.3, axis="y")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)


COLORS, SCALE = matplotlib.colormaps["YlOrRd"], Normalize(0, 1.6)


def printable(text: str) -> str:
    """The text with anything invisible (control characters, changes of direction) written as an escape; line ends stay.

    >>> print(printable("a\\x00b\\u202ec\\nd"))
    a\\x00b\\u202ec
    d
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def pieces(policy: Policy, rollouts: Rollouts, row: int) -> list[tuple[str, int | None]]:
    """A transcript as (text, position): one piece per sampled token; None for the text in between, joined."""
    ids, response = rollouts.ids[row, : rollouts.lengths[row]].tolist(), rollouts.response[row].tolist()
    found, shown = [], []
    for position, token in enumerate(ids):
        if response[position]:
            found += [(printable(policy.tokenizer.decode(shown)), None)] * bool(shown)
            shown = []
            text = policy.token_bytes(token).decode(errors="replace") or policy.tokenizer.convert_ids_to_tokens(token)
            found.append((printable(text), position))
        else:
            shown.append(token)
    return found + [(printable(policy.tokenizer.decode(shown)), None)] * bool(shown)


def draw_transcripts(out: Path, policy: Policy, rollouts: Rollouts, frozen: TokenStats, config: DiagnoseConfig) -> None:
    """tokens.html: two transcripts that succeed and two that fail, as far as there are; tokens.png: the first of them."""
    action, reasoning = rollouts.labels == Segment.ACTION, rollouts.labels == Segment.REASONING
    weights = actfocus_weights(frozen.energy, reasoning, action, rollouts.response, config.alpha, config.beta)
    ended = [torch.nonzero(rollouts.success == wanted).flatten().tolist() for wanted in (True, False)]
    chosen = ended[0][:2] + ended[1][:2]
    title = f"{config.env}: every sampled token by its ActFocus weight (alpha {config.alpha:g}, beta {config.beta:g})"
    transcripts, body = [pieces(policy, rollouts, row) for row in chosen], []
    for row, transcript in zip(chosen, transcripts, strict=True):
        verdict = "success" if rollouts.success[row] else "failure"
        body.append(f"<h2>{verdict}, reward {rollouts.rewards[row]:.2f}, {rollouts.turns[row]} turns</h2><pre>")
        for text, position in transcript:
            if position is None:
                body.append(f"<s>{html.escape(text)}</s>")
                continue
            shown = html.escape(text).replace("\n", "<i>⏎</i>\n")
            name, weight = Segment(rollouts.labels[row, position].item()).name, weights[row, position].item()
            energy, entropy = frozen.energy[row, position].item(), frozen.entropy[row, position].item()
            tip = f"{name} · weight {weight:.2f} · energy {energy:.2f} · entropy {entropy:.2f} nats"
            style = f"background:{to_hex(COLORS(SCALE(weight)))};color:{'#fff' if weight > 1.1 else '#000'}"
            body.append(f'<b class="{name}" style="{style}" data-tip="{tip}">{shown}</b>')
        body.append("</pre>")
    stops = ",".join(to_hex(COLORS(SCALE(weight))) for weight in np.linspace(0, 1.6, 9))
    page = PAGE.replace("TITLE", html.escape(title)).replace("STOPS", stops).replace("BODY", "".join(body))
    (out / "tokens.html").write_text(page, encoding="utf-8")
    if chosen:
        draw_tokens(out / "tokens.png", title, transcripts[0], weights[chosen[0]].tolist())


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>TITLE</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin-top: 2rem }
pre { font: 13px/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; padding-bottom: 2rem }
s { text-decoration: none; color: #777 } i { font-style: normal; opacity: .45 }
b { font-weight: normal; position: relative; padding: 1px 0; border-left: 1px solid #fff; border-bottom: 3px solid #999 }
b.REASONING { border-bottom-color: #1f77b4 } b.ACTION { border-bottom-color: #7a0019 }
b:hover { outline: 2px solid #222 }
b:hover::after { content: attr(data-tip); position: absolute; left: 0; top: 1.9em; z-index: 1; background: #222; color: #fff;
  padding: .2em .6em; border-radius: 4px; white-space: nowrap; font: 13px/1.5 system-ui, sans-serif }
.scale { display: inline-block; width: 16rem; height: 1em; vertical-align: middle; background: linear-gradient(to right, STOPS) }
</style>
<h1>TITLE</h1>
<p>Weight in the loss: 0 <span class="scale"></span> 1.6.
Underlined <b class="REASONING">blue</b>: reasoning, <b class="ACTION">dark red</b>: action, <b class="FORMAT">gray</b>: format.
<s>Gray text</s> was not sampled: prompts and tool responses, never in the loss. Point at a token for its class, weight, energy and
entropy under the reference.</p>
BODY
</html>
"""


def draw_tokens(path: Path, title: str, transcript: list[tuple[str, int | None]], weights: list[float], columns: int = 128) -> None:
    """One transcript as a picture: sampled tokens in boxes, the rest in gray without its line ends. The long instructions
    before the first turn are left out."""
    boxes, x, y = [], 0.0, 0  # (text, weight or None, x, y)
    for n, (text, position) in enumerate(transcript):
        if position is None:  # of the first piece, what follows the instructions
            lines = text.strip().splitlines()
            lines = lines[next((i for i in reversed(range(len(lines))) if "user" in lines[i]), 0) :] if n == 0 else lines
            lines = textwrap.wrap("⏎".join(lines), columns, drop_whitespace=False)
            y += bool(x)
            boxes += [(line, None, 0.0, y + i) for i, line in enumerate(lines)]
            x, y = 0.0, y + len(lines)
            continue
        shown = text.replace("\n", "⏎")
        width = 1.06 * len(shown) + 0.7
        if x + width > columns:
            x, y = 0.0, y + 1
        boxes.append((shown, weights[position], x, y))
        x += width
    figure = Figure(figsize=(13, 0.9 + 0.235 * (y + 1)), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, columns + 1), ylim=(y + 0.8, -0.8), title=title)
    axes.axis("off")
    for text, weight, left, line in boxes:
        style = {"family": "monospace", "fontsize": 9, "va": "center"}
        text = text.replace("$", r"\$")
        if weight is None:
            axes.text(left, line, text, color="dimgray", **style)
        else:
            box = {"boxstyle": "square,pad=0.2", "facecolor": COLORS(SCALE(weight)), "edgecolor": "white"}
            axes.text(left, line, text, color="white" if weight > 1.1 else "black", bbox=box, **style)
    shrink = min(1, 6 / (1 + 0.235 * y))
    figure.colorbar(ScalarMappable(SCALE, COLORS), ax=axes, label="weight in the loss", shrink=shrink, aspect=30)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    diagnose(parse(DiagnoseConfig, __doc__.partition("\n")[0]))
