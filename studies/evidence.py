"""The pictures and tables of evidence.md that compare.py does not make, from the logs that it left:

python -m studies.evidence
"""

import csv
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from arms import ARMS
from studies.diagnose import spearman_test
from studies.gradient_signal import WEIGHTINGS
from studies.stats import T_975, measures, t_interval
from support.config import ActFocusConfig
from support.logs import column

# comparisons of ten iterations from a committed start
COMPARED = (
    *("compare", "ablations", "seeds-*", "planned/*", "weights/*"),
    # not in the setting that the signal was measured in
    *("rate-sudoku", "rate-sokoban", "filter", "batch128"),
)

RESULTS = Path(__file__).parents[1] / "results"
MARKERS = "osD^v"
DOSE_SEEDS = 4
# signal.png tells the last two apart by their place
COLORS = {name: arm.color for name, arm in WEIGHTINGS.items()}
COLORS |= {"actfocus-beta2": "darkred", "no-reasoning": "black"}
SHOWN = {"final": "evaluation success after the run, %", "training": "mean training success, %"}


def by_seed(folder: Path) -> dict[tuple[str, float, int], dict[str, float]]:
    """What was measured of each run of a comparison, by arm, learning rate and seed."""
    with (folder / "compare.csv").open(newline="", encoding="utf-8") as file:
        keys = {(row["arm"], float(row["lr"]), int(row["seed"])) for row in csv.DictReader(file)}
    found = {}
    for arm, lr, seed in sorted(keys):
        named = folder / "frozenlake" / f"{arm}-seed{seed}"  # at the default rate
        if not named.exists():
            named = folder / "frozenlake" / f"{arm}-lr{lr:g}-seed{seed}"
        log = named / f"{arm}.csv"
        found[arm, lr, seed] = measures(log, threshold=0.5)
    return found


def draw_rates(folder: Path) -> None:
    """rate.png: both arms at each learning rate, a dot a seed, the mean with its 95 % interval."""
    found = by_seed(folder)
    arms = sorted({arm for arm, _, _ in found}, key=list(ARMS).index)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, 2), SHOWN.items(), strict=True):
        for i, arm in enumerate(arms):
            rates = sorted({lr for each, lr, _ in found if each == arm})
            values = np.array(
                [[run[name] for key, run in found.items() if key[:2] == (arm, lr)] for lr in rates]
            )  # (rates, seeds)
            x = np.array(rates) * 1.04 ** (2 * i - len(arms) + 1)  # side by side
            half = [t_interval(seeds) for seeds in values]
            style = {"color": ARMS[arm].color, "label": ARMS[arm].label}
            axes.errorbar(x, values.mean(1), half, fmt="o-", capsize=3, **style)
            axes.plot(x, values, "_", color=ARMS[arm].color, alpha=0.7)
        axes.set(xscale="log", xlabel="learning rate (Adam)", ylabel=label)
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(
        "FrozenLake, 16 iterations of 64 rollouts: dashes are seeds, bars 95 % intervals"
    )
    figure.savefig(folder / "rate.png", dpi=110)


# ---------------------------------------------------------------------------- dose and response
class Dose(NamedTuple):
    """FrozenLake with some number of free sentences in a thought, on the same seeds."""

    thoughts: int
    share: float  # action tokens of the tokens generated in GRPO's first iteration, %
    gains: list[float]  # of ActFocus over GRPO in mean training success, points, by seed
    promised: list[float]  # gain in signal over noise before training: low, middle, high


def doses(folder: Path) -> list[Dose]:
    """By action share; the default start's runs are those of compare/, as many seeds of them."""
    sources = {6: (RESULTS / "compare", RESULTS / "signal/frozenlake")}
    for runs in folder.glob("thoughts*"):
        sources[int(runs.name.removeprefix("thoughts"))] = (runs, runs / "signal")
    found = []
    for thoughts, (runs, signal) in sources.items():
        logs = [
            [runs / f"frozenlake/{arm}-seed{seed}/{arm}.csv" for arm in ("grpo", "actfocus")]
            for seed in range(DOSE_SEEDS)
        ]
        training = [[measures(log, threshold=0.5)["training"] for log in pair] for pair in logs]
        shares = [column(grpo, "action_fraction")[1][0] for grpo, _ in logs]
        gains = [actfocus - grpo for grpo, actfocus in training]
        row = signal_row(signal, "actfocus")
        found.append(Dose(thoughts, 100 * float(np.mean(shares)), gains, row))
    return sorted(found, key=lambda dose: dose.share)


def draw_doses(found: list[Dose], path: Path) -> None:
    """What signal over noise promised at each action share, and what ActFocus gained."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    promised, gained = figure.subplots(1, 2)
    x, style = [dose.share for dose in found], {"fmt": "o-", "capsize": 3}
    low, middle, high = np.array([dose.promised for dose in found]).T  # (doses,) each
    promised.errorbar(x, middle, [middle - low, high - middle], color="black", **style)
    means = [np.mean(dose.gains) for dose in found]
    half = [t_interval(dose.gains) for dose in found]
    gained.errorbar(x, means, half, color=ARMS["actfocus"].color, **style)
    gained.plot(x, [dose.gains for dose in found], "_", color=ARMS["actfocus"].color, alpha=0.7)
    promised.set_ylabel("ActFocus's signal / noise before training, less GRPO's")
    gained.set_ylabel("ActFocus's mean training success less GRPO's, points")
    for axes in (promised, gained):
        axes.set_xlabel("action tokens, % (free sentences in a thought)")
        axes.set_xticks(x, [f"{dose.share:.0f} ({dose.thoughts})" for dose in found])
        axes.axhline(0, color="black", linewidth=0.8)
        axes.grid(alpha=0.3)
    figure.suptitle(f"FrozenLake: dashes are the {DOSE_SEEDS} seeds, bars 95 % intervals")
    figure.savefig(path, dpi=110)


def describe_doses(found: list[Dose]) -> str:
    """A row a dose, and how the gain changes with the action share: a line through the means, since
    starts differ by more than their share."""
    lines = ["free sentences  action tokens  promised  gained, points"]
    for thoughts, share, gains, (_, promised, _) in found:
        lines.append(f"{thoughts:14} {share:13.1f}% {promised:+9.3f}  {with_interval(gains)}")
    x, y = np.array([(dose.share, np.mean(dose.gains)) for dose in found]).T
    line = np.polyfit(x, y, 1)
    freedom = len(x) - 2
    error = np.sqrt(
        np.square(y - np.polyval(line, x)).sum() / freedom / np.square(x - x.mean()).sum()
    )
    change, half = np.array([line[0], T_975[freedom - 1] * error]) * (x.max() - x.min())
    lines.append(
        f"from the least share to the largest, by a line: {change:+.1f} ± {half:.1f} points "
        f"({len(x)} starts)"
    )
    return "\n".join(lines)


# ------------------------------------------------------------------- signal over noise, and gains
class Pair(NamedTuple):
    """A way of weighing tokens, and GRPO on the same prompts."""

    env: str
    weighting: str  # of WEIGHTINGS
    setting: str  # if not the world's own: learning rate, filter, prompts
    ratio: list[float]  # gain in signal over noise before training: low, middle, high
    gains: list[float]  # in mean training success, points, by seed


def trained_pairs() -> list[Pair]:
    """Of the runs in COMPARED, each weighting that the diagnosis of its world has too."""
    training = defaultdict(dict)  # by world, weighting and setting: seeds
    cells = (
        path for name in COMPARED for path in RESULTS.glob(f"{name}/*/*-seed*[0-9]/config.json")
    )
    for path in cells:
        config = json.loads(path.read_text())
        log = path.with_name(f"{config['arms']}.csv")
        success = measures(log, threshold=0.5)["training"]
        training[config["env"], weighting(config), setting(config)][config["seed"]] = success
    pairs = []
    for (env, name, how), runs in sorted(training.items()):
        ratio = signal_row(RESULTS / "signal" / env, name)
        if ratio and name != "grpo":
            gains = [runs[seed] - training[env, "grpo", how][seed] for seed in sorted(runs)]
            pairs.append(Pair(env, name, how, ratio, gains))
    return pairs


def setting(config: dict) -> str:
    """What a run had other than its world's own, but for weights and seeds; "" for nothing."""
    usual = ActFocusConfig(env=config["env"])
    usual.resolve()
    names = ("lr", "keep_groups", "prompts", "minibatch")
    return ", ".join(f"{n} {config[n]:g}" for n in names if config[n] != getattr(usual, n))


def signal_row(folder: Path, name: str) -> list[float]:
    """A weighting's gain in signal over noise, as a diagnosis has it: low, middle, high; [] if it
    does not have it."""
    with (folder / "signal.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["name"] == name]
    return [float(row[f"adam_gain{end}"]) for row in rows for end in ("_low", "", "_high")]


def weighting(config: dict) -> str:
    """Its name in WEIGHTINGS; "" if it is not there."""
    asked = {name: config[name] for name in ("arms", "alpha", "beta", "signal")}
    (arm,) = ActFocusConfig(**asked).chosen_arms().values()
    for name, each in WEIGHTINGS.items():
        if replace(each, label=arm.label, color=arm.color) == arm:
            return name
    return ""


def draw_pairs(pairs: list[Pair]) -> None:
    """pairs.png: what signal over noise promised each pair before training, and what it gained."""
    worlds = sorted({pair.env for pair in pairs})
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    for pair in pairs:
        (low, x, high), y = pair.ratio, np.mean(pair.gains)
        color = COLORS[pair.weighting]
        marker = MARKERS[worlds.index(pair.env)]
        axes.errorbar(
            x, y, yerr=t_interval(pair.gains), xerr=[[x - low], [high - x]], fmt=marker,
            color=color, elinewidth=0.7, capsize=2, markersize=8,
            markerfacecolor="white" if pair.setting else color,
        )  # fmt: skip
    handles = [
        Line2D([], [], color="black", marker=marker, linestyle="", label=world)
        for world, marker in zip(worlds, MARKERS, strict=False)
    ]
    for name in sorted({pair.weighting for pair in pairs}):
        style = {"color": COLORS[name], "marker": "o", "linestyle": ""}
        handles.append(Line2D([], [], label=WEIGHTINGS[name].label, **style))
    style = {"color": "black", "marker": "o", "linestyle": "", "markerfacecolor": "white"}
    handles.append(Line2D([], [], label="at another rate or batch, or filtered", **style))
    axes.legend(handles=handles, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    axes.set(
        xlabel="signal / noise of the gradient before training, less GRPO's\n"
        "(32 rollouts, as Adam sees it)",
        ylabel="mean training success less GRPO's, points",
        title=f"{len(pairs)} pairs, ten iterations: bars are 95 % intervals",
    )
    axes.set_xscale("symlog", linthresh=0.02)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(alpha=0.3)
    figure.savefig(RESULTS / "pairs.png", dpi=110)


def describe_pairs(pairs: list[Pair]) -> str:
    """A row a pair, and the rank correlation: of all, and of some."""
    lines = ["world                weighting           promised  gained, points"]
    for env, name, how, (_, promised, _), gains in pairs:
        gained = f"{with_interval(gains)} ({len(gains)} seeds)"
        lines.append(f"{env:20} {name:18} {promised:+9.3f}  {gained}  {how}".rstrip())
    chosen = {
        "all": pairs,
        "without Sudoku": [pair for pair in pairs if pair.env != "sudoku"],
        "in the world's own setting": [pair for pair in pairs if not pair.setting],
    }
    for title, some in chosen.items():
        promised = np.array([pair.ratio[1] for pair in some])
        gained = np.array([np.mean(pair.gains) for pair in some])
        test = spearman_test(promised, gained, np.random.default_rng(0))
        lines.append(
            f"{title}: rank correlation {test.rho:+.2f} [{test.low:+.2f}, {test.high:+.2f}], "
            f"p = {test.p:.4f}, {len(some)} pairs"
        )
    return "\n".join(lines)


# --------------------------------------------------------------------------------- the reasoning
REASONED = ("compare", "ablations", "long", "seeds-sudoku", "seeds-sokoban", "seeds-shop")
REASONING = {  # title: column of the log, factor, decimals
    "true facts, %": ("reasoning_accuracy", 100, 1),
    "turns without a fact, %": ("turns_without_facts", 100, 2),
    "tokens a rollout": ("response_tokens", 1, 0),
    "entropy, nats": ("entropy", 1, 3),
}


def describe_reasoning() -> str:
    """What the arms' reasoning is like in a run's last two iterations, over its seeds."""
    lines = [
        f"{'':26} {'start':>6} {'GRPO':>6} {'ActFocus':>8}   {'less GRPO':14} "
        "silence blamed, less ActFocus"
    ]
    for folder in (path for name in REASONED for path in sorted(RESULTS.glob(f"{name}/*/"))):
        lines.append(f"{folder.relative_to(RESULTS)}")
        for title, (name, factor, digits) in REASONING.items():
            start = over_rows(folder, "grpo", name, slice(1), factor)
            grpo, focus, blame = (
                over_rows(folder, arm, name, slice(-2, None), factor)
                for arm in ("grpo", "actfocus", "blame")
            )
            a, b, c = (np.mean([*runs.values()]) for runs in (start, grpo, focus))
            means = f"{a:6.{digits}f} {b:6.{digits}f} {c:8.{digits}f}"
            gain = with_interval([focus[seed] - grpo[seed] for seed in focus], digits)
            more = [blame[seed] - focus[seed] for seed in blame]
            line = f"  {title:24} {means}   {gain:14} {with_interval(more, digits) if more else ''}"
            lines.append(line.rstrip())
    return "\n".join(lines)


def over_rows(folder: Path, arm: str, name: str, rows: slice, factor: float) -> dict[str, float]:
    """By seed, the mean of some rows of a column of an arm's logs."""
    logs = sorted(folder.glob(f"{arm}-seed*[0-9]/{arm}.csv"))
    means = [factor * np.mean(column(log, name)[1][rows]) for log in logs]
    return {log.parent.name.rpartition("-")[2]: mean for log, mean in zip(logs, means, strict=True)}


def with_interval(values: list[float], digits: int = 1) -> str:
    """The mean, with its sign, and half its 95 % interval."""
    return f"{np.mean(values):+.{digits}f} ± {t_interval(values):.{digits}f}"


if __name__ == "__main__":
    draw_rates(RESULTS / "rate")
    pairs, dosed = trained_pairs(), doses(RESULTS / "dose")
    draw_pairs(pairs)
    draw_doses(dosed, RESULTS / "dose" / "dose.png")
    print(describe_pairs(pairs), describe_doses(dosed), sep="\n\n")
    reasoning = describe_reasoning()
    (RESULTS / "reasoning.txt").write_text(f"{reasoning}\n", encoding="utf-8")
    print(f"\n{reasoning}")
