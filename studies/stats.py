"""Statistics over several runs: what a run is measured by, and how sure a mean over seeds is.

    measured = [measures(log, threshold=0.5) for log in logs_of_one_arm]    # a log for each seed
    area = [each["area"] for each in measured]
    print(f"{np.mean(area):.1f} ± {t_interval(area):.1f}")

What a single run writes, and how its logs are read, stands in support/logs.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from arms import Arm
from support.logs import column

# The 97.5 % quantiles of Student's t distribution, by degrees of freedom from 1 to 30. A table,
# since none of the packages that the project requires computes them: that would take scipy.
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

MEASURES = {  # each is one number for a run; runs of several seeds are compared by them
    "final": "success of the last evaluation, in percentage points: of all its episodes, also "
    "where --final-eval-episodes gave it more",
    "peak": "the highest mean of three evaluations in a row, in points",
    "fall": "from that peak to the mean of the last three evaluations, in points",
    "area": "area under the evaluations (mean evaluation success), in points",
    "training": "mean success of all training rollouts, in points",
    "reach": "iterations until an evaluation first reaches a threshold; inf if none does",
}
FALL = 10  # points: a run falls if its last evaluation is so far below the highest


def measures(log: Path, threshold: float) -> dict[str, float]:
    """The MEASURES of one run, read from its log.

    log: a CSV of support/logs.py with at least one evaluation and one iteration of training.
    threshold: the evaluation success, in [0, 1], that `reach` waits for.

    `area` has this one name in code. In words it is the area under the evaluations, or mean
    evaluation success: evaluations are joined by straight lines, and the area below them is
    divided by the number of iterations. It rewards learning early as well as ending high.
    """
    training = column(log, "train_success")[1]
    final = column(log, "final_success")[1]
    return measures_of(column(log, "eval_success"), training, threshold, final)


def measures_of(
    evaluations: tuple[Sequence[int], Sequence[float]],
    training: Sequence[float],
    threshold: float,
    final: Sequence[float] = (),
) -> dict[str, float]:
    """The MEASURES of one run. evaluations: their iterations and success rates; training: the
    success rate of each iteration's rollouts; threshold: as in `measures`; final: the success rate
    over --final-eval-episodes, if it was measured. All but `final` are of the usual episodes."""
    iterations, success = (np.array(values) for values in evaluations)
    smoothed = success
    if len(success) > 2:
        smoothed = np.convolve(success, np.full(3, 1 / 3), "valid")  # means of three in a row
    return {
        "final": 100 * (final[-1] if final else success[-1]),
        "peak": 100 * smoothed.max(),
        "fall": 100 * (smoothed.max() - smoothed[-1]),
        "area": 100 * np.trapezoid(success, iterations) / iterations[-1],
        "training": 100 * float(np.mean(training)),
        "reach": min(iterations[success >= threshold], default=np.inf),
    }


def t_interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of a mean, by Student's t.

    values: independent measurements, one a seed. A single value has an interval of inf; if a value
    is nan, so is the interval. Beyond 31 values the quantile is approximated by 1.96 + 2.4 / (n-1),
    which is off by 0.002 at most.

    >>> round(t_interval([1.0, 2.0, 3.0]), 3)  # 4.303 * 1 / sqrt(3)
    2.484
    """
    n = len(values)
    if n < 2:
        return math.inf
    quantile = T_975[n - 2] if n - 2 < len(T_975) else 1.96 + 2.4 / (n - 1)
    return quantile * float(np.std(values, ddof=1)) / math.sqrt(n)


def share_interval(some: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score: of 0 in 8, it is 0 to 0.32.

    >>> [round(end, 3) for end in share_interval(0, 8)], [round(e, 3) for e in share_interval(4, 8)]
    ([0.0, 0.324], [0.215, 0.785])
    """
    z2 = 1.96**2
    middle = (some + z2 / 2) / (of + z2)
    half = 1.96 * math.sqrt(some * (of - some) / of + z2 / 4) / (of + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def draw_seeds(axes: Axes, arm: Arm, runs: Sequence[tuple[Sequence[int], Sequence[float]]]) -> None:
    """Draw the runs of one arm: each seed as a faint line, their mean as a thick one with its 95 %
    interval around it.

    runs: a pair (iterations, values) for each seed. The iterations are the same for all; a list
    without runs draws nothing.
    """
    if not runs:
        return
    iterations = runs[0][0]
    values = np.array([values for _, values in runs])  # (seeds, iterations)
    mean = values.mean(axis=0)
    half = np.array([t_interval(at_one_iteration) for at_one_iteration in values.T])
    faint = min(0.4, 1.2 / len(runs))
    axes.plot(iterations, values.T, color=arm.color, linewidth=0.7, alpha=faint)
    marker = "o" if len(iterations) == 1 else None
    axes.plot(iterations, mean, color=arm.color, linewidth=2, marker=marker, label=arm.label)
    if len(runs) > 1:
        axes.fill_between(iterations, mean - half, mean + half, color=arm.color, alpha=0.08)
