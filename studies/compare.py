"""Compare arms, worlds, learning rates and seeds, and say how sure the answer is.

    python -m studies.compare --env frozenlake sokoban --arms grpo actfocus \\
        --seeds 0-7 --lr 1e-4 3e-4 --jobs 2 --out runs/compare

A cell is one arm in one world with one learning rate and one seed. It is a run of train_ppo.py, in
a process and a folder of its own, and gets any flag of train_ppo.py that you add (--iterations 40).
A finished cell is not run again: repeat the command to continue after an interruption, or repeat it
with more seeds or arms.

The first of --arms is the baseline. The arms of a seed meet the same prompts, so each arm is
compared with the baseline seed by seed. compare.csv, table.txt and compare.png are made of all
finished cells in the folder of --out whose flags are those of this command, whether or not this
command asked for them. Other finished cells are left out, and named with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import itertools
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from arms import ARMS
from studies.stats import MEASURES, draw_seeds, measures, t_interval
from support.checkpoint import has_checkpoint
from support.config import MAY_CHANGE_ON_RESUME, parse, read_config
from support.logs import COLUMNS, PANELS, column, is_finished
from support.processes import ROOT, Interruption, last_line, run_script, side_by_side
from support.warm_start import start_folder
from train_ppo import PPOConfig
from worlds.imported import is_imported, world_name

try:
    import fcntl
except ImportError:  # Windows: run one comparison at a time in a folder
    fcntl = None

TRAINER = ROOT / "train_ppo.py"
COMPARED = ("final", "area", "training")  # of MEASURES: what is compared with the baseline
MAY_DIFFER = (
    "out",
    "device",
    *MAY_CHANGE_ON_RESUME,
)  # settings that leave the result as it is, up to rounding


@dataclass(frozen=True)
class Cell:
    """What one run varies."""

    env: str
    arm: str
    lr: float | None  # None: the world's own
    seed: int

    def folder(self, out: Path) -> Path:
        """Where the finished run lies."""
        rate = "" if self.lr is None else f"-lr{self.lr:g}"
        return out / world_name(self.env) / f"{self.arm}{rate}-seed{self.seed}"

    def partial(self, out: Path) -> Path:
        """Where the run lies until it is finished."""
        return self.folder(out).with_name(f"{self.folder(out).name}.partial")

    def flags(self, shared: list[str]) -> list[str]:
        """The command line of the trainer. shared: the flags that all cells have."""
        own = ["--env", self.env, "--arms", self.arm, "--seed", str(self.seed)]
        if self.lr is not None:
            own += ["--lr", str(self.lr)]
        return [*shared, *own]


class Run(NamedTuple):
    """A finished cell, and the settings that it was run with."""

    cell: Cell
    config: PPOConfig
    log: Path


def main(argv: list[str] | None = None) -> None:
    args, shared = parse_flags(argv)
    combinations = itertools.product(args.seeds, args.env, args.lr, args.arms)
    cells = [Cell(env, arm, lr, seed) for seed, env, lr, arm in combinations]
    configs = {cell: parse(PPOConfig, __doc__, cell.flags(shared)) for cell in cells}
    to_run = {}
    for cell, config in configs.items():
        if not finished(cell, config, args.out):
            to_run[cell] = config
    for cell, config in to_run.items():  # here once, and not in several processes at a time
        if not config.model:
            start_folder(cell.env, thoughts=config.thoughts)
    print(f"{len(cells)} cells, {len(cells) - len(to_run)} of them done before; {args.out}")
    failed = run_all(to_run, shared, args.out, args.jobs)
    runs, left_out = collect(cells, shared, args.out)
    if runs:
        report(in_order(runs, args), left_out, args.out, args.arms[0], args.threshold)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(cells)} cells failed: repeat to try them again")


def parse_flags(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """What to compare, and the flags that all runs get."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # otherwise --seed would be read as --seeds
    )
    parser.add_argument("--env", nargs="+", default=["frozenlake"], help="The worlds to play in.")
    parser.add_argument(
        "--arms",
        nargs="+",
        default=["grpo", "actfocus"],
        choices=list(ARMS),
        help="The arms to train. The first is the baseline.",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=seed_range,
        default=[range(3)],
        metavar="0-7",
        help="The seeds, each a number or a range.",
    )
    parser.add_argument(
        "--lr",
        nargs="+",
        type=float,
        default=[None],
        help="The learning rates. Without this flag it is the world's own.",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="How many runs go at the same time. With more than 1, each has a single thread.",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="The evaluation success whose first iteration the column `reach` gives.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare"), help="The folder of the cells."
    )
    args, shared = parser.parse_known_args(argv)
    args.seeds = [seed for seeds in args.seeds for seed in seeds]
    if "--seed" in {word.partition("=")[0] for word in shared}:
        parser.error("--seed is not for a comparison: say --seeds")
    for name in ("env", "arms", "seeds", "lr"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            parser.error(f"--{name} names something twice: name each once")
    if len(set(map(world_name, args.env))) < len(args.env):
        parser.error("--env names two worlds of one name, whose runs would share a folder")
    if args.jobs < 1 or not args.seeds:
        parser.error("--jobs must be at least 1, and --seeds a range such as 0-7")
    return args, shared


def seed_range(text: str) -> range:
    """The seeds of a range such as "0-3", or of a number.

    >>> list(seed_range("0-3")), list(seed_range("7"))
    ([0, 1, 2, 3], [7])
    """
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


# ------------------------------------------------------------------------- what is there already
def finished(cell: Cell, config: PPOConfig, out: Path) -> bool:
    """Has the cell been run? Raises SystemExit if it was run, or begun, with other settings."""
    config.resolve()
    done = cell.folder(out)
    for folder in (done, cell.partial(out)):
        if not (folder / "config.json").exists():
            continue
        if different := difference(config, read_settings(folder)):
            raise SystemExit(
                f"{folder} was run with {different}: choose another --out, or remove it"
            )
    if done.exists() and not (done / "config.json").exists():
        raise SystemExit(f"{done} is not a run: remove it, or choose another --out")
    return done.exists()


def read_settings(folder: Path) -> PPOConfig:
    """The settings of a run. One that there was not yet has its default; one that there is no
    longer is ignored."""
    config = read_config(PPOConfig, folder / "config.json")
    config.resolve()
    return config


def difference(wanted: PPOConfig, was: PPOConfig) -> str:
    """The first setting that changes results and is not the same, in words; "" if there is none."""
    before = asdict(was)
    for name, value in asdict(wanted).items():
        if name not in MAY_DIFFER and before[name] != value:
            return f"{name} {before[name]}, not {value}"
    return ""


def collect(asked: list[Cell], shared: list[str], out: Path) -> tuple[list[Run], list[str]]:
    """The finished runs of the folder that have this command's flags, those asked for first; and a
    line for each other finished cell, with the reason why it is left out."""
    runs: dict[tuple, Run] = {}
    left_out = []
    found = found_cells(out)
    for cell in [*asked, *(cell for cell in found if cell not in asked)]:
        folder = cell.folder(out)
        if cell not in found:  # it failed
            continue
        config = read_settings(folder)
        key = cell.env, cell.arm, cell.seed, config.lr
        if is_imported(cell.env) and cell.env not in {other.env for other in asked}:
            reason = f"{cell.env}, whose code is run, is not named by this command"
        else:
            reason = reason_to_leave_out(cell, config, shared)
        if not reason and key in runs:  # a rate that was given, and is also the world's own
            reason = f"it is the same as {runs[key].log.parent}"
        if reason:
            left_out.append(f"left out: {folder}: {reason}")
        else:
            runs[key] = Run(cell, config, folder / f"{cell.arm}.csv")
    return list(runs.values()), left_out


def found_cells(out: Path) -> list[Cell]:
    """All finished cells in a folder of comparisons."""
    cells = []
    for path in sorted(out.glob("*/*/config.json")):
        stored = json.loads(path.read_text(encoding="utf-8"))
        env, arm, seed = stored.get("env"), stored.get("arms"), stored.get("seed")
        for lr in (None, stored.get("lr")):
            cell = Cell(env, arm, lr, seed)
            if cell.folder(out) == path.parent and cell not in cells:
                cells.append(cell)
    return cells


def reason_to_leave_out(cell: Cell, config: PPOConfig, shared: list[str]) -> str:
    """Why a finished cell is not what this command would have made of it; "" if it is."""
    if cell.arm not in ARMS:
        return f"there is no arm {cell.arm} any more"
    try:
        with contextlib.redirect_stderr(io.StringIO()) as message:
            wanted = parse(PPOConfig, __doc__, cell.flags(shared))
    except SystemExit:  # argparse refuses flags in this way
        return message.getvalue().strip().splitlines()[-1]
    wanted.resolve()
    if different := difference(wanted, config):
        return f"it was run with {different}"
    return ""


def in_order(runs: list[Run], args: argparse.Namespace) -> list[Run]:
    """By arm, seed, world and learning rate; what this command names comes first, in its order."""

    arms = [*args.arms, *(arm for arm in ARMS if arm not in args.arms)]

    def place(value: str | float | None, named: list) -> int:
        return named.index(value) if value in named else len(named)

    def key(run: Run) -> tuple:
        cell = run.cell
        world = place(cell.env, args.env), cell.env
        rate = place(cell.lr, args.lr), run.config.lr
        return arms.index(cell.arm), cell.seed, world, rate

    return sorted(runs, key=key)


# -------------------------------------------------------------------------------- running the cells
def run_all(cells: dict[Cell, PPOConfig], shared: list[str], out: Path, jobs: int) -> list[Cell]:
    """Run cells, several at a time. Returns those that failed. Raises SystemExit if there was an
    interruption, which every cell ends its iteration for."""
    threads = 1 if jobs > 1 else None  # with more, they slow each other down tenfold
    failed = []
    bar = tqdm(desc="cells", total=len(cells), dynamic_ncols=True)
    with bar, Interruption() as interruption:

        def work(cell: Cell) -> str:
            return run_cell(cell, cells[cell], shared, out, threads, interruption)

        for finished_now in side_by_side(work, list(cells), jobs, interruption):
            for cell, problem in finished_now:
                bar.update()
                if problem and not interruption.asked:
                    failed.append(cell)
                    tqdm.write(f"failed: {cell.folder(out)}: {problem}")
        if interruption.asked:
            raise SystemExit("interrupted; repeat the command to continue")
    return failed


def run_cell(
    cell: Cell,
    config: PPOConfig,
    shared: list[str],
    out: Path,
    threads: int | None,
    interruption: Interruption,
) -> str:
    """Run a cell, or continue it, and give its folder the final name at the end.

    The open log carries a lock, which the trainer inherits: so the cell is held for as long as
    either lives. threads: of the trainer, see `run_script`. Returns "" or what went wrong.
    """
    partial, done = cell.partial(out), cell.folder(out)
    log = partial.with_suffix(".txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        if not wait_for_lock(file, partial, interruption):
            return f"interrupted while another process ran it ({log})"
        if done.exists():  # another process has run it meanwhile
            log.unlink(missing_ok=True)
            return ""
        if not complete(cell, config, out):
            file.truncate(0)
            code = train(cell, shared, out, threads, file, interruption)
            if code:
                return f"{last_line(log) or f'exit code {code}'} ({log})"
    partial.rename(done)
    log.rename(done / "output.txt")
    return ""


def wait_for_lock(file: TextIO, folder: Path, interruption: Interruption) -> bool:
    """Lock a file as soon as no other process holds it. False if an interruption comes before."""
    if fcntl is None:
        return True
    announced = False
    while not interruption.asked:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not announced:
                tqdm.write(f"another process is running {folder}: waiting for its end")
            announced = True
            time.sleep(0.2)
    return False


def complete(cell: Cell, config: PPOConfig, out: Path) -> bool:
    """Did a trainer finish this run, and only the comparison that started it ended too early?"""
    return is_finished(cell.partial(out), cell.arm, config.iterations)


def train(
    cell: Cell,
    shared: list[str],
    out: Path,
    threads: int | None,
    file: TextIO,
    interruption: Interruption,
) -> int:
    """Run the trainer of a cell, its output going to a file. Returns its exit code."""
    partial = cell.partial(out)
    command = [str(TRAINER), *cell.flags(shared), "--out", str(partial)]
    if has_checkpoint(partial):  # it was interrupted
        command += ["--resume", str(partial)]
    else:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    return run_script(command, file, interruption, threads)


# -------------------------------------------------------------------------------------- the answer
Logs = dict[str, dict[int, Path]]  # of one world and rate: by arm, then by seed
SAME_EPISODES = (
    "±: over training seeds. All seeds and evaluations play the same evaluation episodes with the\n"
    "same random numbers, so it does not say how much depends on which episodes these are."
)


def report(
    runs: list[Run], left_out: list[str], out: Path, baseline: str, threshold: float
) -> None:
    """Write compare.csv, the table and the picture, and print the table."""
    write_csv(runs, out / "compare.csv")
    worlds: dict[tuple[str, float], Logs] = {}  # by world and learning rate
    for run in runs:
        logs = worlds.setdefault((run.cell.env, run.config.lr), {})
        logs.setdefault(run.cell.arm, {})[run.cell.seed] = run.log
    texts = [table(*world, logs, baseline, threshold) for world, logs in worlds.items()]
    texts.append(SAME_EPISODES)
    if left_out:
        texts.append("\n".join(left_out))
    text = "\n\n".join(texts)
    (out / "table.txt").write_text(f"{text}\n", encoding="utf-8")
    draw(worlds, baseline, out / "compare.png")
    print(text, f"\n{out} has compare.csv, table.txt and compare.png")


def write_csv(runs: list[Run], path: Path) -> None:
    """The logs of all runs in one table. A column that an old log lacks stays empty."""
    setting = ["env", "arm", "seed", "lr", "alpha", "beta", "signal"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*setting, *COLUMNS], extrasaction="ignore")
        writer.writeheader()
        for run in runs:
            arm = run.config.chosen_arms()[run.cell.arm]
            values = asdict(run.cell) | asdict(arm) | {"lr": run.config.lr}
            values["env"] = world_name(run.cell.env)
            with run.log.open(newline="", encoding="utf-8") as lines:
                for row in csv.DictReader(lines):
                    writer.writerow({name: values[name] for name in setting} | row)


def table(env: str, lr: float, logs: Logs, baseline: str, threshold: float) -> str:
    """A line for each arm.

    First come the means of MEASURES over its seeds; the mean of `reach` is over the seeds that
    reach the threshold, whose number stands in parentheses if it is not all. Then, over the seeds
    that both have, the mean difference to the baseline, its 95 % interval (Student's t), and in how
    many of these seeds the arm is ahead. The interval is about training seeds alone; SAME_EPISODES
    says what it leaves out.
    """
    found = {baseline: {}}
    for arm, of_arm in logs.items():
        found[arm] = {seed: measures(log, threshold) for seed, log in of_arm.items()}
    heads = f"{'':14}{'seeds':>6}" + "".join(f"{name:>9}" for name in MEASURES)
    heads += "".join(f"{f'{name} less {baseline}':>26}" for name in COMPARED)
    lines = [f"{world_name(env)}, lr {lr:g}", heads]
    for arm in logs:
        line = f"{arm:14}{len(found[arm]):>6}"
        line += "".join(f"{mean_of_seeds(found[arm], name):>9}" for name in MEASURES)
        if arm != baseline:
            for name in COMPARED:
                line += f"{difference_of_seeds(found[arm], found[baseline], name):>26}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def mean_of_seeds(runs: dict[int, dict[str, float]], name: str) -> str:
    """The mean of a measure over the seeds where it is finite. runs: measures by seed."""
    values = [run[name] for run in runs.values() if run[name] < np.inf]
    if not values:
        return "never"
    some = f" ({len(values)})" if len(values) < len(runs) else ""
    return f"{np.mean(values):.1f}{some}"


def difference_of_seeds(
    runs: dict[int, dict[str, float]], baseline: dict[int, dict[str, float]], name: str
) -> str:
    """A measure less the baseline's, over the seeds that both have; "" if there are none."""
    seeds = runs.keys() & baseline.keys()
    if not seeds:
        return ""
    gains = [runs[seed][name] - baseline[seed][name] for seed in seeds]
    ahead = sum(gain > 0 for gain in gains)
    return f"{np.mean(gains):+.1f} ± {t_interval(gains):.1f}, {ahead}/{len(gains)}"


def draw(worlds: dict[tuple[str, float], Logs], baseline: str, path: Path) -> None:
    """compare.png. For each world and learning rate: success in evaluation and in training; below,
    the same less the baseline's."""
    figure = Figure(figsize=(12, 7 * len(worlds)), layout="constrained")
    panels = figure.subplots(2 * len(worlds), 2, squeeze=False)
    for i, ((env, lr), logs) in enumerate(worlds.items()):
        above, below = panels[2 * i], panels[2 * i + 1]
        for j, name in enumerate(("eval_success", "train_success")):
            draw_success(above[j], logs, name, f"{world_name(env)}, lr {lr:g}")
            draw_differences(below[j], logs, baseline, name)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    figure.savefig(path, dpi=110)


def draw_success(axes: Axes, logs: Logs, name: str, title: str) -> None:
    """A column of the logs: the seeds of each arm and their mean."""
    for arm, of_arm in logs.items():
        draw_seeds(axes, ARMS[arm], [column(log, name) for log in of_arm.values()])
    axes.set(title=f"{PANELS[name][0]}\n{title}", ylabel="success rate")
    axes.set_ylim(0, min(1.03, axes.get_ylim()[1]))  # an interval may leave this range
    finish_axes(axes)


def draw_differences(axes: Axes, logs: Logs, baseline: str, name: str) -> None:
    """A column of the logs less the baseline's of the same seed, for each other arm."""
    of_baseline = logs.get(baseline, {})
    for arm, of_arm in logs.items():
        if arm == baseline:
            continue
        differences = []
        for seed in of_arm.keys() & of_baseline.keys():
            iterations, values = column(of_arm[seed], name)
            _, others = column(of_baseline[seed], name)
            differences.append((iterations, np.subtract(values, others)))
        draw_seeds(axes, ARMS[arm], differences)
    title = f"{PANELS[name][0]}\nless {ARMS[baseline].label}'s, seed by seed"
    axes.set(title=title, ylabel="difference of success rates")
    finish_axes(axes)


def finish_axes(axes: Axes) -> None:
    """What all panels have in common."""
    axes.set_xlabel("training iterations")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
