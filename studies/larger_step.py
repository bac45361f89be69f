"""Is ActFocus more than a larger step? What results/larger-step.md says, as rows of numbers.

Four experiments are read from results/data here: both methods at several learning rates
(`speed_rows`, `lead_rows`), from several starting models (`start_rows`), beside what others do
(the experiment `arms`, a plain comparison), and for long (`collapse_rows`). Tables are made of
them in studies/tables.py, pictures in studies/figures.py.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from studies.data import Run, all_runs
from studies.stats import FALL

WORLDS = ("sudoku", "frozenlake")
ACTFOCUS_RATE = 3e-4  # the default, which every rate of GRPO is held against

SEEDS_FOR_INTERVAL = 3  # with two seeds, an interval is wider than all that can be


# -------------------------------------------------------------------------------- matched speed
class Speed(NamedTuple):
    """All seeds of one arm at one learning rate."""

    env: str
    arm: str
    lr: float
    runs: dict[int, Run]

    def values(self, name: str) -> list[float]:
        """One of the measures for each seed."""
        return [speed_measures(run)[name] for run in self.runs.values()]

    @property
    def fallen(self) -> int:
        """How many seeds end FALL points or more below an earlier evaluation."""
        return sum(run.drop >= FALL for run in self.runs.values())


def speed_measures(run: Run) -> dict[str, float]:
    """The measures of a run, and what it moved.

    `reach` of a run that never comes to one half is the number of its iterations, so that a mean
    exists; it is too small then. KL divergences are medians over the iterations, since those of a
    run that falls are large in a few of them. `dip` is the largest difference of an evaluation to
    an earlier one, in points, from which a run may have recovered.
    """
    found = run.measures()
    found["reach"] = min(found["reach"], run.settings["iterations"])
    for name in ("kl_action", "kl_reasoning"):
        found[name] = float(np.median(run.column(name)[1]))
    success = 100 * np.array(run.column("eval_success")[1])
    found["dip"] = float(np.max(np.maximum.accumulate(success) - success))
    found["facts"] = 100 * run.column("reasoning_accuracy")[1][-1]
    found["distance"] = run.column("distance")[1][-1]
    found["seconds"] = sum(run.column("seconds")[1])
    return found


def speed_rows() -> list[Speed]:
    """Every arm and rate of the comparison at matched speed, as far as it has run: by world, GRPO
    first, from the lowest rate to the highest."""
    found: dict[tuple[str, str, float], dict[int, Run]] = {}
    for run in all_runs():
        if run.experiment in [f"speed-{env}" for env in WORLDS]:
            found.setdefault((run.env, run.arm, run.lr), {})[run.seed] = run
    order = ("grpo", "discount", "actfocus")
    rows = [Speed(*key, dict(sorted(runs.items()))) for key, runs in found.items()]
    return sorted(rows, key=lambda row: (WORLDS.index(row.env), order.index(row.arm), row.lr))


class Lead(NamedTuple):
    """ActFocus at its default rate less another arm at some rate, seed by seed."""

    env: str
    arm: str
    lr: float
    differences: dict[str, list[float]]  # by measure, one a seed that both have
    fallen: tuple[int, int]  # how many of these seeds fell: ActFocus's, the other's
    seconds: float  # ActFocus's over the other's, by their means


def lead_rows() -> list[Lead]:
    """What ActFocus at its default rate is held against: all other rows of its world."""
    rows = speed_rows()
    leads = []
    for env in WORLDS:
        here = [row for row in rows if row.env == env]
        ours = [row for row in here if (row.arm, row.lr) == ("actfocus", ACTFOCUS_RATE)]
        for other in here if ours else ():
            if other is not ours[0]:
                leads.append(lead(ours[0], other))
    return leads


def lead(ours: Speed, other: Speed) -> Lead:
    """ActFocus less another arm, on the seeds that both have."""
    differences: dict[str, list[float]] = {}
    fallen, seconds = np.zeros(2, dtype=int), np.zeros(2)
    for seed in [seed for seed in ours.runs if seed in other.runs]:
        pair = ours.runs[seed], other.runs[seed]
        measured = [speed_measures(run) for run in pair]
        for name in ("area", "training", "reach", "final"):
            difference = measured[0][name] - measured[1][name]
            differences.setdefault(name, []).append(difference)
        until = min(each["seconds"] for each in measured)
        by_clock = [area_by_clock(run, until) for run in pair]
        differences.setdefault("clock", []).append(by_clock[0] - by_clock[1])
        fallen += [run.drop >= FALL for run in pair]
        seconds += [each["seconds"] for each in measured]
    return Lead(
        other.env, other.arm, other.lr, differences, tuple(fallen.tolist()),
        float(seconds[0] / seconds[1]),
    )  # fmt: skip


def area_by_clock(run: Run, until: float) -> float:
    """The mean evaluation success of the first `until` seconds of training, in points: the area
    under the evaluations, drawn as straight lines over the time that training took before them."""
    iterations, success = run.column("eval_success")
    passed = np.concatenate([[0.0], np.cumsum(run.column("seconds")[1])])
    return mean_until(passed[iterations], 100 * np.array(success), until)


def mean_until(x: np.ndarray, y: np.ndarray, until: float) -> float:
    """The mean, from x[0] to `until`, of straight lines through the points (x, y); x is ascending
    and `until` lies within it.

    By hand: from 0 to 2 the line rises from 0 to 4, and at 3 it is 4 still. Its mean until 1 is 1,
    and until 3 it is (4 + 4) / 3.

    >>> x, y = np.array([0.0, 2.0, 3.0]), np.array([0.0, 4.0, 4.0])
    >>> mean_until(x, y, 1.0), round(mean_until(x, y, 3.0), 3)
    (1.0, 2.667)
    """
    inside = x < until
    ends = np.append(x[inside], until)
    return float(np.trapezoid(np.interp(ends, x, y), ends) / (until - x[0]))


# ------------------------------------------------------------------------------------- the starts
# The runs from the committed starts. They have the settings of those from the other starts, but
# their own seeds, and no long evaluation at the end.
COMMITTED = {"seeds-sudoku": "sudoku-0", "compare": "frozenlake-0"}


class Start(NamedTuple):
    """ActFocus less GRPO from one starting model, a difference for each seed, in points."""

    env: str
    name: str  # the world and the seed of the warm start
    gains: dict[str, list[float]]  # by measure; "final" only where many episodes were evaluated


def start_rows() -> list[Start]:
    """Every start of the experiments starts/..., as far as both arms have run, and the committed
    start of each world that has one of these."""
    arms_of: dict[tuple[str, str], dict[str, dict[int, Run]]] = {}
    for run in all_runs():
        name = run.experiment.removeprefix("starts/")
        if name == run.experiment:
            name = COMMITTED.get(run.experiment)
        if name and run.arm in ("grpo", "actfocus"):
            arms = arms_of.setdefault((run.env, name), {"grpo": {}, "actfocus": {}})
            arms[run.arm][run.seed] = run
    found = [Start(*key, start_gains(**arms)) for key, arms in arms_of.items()]
    found = [start for start in found if start.gains]
    others = {start.env for start in found if start.name not in COMMITTED.values()}
    found = [start for start in found if start.env in others]
    return sorted(found, key=lambda start: (WORLDS.index(start.env), start.name))


def start_gains(grpo: dict[int, Run], actfocus: dict[int, Run]) -> dict[str, list[float]]:
    """By measure, ActFocus less GRPO for each seed that both have."""
    gains: dict[str, list[float]] = {}
    for seed in sorted(grpo.keys() & actfocus.keys()):
        pair = grpo[seed], actfocus[seed]
        before, after = (run.measures() for run in pair)
        names = ["training", "area"]
        if all(run.column("final_success")[1] for run in pair):
            names.append("final")
        for name in names:
            gains.setdefault(name, []).append(after[name] - before[name])
    return gains


# ----------------------------------------------------------------------------------- the collapse
CHANGING = {  # what may leave its usual value when a run falls: name, column of the log
    "true facts": "reasoning_accuracy",
    "tokens a rollout": "response_tokens",
    "cut turns": "cut_turns",
    "entropy of reasoning": "entropy_reasoning",
    "entropy of actions": "entropy_action",
}
AROUND = 5  # iterations on either side of the best evaluation
LEFT = 0.1  # of the usual value
IN_A_ROW = 3


def left_at(values: list[float], best: int) -> int | None:
    """The first iteration from which on a column differs, for three iterations in a row, from what
    it was around the best evaluation by more than a tenth. None if it never does.

    values: one for each iteration. best: the iteration of the highest evaluation, the last of them
    if there are several. What it was is the median over the iterations best - 5 to best + 4; where
    this is 0, any other value has left.

    >>> left_at([1.0] * 10 + [1.2, 1.0, 1.2, 1.2, 1.2], best=4)
    12
    """
    usual = np.median(values[max(0, best - AROUND) : best + AROUND])
    away = np.abs(np.array(values) - usual) > LEFT * abs(usual)
    for i in range(best, len(values) - IN_A_ROW + 1):
        if away[i : i + IN_A_ROW].all():
            return i
    return None


class Collapse(NamedTuple):
    """One long run: how it went, and what changed when."""

    setting: str
    run: Run
    best: int  # the iteration of its highest evaluation, of the last one if there are several
    fell_at: int | None  # the first evaluation that is FALL points below the highest before it
    left: dict[str, int | None]  # by name in CHANGING


def collapse_rows() -> list[Collapse]:
    """Every run of the experiments collapse/..."""
    rows = []
    for run in all_runs():
        if not run.experiment.startswith("collapse/"):
            continue
        iterations, success = run.column("eval_success")
        best = iterations[int(np.flatnonzero(np.array(success) == max(success))[-1])]
        below = 100 * (np.maximum.accumulate(success) - np.array(success)) >= FALL
        fell_at = iterations[int(np.argmax(below))] if below.any() else None
        left = {name: left_at(run.column(column)[1], best) for name, column in CHANGING.items()}
        rows.append(Collapse(run.experiment.removeprefix("collapse/"), run, best, fell_at, left))
    return sorted(rows, key=lambda row: (row.setting != "usual", row.setting, row.run.arm,
                                         row.run.seed))  # fmt: skip
