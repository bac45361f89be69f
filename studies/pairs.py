"""What the gradient's signal over noise foretells before training, beside what training gained.

Two questions of results/evidence.md are answered from the tables of results/data here: does a gain
in signal over noise come true (`trained_pairs`), and does the share of action tokens decide how
much ActFocus gains (`doses`)?
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from arms import ARMS
from studies.data import Run, all_runs, diagnoses, runs_of
from studies.gradient_signal import WEIGHTINGS
from support.config import ActFocusConfig

# Comparisons of ten iterations from a committed start. The last four are not in the setting that
# the signal was measured in: they have another learning rate or batch, or filter their groups.
COMPARED = (
    *("compare", "ablations", "seeds-sudoku", "seeds-sokoban", "seeds-shop"),
    *("planned/alpha0", "planned/alpha0.1", "planned/alpha0.3"),
    *("weights/alpha0", "weights/alpha0.3", "weights/beta2"),
    *("arms", "rate-sudoku", "rate-sokoban", "filter", "batch128"),
)
# What diagnoses of a world are called. The second have the arms that were added later.
MEASURED = ("signal", "signal-arms")
SETTING = ("keep_groups", "prompts", "minibatch")  # named where a pair is not in its world's own
DOSE_SEEDS = 4


class Pair(NamedTuple):
    """A way of weighing tokens, and GRPO on the same prompts."""

    env: str
    weighting: str  # a name in WEIGHTINGS
    setting: str  # what is not the world's own: learning rate, filter, prompts; "" for nothing
    promised: tuple[float, float, float]  # gain in signal over noise before training: its interval
    gains: list[float]  # in mean training success, in points, one a seed


class Dose(NamedTuple):
    """FrozenLake with some number of filler sentences in a thought, on the same seeds."""

    sentences: int
    share: float  # action tokens among the tokens generated in GRPO's first iteration, in %
    gains: list[float]  # of ActFocus over GRPO in mean training success, in points, one a seed
    promised: tuple[float, float, float]  # as in Pair


# ------------------------------------------------------------------------------------- every pair
def trained_pairs() -> list[Pair]:
    """Every weighting that was trained beside GRPO, and whose signal was measured in its world."""
    trained: dict[tuple, dict[int, float]] = defaultdict(dict)
    for run in all_runs():
        if run.experiment in COMPARED:
            key = run.env, weighting(run), setting(run)
            trained[key][run.seed] = run.measures()["training"]
    pairs = []
    for (env, name, how), by_seed in sorted(trained.items()):
        found = (promised_gain(f"{folder}/{env}", name) for folder in MEASURED)
        promised = next((each for each in found if each), None)
        if promised and name != "grpo":
            baseline = trained[env, "grpo", how]
            gains = [by_seed[seed] - baseline[seed] for seed in sorted(by_seed)]
            pairs.append(Pair(env, name, how, promised, gains))
    return pairs


def weighting(run: Run) -> str:
    """The name in WEIGHTINGS of the weights that a run gave; "" if they are not there."""
    arm = ARMS[run.arm]
    if not arm.uniform:
        asked = {name: run.settings.get(name) for name in ("alpha", "beta", "signal")}
        arm = replace(arm, **{name: each for name, each in asked.items() if each is not None})
    for name, each in WEIGHTINGS.items():
        if replace(each, label=arm.label, color=arm.color) == arm:
            return name
    return ""


def setting(run: Run) -> str:
    """What a run had other than its world's own, but for weights and seeds; "" for nothing."""
    usual = ActFocusConfig(env=run.env)
    usual.resolve()
    other = [f"lr {run.lr:g}"] if run.lr != usual.lr else []
    for name in SETTING:
        if run.settings[name] != getattr(usual, name):
            other.append(f"{name} {run.settings[name]:g}")
    return ", ".join(other)


def promised_gain(diagnosis: str, name: str) -> tuple[float, float, float] | None:
    """How much more signal over noise a weighting has than GRPO, by a diagnosis: the lower end of
    the 95 % interval, the value, the upper end. None if the diagnosis did not measure it."""
    for row in diagnoses("signal").get(diagnosis, ()):
        if row["name"] == name:
            return tuple(float(row[f"adam_gain{end}"]) for end in ("_low", "", "_high"))
    return None


# -------------------------------------------------------------------------------- dose and response
def doses() -> list[Dose]:
    """By action share. The default start has six filler sentences; its runs are those of the
    comparison of five arms."""
    sources = {6: ("compare", "signal/frozenlake")}
    for sentences in (0, 4, 12):
        sources[sentences] = (f"dose/thoughts{sentences}", f"dose/thoughts{sentences}")
    found = []
    for sentences, (experiment, diagnosis) in sources.items():
        grpo = runs_of(experiment, arm="grpo")
        actfocus = runs_of(experiment, arm="actfocus")
        shares, gains = [], []
        for seed in range(DOSE_SEEDS):
            shares.append(100 * grpo[seed].column("action_fraction")[1][0])
            after = actfocus[seed].measures()["training"]
            gains.append(after - grpo[seed].measures()["training"])
        promised = promised_gain(diagnosis, "actfocus")
        found.append(Dose(sentences, float(np.mean(shares)), gains, promised))
    return sorted(found, key=lambda dose: dose.share)
