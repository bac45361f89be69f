"""Arms x worlds x learning rates x seeds in one command, and how sure the answer is.

    python -m studies.compare --env frozenlake sokoban --arms grpo actfocus \\
        --seeds 0-7 --lr 1e-4 3e-4 --jobs 2 --out runs/compare

Each cell is a run of train_ppo.py with one arm, in a process and a folder of its own, and gets any
flag of train_ppo.py (--iterations 40). What is done is not run again: the same command goes
on after an interruption, or with more seeds. The first arm is the baseline: with a seed, all meet
the same prompts. --out gets the cells, and of those asked for compare.csv, table.txt, compare.png.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from arms import ARMS
from studies.stats import MEASURES, draw_seeds, measures, t_interval
from support.config import MAY_CHANGE_ON_RESUME, parse, read_config
from support.logs import COLUMNS, PANELS, column
from support.warm_start import start_folder
from train_ppo import PPOConfig

TRAINER = Path(__file__).parents[1] / "train_ppo.py"
PAIRED = ("final", "area", "training")


@dataclass(frozen=True)
class Cell:
    """One run."""

    env: str
    arm: str
    lr: float | None  # None: the world's own
    seed: int

    def folder(self, out: Path) -> Path:
        rate = "" if self.lr is None else f"-lr{self.lr:g}"
        return out / self.env / f"{self.arm}{rate}-seed{self.seed}"

    def partial(self, out: Path) -> Path:
        """The folder while it is being made."""
        return self.folder(out).with_name(f"{self.folder(out).name}.partial")

    def flags(self, rest: list[str]) -> list[str]:
        own = ["--env", self.env, "--arms", self.arm, "--seed", str(self.seed)]
        return [*rest, *own, *([] if self.lr is None else ["--lr", str(self.lr)])]


def main(argv: list[str] | None = None) -> None:
    args, rest = parse_flags(argv)
    everything = itertools.product(args.seeds, args.env, args.lr, args.arms)  # pairs end together
    cells = [Cell(env, arm, lr, seed) for seed, env, lr, arm in everything]
    configs = {cell: parse(PPOConfig, __doc__, cell.flags(rest)) for cell in cells}
    todo = [cell for cell in cells if not finished(cell, configs[cell], args.out)]
    for cell in todo:  # once, and not in every process
        if not configs[cell].model:
            start_folder(cell.env, thoughts=configs[cell].thoughts)
    print(f"{len(cells)} cells, {len(cells) - len(todo)} of them done before; {args.out}")
    failed = run_all(todo, rest, args.out, args.jobs)
    cells.sort(key=lambda cell: args.arms.index(cell.arm))
    if done := [cell for cell in cells if cell.folder(args.out).exists()]:
        report(done, args.out, args.arms[0], args.threshold)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(cells)} cells failed: say it again to try again")


def parse_flags(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """What to compare, and the flags of training."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --seed would be --seeds
    )
    parser.add_argument("--env", nargs="+", default=["frozenlake"])
    parser.add_argument("--arms", nargs="+", default=["grpo", "actfocus"], choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=seed_range, default=[range(3)], metavar="0-7")
    parser.add_argument("--lr", nargs="+", type=float, default=[None], help="(the world's own)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; if > 1, a thread each")
    parser.add_argument("--threshold", type=float, default=0.5, help="success to reach")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    args, rest = parser.parse_known_args(argv)
    args.seeds = [seed for seeds in args.seeds for seed in seeds]
    if "--seed" in {word.partition("=")[0] for word in rest}:
        parser.error("--seed is not for a comparison: say --seeds")
    for name in ("env", "arms", "seeds", "lr"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            parser.error(f"--{name} names something twice: name each once")
    if args.jobs < 1 or not args.seeds:
        parser.error("--jobs must be at least 1, and --seeds a range such as 0-7")
    return args, rest


def seed_range(text: str) -> range:
    """From "0-3" or "7"."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


# --------------------------------------------------------------------------------------- the cells
def finished(cell: Cell, config: PPOConfig, out: Path) -> bool:
    """Is the cell done? SystemExit if it was run, or begun, with other flags; those that it did not
    know yet were as they are by default."""
    config.resolve()
    done = cell.folder(out)
    usual = {name: value for name, value in vars(PPOConfig()).items() if value is not None}
    for path in (done / "config.json", cell.partial(out) / "config.json"):
        before = usual | json.loads(path.read_text()) if path.exists() else {}
        for name, value in asdict(config).items():
            if (
                name not in ("out", "device", *MAY_CHANGE_ON_RESUME)
                and before.get(name, value) != value
            ):
                was = f"{path.parent} was run with {name} {before[name]}, not {value}"
                raise SystemExit(f"{was}: choose another --out, or remove it")
    if done.exists() and not (done / "config.json").exists():
        raise SystemExit(f"{done} is not a run: remove it, or choose another --out")
    return done.exists()


def run_all(cells: list[Cell], rest: list[str], out: Path, jobs: int) -> list[Cell]:
    """Run cells, several at a time. Returns those that failed."""
    threads = {"OMP_NUM_THREADS": "1"} if jobs > 1 else {}  # else they slow each other down tenfold
    failed, processes = [], []
    with ThreadPoolExecutor(jobs) as pool:
        shared = (rest, out, os.environ | threads, processes)
        running = {pool.submit(run_cell, cell, *shared): cell for cell in cells}
        try:
            for future in tqdm(as_completed(running), "cells", len(cells), dynamic_ncols=True):
                if problem := future.result():
                    failed.append(running[future])
                    tqdm.write(f"failed: {running[future].folder(out)}: {problem}")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            raise SystemExit("interrupted; the same command goes on") from None
    return failed


def run_cell(cell: Cell, rest: list[str], out: Path, environ: dict, processes: list) -> str:
    """Run a cell, or go on with it, and name its folder at the end. Returns what went wrong."""
    partial, log = cell.partial(out), cell.partial(out).with_suffix(".txt")
    command = [sys.executable, str(TRAINER), *cell.flags(rest), "--out", str(partial)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the trainer inherits it
        except BlockingIOError:
            return f"another process is running it: wait for its end, or kill it ({log})"
        if cell.folder(out).exists():  # another process has done it meanwhile
            log.unlink()
            return ""
        file.truncate(0)
        if any(partial.glob("checkpoints/*.pt")):  # it was killed
            command += ["--resume", str(partial)]
        else:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        process = subprocess.Popen(command, env=environ, stdout=file, stderr=file, process_group=0)
        processes.append(process)
        code = process.wait()
    if code:
        said = log.read_text(encoding="utf-8").strip()
        return f"{said.splitlines()[-1] if said else f'exit code {code}'} ({log})"
    partial.rename(cell.folder(out))
    log.rename(cell.folder(out) / "output.txt")
    return ""


# -------------------------------------------------------------------------------------- the answer
Logs = dict[str, dict[int, Path]]  # by arm, by seed


def report(cells: list[Cell], out: Path, baseline: str, threshold: float) -> None:
    """Write compare.csv, the table and the picture."""
    worlds: dict[tuple[str, float], Logs] = {}  # by env and learning rate
    setting = ["env", "arm", "seed", "lr", "alpha", "beta", "signal"]
    with (out / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*setting, *COLUMNS])
        writer.writeheader()
        for cell in cells:
            folder, log = cell.folder(out), cell.folder(out) / f"{cell.arm}.csv"
            config = read_config(PPOConfig, folder / "config.json")
            values = asdict(cell) | asdict(config.chosen_arms()[cell.arm]) | {"lr": config.lr}
            with log.open(newline="", encoding="utf-8") as lines:
                for row in csv.DictReader(lines):
                    writer.writerow({name: values[name] for name in setting} | row)
            worlds.setdefault((cell.env, config.lr), {}).setdefault(cell.arm, {})[cell.seed] = log
    text = "\n\n".join(table(*key, arms, baseline, threshold) for key, arms in worlds.items())
    (out / "table.txt").write_text(f"{text}\n", encoding="utf-8")
    draw(worlds, baseline, out / "compare.png")
    print(text, f"\n{out} has compare.csv, table.txt and compare.png")


def table(env: str, lr: float, arms: Logs, baseline: str, threshold: float) -> str:
    """An arm a line: means over seeds (`reach`: of as many seeds as reach the threshold), and what
    sets it apart from the baseline seed by seed, with its 95 % interval and the seeds won."""
    found = {baseline: {}}
    for arm, logs in arms.items():
        found[arm] = {seed: measures(log, threshold) for seed, log in logs.items()}
    gains = "".join(f"{f'{name} less {baseline}':>26}" for name in PAIRED)
    names = "".join(f"{name:>9}" for name in MEASURES)
    lines = [f"{env}, lr {lr:g}", f"{'':14}{'seeds':>6}{names}{gains}"]
    for arm in arms:
        runs = found[arm]
        line = f"{arm:14}{len(runs):>6}"
        for name in MEASURES:
            values = [run[name] for run in runs.values() if run[name] < np.inf]
            few = f" ({len(values)})" if len(values) < len(runs) else ""
            line += f"{f'{np.mean(values):.1f}' + few if values else 'never':>9}"
        both = runs.keys() & found[baseline].keys()
        for name in PAIRED if both and arm != baseline else ():
            gain = [runs[seed][name] - found[baseline][seed][name] for seed in both]
            won = f"{sum(each > 0 for each in gain)}/{len(gain)}"
            line += f"{f'{np.mean(gain):+.1f} ± {t_interval(gain):.1f}, {won}':>26}"
        lines.append(line)
    return "\n".join(lines)


def draw(worlds: dict[tuple[str, float], Logs], baseline: str, path: Path) -> None:
    """Of each world and rate evaluation and training success; below, both less the baseline's."""
    figure = Figure(figsize=(12, 7 * len(worlds)), layout="constrained")
    panels = figure.subplots(2 * len(worlds), 2, squeeze=False)
    for i, ((env, lr), arms) in enumerate(worlds.items()):
        kinds = itertools.product((False, True), ("eval_success", "train_success"))
        for axes, (paired, name) in zip(panels[2 * i : 2 * i + 2].flat, kinds, strict=True):
            for arm, logs in arms.items():
                runs = {seed: column(log, name) for seed, log in logs.items()}
                if paired:
                    other = arms.get(baseline, {}) if arm != baseline else {}
                    both = runs.keys() & other.keys()
                    less = {seed: np.negative(column(other[seed], name)[1]) for seed in both}
                    runs = {seed: (runs[seed][0], runs[seed][1] + less[seed]) for seed in both}
                draw_seeds(axes, ARMS[arm], list(runs.values()))
            what = f"less {ARMS[baseline].label}'s, seed by seed" if paired else f"{env}, lr {lr:g}"
            axes.set(title=f"{PANELS[name][0]}\n{what}", xlabel="training iterations")
            axes.set_ylabel("difference of success rates" if paired else "success rate")
            if not paired:
                axes.set_ylim(0, min(1.03, axes.get_ylim()[1]))  # an interval may leave it
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.axhline(0, color="black", linewidth=0.8)
            axes.grid(alpha=0.3)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGHUP):  # a kill, a lost terminal: an interruption
        signal.signal(ending, signal.default_int_handler)
    main()
