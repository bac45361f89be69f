"""Which training runs there are, from results/data/training.csv:

python -m studies.runs                   # a row for each experiment
python -m studies.runs rate long         # a row for each run of some experiments
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable

from arms import ARMS
from studies.data import Run, all_runs
from studies.tables import markdown


def experiments_table() -> str:
    """A row for each experiment: what was trained, on how many seeds, and for how long."""
    experiments: dict[str, list[Run]] = {}
    for run in all_runs():
        experiments.setdefault(run.experiment, []).append(run)
    heads = ("experiment", "environments", "arms", "learning rates", "seeds", "iterations", "runs")
    lines = []
    for name, runs in experiments.items():
        lines.append(
            [
                f"`{name}`",
                listed(run.env for run in runs),
                listed(sorted((run.arm for run in runs), key=list(ARMS).index)),
                listed(f"{rate:g}" for rate in sorted({run.lr for run in runs})),
                spanned(sorted({run.seed for run in runs})),
                listed(str(run.settings["iterations"]) for run in runs),
                str(len(runs)),
            ]
        )
    return markdown(heads, lines)


def listed(values: Iterable[str]) -> str:
    """Each value once.

    >>> listed(["grpo", "actfocus", "grpo"])
    'grpo, actfocus'
    """
    return ", ".join(dict.fromkeys(values))


def spanned(seeds: list[int]) -> str:
    """Seeds in order, shortened if there are no gaps.

    >>> spanned([3, 4, 5]), spanned([0, 2])
    ('3 to 5', '0, 2')
    """
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def runs_table(experiments: list[str]) -> str:
    """A row for each run: its evaluations in turn, the mean success of its training rollouts, then
    the true facts and the entropy of the first and the last iteration."""
    heads = (
        *("experiment", "env", "arm", "lr", "seed", "evaluation success, %", "training, %"),
        *("true facts, %", "entropy, nats"),
    )
    lines = []
    for run in all_runs():
        if run.experiment not in experiments:
            continue
        success = run.column("eval_success")[1]
        training = run.column("train_success")[1]
        entropy = run.column("entropy")[1]
        facts = [each for each in run.column("reasoning_accuracy")[1] if not math.isnan(each)]
        lines.append(
            [
                *(run.experiment, run.env, run.arm, f"{run.lr:g}", str(run.seed)),
                ", ".join(f"{100 * value:.1f}" for value in success),
                f"{100 * sum(training) / len(training):.1f}",
                f"{100 * facts[0]:.0f} to {100 * facts[-1]:.0f}" if facts else "not logged",
                f"{entropy[0]:.2f} to {entropy[-1]:.2f}",
            ]
        )
    if not lines:
        raise SystemExit(f"no run of {' '.join(experiments)}: `python -m studies.runs` names all")
    return markdown(heads, lines)


if __name__ == "__main__":
    print(runs_table(sys.argv[1:]) if sys.argv[1:] else experiments_table())
