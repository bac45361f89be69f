"""The arms of a run side by side, each in a process of its own, and what the user sees of them.

An arm is trained by the script that was started, which runs once more for it alone, in the arm's
folder. This process sleeps, and twice a second looks at what the arms have written: their logs make
a bar for each arm and the common curves.png, and notes in their output are passed on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from arms import Arm
from support import logs, memory
from support.checkpoint import has_checkpoint, how_to_resume
from support.config import Config, flags_of
from support.folder import writing
from support.processes import Interruption, last_line, run_script, side_by_side, usable_cores
from support.warm_start import start_folder

# Parameters up to which a model is small: the built-in ones have 0.4M, SmolLM2 has 135M.
SMALL = 10_000_000
OUTPUT = "output.txt"  # all that the process of an arm says, in the arm's folder


def choose_threads(model: torch.nn.Module, config: Config) -> None:
    """Let a small model on a CPU compute with one thread, and a large one with no more than this
    process can keep busy, unless OMP_NUM_THREADS says how many."""
    if config.device != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return
    threads = 1 if is_small(model) else min(torch.get_num_threads(), usable_cores())
    torch.set_num_threads(threads)


def is_small(model: torch.nn.Module) -> bool:
    """Is this a model that computes faster with one thread than with several, as soon as any other
    process needs the processor?"""
    return sum(p.numel() for p in model.parameters()) <= SMALL


def arms_at_once(
    model: torch.nn.Module, config: Config, arms: dict[str, Arm], to_train: int
) -> int:
    """How many arms go side by side: those of a small model on a CPU, as many as there are cores
    and memory for. A large model and a GPU are kept busy by one arm."""
    if config.device != "cpu" or not is_small(model) or to_train < 2:
        return 1
    cores = usable_cores() // torch.get_num_threads()
    if cores < 2:
        return 1
    folder = config.model or start_folder(config.env, thoughts=config.thoughts)
    return max(1, min(to_train, cores, memory.how_many_fit(folder, config, arms.values())))


def train_side_by_side(
    script: str, configs: dict[str, Config], out: Path, at_once: int, interruption: Interruption
) -> None:
    """Train arms in processes, `at_once` at a time.

    script: trains one arm, with the flags of its config. configs: by arm, each with a folder of its
    own. out: the folder of the whole run. An arm that fails does not end the others. Raises
    SystemExit at the end if one has failed, or if there was an interruption, which every arm ends
    its iteration for and saves a checkpoint.
    """
    print(f"{len(configs)} arms, {at_once} at a time, in processes that each need this memory")
    threads = torch.get_num_threads()

    def train(name: str) -> str:
        return train_in_process(script, name, configs[name], threads, interruption)

    bars = [
        tqdm(desc=name, total=config.iterations, position=position, dynamic_ncols=True)
        for position, (name, config) in enumerate(configs.items())
    ]
    problems: list[str] = []
    passed_on: set[str] = set()
    evaluations = 0
    with contextlib.closing(side_by_side(train, list(configs), at_once, interruption)) as steps:
        for finished in steps:
            problems += [problem for _, problem in finished if problem]
            for bar, (name, config) in zip(bars, configs.items(), strict=True):
                show_progress(bar, Path(config.out) / f"{name}.csv")
                for note in notes_in(Path(config.out) / OUTPUT):
                    if note not in passed_on:
                        tqdm.write(note)
                    passed_on.add(note)
            earlier, evaluations = evaluations, number_of_evaluations(out)
            if evaluations > earlier:
                logs.draw(out)
    for bar in bars:
        bar.close()
    first = next(iter(configs.values()))
    how = how_to_resume(out, first.checkpoint_every, first.env)
    if problems:
        raise SystemExit("\n".join([*problems, f"the other arms have been trained; {how}"]))
    if interruption.asked:
        raise SystemExit(f"interrupted; {how}")


def train_in_process(
    script: str, name: str, config: Config, threads: int, interruption: Interruption
) -> str:
    """Train one arm in a process, from its last checkpoint if it has one. Returns what went wrong,
    or "" if nothing did or if it was interrupted."""
    out = Path(config.out)
    path = out / OUTPUT
    if has_checkpoint(out):
        config = replace(config, resume=config.out)
    with writing(path), path.open("w", encoding="utf-8") as output:
        code = run_script([script, *flags_of(config)], output, interruption, threads)
    reason = last_line(path)
    if code < 0:
        reason = f"its process was ended by signal {-code}"
    if code == 0 or (interruption.asked and (code < 0 or reason.startswith("interrupted"))):
        return ""
    return f"{name} failed: {reason} ({path})"


def show_progress(bar: tqdm, log: Path) -> None:
    """Set a bar to the iterations that the log of its arm has."""
    if not log.exists():
        return
    _, success = logs.column(log, "train_success")
    if len(success) != bar.n:
        bar.n = len(success)
        bar.set_postfix_str(f"training success {success[-1]:.2f}" if success else "")


def notes_in(path: Path) -> Iterator[str]:
    """The notes in the output of an arm, as far as it has begun its run: what it noted before, such
    as of its model, this process has noted as well."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    _, _, since = text.partition("results go to ")
    for line in since.split("\n")[:-1]:  # the last one may be half written
        if line.startswith("note:"):
            yield line


def number_of_evaluations(out: Path) -> int:
    """Of all arms of a run, together."""
    return sum(len(logs.column(path, "eval_success")[0]) for path in logs.log_files(out))
