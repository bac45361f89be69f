"""Every figure that results/ makes from results/data. `python -m studies.evidence` draws them all.

Lines are means over seeds. From five seeds on, a shaded band is the 95 % interval of the mean, no
wider than what is possible; of fewer seeds an interval says little, so the seeds themselves are
drawn as faint lines. Every line has its name at its end, and GRPO lies in front of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import offset_copy

from arms import ARMS
from studies.data import DATA, FIGURES, Run, diagnoses, read_settings, read_table, runs_of
from studies.larger_step import SEEDS_FOR_INTERVAL, Speed, speed_rows, start_rows
from studies.larger_step import WORLDS as LARGER_STEP_WORLDS
from studies.pairs import Pair, doses, trained_pairs
from studies.stats import share_interval, t_interval
from studies.tables import Comparison, arms_of, others, state_rows

Curve = tuple[Sequence[int], Sequence[float]]  # iterations, values

COLORS = {arm.label: arm.color for arm in ARMS.values()}
COLORS |= {"GRPO": "dimgray", ARMS["blame"].label: "darkgoldenrod"}  # to be read on white
WORLDS = {  # name, color
    "frozenlake": ("FrozenLake", "tab:blue"),
    "frozenlake-planned": ("planned", "tab:green"),
    "sudoku": ("Sudoku", "tab:red"),
    "sokoban": ("Sokoban", "tab:brown"),
    "shop": ("shop", "tab:purple"),
}
BAND_FROM = 5  # seeds

SUCCESS = ("eval_success", "evaluation success, %")
TRAINING = ("train_success", "success of training rollouts, %")
FACTS = ("reasoning_accuracy", "true facts in the reasoning, %")
ENTROPY = ("entropy", "nats a generated token")


def draw_all() -> None:
    """Write every figure to results/figures."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    draw_frozenlake()
    draw_sudoku()
    draw_long()
    draw_earlier()
    draw_smollm2()
    draw_rates()
    if speed_rows():
        draw_speed()
    if start_rows():
        draw_starts()
    draw_others()
    draw_pairs()
    draw_doses()
    draw_signal()
    draw_bottleneck("action-bottleneck/sokoban-committed", "committed", "bottleneck-sokoban.png")
    draw_bottleneck("action-bottleneck/sokoban", "earlier", "bottleneck-sokoban-earlier.png")
    if any(row.tokens == "first turn" for row in state_rows()):
        draw_states()
    draw_growth()


# ------------------------------------------------------------------------ curves over iterations
class Panel(NamedTuple):
    """What one pair of axes shows: a column of the logs over the iterations of training."""

    title: str
    comparison: Comparison
    column: str
    label: str  # of the y axis
    limits: tuple[float, float]  # of the y axis


def draw_frozenlake() -> None:
    groups = arms_of("compare", names=("grpo", "actfocus", "placebo"))
    critic = arms_of("compare", names=("ppo", "ppo-actfocus"))
    figure, axes = new_figure(3, "FrozenLake, eight seeds: means and their 95 % intervals")
    draw_panel(axes[0], Panel("GRPO: advantages from groups", groups, *SUCCESS, (30, 65)))
    draw_panel(axes[1], Panel("PPO: advantages from a critic", critic, *SUCCESS, (30, 65)))
    lead = {
        "on GRPO": less(groups["ActFocus"], groups["GRPO"], "eval_success"),
        "on PPO": less(critic["PPO, ActFocus"], critic["PPO"], "eval_success"),
    }
    axes[2].set(title="ActFocus's lead, seed by seed", ylabel="points of evaluation success")
    axes[2].axhline(0, color="black", linewidth=0.8)
    colors = {"on GRPO": ARMS["actfocus"].color, "on PPO": ARMS["ppo-actfocus"].color}
    draw_curves(axes[2], lead, colors, (-12, 20), bounds=(-100, 100))
    figure.savefig(FIGURES / "frozenlake.png", dpi=110)


def draw_sudoku() -> None:
    where = arms_of("seeds-sudoku", names=("grpo", "actfocus", "placebo"))
    halves = arms_of("seeds-sudoku", names=("grpo", "actfocus", "discount", "energy"))
    figure, axes = new_figure(3, "Sudoku: means of four seeds; the seeds are faint")
    draw_panel(axes[0], Panel("Evaluation", where, *SUCCESS, (0, 103)))
    draw_panel(axes[1], Panel("Training", where, *TRAINING, (0, 103)))
    draw_panel(axes[2], Panel("Training: the parts of ActFocus", halves, *TRAINING, (0, 103)))
    figure.savefig(FIGURES / "sudoku.png", dpi=110)


def draw_long() -> None:
    arms = arms_of("long", names=("grpo", "actfocus"))
    title = "FrozenLake, a hundred iterations: means of three seeds; the seeds are faint"
    figure, axes = new_figure(3, title)
    draw_panel(axes[0], Panel("Evaluation", arms, *SUCCESS, (0, 80)))
    draw_panel(axes[1], Panel("Training, means of five iterations", arms, *TRAINING, (0, 80)), 5)
    draw_panel(axes[2], Panel("Reasoning, means of five iterations", arms, *FACTS, (60, 100)), 5)
    figure.savefig(FIGURES / "long.png", dpi=110)


def draw_earlier() -> None:
    """Both arms from the earlier starts, in FrozenLake and in Sudoku."""
    arms = {
        "GRPO": runs_of("earlier-starts", env="frozenlake", arm="grpo"),
        "ActFocus": runs_of("earlier-starts", env="frozenlake", arm="actfocus"),
    }
    title = "FrozenLake from an earlier start: means of three seeds; the seeds are faint"
    figure, axes = new_figure(3, title)
    draw_panel(axes[0], Panel("Evaluation", arms, *SUCCESS, (0, 80)))
    draw_panel(axes[1], Panel("Training", arms, *TRAINING, (0, 80)))
    draw_panel(axes[2], Panel("Reasoning", arms, *FACTS, (40, 100)))
    figure.savefig(FIGURES / "earlier-frozenlake.png", dpi=110)
    arms = {
        "GRPO": runs_of("earlier-starts", env="sudoku", arm="grpo"),
        "ActFocus": runs_of("earlier-starts", env="sudoku", arm="actfocus"),
        "ActFocus, silence blamed": runs_of("earlier-starts/blame"),
    }
    title = "Sudoku from an earlier start: means of two seeds; the seeds are faint"
    figure, axes = new_figure(3, title)
    draw_panel(axes[0], Panel("Evaluation", arms, *SUCCESS, (0, 103)))
    draw_panel(axes[1], Panel("Reasoning", arms, *FACTS, (40, 103)))
    draw_panel(axes[2], Panel("Entropy", arms, *ENTROPY, (0, 0.35)))
    figure.savefig(FIGURES / "earlier-sudoku.png", dpi=110)


def draw_smollm2() -> None:
    """Single runs. A bar is the standard error of an evaluation, over its episodes."""
    figure, axes = new_figure(2, "SmolLM2-135M in FrozenLake: one run of each arm from two starts")
    first, second = (smollm2(name, "frozenlake") for name in ("smollm2", "smollm2-seeds"))
    draw_panel(axes[0], Panel("First start, 32 episodes", first, *SUCCESS, (0, 100)))
    draw_panel(axes[1], Panel("Second start, 64 episodes", second, *SUCCESS, (0, 100)))
    for panel, arms in zip(axes, (first, second), strict=True):
        draw_standard_errors(panel, arms)
        panel.set_xlim(-0.5, 8.2)
    figure.savefig(FIGURES / "smollm2-frozenlake.png", dpi=110)

    arms = smollm2("smollm2", "sokoban")
    figure, axes = new_figure(2, "SmolLM2-135M in Sokoban, one run of each arm")
    draw_panel(axes[0], Panel("Evaluation, 32 episodes", arms, *SUCCESS, (0, 60)))
    draw_panel(axes[1], Panel("Training, 16 rollouts an iteration", arms, *TRAINING, (0, 60)))
    draw_standard_errors(axes[0], arms)
    figure.savefig(FIGURES / "smollm2-sokoban.png", dpi=110)


def smollm2(experiment: str, env: str) -> Comparison:
    """Both arms of SmolLM2 in a world, from the start that an experiment has."""
    arms = ("grpo", "actfocus")
    return {ARMS[arm].label: runs_of(experiment, env=env, arm=arm) for arm in arms}


def draw_standard_errors(axes: Axes, arms: Comparison) -> None:
    """A bar at each evaluation of the first run of each arm."""
    for label, runs in arms.items():
        run = next(iter(runs.values()))
        iterations, success = run.column("eval_success")
        error = 100 * np.array(run.column("eval_stderr")[1])
        success = 100 * np.array(success)
        bars = [np.minimum(error, success), np.minimum(error, 100 - success)]
        axes.errorbar(
            iterations, success, bars, fmt="none", color=COLORS[label], capsize=3, alpha=0.7
        )


def less(runs: Mapping[int, Run], others: Mapping[int, Run], column: str) -> list[Curve]:
    """A curve a seed: a share in one arm's run less that in another's, in points."""
    curves = []
    for seed, run in runs.items():
        iterations, values = run.column(column)
        curves.append((iterations, 100 * np.subtract(values, others[seed].column(column)[1])))
    return curves


def new_figure(panels: int, title: str) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(4.7 * panels, 3.9), layout="constrained")
    figure.suptitle(title)
    figure.get_layout_engine().set(w_pad=0.1)
    return figure, figure.subplots(1, panels)


def draw_panel(axes: Axes, panel: Panel, smooth: int = 1) -> None:
    """The curves of a panel. smooth: an odd number of iterations that each point is the mean of."""
    factor = 1 if panel.column == "entropy" else 100
    side = smooth // 2
    curves: dict[str, list[Curve]] = {}
    for label, runs in panel.comparison.items():
        curves[label] = []
        for run in runs.values():
            iterations, values = run.column(panel.column)
            means = factor * np.convolve(values, np.full(smooth, 1 / smooth), "valid")
            curves[label].append((iterations[side : len(iterations) - side], means))
    axes.set(title=panel.title, ylabel=panel.label)
    draw_curves(axes, curves, COLORS, panel.limits, bounds=(0, factor))


def draw_curves(
    axes: Axes,
    curves: Mapping[str, list[Curve]],
    colors: Mapping[str, str],
    limits: tuple[float, float],
    bounds: tuple[float, float],
) -> None:
    """The mean of each set of curves with its name, and its interval or its seeds.

    curves: by name, a curve for each seed, all of the same iterations. limits: of the y axis.
    bounds: what is possible, which an interval does not leave.
    """
    ends = []
    for label, seeds in curves.items():
        iterations = seeds[0][0]
        values = np.array([curve for _, curve in seeds])  # (seeds, iterations)
        mean = values.mean(axis=0)
        color = colors[label]
        front = 4 if label == "GRPO" else 3
        marker = "o" if len(iterations) < 12 else None
        style = {"color": color, "linewidth": 2, "marker": marker, "markersize": 4}
        axes.plot(iterations, mean, zorder=front, **style)
        if len(values) >= BAND_FROM:
            half = np.array([t_interval(each) for each in values.T])
            low, high = np.clip([mean - half, mean + half], *bounds)
            axes.fill_between(iterations, low, high, color=color, alpha=0.13, linewidth=0)
        elif len(values) > 1:
            axes.plot(iterations, values.T, color=color, linewidth=0.8, alpha=0.4, zorder=2)
        ends.append((float(mean[-1]), iterations[-1], label, color))
    axes.set_ylim(limits)
    axes.set_xlabel("training iterations")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    plain(axes)
    name_ends(axes, ends)


def name_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names beside the ends of lines, moved apart where they would overlap; a thin line leads
    from each to its end. ends: y, x, name, color."""
    low, high = axes.get_ylim()
    line = 0.07 * (high - low)  # the height of a line of text, with some air
    ordered = sorted(ends)
    heights: list[float] = []
    for i, (height, _, label, _) in enumerate(ordered):
        if i > 0:
            lines = 2 + label.count(", ") + ordered[i - 1][2].count(", ")  # of both names
            height = max(height, heights[-1] + line * lines / 2)
        heights.append(height)
    moved = np.mean(heights) - np.mean([height for height, *_ in ordered])
    moved = max(moved, heights[-1] - high)  # none stands above the axes
    beside = offset_copy(axes.transData, axes.figure, x=14, units="points")
    for height, (end, x, label, color) in zip(heights, ordered, strict=True):
        axes.annotate(
            label.replace(", ", ",\n"),
            (x, end),
            xytext=(x, height - moved),
            textcoords=beside,
            color=color,
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 1},
            annotation_clip=False,
        )


def plain(axes: Axes, grid: str = "both") -> None:
    axes.grid(alpha=0.25, linewidth=0.6, axis=grid)
    axes.spines[["top", "right"]].set_visible(False)


# ---------------------------------------------------------------------------------- learning rates
def draw_rates() -> None:
    """Mean evaluation success of both arms at each learning rate, and ActFocus's lead."""
    frozenlake = {lr: rated("rate", lr) for lr in (3e-5, 1e-4, 3e-4, 1e-3)}
    sudoku = {
        1e-4: rated("rate-sudoku", 1e-4),
        3e-4: rated("seeds-sudoku", 3e-4),
        1e-3: rated("rate-sudoku", 1e-3),
    }
    title = "Mean evaluation success (area) by learning rate: dots are seeds, lines their means"
    figure, axes = new_figure(3, title)
    draw_by_rate(axes[0], frozenlake, "FrozenLake, 16 iterations")
    draw_by_rate(axes[1], sudoku, "Sudoku, 10 iterations")
    axes[0].set_ylim(30, 60)
    axes[1].set_ylim(30, 100)
    axes[2].set(title="ActFocus less GRPO, ± 95 % interval", ylabel="points")
    axes[2].axhline(0, color="black", linewidth=0.8)
    for place, (name, color, found) in enumerate(
        (("FrozenLake", WORLDS["frozenlake"][1], frozenlake), ("Sudoku", "tab:red", sudoku))
    ):
        gains = [
            [actfocus - grpo for grpo, actfocus in zip(*areas, strict=True)]
            for areas in found.values()
        ]
        x = np.array(list(found)) * 1.06 ** (2 * place - 1)  # side by side
        y = np.array([np.mean(each) for each in gains])
        axes[2].errorbar(
            x, y, [t_interval(each) for each in gains], fmt="o", color=color, capsize=3
        )
        axes[2].annotate(
            name, (x[0], y[0]), xytext=(-8, 0), textcoords="offset points",
            color=color, ha="right", va="center", fontsize=9,
        )  # fmt: skip
    rates_axis(axes[2], list(frozenlake))
    axes[2].set_xlim(0.8e-5, 1.6e-3)
    figure.savefig(FIGURES / "rate.png", dpi=110)


def rated(experiment: str, lr: float) -> tuple[list[float], list[float]]:
    """Mean evaluation success of GRPO's and of ActFocus's runs, on the seeds that both have."""
    grpo, actfocus = (runs_of(experiment, arm=arm, lr=lr) for arm in ("grpo", "actfocus"))
    seeds = [seed for seed in grpo if seed in actfocus]
    return tuple([runs[seed].measures()["area"] for seed in seeds] for runs in (grpo, actfocus))


def draw_by_rate(axes: Axes, found: Mapping[float, tuple], title: str) -> None:
    rates = list(found)
    ends = []
    for i, label in enumerate(("GRPO", "ActFocus")):
        color = COLORS[label]
        x = np.array(rates) * 1.05 ** (2 * i - 1)  # side by side
        means = [np.mean(found[lr][i]) for lr in rates]
        axes.plot(x, means, "-", color=color, linewidth=2)
        for place, lr in zip(x, rates, strict=True):
            seeds = found[lr][i]
            axes.plot([place] * len(seeds), seeds, "o", color=color, markersize=4, alpha=0.6)
        ends.append((means[-1], rates[-1] * 1.12, label, color))
    axes.set(title=title, ylabel="mean evaluation success, %")
    rates_axis(axes, rates)
    name_ends(axes, ends)


def draw_speed() -> None:
    """A point for each arm and rate: how fast it learns, beside how many of its runs fall and how
    far an update moves its reasoning."""
    rows = speed_rows()
    worlds = [env for env in LARGER_STEP_WORLDS if any(row.env == env for row in rows)]
    figure = Figure(figsize=(11, 4.2 * len(worlds)), layout="constrained")
    figure.suptitle(
        "Each arm at each learning rate: means over seeds with 95 % intervals; of the KL, the "
        "least and the largest"
    )
    for (falls, moves), env in zip(figure.subplots(len(worlds), 2, squeeze=False), worlds,
                                   strict=True):  # fmt: skip
        for arm in ("discount", "actfocus", "grpo"):
            here = [row for row in rows if (row.env, row.arm) == (env, arm)]
            draw_speeds(falls, here, [falling(row) for row in here])
            draw_speeds(moves, here, [moving(row) for row in here])
        falls.set(title=f"{WORLDS[env][0]}: speed and stability", ylim=(-4, 104))
        falls.set(ylabel="runs that end ten points below their best, %")
        moves.set(title=f"{WORLDS[env][0]}: what the updates move", yscale="log")
        moves.set(ylabel="KL of reasoning, nats a token and iteration")
        for axes in (falls, moves):
            axes.set(xlabel="mean evaluation success (area), %")
            axes.margins(x=0.15)
            plain(axes)
    figure.savefig(FIGURES / "speed.png", dpi=110)


def falling(row: Speed) -> tuple[float, float, float]:
    """The share of the runs that fall, in percent, and its interval: low, value, high."""
    low, high = share_interval(row.fallen, len(row.runs))
    return 100 * low, 100 * row.fallen / len(row.runs), 100 * high


def moving(row: Speed) -> tuple[float, float, float]:
    """The KL of reasoning: its geometric mean over seeds between the least and the largest."""
    values = row.values("kl_reasoning")
    return min(values), float(np.exp(np.mean(np.log(values)))), max(values)


def draw_speeds(
    axes: Axes, rows: Sequence[Speed], heights: Sequence[tuple[float, float, float]]
) -> None:
    """The points of one arm, joined in the order of their rates, each with its rate. heights: low,
    value, high."""
    if not rows:
        return
    label = ARMS[rows[0].arm].label
    color = COLORS[label]
    x = [float(np.mean(row.values("area"))) for row in rows]
    axes.plot(x, [middle for _, middle, _ in heights], color=color, linewidth=1, alpha=0.5)
    for row, across, (low, middle, high) in zip(rows, x, heights, strict=True):
        half = t_interval(row.values("area")) if len(row.runs) >= SEEDS_FOR_INTERVAL else 0
        bars = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
        sides = [[min(half, across)], [min(half, 100 - across)]]
        axes.errorbar(
            across, middle, yerr=bars, xerr=sides, fmt="o", color=color, capsize=2, elinewidth=0.8
        )  # fmt: skip
        axes.annotate(
            f"{label}\n{row.lr:g}", (across, middle), textcoords="offset points",
            xytext=(-5 if row.arm == "grpo" else 5, 5), ha="right" if row.arm == "grpo" else "left",
            color=color, fontsize=8,
        )  # fmt: skip


def draw_others() -> None:
    """What each arm gained over GRPO in training: a dot for each seed, and the mean. A world has a
    panel once all arms have run in it; without one, nothing is drawn."""
    worlds = {env: found for env in LARGER_STEP_WORLDS if (found := others(env))}
    if not worlds:
        return
    figure = Figure(figsize=(1.5 + 4.7 * len(worlds), 3.9), layout="constrained")
    figure.suptitle("Training success less GRPO's; small dots are seeds, bars 95 %")
    panels = figure.subplots(1, len(worlds), squeeze=False)[0]
    for axes, (env, comparison) in zip(panels, worlds.items(), strict=True):
        grpo = comparison.pop("GRPO")
        for y, (label, runs) in enumerate(comparison.items()):
            gains = [
                run.measures()["training"] - grpo[seed].measures()["training"]
                for seed, run in runs.items()
            ]
            axes.errorbar(
                np.mean(gains), y, xerr=t_interval(gains), fmt="o", color=COLORS[label], capsize=3
            )
            axes.plot(gains, [y + 0.25] * len(gains), "o", color=COLORS[label], ms=3, alpha=0.5)
        axes.axvline(0, color="dimgray", linewidth=1.2)
        axes.set_yticks(range(len(comparison)), list(comparison))
        axes.set(title=WORLDS[env][0], xlabel="points", ylim=(len(comparison) - 0.4, -0.6))
        plain(axes, grid="x")
    figure.savefig(FIGURES / "arms.png", dpi=110)


def draw_starts() -> None:
    """ActFocus's gain from each start, and the mean over starts."""
    rows = start_rows()
    worlds = [env for env in LARGER_STEP_WORLDS if any(row.env == env for row in rows)]
    color = ARMS["actfocus"].color
    figure = Figure(figsize=(1.5 + 4.7 * len(worlds), 4.2), layout="constrained")
    figure.suptitle("ActFocus less GRPO from several starts; small dots are seeds")
    panels = figure.subplots(1, len(worlds), squeeze=False)[0]
    for axes, env in zip(panels, worlds, strict=True):
        starts = [row for row in rows if row.env == env]
        means = [float(np.mean(row.gains["training"])) for row in starts]
        for x, row in enumerate(starts):
            gains = row.gains["training"]
            axes.plot([x] * len(gains), gains, "o", color=color, markersize=3, alpha=0.5)
            axes.plot(x, means[x], "_", color=color, markersize=18, markeredgewidth=2)
        last = len(starts)
        axes.errorbar(last, np.mean(means), t_interval(means), fmt="o", color="black", capsize=4)
        names = [*(f"start {x}" for x in range(last)), "mean\nover starts"]
        axes.set_xticks(range(last + 1), names)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(title=WORLDS[env][0], ylabel="training success less GRPO's, points")
        plain(axes, grid="y")
    figure.savefig(FIGURES / "starts.png", dpi=110)


def rates_axis(axes: Axes, rates: list[float]) -> None:
    axes.set(xscale="log", xlabel="learning rate (Adam)")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    plain(axes)


# ------------------------------------------------------------------------- promised, and gained
PAIR_RANGE = 36.0  # points; a longer bar is cut, and ends in an arrow


def draw_pairs() -> None:
    """A row for each pair, by what its signal over noise promised before training; beside it, what
    training gained. If a promise comes true, the dots at the right fall as those at the left do."""
    pairs = sorted(trained_pairs(), key=lambda pair: pair.promised[1], reverse=True)
    figure = Figure(figsize=(12, 0.3 * len(pairs) + 1.6), layout="constrained")
    promised, gained = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.2))
    for y, pair in enumerate(pairs):
        _, color = WORLDS[pair.env]
        low, middle, high = pair.promised
        style = {"color": color, "capsize": 2, "elinewidth": 1}
        promised.errorbar(middle, y, xerr=[[middle - low], [high - middle]], fmt="o", **style)
        draw_gain(gained, y, pair.gains, color)
    promised.set_yticks(range(len(pairs)), [name_of(pair) for pair in pairs], fontsize=9)
    for label, pair in zip(promised.get_yticklabels(), pairs, strict=True):
        label.set_color(WORLDS[pair.env][1])
    promised.set_ylim(len(pairs) - 0.4, -0.6)
    promised.set(title="Promised before training", xlabel="signal / noise, less GRPO's")
    gained.set(title="Gained in training", xlabel="mean training success less GRPO's, points")
    gained.set_xlim(-PAIR_RANGE, PAIR_RANGE)
    for axes in (promised, gained):
        axes.axvline(0, color="black", linewidth=0.8)
        plain(axes)
    figure.suptitle(f"{len(pairs)} pairs of a weighting and GRPO: bars are 95 % intervals")
    figure.savefig(FIGURES / "pairs.png", dpi=110)


def draw_gain(axes: Axes, y: float, gains: list[float], color: str) -> None:
    """A mean with its interval, cut at the end of the axis."""
    mean, half = np.mean(gains), t_interval(gains)
    low, high = np.clip([mean - half, mean + half], -PAIR_RANGE, PAIR_RANGE)
    style = {"color": color, "capsize": 2, "elinewidth": 1}
    axes.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", **style)
    for end, marker in ((low, "<"), (high, ">")):
        if abs(end) == PAIR_RANGE:
            axes.plot(end, y, marker, color=color, markersize=6, clip_on=False)


def name_of(pair: Pair) -> str:
    """A pair in words."""
    weightings = {
        "actfocus": "ActFocus",
        "actfocus-beta2": "beta 2",
        "no-reasoning": "alpha 0, beta 0",
        "discount": "discount alone",
        "energy": "energy alone",
        "entropy": "with entropy",
        "nll": "with policy NLL",
        "top-entropy": "top entropy",
        "low-prob": "unlikely tokens less",
        "span-placebo": "span placebo",
    }
    settings = {
        "": "",
        "keep_groups 0.25, prompts 32": ", filtered",
        "lr 0.0001, prompts 16, minibatch 32": ", 128 rollouts at 1e-4",
        "prompts 16, minibatch 32": ", 128 rollouts",
        "lr 0.0001": " at 1e-4",
        "lr 0.001": " at 1e-3",
    }
    name = weightings.get(pair.weighting, pair.weighting)
    return f"{WORLDS[pair.env][0]}: {name}{settings.get(pair.setting, pair.setting)}"


# ----------------------------------------------------------------------------- dose and response
def draw_doses() -> None:
    """What signal over noise promised at each action share, and what ActFocus gained."""
    found = doses()
    figure, (promised, gained) = new_figure(
        2, "FrozenLake, another start for each length of thought: 95 % intervals"
    )
    for dose in found:
        low, middle, high = dose.promised
        bars = [[middle - low], [high - middle]]
        promised.errorbar(dose.share, middle, bars, fmt="o", color="black", capsize=3)
        mean = np.mean(dose.gains)
        color = ARMS["actfocus"].color
        gained.errorbar(dose.share, mean, t_interval(dose.gains), fmt="o", color=color, capsize=3)
        beside = [dose.share + 0.45] * len(dose.gains)
        gained.plot(beside, dose.gains, "o", color=color, markersize=3, alpha=0.5)
    promised.set(title="Promised before training")
    promised.set_ylabel("ActFocus's signal / noise, less GRPO's")
    gained.set(title="Gained in training; small dots are seeds")
    gained.set_ylabel("training success less GRPO's, points")
    for axes in (promised, gained):
        axes.set(xlabel="action tokens, % (filler sentences in a thought)", xlim=(5, 30))
        axes.set_xticks(
            [dose.share for dose in found],
            [f"{dose.share:.0f}\n({dose.sentences})" for dose in found],
        )
        axes.axhline(0, color="black", linewidth=0.8)
        plain(axes)
    figure.savefig(FIGURES / "dose.png", dpi=110)


# -------------------------------------------------------------------------------------- diagnoses
SIGNAL_ROWS = {  # of signal.csv, from the top: name, color
    "reasoning": ("reasoning tokens alone", "tab:blue"),
    "action": ("action tokens alone", "tab:blue"),
    "format": ("format tokens alone", "tab:blue"),
    "grpo": ("GRPO", "dimgray"),
    "placebo": ("placebo", "tab:brown"),
    "energy": ("energy alone", "tab:purple"),
    "discount": ("discount alone", "tab:orange"),
    "actfocus": ("ActFocus", "tab:red"),
    "actfocus-beta2": ("ActFocus, beta 2", "tab:red"),
    "no-reasoning": ("alpha 0, beta 0", "tab:red"),
    "entropy": ("ActFocus with entropy", "tab:red"),
    "nll": ("ActFocus with policy NLL", "tab:red"),
    "entropy-beta2": ("with entropy, beta 2", "tab:red"),
}


def draw_signal() -> None:
    """Signal over noise of classes and weightings in FrozenLake, as Adam sees it and raw."""
    rows = {row["name"]: row for row in diagnoses("signal")["signal/frozenlake"]}
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    figure.suptitle("FrozenLake: signal / noise of the gradient of 32 rollouts, ± 95 % interval")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, scale, title in zip(panels, ("adam", "raw"), ("as Adam sees it", "raw"), strict=True):
        for y, (name, (_, color)) in enumerate(SIGNAL_ROWS.items()):
            low, value, high = (
                float(rows[name][f"{scale}_ratio{end}"]) for end in ("_low", "", "_high")
            )
            bars = [[value - low], [high - value]]
            axes.errorbar(value, y, xerr=bars, fmt="o", color=color, capsize=3)
        baseline = float(rows["grpo"][f"{scale}_ratio"])
        axes.axvline(baseline, color="dimgray", linestyle="--", linewidth=0.8)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.axhline(2.5, color="black", linewidth=0.8)
        axes.set(title=title, xlabel="signal / noise (dashed: GRPO)")
        plain(axes, grid="x")
    panels[0].set_yticks(range(len(SIGNAL_ROWS)), [label for label, _ in SIGNAL_ROWS.values()])
    panels[0].set_ylim(len(SIGNAL_ROWS) - 0.5, -0.5)
    figure.savefig(FIGURES / "signal.png", dpi=110)


TOKENS = {
    "action": "action tokens",
    "decision": "the deciding\naction token",
    "reasoning": "reasoning tokens",
    "all": "all tokens",
}


def draw_bottleneck(experiment: str, start: str, name: str) -> None:
    """A point for each group: energy against reward variance; beside it, all rank correlations of
    energy and of entropy."""
    groups = diagnoses("diagnosis_groups")[experiment]
    results = {(row["signal"], row["tokens"]): row for row in diagnoses("correlations")[experiment]}
    settings = read_settings()[groups[0]["settings"]]
    variance, success = (
        [float(group[column]) for group in groups] for column in ("reward_variance", "success")
    )
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    figure.suptitle(
        f"{WORLDS[settings['env']][0]}, {start} start: {len(groups)} groups of "
        f"{settings['group_size']} rollouts, success {np.mean(success):.0%}"
    )
    figure.get_layout_engine().set(w_pad=0.08)
    *panels, last = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.15))
    for axes, tokens in zip(panels, ("action", "reasoning", "all"), strict=True):
        energy = [float(group[f"energy_{tokens}"]) for group in groups]
        points = axes.scatter(energy, variance, c=success, cmap="viridis", vmin=0, vmax=1, s=16)
        row = results["energy", tokens]
        rho, low, high = (float(row[column]) for column in ("rho", "low", "high"))
        axes.set_title(f"{TOKENS[tokens]}\nρ = {rho:+.2f} [{low:+.2f}, {high:+.2f}]", fontsize=11)
        axes.set_xlabel("mean energy of the group")
        axes.locator_params(axis="x", nbins=4)
        plain(axes)
    panels[0].set_ylabel("variance of the group's rewards")
    figure.colorbar(points, ax=panels, label="success rate of the group", pad=0.01)
    draw_correlations(last, results)
    figure.savefig(FIGURES / name, dpi=110)


def draw_correlations(axes: Axes, results: Mapping[tuple[str, str], dict]) -> None:
    """A dot with its interval for each choice of tokens: of energy, and below it of entropy."""
    for y, tokens in enumerate(TOKENS):
        for signal, color, lower in (("energy", "tab:red", -0.12), ("entropy", "tab:blue", 0.12)):
            row = results[signal, tokens]
            rho, low, high = (float(row[column]) for column in ("rho", "low", "high"))
            bars = [[abs(rho - low)], [abs(high - rho)]]
            axes.errorbar(rho, y + lower, xerr=bars, fmt="o", color=color, capsize=3)
            if y == 0:
                axes.annotate(
                    signal, (rho, y + lower), xytext=(0, -11 if lower > 0 else 6),
                    textcoords="offset points", ha="center", color=color, fontsize=9,
                )  # fmt: skip
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(TOKENS)), TOKENS.values())
    axes.set(xlim=(-1, 1), ylim=(len(TOKENS) - 0.5, -0.6))
    axes.set(title="rank correlation with\nthe reward variance", xlabel="Spearman's ρ")
    axes.title.set_fontsize(11)
    plain(axes)


def draw_states() -> None:
    """Energy against the variance of rewards, within one state and over whole episodes: for each
    world three dots, the correlation and what is left of it given success and number of turns."""
    rows = state_rows()
    worlds = list(dict.fromkeys(row.world for row in rows))
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, tokens in zip(panels, ("first turn", "whole episodes"), strict=True):
        for row in rows:
            if row.tokens == tokens:
                found = (row.action, row.given_success, row.given_turns)
                draw_state(axes, worlds.index(row.world), WORLDS[row.world][1], found)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(title=f"Energies of the {tokens}", ylim=(len(worlds) - 0.5, -0.5), xlim=(-1, 1))
        axes.set_xlabel("rank correlation with the variance of rewards")
        plain(axes, grid="x")
    panels[0].set_yticks(range(len(worlds)), [WORLDS[world][0] for world in worlds])
    figure.suptitle(
        "Energy of action tokens: dots as it is, squares given success, diamonds given the number "
        "of turns"
    )
    figure.savefig(FIGURES / "states.png", dpi=110)


def draw_state(axes: Axes, y: int, color: str, found: Sequence[tuple]) -> None:
    """Three dots with their intervals: filled the correlation, open the partial ones."""
    styles = zip((-0.22, 0, 0.22), "osD", (color, "white", "white"), found, strict=True)
    for lower, marker, fill, (rho, low, high) in styles:
        bars = [[abs(rho - low)], [abs(high - rho)]]
        axes.errorbar(rho, y + lower, xerr=bars, fmt=marker, color=color, mfc=fill, capsize=3)


# ------------------------------------------------------------------------------------------- speed
def draw_growth() -> None:
    """Cost per token while rows, positions or the vocabulary grow, from bench.csv."""
    figure, axes = new_figure(3, "Cost per sampled token while one size grows, two CPU cores")
    sizes = {
        "rows": ("256 positions", ("playing", "update")),
        "positions": ("64 rows", ("playing", "update")),
        "vocabulary": ("the loss alone, 1,024 tokens", ("all logits", "fused")),
    }
    for axis, (size, (title, names)) in zip(axes, sizes.items(), strict=True):
        for name, color in zip(names, ("tab:blue", "tab:orange"), strict=True):
            x, y = growth(name, size)
            axis.loglog(x, y, "o-", color=color, linewidth=2, markersize=4)
            axis.annotate(
                name, (x[-1], y[-1]), xytext=(6, 0), textcoords="offset points",
                color=color, va="center", fontsize=9, annotation_clip=False,
            )  # fmt: skip
        axis.set_xticks(x, [f"{each:,}" for each in x])
        if size != "vocabulary":
            axis.set(ylim=(10, 80))
            axis.set_yticks([10, 20, 40, 80])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.set(title=title, xlabel=size, ylabel="microseconds")
        plain(axis)
    figure.savefig(FIGURES / "growth.png", dpi=110)


def growth(name: str, size: str) -> tuple[list[int], list[float]]:
    """Sizes, and microseconds a token: of rows such as "playing, 32 rows, microseconds a token"."""
    found = {}
    for row in read_table(DATA / "bench.csv"):
        what, *rest = row["what"].split(", ")
        if row["section"] == "growth" and what == name and rest[0].endswith(f" {size}"):
            found[int(rest[0].split()[0])] = float(row["value"])
    return list(found), list(found.values())
