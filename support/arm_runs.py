"""The folders of a run, of one arm or of several, and which of its arms are still to be trained.

    out/config.json             the settings, of all arms
    out/grpo/config.json        the same of one arm, which can be resumed alone or with the others
    out/grpo/grpo.csv, ...      its logs; and out/grpo/checkpoints, while it is not finished
    out/actfocus/...
    out/curves.png, ...         what is drawn from all of them

A run of one arm has no folders for arms: all of it stands in `out`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from support import logs
from support.checkpoint import Checkpoints, has_checkpoint, sync
from support.config import Config
from support.processes import Interruption


class ArmRun(NamedTuple):
    """What is to be trained of one arm, by itself or among several."""

    name: str
    config: Config  # with the folder of this arm, in a run of several
    checkpoints: Checkpoints


def open_run(
    config: Config, names: list[str], origin: dict, interruption: Interruption
) -> list[ArmRun]:
    """The arms to train: all of a new run, or those of an earlier one that are not finished. Raises
    SystemExit if the folder cannot be used."""
    out = Path(config.out)
    all_runs = []
    for name in names:
        own, own_origin = config, origin
        if len(names) > 1:
            own = replace(config, arms=name, out=str(out / name))
            own_origin = origin | {"arms": name}
        checkpoints = Checkpoints(
            Path(own.out), out, config.checkpoint_every, own_origin, logs.appended_files,
            interruption,
        )  # fmt: skip
        all_runs.append(ArmRun(name, own, checkpoints))
    try:
        if not config.resume:
            lay_out(config, all_runs)
            return all_runs
        if len(names) > 1 and (has_checkpoint(out) or logs.appended_files(out)):
            raise ValueError(
                "an earlier version of this code kept all arms in one folder: resume it from the "
                "commit that began it"
            )
    except (OSError, ValueError) as error:
        raise SystemExit(f"{out} cannot be used: {error}") from None
    return [
        each
        for each in all_runs
        if not logs.is_finished(Path(each.config.out), each.name, config.iterations)
    ]


def lay_out(config: Config, runs: list[ArmRun]) -> None:
    """Make the folders of a new run: settings, and a first checkpoint of each arm, which keeps what
    the arm starts from, and finds out whether the folder can be written. The settings of a run of
    several arms come last, so that one that can be resumed is complete."""
    if logs.holds_logs(Path(config.out)):  # of a run that ended while this one loaded its model
        raise ValueError("it holds an earlier run: choose another folder")
    for each in runs:
        Path(each.config.out).mkdir(exist_ok=True)
        write_settings(each.config)
        if config.checkpoint_every:
            each.checkpoints.save({"iteration": 0})
    if len(runs) > 1:
        write_settings(config)


def write_settings(config: Config) -> None:
    """config.json, in the folder of a run."""
    path = Path(config.out) / "config.json"
    path.write_text(json.dumps(asdict(config), indent=2) + "\n")
    sync(path)
