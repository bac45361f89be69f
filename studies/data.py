"""The tables of results/data, which every page of results/ is made from, and how to read them.

    for seed, run in runs_of("rate", arm="grpo", lr=1e-4).items():
        print(seed, run.measures(threshold=0.5)["final"], run.settings["iterations"])

`studies/collect.py` writes them. There are seven:

training.csv          a row for each iteration of each training run: which run it is (experiment,
                      env, arm, lr, seed, settings) and the columns of its log
settings.json         all other flags of a run or a diagnosis, by the id in the column `settings`
diagnosis_groups.csv  a row for each group of a diagnosis (`groups.csv` of `studies.diagnose`)
correlations.csv      a row for each signal and choice of tokens of a diagnosis
signal.csv            a row for each kind of tokens and each weighting of a diagnosis
bench.csv             a row for each measurement of `studies.bench`
prompts.csv           how each prompt of some runs ended, where a page needs that
"""

from __future__ import annotations

import csv
import functools
import json
from dataclasses import dataclass
from pathlib import Path

from studies.stats import measures_of

RESULTS = Path(__file__).parents[1] / "results"
DATA = RESULTS / "data"
FIGURES = RESULTS / "figures"

RUN = ("experiment", "env", "arm", "lr", "seed", "settings")  # the columns that name a run


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table, with every value as the text that it is in the file. A table that does
    not exist yet has no rows."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows as a table. Its columns are those of all rows, in the order in which they first
    occur; a row that lacks a column leaves it empty."""
    columns = dict.fromkeys(name for row in rows for name in row)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_settings(folder: Path = DATA) -> dict[str, dict]:
    """The settings of runs and diagnoses, by id."""
    path = folder / "settings.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


# -------------------------------------------------------------------------------- training runs
@dataclass(frozen=True)
class Run:
    """One training run of one arm."""

    experiment: str  # the comparison that it belongs to
    env: str
    arm: str
    lr: float
    seed: int
    settings: dict  # its other flags, as they were named when it ran
    rows: list[dict[str, str]]  # its log, a row for each iteration

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """The iterations at which a column of the log has a value, and the values."""
        rows = [row for row in self.rows if row.get(name)]
        return [int(row["iteration"]) for row in rows], [float(row[name]) for row in rows]

    def measures(self, threshold: float = 0.5) -> dict[str, float]:
        """What runs are compared by: MEASURES of the statistics over runs."""
        training = self.column("train_success")[1]
        final = self.column("final_success")[1]
        return measures_of(self.column("eval_success"), training, threshold, final)

    @property
    def drop(self) -> float:
        """How far the last evaluation lies below the highest, in points."""
        success = self.column("eval_success")[1]
        return 100 * (max(success) - success[-1])


@functools.cache
def all_runs(folder: Path = DATA) -> list[Run]:
    """Every run of training.csv, in the order of the file."""
    settings = read_settings(folder)
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in read_table(folder / "training.csv"):
        found.setdefault(tuple(row[name] for name in RUN), []).append(row)
    return [
        Run(experiment, env, arm, float(lr), int(seed), settings[identity], rows)
        for (experiment, env, arm, lr, seed, identity), rows in found.items()
    ]


def runs_of(
    *experiments: str, env: str | None = None, arm: str | None = None, lr: float | None = None
) -> dict[int, Run]:
    """The runs of some experiments by seed, in order; None asks for any environment, arm or
    learning rate. ValueError if two of them have the same seed: the question was too wide."""
    found: dict[int, Run] = {}
    for run in all_runs():
        wanted = run.experiment in experiments and env in (None, run.env)
        if wanted and arm in (None, run.arm) and lr in (None, run.lr):
            if run.seed in found:
                raise ValueError(f"{experiments} has several runs with seed {run.seed}")
            found[run.seed] = run
    return dict(sorted(found.items()))


# ------------------------------------------------------------------------------------ diagnoses
def diagnoses(table: str) -> dict[str, list[dict[str, str]]]:
    """The rows of diagnosis_groups, correlations or signal, by diagnosis."""
    found: dict[str, list[dict[str, str]]] = {}
    for row in read_table(DATA / f"{table}.csv"):
        found.setdefault(row["experiment"], []).append(row)
    return found
