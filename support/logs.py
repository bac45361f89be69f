"""What one run leaves behind: CSV logs, a picture of its curves, a summary, sample transcripts.

    log(out / "grpo.csv", {"iteration": 0, "eval_success": 0.25})    # append a row
    draw(out)                                                        # curves.png, from the CSVs
    print(summary(out))                                              # a table, from the CSVs

There is one CSV an arm with one row an iteration. Everything that is drawn or summarised is read
from the CSVs, so a run that is interrupted keeps whatever it has done. Statistics over several runs
stand in studies/stats.py.

A run of one arm is a folder with its files. A run of several arms is a folder of such folders,
named after the arms (out/grpo, out/actfocus); what is drawn from all of them stands beside these.
Earlier versions wrote the files of all arms into one folder, which can still be drawn.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor
from tqdm import tqdm

from arms import ARMS
from fused_loss import PolicyLoss
from policy import Policy
from rollout import Rollouts
from segment import Segment
from support.checkpoint import has_checkpoint
from support.folder import writing
from worlds.imported import world_name

# The columns of a log. Row k describes the policy after k iterations, and what it plays then.
COLUMNS = {
    "iteration": "how many iterations came before this row",
    "eval_success": "success rate of the fixed evaluation episodes (at --eval-temperature)",
    "eval_reward": "mean reward of an evaluation episode, summed over its turns",
    "eval_stderr": "standard error of eval_success, over prompts",
    "final_success": "success rate of all --final-eval-episodes, after the last iteration",
    "final_stderr": "standard error of final_success, over prompts",
    "eval_finished": "share of evaluation episodes that the game itself ended (goal reached, hole, "
    "last mistake, any purchase), and not the limit of turns",
    "train_success": "success rate of all rollouts that the iteration played (at --temperature)",
    "train_reward": "their mean reward, summed over turns",
    "train_finished": "share of them that the game itself ended, and not the limit of turns",
    "equal_groups": "share of groups whose rewards are all equal: such a group teaches nothing",
    "loss": "mean over tokens, with entropy bonus and KL; it is near zero by construction",
    "entropy": "mean entropy of the policy at a generated token, in nats",
    "entropy_reasoning": "the same at a reasoning token",
    "entropy_action": "the same at an action token",
    "kl": "KL from the policy that played to the one being updated, per token (k3 estimate)",
    "kl_reasoning": "the same per reasoning token",
    "kl_action": "the same per action token",
    "kl_reference": "KL from the policy that played to the frozen reference, per token (k1 "
    "estimate; only with --kl-coef)",
    "clip_fraction": "share of generated tokens whose probability ratio is clipped",
    "sampling_gap": "largest difference, in nats, between the log-prob of a token when it was "
    "sampled and in the first training pass, before the policy has moved: rounding",
    "grad_norm": "norm of the gradient before clipping, mean over the updates",
    "skipped_updates": "updates that were left out because their gradient was not finite",
    "distance": "how far the updates have brought the weights from those at the start: the L2 norm "
    "of the difference over that of the start",
    "gradient_agreement": "mean cosine between the gradients of successive mini-batches (empty for "
    "models of over 200M parameters)",
    "advantage_mean": "mean advantage of a generated token",
    "advantage_std": "standard deviation of the advantage over generated tokens",
    "value_loss": "squared error of PPO's critic before it is fitted to these rollouts",
    "explained_variance": "share of the variance of returns that PPO's critic predicted",
    "turns": "assistant turns per episode (this and all below: of the groups that --keep-groups "
    "keeps)",
    "cut_turns": "share of turns without an end-of-turn token: most of them met a limit of length",
    "response_tokens": "generated tokens per episode",
    "action_fraction": "share of ACTION tokens among the generated ones",
    "reasoning_accuracy": "share of the facts stated in the reasoning that are true",
    "turns_without_facts": "share of turns whose reasoning states no fact that could be checked",
    "mean_weight": "mean weight of a generated token: a reasoning token's share of the update "
    "changes by alpha / mean_weight",
    "reasoning_weight_share": "share of the total weight that lies on reasoning tokens",
    "seconds": "duration of the iteration without its evaluation",
    "seconds_play": "duration of playing alone",
}
PANELS = {  # of curves.png; column: title, label of the y axis
    "eval_success": ("Evaluation on fixed episodes", "success rate"),
    "train_success": ("Success of training rollouts", "success rate"),
    "train_reward": ("Reward of training rollouts", "mean per episode"),
    "entropy": ("Entropy of the policy", "nats per token"),
    "reasoning_weight_share": ("Weight on reasoning tokens", "share of all weight"),
    "reasoning_accuracy": ("Facts stated in reasoning", "share that is true"),
    "turns_without_facts": ("Turns that state no fact", "share of turns"),
    "gradient_agreement": ("Agreement of mini-batches", "cosine of gradients"),
}
LARGE_PANELS = ("eval_success", "train_success")  # what a newcomer looks at first
SMALL_PANELS = tuple(name for name in PANELS if name not in LARGE_PANELS)
SHARES = (*LARGE_PANELS, "reasoning_weight_share", "reasoning_accuracy", "turns_without_facts")
CLASSES = {"reasoning": Segment.REASONING, "action": Segment.ACTION}  # that have own columns
LINES = 4  # the most that a panel may have
MANY = 40  # values from which on a line is smoothed
SMOOTHED = 9  # iterations that a running mean is taken over
LARGE = 200_000_000  # parameters: a copy of the gradient of a larger model may not fit


# ------------------------------------------------------------------------------- files of a run
def log(path: Path, row: dict[str, float]) -> None:
    """Append a row to a CSV with a column for each of COLUMNS; one without a value stays empty.
    Raises ValueError for a key that is no column, and RunFolderError if it cannot be written."""
    new = not path.exists()
    with writing(path), path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(COLUMNS))
        if new:
            writer.writeheader()
        writer.writerow(rounded(row))


def rounded(row: dict) -> dict:
    """The row with its floats as they stand in a CSV: text of six significant digits.

    >>> rounded({"iteration": 3, "loss": 1 / 3})
    {'iteration': 3, 'loss': '0.333333'}
    """
    return {
        name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()
    }


def log_prompts(
    path: Path, arm: str, iteration: int, prompts: Sequence[int], rollouts: Rollouts
) -> None:
    """Append to a CSV the success rate of each group of an iteration. Arms play the same prompts,
    so these rows pair the arms of a run.

    prompts: the P seeds of the prompts; rollouts: P groups of equal size, in the same order.
    Raises RunFolderError if it cannot be written.
    """
    new = not path.exists()
    groups = rollouts.success.float().view(len(prompts), -1)  # (P, G)
    with writing(path), path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(("arm", "iteration", "prompt", "success"))
        for prompt, success in zip(prompts, groups.mean(dim=1).tolist(), strict=True):
            writer.writerow((arm, iteration, prompt, f"{success:.6g}"))


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write a CSV of rows that all have the same keys."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(map(rounded, rows))


def write_samples(path: Path, title: str, policy: Policy, rollouts: Rollouts) -> None:
    """Append the first two transcripts to a text file, whole and with control tokens. Raises
    RunFolderError if it cannot be written."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        for row in range(min(2, len(rollouts.ids))):
            text = policy.tokenizer.decode(rollouts.ids[row, : rollouts.lengths[row]].tolist())
            ending = "success" if rollouts.success[row] else "failure"
            file.write(f"===== {title}: {ending}\n{text}\n\n")


def log_files(out: Path) -> list[Path]:
    """The logs of a run, one an arm, in the order of `arm_names`."""
    paths = (arm_file(out, name, f"{name}.csv") for name in arm_names(out))
    return [path for path in paths if path.exists()]


def arm_names(out: Path) -> list[str]:
    """All arms: first those of the run's --arms, in their order, so that the first is what the
    others are compared with."""
    named = str(settings_of(out).get("arms") or "").split(",")
    names = [name for name in named if name in ARMS]
    return names + [name for name in ARMS if name not in names]


def arm_file(out: Path, arm: str, name: str) -> Path:
    """Where a file of an arm stands, or would stand: in the run's folder if it has one arm (or if
    an earlier version wrote it), else in the arm's own folder below it."""
    path = out / name
    return path if path.exists() else out / arm / name


def settings_of(out: Path) -> dict:
    """The settings in the folder of a run; {} if they are not there."""
    try:
        settings = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def appended_files(out: Path) -> list[Path]:
    """The files in the folder of a run of one arm that grow by appending. A resumed run cuts them
    back to the length that they had when it was saved; any other file is written whole each time.
    """
    own_logs = [path for path in log_files(out) if path.parent == out]
    others = (out / name for name in ("prompts.csv", "evaluations.csv", "samples.txt"))
    return own_logs + [path for path in others if path.exists()]


def holds_logs(out: Path) -> bool:
    """Has a run, of one arm or of several, begun to write in this folder?"""
    return bool(log_files(out) or appended_files(out))


def is_finished(out: Path, arm: str, iterations: int) -> bool:
    """Has a run of one arm come to its end? Then its log has the evaluation after the last
    iteration, and its checkpoints, which are removed last, are gone."""
    path = out / f"{arm}.csv"
    if not path.exists() or has_checkpoint(out):
        return False
    return iterations in column(path, "eval_success")[0]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; once that is done, it takes the name. Whoever opens `path`
    finds the old content or the new one, also if the process dies or the power fails on the way.
    Raises RunFolderError if it cannot be written.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "page.html"
    >>> with whole_file(path) as aside:
    ...     _ = aside.write_text("a page")
    ...     path.exists()
    False
    >>> path.read_text(), aside.exists()
    ('a page', False)
    """
    aside = path.with_stem(f"{path.stem}.unfinished")  # the ending says which format it has
    with writing(path):
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)


def column(path: Path, name: str) -> tuple[list[int], list[float]]:
    """The iterations at which a column of a log has a value, and these values."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get(name)]
    return [int(row["iteration"]) for row in rows], [float(row[name]) for row in rows]


# ---------------------------------------------------------------------------------- curves.png
def draw(out: Path) -> None:
    """Draw curves.png from the logs in a folder, if there are any: two large panels on success and
    six small ones below. A run calls it after each evaluation, so that it can be watched; the
    picture in the folder is whole at any moment.

    A panel has at most four lines. A run of more arms gets further rows of panels, each with the
    first arm once more, to compare with.
    """
    paths = log_files(out)
    if not paths:
        return
    first, others = paths[0], paths[1:]
    step = LINES - 1
    blocks = [[first, *others[i : i + step]] for i in range(0, max(1, len(others)), step)]
    figure = Figure(figsize=(13, 8.2 * len(blocks)))
    subfigures = figure.subfigures(len(blocks), 1, squeeze=False).flat
    for subfigure, some in zip(subfigures, blocks, strict=True):
        subfigure.suptitle(title_of(out), x=0.06, y=0.985, ha="left", va="top", weight="bold")
        draw_block(subfigure, some)
    with whole_file(out / "curves.png") as aside:
        figure.savefig(aside, dpi=100)


def title_of(out: Path) -> str:
    """What was run, in one line, from the settings in its folder; empty if they are not there."""
    settings = settings_of(out)
    try:
        model = Path(settings["model"]).name if settings["model"] else "built-in model"
        rollouts = settings["prompts"] * settings["group_size"]
        return f"{world_name(settings['env'])}, {model}, {rollouts} rollouts an iteration"
    except KeyError:
        return ""


def draw_block(figure: SubFigure, paths: list[Path]) -> None:
    """Draw every panel for some of the arms. The large panels name their lines; the small ones use
    the same colours."""
    above = figure.add_gridspec(1, 2, left=0.06, right=0.89, top=0.89, bottom=0.53, wspace=0.4)
    below = figure.add_gridspec(
        2, 3, left=0.06, right=0.98, top=0.43, bottom=0.07, wspace=0.28, hspace=0.5
    )
    for name, place in zip(LARGE_PANELS, above, strict=True):
        axes = figure.add_subplot(place)
        draw_panel(axes, name, paths, linewidth=2.2)
        axes.set_title(PANELS[name][0], loc="left", fontsize=12)
        axes.set_xlabel("training iterations")
        label_lines(axes, paths, name)
    for name, place in zip(SMALL_PANELS, below, strict=True):
        axes = figure.add_subplot(place)
        draw_panel(axes, name, paths, linewidth=1.5)
        axes.set_title(PANELS[name][0], loc="left", fontsize=10)
        axes.yaxis.label.set_fontsize(9)
        axes.tick_params(labelsize=8)
        if place.is_last_row():
            axes.set_xlabel("training iterations", fontsize=9)


def draw_panel(axes: Axes, name: str, paths: list[Path], linewidth: float) -> None:
    """Draw a column of some logs, one line an arm. Where a log has many values their running mean
    is drawn over them, since they jump from one set of prompts to the next."""
    note = ""
    for path in paths:
        color = ARMS[path.stem].color
        iterations, values = column(path, name)
        if name == "eval_success":
            note = "shaded: ± one standard error"
            shade_error(axes, path)
        elif len(values) > MANY:
            note = f"thick: mean of {SMOOTHED} iterations"
            axes.plot(iterations, values, color=color, linewidth=0.7, alpha=0.4)
            half = SMOOTHED // 2
            iterations = iterations[half:-half]
            values = np.convolve(values, np.full(SMOOTHED, 1 / SMOOTHED), "valid")
        marker = "o" if name == "eval_success" or len(values) == 1 else None
        axes.plot(iterations, values, color=color, linewidth=linewidth, marker=marker)
    if name in LARGE_PANELS:
        axes.set_title(note, loc="right", fontsize=9, color="gray")
    scale(axes, name)
    axes.set_ylabel(PANELS[name][1])
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def scale(axes: Axes, name: str) -> None:
    """Scale the y axis: shares from 0 to 100 %, success rates from 0 to what they reach, any other
    quantity from 0, or from its lowest value if that is negative."""
    low, high = axes.dataLim.intervaly
    if not low <= high:  # there is no value yet
        low, high = 0.0, 1.0
    if name in SHARES:
        top = 1.04
        if name in LARGE_PANELS:
            top = min(top, max(0.1, 1.1 * high))
        axes.set_ylim(0, top)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    else:
        axes.set_ylim(1.08 * min(0.0, low), 1.08 * max(0.0, high) or 1.0)


def shade_error(axes: Axes, path: Path) -> None:
    """Shade one standard error around the evaluations of a log, as far as it lies in [0, 1]."""
    iterations, success = column(path, "eval_success")
    error = column(path, "eval_stderr")[1]
    if len(error) < len(success):  # a log of before this column
        return
    low = np.subtract(success, error).clip(0, 1)
    high = np.add(success, error).clip(0, 1)
    axes.fill_between(iterations, low, high, color=ARMS[path.stem].color, alpha=0.13, linewidth=0)


def label_lines(axes: Axes, paths: list[Path], name: str) -> None:
    """Write the name of each arm to the right of its line, and no two names over each other."""
    drawn = [path for path in paths if column(path, name)[1]]
    lines = [line for line in axes.lines if line.get_linewidth() > 1]  # not the faint ones
    ends = [line.get_ydata()[-1] for line in lines if len(line.get_ydata())]
    names = [textwrap.fill(ARMS[path.stem].label, 15) for path in drawn]
    tallest = max((text.count("\n") + 1 for text in names), default=1)
    heights = spread(ends, gap=0.058 * tallest * axes.get_ylim()[1])
    right = axes.get_xlim()[1]
    for path, text, height in zip(drawn, names, heights, strict=True):
        axes.annotate(
            text, (right, height), xytext=(4, 0), textcoords="offset points",
            color=ARMS[path.stem].color, weight="bold", va="center", annotation_clip=False,
        )  # fmt: skip


def spread(heights: list[float], gap: float) -> list[float]:
    """The heights, moved as little as it takes to have them at least `gap` apart, in their order.

    >>> [round(height, 2) for height in spread([0.5, 0.9, 0.52], gap=0.1)]
    [0.46, 0.9, 0.56]
    """
    order = sorted(range(len(heights)), key=heights.__getitem__)  # from the lowest to the highest
    moved = list(heights)
    for _ in range(100):  # neighbours that are too close give way by equal parts
        for lower, upper in itertools.pairwise(order):
            overlap = gap - (moved[upper] - moved[lower])
            if overlap > 0:
                moved[lower] -= overlap / 2
                moved[upper] += overlap / 2
    return moved


# ------------------------------------------------------------------------------------- summary
def summary(out: Path) -> str:
    """What a run has come to, as text for the terminal: a table with a line for each arm, then each
    arm against the first one, prompt by prompt, and where the pictures are."""
    paths = [path for path in log_files(out) if column(path, "eval_success")[1]]
    lines = [
        "                ------------- success in evaluation --------    success in  seconds per",
        "arm             before    best   after  ± std. error  change      training    iteration",
    ]
    lines += [summary_line(path) for path in paths]
    lines.append(
        "before, after: before and after training. change: in percentage points. success in "
        "training: the\nmean over all rollouts of the run."
    )
    lines.append(
        "± std. error: over the prompts of one evaluation. Every evaluation plays the same prompts "
        "with\nthe same random numbers, whatever --seed is."
    )
    trained = [path for path in paths if column(path, "train_success")[1]]
    for path in trained[1:]:
        lines += compared(path, trained[0])
    pages = {"curves.png": "the curves", "episodes.html": "episodes before and after training"}
    for name, content in pages.items():
        if (out / name).exists():
            lines.append(f"{content}: {out / name}")
    return "\n".join(lines)


def summary_line(path: Path) -> str:
    """The line of one arm in the summary's table."""
    success = column(path, "eval_success")[1]
    error = column(path, "eval_stderr")[1]
    training = column(path, "train_success")[1]
    seconds = column(path, "seconds")[1]
    line = f"{path.stem:14}{success[0]:>8.1%}{max(success):>8.1%}{success[-1]:>8.1%}"
    line += f"{error[-1]:>14.1%}{100 * (success[-1] - success[0]):>+8.1f}"
    if training:
        line += f"{np.mean(training):>14.1%}{np.mean(seconds):>13.1f}"
    return line


def compared(path: Path, baseline: Path) -> list[str]:
    """Lines that compare an arm with another, over the prompts that both have played. path,
    baseline: their logs."""
    last = min(column(log, "eval_success")[0][-1] for log in (path, baseline))
    played = (success_by_prompt(log, "prompts.csv") for log in (path, baseline))
    evaluated = (success_by_prompt(log, "evaluations.csv", last) for log in (path, baseline))
    return [
        f"{path.stem} minus {baseline.stem}, in percentage points, over the prompts that both "
        "played (of one seed; another may differ):",
        f"  in training: {difference_in_words(*paired_difference(*played))}",
        f"  evaluation after {last} iterations: "
        f"{difference_in_words(*paired_difference(*evaluated))}",
    ]


def success_by_prompt(
    log: Path, name: str, iteration: int | None = None
) -> dict[tuple[str, str], float]:
    """The success rate of each group that an arm has played, by iteration and prompt.

    log: of the arm. name: of a CSV of `log_prompts` beside it. iteration: only this one; None: all.
    """
    with log.with_name(name).open(newline="", encoding="utf-8") as file:
        return {
            (row["iteration"], row["prompt"]): float(row["success"])
            for row in csv.DictReader(file)
            if row["arm"] == log.stem and iteration in (None, int(row["iteration"]))
        }


def paired_difference(
    arm: dict[tuple[str, str], float], baseline: dict[tuple[str, str], float]
) -> tuple[float, float, int]:
    """The success rate of an arm minus that of another, over the groups of the same prompt in the
    same iteration that both have played.

    arm, baseline: from `success_by_prompt`. Returns the mean difference, its standard error (nan
    for fewer than two pairs) and the number of pairs.
    """
    gains = torch.tensor([arm[pair] - baseline[pair] for pair in arm.keys() & baseline.keys()])
    error = (gains.std() / len(gains) ** 0.5).item() if len(gains) > 1 else math.nan
    return gains.mean().item(), error, len(gains)


def difference_in_words(mean: float, error: float, prompts: int) -> str:
    """A paired difference as a sentence: it is more than noise if it exceeds two standard errors.

    >>> difference_in_words(0.25, 0.1, 64)
    '+25.0, standard error 10.0 over 64 prompts: more than noise'
    """
    judgement = "more than noise" if abs(mean) > 2 * error else "not more than noise"
    if prompts < 8:
        judgement = "too few to tell"
    numbers = f"{100 * mean:+.1f}, standard error {100 * error:.1f} over {prompts} prompts"
    return f"{numbers}: {judgement}"


# -------------------------------------------------------------------------------- measurements
def outcomes(rollouts: Rollouts, phase: str) -> dict[str, float]:
    """How the episodes ended, as columns of the log. phase: "eval" or "train"."""
    return {
        f"{phase}_success": rollouts.success.float().mean().item(),
        f"{phase}_reward": rollouts.rewards.mean().item(),
        f"{phase}_finished": rollouts.finished.float().mean().item(),
    }


def standard_error(success: Tensor, group_size: int) -> float:
    """The standard error of the mean of B successes, (B,) bool, in consecutive groups. Rollouts of
    one prompt are not independent, so it is computed over the means of the groups; it is 0 for a
    single group.

    >>> standard_error(torch.tensor([1, 1, 0, 0]).bool(), group_size=1)
    0.28867512941360474
    >>> standard_error(torch.tensor([1, 1, 0, 0]).bool(), group_size=2)
    0.5
    """
    means = success.float().view(-1, group_size).mean(dim=1)  # (prompts,)
    if len(means) == 1:
        return 0.0
    return (means.std() / len(means) ** 0.5).item()


def equal_groups(rewards: Tensor, group_size: int) -> float:
    """The share of the groups of (B,) rewards in which all rewards are equal.

    >>> equal_groups(torch.tensor([1.0, 0.0, 2.0, 2.0]), group_size=2)
    0.5
    """
    groups = rewards.view(-1, group_size)  # (P, G)
    return (groups == groups[:, :1]).all(dim=1).float().mean().item()


class UpdateMeter:
    """What is logged of an iteration's updates: means over tokens, and over optimizer steps.

    Sums stay on the device until `columns` reads them, since reading one makes a GPU wait.
    """

    def __init__(self, clip_low: float, clip_high: float):
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.sums: dict[str, Tensor] = {}  # float64 scalars
        self.norms: list[float] = []
        self.cosines: list[Tensor] = []
        self.last_gradient: Tensor | None = None
        self.gaps: list[Tensor] = []

    @torch.no_grad()
    def add_micro_batch(
        self,
        result: PolicyLoss,
        old_logprob: Tensor,
        advantage: Tensor,
        labels: Tensor,
        count: Tensor,
    ) -> None:
        """All but `count`, the tokens of the whole mini-batch, are of N tokens; labels: Segment."""
        log_ratio = result.logprob - old_logprob
        ratio = log_ratio.exp()
        above = (ratio > 1 + self.clip_high) & (advantage > 0)
        below = (ratio < 1 - self.clip_low) & (advantage < 0)
        entropy = result.entropy.double()
        kl = (ratio - 1 - log_ratio).double()
        sums = {
            "loss": (result.loss.detach() * count).double(),
            "entropy": entropy.sum(),
            "kl": kl.sum(),
            "clip_fraction": (above | below).sum().double(),
        }
        for name, kind in CLASSES.items():
            of_class = labels == kind  # (N,)
            sums[f"entropy_{name}"] = entropy.where(of_class, 0.0).sum()
            sums[f"kl_{name}"] = kl.where(of_class, 0.0).sum()
            sums[f"tokens_{name}"] = of_class.sum()
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def add_sampling_gaps(self, gaps: Tensor) -> None:
        """gaps: (N,), log-probs of the training pass less those that were noted while sampling."""
        self.gaps.append(gaps)

    def sampling_gaps(self) -> Tensor:
        """(N,): all that were added."""
        return torch.cat(self.gaps)

    def add_gradient(self, model: torch.nn.Module) -> None:
        """How much successive mini-batches agree; too large a model is left out."""
        gradient = flat_gradient(model)  # (P,) or None
        if self.last_gradient is not None:
            cosine = torch.cosine_similarity(self.last_gradient, gradient, dim=0)
            self.cosines.append(cosine)
        self.last_gradient = gradient

    def add_step(self, norm: float) -> None:
        """norm: of the mini-batch's gradient, before it is clipped."""
        self.norms.append(norm)

    def columns(self, tokens: int) -> dict[str, float]:
        """Columns of the log; those of a class that has no token are left out. tokens: that were
        trained on."""
        sums = {name: total.item() for name, total in self.sums.items()}
        counts = {name: sums.pop(f"tokens_{name}") for name in CLASSES}
        found = {}
        for name, total in sums.items():
            count = counts.get(name.rpartition("_")[2], tokens)  # "kl_action": of action tokens
            if count:
                found[name] = total / count
        found["grad_norm"] = sum(self.norms) / len(self.norms)
        found["skipped_updates"] = sum(not math.isfinite(norm) for norm in self.norms)
        if self.gaps:
            found["sampling_gap"] = self.sampling_gaps().abs().max().item()
        if self.cosines:
            cosines = torch.stack(self.cosines).tolist()
            found["gradient_agreement"] = sum(cosines) / len(cosines)
        return found


def batch_statistics(
    rollouts: Rollouts, weights: Tensor, advantages: Tensor, end_of_turn: int
) -> dict[str, float]:
    """What a batch of rollouts consists of and what there is to learn from it, as columns of the
    log: how long the episodes are, how true their reasoning is, where the weight lies, and how the
    advantages spread.

    weights, advantages: (B, T), as in the loss. end_of_turn: the id of that control token.
    """
    response = rollouts.response  # (B, T)
    tokens = response.sum().item()
    following = torch.nn.functional.pad(response, (0, 1))[:, 1:]
    last = rollouts.ids[response & ~following]  # (turns,): the last token of each turn
    credit = advantages[response]  # (tokens,)
    accuracy = rollouts.true_facts.sum() / rollouts.facts.sum()  # nan if no fact is stated
    reasoning_share = weights[rollouts.reasoning].sum() / weights.sum().clamp(min=1e-9)
    return {
        "advantage_mean": credit.mean().item(),
        "advantage_std": credit.std(correction=0).item(),
        "turns": rollouts.turns.float().mean().item(),
        "cut_turns": (last != end_of_turn).float().mean().item(),
        "response_tokens": tokens / len(rollouts.ids),
        "action_fraction": rollouts.action.sum().item() / tokens,
        "reasoning_accuracy": accuracy.item(),
        "turns_without_facts": (rollouts.turns_without_facts.sum() / rollouts.turns.sum()).item(),
        "mean_weight": weights.sum().item() / tokens,
        "reasoning_weight_share": reasoning_share.item(),
    }


def flat_gradient(model: torch.nn.Module) -> Tensor | None:
    """A copy of the gradients of all parameters as one vector, or None for a model so large that
    the copy might not fit."""
    if sum(p.numel() for p in model.parameters()) > LARGE:
        return None
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def warn_if_untagged(reasoning: Tensor, response: Tensor) -> None:
    """Print a note if hardly any generated token is reasoning. reasoning, response: (B, T) bool."""
    share = reasoning.sum().item() / response.sum().item()
    if share < 0.02:
        tqdm.write(
            f"note: {share:.1%} of the generated tokens are reasoning in <think> </think>; "
            "without it, ActFocus and GRPO are nearly the same. (Does the model write its thoughts "
            "between other tags? If those are special tokens of its tokenizer, they end the turn.)"
        )
