"""Add finished runs, diagnoses and benchmarks to the tables of results/data.

    python -m studies.compare --lr 1e-4 3e-4 --out runs/rate
    python -m studies.collect runs/rate                        # the experiment is called "rate"
    python -m studies.collect runs/mine --experiment longer    # or what you call it
    python -m studies.evidence                                 # draw all figures anew

Every folder below the given ones that holds a config.json is taken: a training run, alone or as
one of a comparison, or a diagnosis; and every bench.csv. An arm that has not come to its last
iteration is left out. To collect a folder twice changes nothing, and a run that was made anew takes
the place of the earlier one. A new column of the logs becomes a new column of the table, and what
an old log lacks stays empty.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from studies.data import DATA, RUN, read_settings, read_table, write_table
from support.logs import COLUMNS, log_files
from worlds.imported import world_name

# These flags are left out of settings.json: they do not change what a run measures.
NOT_SETTINGS = ("out", "resume", "save", "checkpoint_every", "no_baseline")
DIAGNOSIS = {  # file of a diagnosis: table
    "groups.csv": "diagnosis_groups.csv",
    "correlations.csv": "correlations.csv",
    "signal.csv": "signal.csv",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="Where finished runs are.")
    parser.add_argument(
        "--experiment", help="What the runs are called in the tables (default: their folder)."
    )
    parser.add_argument(
        "--prompts", action="store_true", help="Also keep how each prompt ended, in prompts.csv."
    )
    parser.add_argument(
        "--unfinished", action="store_true", help="Also take runs that were stopped early."
    )
    parser.add_argument("--data", type=Path, default=DATA, help="The folder of the tables.")
    args = parser.parse_args(argv)
    for folder in args.folders:
        experiment = args.experiment or folder.resolve().name
        collect(folder, experiment, args.data, args.prompts, args.unfinished)


def collect(
    folder: Path,
    experiment: str,
    data: Path = DATA,
    with_prompts: bool = False,
    with_unfinished: bool = False,
) -> None:
    """Add all that is below a folder to the tables in `data`."""
    new: dict[str, list[dict[str, str]]] = {}  # by table
    settings = read_settings(data)
    for path in sorted(folder.rglob("config.json")):
        if any(part.endswith(".partial") for part in path.parts):
            continue  # studies/compare.py is at work on it
        config = json.loads(path.read_text(encoding="utf-8"))
        if "iterations" in config:
            found = training_tables(path.parent, experiment, config, with_unfinished)
            if not with_prompts:
                found.pop("prompts.csv", None)
        else:
            below = path.parent.relative_to(folder).as_posix()
            name = experiment if below == "." else f"{experiment}/{below}"
            found = diagnosis_tables(path.parent, name, config)
        for table, rows in found.items():
            new.setdefault(table, []).extend(rows)
        if found:
            settings[identity(settings_of(config))] = settings_of(config)
    for path in sorted(folder.rglob("bench.csv")):
        new["bench.csv"] = [{"experiment": experiment} | row for row in read_table(path)]
    if not new:
        raise SystemExit(f"{folder} holds no finished run, diagnosis or benchmark")
    data.mkdir(parents=True, exist_ok=True)
    for table, rows in new.items():
        key = RUN if table in ("training.csv", "prompts.csv") else ("experiment",)
        write_table(data / table, merged(read_table(data / table), rows, key))
        print(f"{experiment}: {len(rows)} rows in {data / table}")
    write_settings(data / "settings.json", settings)


# ------------------------------------------------------------------------------ what a folder has
def training_tables(
    folder: Path, experiment: str, config: dict, with_unfinished: bool
) -> dict[str, list[dict[str, str]]]:
    """The rows of training.csv and prompts.csv that the folder of a training run has: of its arm,
    or of all arms in a folder of an earlier version."""
    found: dict[str, list[dict[str, str]]] = {}
    for path in log_files(folder):
        if path.parent != folder:  # an arm with a folder and settings of its own
            continue
        log = read_table(path)
        done = int(log[-1]["iteration"]) if log else 0
        if done < config["iterations"] and not with_unfinished:
            print(f"left out, since it has not come to its end: {path}")
            continue
        named = {
            "experiment": experiment,
            "env": world_name(config["env"]),
            "arm": path.stem,
            "lr": f"{config['lr']:g}",
            "seed": str(config["seed"]),
            "settings": identity(settings_of(config)),
        }
        empty = dict.fromkeys(COLUMNS, "")  # what an old log lacks
        found.setdefault("training.csv", []).extend(named | empty | row for row in log)
        for file, phase in (("prompts.csv", "training"), ("evaluations.csv", "evaluation")):
            rows = [row for row in read_table(folder / file) if row["arm"] == path.stem]
            rows = [named | {"phase": phase} | row for row in rows]
            if rows:
                found.setdefault("prompts.csv", []).extend(rows)
    return found


def diagnosis_tables(
    folder: Path, experiment: str, config: dict
) -> dict[str, list[dict[str, str]]]:
    """The rows of the three tables that a diagnosis has, as far as it has them."""
    named = {"experiment": experiment, "settings": identity(settings_of(config))}
    found = {}
    for file, table in DIAGNOSIS.items():
        rows = [named | row for row in read_table(folder / file)]
        if rows:
            found[table] = rows
    return found


def settings_of(config: dict) -> dict:
    """The settings of a config that settings.json keeps. Those of a training run are without what
    has a column in training.csv."""
    columns = ("env", "arms", "lr", "seed") if "iterations" in config else ()
    return {name: value for name, value in config.items() if name not in (*NOT_SETTINGS, *columns)}


def identity(settings: dict) -> str:
    """A short id that depends on the settings alone, so that equal settings share one."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:6]


# -------------------------------------------------------------------------------------- the tables
def merged(
    old: list[dict[str, str]], new: list[dict[str, str]], key: tuple[str, ...]
) -> list[dict[str, str]]:
    """The rows of a table with new ones. Rows with the same key belong together: new ones take the
    place of all old ones with their key, and other keys are added at the end.

    >>> old = [{"run": "a", "x": "1"}, {"run": "a", "x": "2"}, {"run": "b", "x": "3"}]
    >>> new = [{"run": "a", "x": "4"}, {"run": "c", "x": "5"}]
    >>> [row["x"] for row in merged(old, new, key=("run",))]
    ['4', '3', '5']
    """
    by_key: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in old:
        by_key.setdefault(tuple(row[name] for name in key), []).append(row)
    for each in {tuple(row[name] for name in key) for row in new}:
        if each in by_key:
            by_key[each] = []
    for row in new:
        by_key.setdefault(tuple(row[name] for name in key), []).append(row)
    return [row for rows in by_key.values() for row in rows]


def write_settings(path: Path, settings: dict[str, dict]) -> None:
    """A line for each id, so that a new one is a new line."""
    lines = [f"{json.dumps(name)}: {json.dumps(each)}" for name, each in settings.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
