"""Every table of results/tables.md, from results/data. `python -m studies.evidence` writes them.

A table of a comparison has a row for each arm. All its numbers are means over seeds; a difference
is taken seed by seed to the first row, and stands with its 95 % interval (Student's t over seeds)
and the number of seeds in which it is positive.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from arms import ARMS
from studies.data import Run, all_runs, diagnoses, runs_of
from studies.diagnose import partial_interval, partial_spearman, spearman, spearman_test
from studies.gradient_signal import WEIGHTINGS
from studies.larger_step import (
    CHANGING,
    SEEDS_FOR_INTERVAL,
    collapse_rows,
    lead_rows,
    speed_rows,
    start_rows,
)
from studies.larger_step import WORLDS as LARGER_STEP_WORLDS
from studies.pairs import doses, trained_pairs
from studies.stats import FALL, T_975, t_interval
from worlds import ENVIRONMENTS

Comparison = dict[str, dict[int, Run]]  # by label, the runs by seed; the first is the baseline

INTRODUCTION = """# All tables

`python -m studies.evidence` writes this page from [data](data). Each comparison trains several arms
on the same seeds, from the same starting model.

*Final* is the success of the last evaluation, *area* the mean evaluation success (the area under
the evaluations), *training* the mean success of all training rollouts, all in percent; *to 50 %*
is the number of iterations until an evaluation reaches one half, of as many seeds as do. The last
three columns are differences to the first row, seed by seed, in points, with 95 % intervals; in
brackets is the number of seeds in which the difference is positive.
"""
MEASURED = ("final", "area", "training")


def all_tables() -> str:
    """The whole page."""
    sections = [INTRODUCTION]
    for title, comparison in comparisons().items():
        sections.append(f"## {title}\n\n{comparison_table(comparison)}\n")
    sections.append(f"## What the weights come to, and cost\n\n{weights_table()}\n")
    sections.append(f"## Effective tokens\n\n{EFFECTIVE}\n\n{effective_table()}\n")
    sections.append(f"## Matched learning rates\n\n{MATCHED}\n\n{matched_rates_table()}\n")
    if lead_rows():
        sections.append(f"## Matched speed\n\n{SPEED}\n\n{speed_table()}\n\n{leads_table()}\n")
    if start_rows():
        sections.append(f"## Starts\n\n{STARTS}\n\n{starts_table()}\n")
    if collapse_rows():
        sections.append(f"## Collapse\n\n{COLLAPSE}\n\n{collapse_table()}\n")
    sections.append(f"## Falls\n\n{FALLS}\n\n{falls_table()}\n")
    sections.append(f"## What the reasoning is like\n\n{reasoning_table()}\n")
    sections.append(f"## What was promised, and what was gained\n\n{pairs_table()}\n")
    sections.append(f"## Dose and response\n\n{doses_table()}\n")
    sections.append(f"## Signal over noise\n\n{signal_table()}\n\n{agreement()}\n")
    if table := other_signals_table():
        sections.append(f"## Signal over noise, what others do\n\n{OTHER_SIGNALS}\n\n{table}\n")
    sections.append(f"## Energy within one state\n\n{states_table()}\n")
    sections.append(f"## All diagnoses of energy\n\n{diagnoses_table()}\n")
    return "\n".join(sections)


def markdown(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table as markdown.

    >>> print(markdown(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    heads = list(heads)
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join(lines)


def with_interval(values: list[float], digits: int = 1) -> str:
    """The mean with its sign, and half of its 95 % interval.

    >>> with_interval([1.0, 2.0, 3.0])
    '+2.0 ± 2.5'
    """
    return f"{np.mean(values):+.{digits}f} ± {t_interval(values):.{digits}f}"


# ------------------------------------------------------------------------------------- comparisons
def comparisons() -> dict[str, Comparison]:
    """Every comparison that a page cites, by its title."""
    names = ("grpo", "actfocus", "ppo", "ppo-actfocus", "placebo")
    found = {
        "FrozenLake": arms_of("compare", names=names),
        "FrozenLake, PPO": arms_of("compare", names=("ppo", "ppo-actfocus")),
        "FrozenLake, placebo": arms_of("compare", names=("placebo", "actfocus")),
        "FrozenLake, parts of ActFocus": seeds_of(components(), range(3, 8)),
        "FrozenLake, other signals": seeds_of(components("entropy", "nll", "shift"), range(3, 6)),
        "FrozenLake, alpha and beta": seeds_of(weights(), range(3, 8)),
        "FrozenLake, silence blamed": seeds_of(
            arms_of("compare", "ablations", names=("actfocus", "blame")), range(3, 8)
        ),
    }
    for lr in (3e-5, 1e-4, 3e-4, 1e-3):
        names = ("grpo", "actfocus", "placebo") if lr == 1e-4 else ("grpo", "actfocus")
        found[f"FrozenLake, learning rate {lr:g}"] = arms_of("rate", names=names, lr=lr)
    found["FrozenLake, placebo at 0.0001"] = arms_of("rate", names=("placebo", "actfocus"), lr=1e-4)
    found["FrozenLake, each at its best rate"] = {
        "GRPO at 0.001": runs_of("rate", arm="grpo", lr=1e-3),
        "ActFocus at 0.0003": runs_of("rate", arm="actfocus", lr=3e-4),
    }
    for lr in (1e-4, 3e-4):
        found[f"FrozenLake, ten iterations at {lr:g}"] = first_iterations(
            arms_of("rate", names=("grpo", "actfocus"), lr=lr), 10
        )
        found[f"FrozenLake, 128 rollouts at {lr:g}"] = arms_of(
            "batch128", names=("grpo", "actfocus"), lr=lr
        )
    found["FrozenLake, a hundred iterations"] = arms_of("long", names=("grpo", "actfocus"))
    found["FrozenLake, most varied quarter"] = arms_of("filter", names=("grpo", "actfocus"))
    found["FrozenLake, GRPO with and without the filter"] = {
        "all groups": seeds_of(arms_of("compare", names=["grpo"]), range(3))["GRPO"],
        "most varied quarter": runs_of("filter", arm="grpo"),
    }
    for sentences in (0, 4, 12):
        found[f"FrozenLake, {sentences} filler sentences"] = arms_of(
            f"dose/thoughts{sentences}", names=("grpo", "actfocus")
        )
    found["FrozenLake, planned"] = planned()
    found["Sudoku, the default world"] = arms_of("default-world", names=("grpo", "actfocus"))
    names = ("grpo", "actfocus", "discount", "energy", "placebo", "blame")
    found["Sudoku"] = arms_of("seeds-sudoku", names=names)
    for env, name in (("sudoku", "Sudoku"), ("frozenlake", "FrozenLake")):
        if beside := others(env):
            found[f"{name}, what others do"] = beside
    found["Sudoku, silence blamed"] = arms_of("seeds-sudoku", names=("actfocus", "blame"))
    found["Sudoku, discount"] = arms_of("seeds-sudoku", names=("discount", "actfocus"))
    for lr in (1e-4, 1e-3):
        found[f"Sudoku, learning rate {lr:g}"] = arms_of(
            "rate-sudoku", names=("grpo", "actfocus"), lr=lr
        )
    for lr in (3e-3, 1e-2):
        found[f"Sudoku, adapters at {lr:g}"] = arms_of("lora", names=("grpo", "actfocus"), lr=lr)
    found["Sudoku, each at its best rate"] = {
        "GRPO at 0.001": runs_of("rate-sudoku", arm="grpo", lr=1e-3),
        "ActFocus at 0.0003": runs_of("seeds-sudoku", arm="actfocus"),
    }
    found["Sokoban"] = arms_of("seeds-sokoban", names=("grpo", "actfocus"))
    found["Sokoban, silence blamed"] = arms_of("seeds-sokoban", names=("actfocus", "blame"))
    found["Sokoban, learning rate 0.001"] = arms_of("rate-sokoban", names=("grpo", "actfocus"))
    found["Shop"] = arms_of("seeds-shop", names=("grpo", "actfocus", "blame"))
    found["Shop, silence blamed"] = arms_of("seeds-shop", names=("actfocus", "blame"))
    return found


def arms_of(*experiments: str, names: Iterable[str], lr: float | None = None) -> Comparison:
    """A comparison of arms of some experiments, in the order given."""
    return {ARMS[name].label: runs_of(*experiments, arm=name, lr=lr) for name in names}


def components(*others: str) -> Comparison:
    names = ("grpo", "actfocus", "discount", "energy", "placebo", *others)
    return arms_of("compare", "ablations", names=names)


def weights() -> Comparison:
    """ActFocus with other values of alpha and beta, beside GRPO and ActFocus as it is."""
    return arms_of("compare", names=("grpo", "actfocus")) | {
        "alpha 0.3": runs_of("weights/alpha0.3"),
        "alpha 0, beta 0": runs_of("weights/alpha0"),
        "beta 2": runs_of("weights/beta2"),
    }


def planned() -> Comparison:
    return {
        "GRPO": runs_of("planned/alpha0.1", arm="grpo"),
        "alpha 0.3": runs_of("planned/alpha0.3"),
        "alpha 0.1": runs_of("planned/alpha0.1", arm="actfocus"),
        "alpha 0, beta 0": runs_of("planned/alpha0"),
    }


OTHERS = ("top-entropy", "low-prob", "span-placebo")  # the arms that were run beside the older ones


def others(env: str) -> Comparison:
    """Other people's weights and the control of these, beside the arms that ran before on the same
    seeds; {} as long as not all of them have run."""
    older = ("seeds-sudoku",) if env == "sudoku" else ("compare", "ablations")
    names = ("grpo", "actfocus", "discount", "placebo")
    new = {ARMS[name].label: runs_of("arms", env=env, arm=name) for name in OTHERS}
    seeds = list(new[ARMS["span-placebo"].label])
    if not all(list(runs) == seeds and seeds for runs in new.values()):
        return {}
    return seeds_of(arms_of(*older, names=names), range(seeds[0], seeds[-1] + 1)) | new


def seeds_of(comparison: Comparison, seeds: range) -> Comparison:
    """The same comparison on some of its seeds."""
    return {
        label: {seed: runs[seed] for seed in seeds if seed in runs}
        for label, runs in comparison.items()
    }


def first_iterations(comparison: Comparison, iterations: int) -> Comparison:
    """The same comparison as if it had ended earlier."""
    return {
        label: {
            seed: replace(run, rows=[row for row in run.rows if int(row["iteration"]) < iterations])
            for seed, run in runs.items()
        }
        for label, runs in comparison.items()
    }


def comparison_table(comparison: Comparison) -> str:
    """A row for each arm; differences are to the first."""
    baseline_name, *_ = comparison
    heads = ["", "seeds", *MEASURED, "to 50 %", *(f"{n} less {baseline_name}" for n in MEASURED)]
    baseline = {seed: run.measures() for seed, run in comparison[baseline_name].items()}
    lines = []
    for label, runs in comparison.items():
        measured = {seed: run.measures() for seed, run in runs.items()}
        cells = [label, str(len(runs))]
        for name in MEASURED:
            cells.append(f"{np.mean([each[name] for each in measured.values()]):.1f}")
        cells.append(iterations_to_half([each["reach"] for each in measured.values()]))
        for name in MEASURED:
            both = [seed for seed in measured if seed in baseline]
            gains = [measured[seed][name] - baseline[seed][name] for seed in both]
            cells.append("" if label == baseline_name else gain(gains))
        lines.append(cells)
    return markdown(heads, lines)


def gain(gains: list[float]) -> str:
    """A mean difference, its 95 % interval, and in how many seeds it is positive.

    >>> gain([1.0, 2.0, -3.0])
    '+0.0 ± 6.6 (2/3)'
    """
    won = sum(each > 0 for each in gains)
    return f"{with_interval(gains)} ({won}/{len(gains)})"


def iterations_to_half(reached: list[float]) -> str:
    """The mean over the seeds that reach one half, and how many do if not all."""
    finite = [each for each in reached if each < np.inf]
    if not finite:
        return "never"
    few = f" ({len(finite)}/{len(reached)})" if len(finite) < len(reached) else ""
    return f"{np.mean(finite):.1f}{few}"


# ------------------------------------------------------------------------------------ the weights
WEIGHED = {
    "FrozenLake": "compare",
    "FrozenLake, planned": "planned/alpha0.1",
    "Sokoban": "seeds-sokoban",
    "shop": "seeds-shop",
    "Sudoku": "seeds-sudoku",
}


def weights_table() -> str:
    """What ActFocus's weights come to in the first iteration of seed 0, which depends on the share
    of action tokens; and the seconds of its iterations over GRPO's, by their means."""
    heads = ("world", "action tokens", "mean weight", "a reasoning token's share of the update",
             "an action token's", "seconds over GRPO's")  # fmt: skip
    lines = []
    for world, experiment in WEIGHED.items():
        grpo, actfocus = (runs_of(experiment, arm=arm) for arm in ("grpo", "actfocus"))
        share = actfocus[0].column("action_fraction")[1][0]
        weight = actfocus[0].column("mean_weight")[1][0]
        arm = ARMS["actfocus"]
        seconds = [
            np.mean([np.mean(run.column("seconds")[1]) for run in runs.values()])
            for runs in (actfocus, grpo)
        ]
        cells = [world, f"{100 * share:.1f} %", f"{weight:.3f}", f"x {arm.alpha / weight:.2f}"]
        # on average over action tokens, the sigmoid of their signal is a half
        cells += [f"x {(1 + arm.beta / 2) / weight:.1f}", f"{seconds[0] / seconds[1]:.2f}"]
        lines.append(cells)
    return markdown(heads, lines)


# ----------------------------------------------------------------------------------- matched rates
MATCHED = """GRPO's *matched rate* is the lowest learning rate at which its training success, drawn
as straight lines over the logarithm of the rate, meets ActFocus's on the same seeds; *times* is
this rate over ActFocus's. A dash says that GRPO meets it at none of its rates, and a number in
brackets how many single seeds do."""
RATES = {  # by world and number of iterations: the experiments that trained it at several rates
    "FrozenLake": (("rate",), None),
    "Sudoku": (("rate-sudoku", "seeds-sudoku"), None),
    "Sudoku, first four iterations": (("rate-sudoku", "seeds-sudoku"), 4),
}


def matched_rates_table() -> str:
    """For each world and rate of ActFocus: the rate at which GRPO has the same training success on
    the same seeds, and how many times ActFocus's it is. A dash where GRPO has it at none."""
    heads = ("world", "ActFocus's rate", "its training success", "GRPO's matched rate", "times",
             "single seeds")  # fmt: skip
    lines = []
    for world, (experiments, iterations) in RATES.items():
        grpo = training_by_rate(experiments, "grpo", iterations)
        for rate, actfocus in training_by_rate(experiments, "actfocus", iterations).items():
            success = float(np.mean([*actfocus.values()]))
            matched = matched_rate(mean_by_rate(grpo, seeds=actfocus), success)
            cells = [world, f"{rate:g}", f"{success:.1f}"]
            cells += [f"{matched:.1e}", f"{matched / rate:.1f}"] if matched else ["-", "-"]
            factors = []
            for seed, of_seed in actfocus.items():
                if matched := matched_rate(mean_by_rate(grpo, seeds=[seed]), of_seed):
                    factors.append(matched / rate)
            few = f" ({len(factors)}/{len(actfocus)})" if len(factors) < len(actfocus) else ""
            between = f"{min(factors):.1f} to {max(factors):.1f}{few}" if factors else "-"
            lines.append([*cells, between])
    return markdown(heads, lines)


def mean_by_rate(
    trained: Mapping[float, Mapping[int, float]], seeds: Iterable[int]
) -> dict[float, float]:
    """The mean at each rate over those of the seeds that it has; a rate with none is left out."""
    means = {}
    for rate, by_seed in trained.items():
        there = [by_seed[seed] for seed in seeds if seed in by_seed]
        if there:
            means[rate] = float(np.mean(there))
    return means


def training_by_rate(
    experiments: Iterable[str], arm: str, iterations: int | None
) -> dict[float, dict[int, float]]:
    """By learning rate and seed, in order: the training success over so many iterations, or over
    all of them, in percent."""
    found: dict[float, dict[int, float]] = {}
    for run in all_runs():
        if run.experiment in experiments and run.arm == arm:
            success = 100 * float(np.mean(run.column("train_success")[1][:iterations]))
            found.setdefault(run.lr, {})[run.seed] = success
    return dict(sorted(found.items()))


def matched_rate(by_rate: Mapping[float, float], success: float) -> float | None:
    """The lowest rate that gives this success, on straight lines through the points (log rate,
    success); None if no rate does.

    by_rate: the success at each learning rate, in order of the rate.

    >>> round(matched_rate({1e-4: 10.0, 1e-2: 30.0}, success=20.0), 6)
    0.001
    """
    rates, values = list(by_rate), list(by_rate.values())
    for (low, high), (below, above) in zip(pairwise(rates), pairwise(values), strict=True):
        if below <= success <= above:
            share = (success - below) / (above - below)
            return float(np.exp((1 - share) * np.log(low) + share * np.log(high)))
    return None


# ------------------------------------------------------------------------------- a larger step?
SPEED = """Both methods at several rates, twenty iterations, new seeds. *End* is the success in
1,024 episodes after the last iteration. A run *fell* if its last evaluation is ten points or more
below an earlier one. The *deepest dip* is the largest difference of any evaluation of its runs to
an earlier one, in points. *True facts* are those of the last iteration. KL divergences, from the
policy that played to the updated one, are in thousandths of a nat a token of the class; *distance*
is that of the weights from the start over the length of the start's. The second table is ActFocus
at 3e-4 less each other row, seed by seed. *By the clock* is the area over the seconds of training
in place of the iterations, until the faster of the two runs has ended; *seconds* is ActFocus's
time over the other's."""


def speed_table() -> str:
    """A row for each arm and rate: means over seeds."""
    heads = ("world", "arm", "rate", "seeds", "to 50 %", "area", "training", "end", "fell",
             "deepest dip", "true facts", "KL of actions", "KL of reasoning",
             "distance")  # fmt: skip
    lines = []
    for row in speed_rows():
        cells = [row.env, ARMS[row.arm].label, f"{row.lr:g}", str(len(row.runs))]
        for name in ("reach", "area", "training", "final"):
            cells.append(f"{np.mean(row.values(name)):.1f}")
        cells += [f"{row.fallen} of {len(row.runs)}", f"{np.max(row.values('dip')):.0f}"]
        cells.append(f"{np.mean(row.values('facts')):.0f} %")
        cells += [f"{1000 * np.mean(row.values(f'kl_{name}')):.2f}" for name in KL_OF]
        lines.append([*cells, f"{np.mean(row.values('distance')):.3f}"])
    return markdown(heads, lines)


KL_OF = ("action", "reasoning")


def leads_table() -> str:
    """ActFocus at its default rate less each other arm and rate."""
    heads = ("world", "ActFocus less", "to 50 %", "area", "area by the clock", "training", "end",
             "fell", "seconds")  # fmt: skip
    lines = []
    for row in lead_rows():
        cells = [row.env, f"{ARMS[row.arm].label} at {row.lr:g}"]
        cells += [shown(row.differences[name]) for name in ("reach", "area", "clock", "training",
                                                           "final")]  # fmt: skip
        lines.append([*cells, "{}, {}".format(*row.fallen), f"{row.seconds:.2f}"])
    return markdown(heads, lines)


def shown(gains: list[float]) -> str:
    """As `gain`, but without an interval where there are too few seeds for one.

    >>> shown([1.0, 2.0, -3.0]), shown([1.0])
    ('+0.0 ± 6.6 (2/3)', '+1.0 (1/1)')
    """
    if len(gains) >= SEEDS_FOR_INTERVAL:
        return gain(gains)
    return f"{np.mean(gains):+.1f} ({sum(each > 0 for each in gains)}/{len(gains)})"


STARTS = """ActFocus less GRPO from several starting models, in points, each a mean over seeds. The
last row of a world is the mean over its starts with the 95 % interval over starts, and the number
of starts in which the mean is positive. The end is that of 1,024 episodes; the runs from the
committed start, 0, have none."""


def starts_table() -> str:
    """A row for each start, and one for each world."""
    lines = []
    measured = ("training", "area", "final")
    for env in LARGER_STEP_WORLDS:
        starts = [start for start in start_rows() if start.env == env]
        for start in starts:
            seeds = str(len(start.gains["training"]))
            means = {name: f"{np.mean(gains):+.1f}" for name, gains in start.gains.items()}
            cells = [means.get(name, "") for name in measured]
            lines.append([env, start.name, seeds, *cells])
        if len(starts) > 1:
            means = [
                [float(np.mean(start.gains[name])) for start in starts if name in start.gains]
                for name in measured
            ]
            lines.append([env, "all", f"{len(starts)} starts", *map(shown, means)])
    return markdown(("world", "start", "seeds", *measured[:2], "end"), lines)


COLLAPSE = """Sudoku for sixty iterations at 3e-4. *Fell at* is the first iteration whose evaluation
is ten points below an earlier one. The other columns are the first iteration from which on a
quantity differs, for three iterations in a row, by more than a tenth from what it was around the
best evaluation; a dash says that it never does."""


def collapse_table() -> str:
    """A row for each long run."""
    lines = []
    for row in collapse_rows():
        success = [100 * each for each in row.run.column("eval_success")[1]]
        cells = [row.setting, ARMS[row.run.arm].label, str(row.run.seed)]
        cells += [f"{max(success):.0f} at {row.best}", f"{success[-1]:.0f}"]
        for at in (row.fell_at, *row.left.values()):
            cells.append("-" if at is None else str(at))
        lines.append(cells)
    heads = ("setting", "arm", "seed", "best, %", "last, %", "fell at", *CHANGING)
    return markdown(heads, lines)


# ----------------------------------------------------------------------------------------- falls
FALLS = """A run *falls* if the success of its last evaluation is ten points or more below that of
an earlier one. These are all runs from the committed starts that did; true facts and tokens are
those of the first iteration and of the last."""
# Experiments that did not begin at the committed starts, by how their names begin.
OTHER_STARTS = ("dose", "earlier-starts", "first-runs", "smollm2", "starts")


def falls_table() -> str:
    """A row for each run that fell, with how its reasoning and its length changed from the first
    iteration to the last."""
    heads = ("experiment", "world", "rate", "arm", "seed", "evaluations, %", "true facts, %",
             "tokens a rollout")  # fmt: skip
    lines = []
    for run in sorted(fallen_runs(), key=lambda run: (run.experiment, -run.lr, run.arm, run.seed)):
        evaluations = ", ".join(f"{100 * each:.0f}" for each in run.column("eval_success")[1])
        facts = run.column("reasoning_accuracy")[1]
        tokens = run.column("response_tokens")[1]
        cells = [run.experiment, run.env, f"{run.lr:g}", ARMS[run.arm].label, str(run.seed)]
        cells += [evaluations, f"{100 * facts[0]:.0f} to {100 * facts[-1]:.0f}"]
        cells.append(f"{tokens[0]:.0f} to {tokens[-1]:.0f}")
        lines.append(cells)
    return markdown(heads, lines)


def fallen_runs() -> list[Run]:
    """The runs from committed starts that end FALL points or more below an earlier evaluation."""
    fallen = []
    for run in all_runs():
        if run.drop >= FALL and not run.experiment.startswith(OTHER_STARTS):
            fallen.append(run)
    return fallen


# -------------------------------------------------------------------------------- effective tokens
EFFECTIVE = """The *effective tokens* of weights w are (Σw)² / Σw², here as a share of all N tokens:
under equal weights it is 1. The placebo has the same weights as ActFocus, on other tokens, and so
the same share. It is of the first iteration of seed 0. Two values bound it, since the logs have Σw
but not Σw²: the weights of single action tokens are not kept."""


def effective_table() -> str:
    """A row for each world that ActFocus's weights were logged in."""
    lines = []
    for world, experiment in WEIGHED.items():
        run = runs_of(experiment, arm="actfocus")[0]
        names = ("mean_weight", "reasoning_weight_share", "action_fraction")
        least, most = effective_share(*(run.column(name)[1][0] for name in names))
        lines.append([world, f"{least:.2f} to {most:.2f}"])
    return markdown(("world", "effective tokens, as a share of all"), lines)


def effective_share(
    mean_weight: float, reasoning_weight_share: float, action_share: float
) -> tuple[float, float]:
    """The least and the largest (sum w)^2 / (N sum w^2) that ActFocus's weights can have with these
    sums. The logs have no sum of squares; but a reasoning token weighs alpha, a format token 1 and
    an action token 1 to 1 + beta, which leaves little room.

    By hand: 6 reasoning tokens of 0.1, 2 format tokens, 2 action tokens of 1 and 1.5. sum w is 5.1,
    sum w^2 is 5.31, which is the most that action tokens with the sum 2.5 can give:

    >>> least, most = effective_share(0.51, 0.6 / 5.1, action_share=0.2)
    >>> round(least, 4), round(5.1**2 / (10 * 5.31), 4)
    (0.4898, 0.4898)
    """
    arm = ARMS["actfocus"]
    reasoning = reasoning_weight_share * mean_weight / arm.alpha  # the share of reasoning tokens
    others = 1 - reasoning - action_share
    action = (mean_weight - arm.alpha * reasoning - others) / action_share  # their mean weight
    alike = action**2  # the least mean square: all action tokens weigh the same
    apart = 1 + (action - 1) * (2 + arm.beta)  # the most: each weighs 1 or 1 + beta
    low, high = (
        mean_weight**2 / (arm.alpha**2 * reasoning + others + action_share * square)
        for square in (apart, alike)
    )
    return low, high


# --------------------------------------------------------------------------------- the reasoning
REASONED = {
    "FrozenLake": ("compare", None),
    "FrozenLake, seeds 3 to 7": ("compare", range(3, 8)),
    "FrozenLake, a hundred iterations": ("long", None),
    "Sudoku": ("seeds-sudoku", None),
    "Sokoban": ("seeds-sokoban", None),
    "shop": ("seeds-shop", None),
}
REASONING = {  # what is said: column of the log, factor, decimals
    "true facts, %": ("reasoning_accuracy", 100, 1),
    "turns without a fact, %": ("turns_without_facts", 100, 2),
    "tokens a rollout": ("response_tokens", 1, 0),
    "entropy, nats": ("entropy", 1, 3),
}


def reasoning_table() -> str:
    """What the arms' reasoning is like in a run's last two iterations, over its seeds."""
    heads = ("run", "measure", "start", "GRPO", "ActFocus", "ActFocus less GRPO",
             "silence blamed less ActFocus")  # fmt: skip
    lines = []
    for title, (experiment, seeds) in REASONED.items():
        blamed = "ablations" if seeds else experiment
        runs = {
            "grpo": runs_of(experiment, arm="grpo"),
            "actfocus": runs_of(experiment, arm="actfocus"),
            "blame": runs_of(blamed, arm="blame"),
        }
        if seeds:
            runs = seeds_of(runs, seeds)
        for measure, (column, factor, digits) in REASONING.items():
            at_first = mean_over(runs["grpo"], column, slice(1), factor)
            grpo, actfocus, blame = (
                mean_over(each, column, slice(-2, None), factor) for each in runs.values()
            )
            cells = [title, measure]
            for values in (at_first, grpo, actfocus):
                cells.append(f"{np.mean([*values.values()]):.{digits}f}")
            cells.append(with_interval([actfocus[s] - grpo[s] for s in actfocus], digits))
            more = [blame[seed] - actfocus[seed] for seed in blame]
            cells.append(with_interval(more, digits) if more else "")
            lines.append(cells)
    return markdown(heads, lines)


def mean_over(
    runs: Mapping[int, Run], column: str, iterations: slice, factor: float
) -> dict[int, float]:
    """By seed, the mean of a column over some iterations, times a factor."""
    return {
        seed: factor * float(np.mean(run.column(column)[1][iterations]))
        for seed, run in runs.items()
    }


# ------------------------------------------------------------------------- promised, and gained
def pairs_table() -> str:
    """A row for each pair; below, the rank correlation of all, and of some."""
    pairs = trained_pairs()
    heads = ("world", "weighting", "setting", "promised", "gained", "seeds")
    lines = []
    for env, name, how, (_, promised, _), gains in pairs:
        gained = with_interval(gains)
        lines.append([env, name, how, f"{promised:+.3f}", gained, str(len(gains))])
    selections = {
        "All": pairs,
        "Without Sudoku": [pair for pair in pairs if pair.env != "sudoku"],
        "In the world's own setting": [pair for pair in pairs if not pair.setting],
    }
    said = []
    for title, selected in selections.items():
        promised = np.array([pair.promised[1] for pair in selected])
        gained = np.array([np.mean(pair.gains) for pair in selected])
        test = spearman_test(promised, gained, np.random.default_rng(0))
        said.append(
            f"- {title}, {len(selected)} pairs: rank correlation {test.rho:+.2f} "
            f"[{test.low:+.2f}, {test.high:+.2f}], p = {test.p:.4f}"
        )
    return f"{markdown(heads, lines)}\n\n" + "\n".join(said)


def doses_table() -> str:
    """A row for each dose, and how the gain changes with the action share: by a line through the
    means, since starts differ by more than their share."""
    found = doses()
    heads = ("filler sentences", "action tokens", "promised", "gained")
    lines = []
    for sentences, share, gains, (_, promised, _) in found:
        lines.append([str(sentences), f"{share:.1f} %", f"{promised:+.3f}", with_interval(gains)])
    x = np.array([dose.share for dose in found])
    y = np.array([np.mean(dose.gains) for dose in found])
    slope, _ = np.polyfit(x, y, 1)
    residuals = y - np.polyval(np.polyfit(x, y, 1), x)
    freedom = len(x) - 2
    error = np.sqrt(np.square(residuals).sum() / freedom / np.square(x - x.mean()).sum())
    widest = x.max() - x.min()
    said = (
        f"From the least share to the largest, by a line through the {len(x)} starts: "
        f"{slope * widest:+.1f} ± {T_975[freedom - 1] * error * widest:.1f} points."
    )
    said += f" Their mean gain is {with_interval(y.tolist())} points, by an interval over starts."
    return f"{markdown(heads, lines)}\n\n{said}"


# -------------------------------------------------------------------------------------- diagnoses
def signal_table() -> str:
    """A row for each diagnosis of the gradient: signal over noise as Adam sees it."""
    heads = ("run", "action tokens", "reasoning alone", "action alone", "GRPO", "ActFocus",
             "placebo", "ActFocus less GRPO")  # fmt: skip
    lines = []
    for experiment, found in diagnoses("signal").items():
        rows = {row["name"]: row for row in found}
        cells = [experiment.removeprefix("signal/"), f"{float(rows['action']['token_share']):.0%}"]
        for name in ("reasoning", "action", "grpo", "actfocus", "placebo"):
            cells.append(f"{float(rows[name]['adam_ratio']):.3f}")
        ends = [float(rows["actfocus"][f"adam_gain{end}"]) for end in ("", "_low", "_high")]
        cells.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(*ends))
        lines.append(cells)
    return markdown(heads, lines)


OTHER_SIGNALS = """The same, measured anew for all weightings at once: the ratio of each, and its
gain over GRPO's with the 95 % interval."""


def other_signals_table() -> str:
    """A row for each weighting of the diagnoses signal-arms/..., with each world's ratio and gain;
    "" as long as there is none."""
    measured = {
        experiment.removeprefix("signal-arms/"): {row["name"]: row for row in rows}
        for experiment, rows in diagnoses("signal").items()
        if experiment.startswith("signal-arms/")
    }
    if not measured:
        return ""
    lines = []
    for name, arm in WEIGHTINGS.items():
        if not all(name in rows for rows in measured.values()):
            continue  # "shift", which is 0 before training
        cells = [arm.label]
        for rows in measured.values():
            ends = [float(rows[name][f"adam_gain{end}"]) for end in ("", "_low", "_high")]
            gained = "" if name == "grpo" else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*ends)
            cells += [f"{float(rows[name]['adam_ratio']):.3f}", gained]
        lines.append(cells)
    heads = ["weighting"]
    for world in measured:
        heads += [world, "less GRPO's"]
    return markdown(heads, lines)


def agreement() -> str:
    """In training, too, gradients under ActFocus agree more: the log's `gradient_agreement`."""
    grpo, actfocus = runs_of("compare", arm="grpo"), runs_of("compare", arm="actfocus")
    more = [
        np.mean(actfocus[seed].column("gradient_agreement")[1])
        - np.mean(grpo[seed].column("gradient_agreement")[1])
        for seed in grpo
    ]
    won = sum(each > 0 for each in more)
    return (
        "Mean cosine of the gradients of successive mini-batches in FrozenLake's training, "
        f"ActFocus less GRPO: {with_interval(more, digits=3)} ({won}/{len(more)} seeds)."
    )


class StateRow(NamedTuple):
    """What a diagnosis says of action tokens' energy, and of reasoning tokens'. Each is a rank
    correlation with the variance of a group's rewards: its value and its 95 % interval."""

    world: str
    tokens: str  # of which turns
    action: tuple[float, float, float]
    given_success: tuple[float, float, float]
    given_turns: tuple[float, float, float]
    reasoning: tuple[float, float, float]


def state_rows() -> list[StateRow]:
    """For each world, from the committed start: energies over whole episodes, and over the first
    turn alone, in which all rollouts of a group are in the same state; as far as they were run."""
    rows = []
    groups_of, correlations_of = diagnoses("diagnosis_groups"), diagnoses("correlations")
    for world in ENVIRONMENTS:
        for suffix, tokens in (("committed", "whole episodes"), ("turn1", "first turn")):
            experiment = f"action-bottleneck/{world}-{suffix}"
            if experiment not in groups_of:
                continue
            energy, variance, success, turns = (
                np.array([float(group[name]) for group in groups_of[experiment]])
                for name in ("energy_action", "reward_variance", "success", "turns")
            )
            of_tokens = {
                row["tokens"]: tuple(float(row[name]) for name in ("rho", "low", "high"))
                for row in correlations_of[experiment]
                if row["signal"] == "energy"
            }
            partial = []
            for given in (success, turns):
                value = partial_spearman(energy, variance, given)
                interval = partial_interval(energy, variance, given, np.random.default_rng(0))
                partial.append((value, *interval))
            rows.append(
                StateRow(world, tokens, of_tokens["action"], *partial, of_tokens["reasoning"])
            )
    return rows


def states_table() -> str:
    """A row for each of `state_rows`."""
    heads = ("world", "energies of", "action tokens", "given success", "given turns",
             "reasoning tokens")  # fmt: skip
    lines = [
        [world, tokens, *("{:+.2f} [{:+.2f}, {:+.2f}]".format(*each) for each in found)]
        for world, tokens, *found in state_rows()
    ]
    return markdown(heads, lines)


def diagnoses_table() -> str:
    """A row for each diagnosis of energy: success, Spearman's rho of the energy with the variance
    of the rewards over four choices of tokens, and what explains it."""
    heads = (
        *("run", "success", "action", "decision", "reasoning", "all"),
        *("ρ(entropy of the decision, variance)", "ρ(success, variance)"),
        *("ρ(decision, success)", "ρ(energy, entropy) of the decision"),
    )
    groups_of = diagnoses("diagnosis_groups")
    lines = []
    for experiment, found in diagnoses("correlations").items():
        results = {(row["signal"], row["tokens"]): row for row in found}
        groups = groups_of[experiment]
        success = np.mean([float(group["success"]) for group in groups])
        cells = [experiment.removeprefix("action-bottleneck/"), f"{success:.0%}"]
        for tokens in ("action", "decision", "reasoning", "all"):
            row = results["energy", tokens]
            rho, low, high = float(row["rho"]), float(row["low"]), float(row["high"])
            cells.append(f"{rho:+.2f} [{low:+.2f}, {high:+.2f}]")
        cells.append(f"{float(results['entropy', 'decision']['rho']):+.2f}")
        cells.append(f"{float(results['success', '']['rho']):+.2f}")
        cells.append(f"{float(results['energy', 'decision']['rho_success']):+.2f}")
        energy = np.array([float(group["energy_decision"]) for group in groups])
        entropy = np.array([float(group["entropy_decision"]) for group in groups])
        cells.append(f"{spearman(energy, entropy):+.2f}")
        lines.append(cells)
    return markdown(heads, lines)
