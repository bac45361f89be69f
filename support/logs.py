"""What a run leaves behind: CSV logs, pictures, a table.

A log is one CSV per arm, a row an iteration; everything that is drawn is drawn from the CSVs, so
that an interrupted run keeps all that it did.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from arms import ARMS, Arm
from policy import Policy
from rollout import Rollouts
from segment import Segment

COLUMNS = {  # of a log; row k: of the policy after k iterations and what it plays then
    "iteration": "iterations before this row",
    "eval_success": "of the fixed evaluation episodes (at --eval-temperature)",
    "eval_reward": "their mean return",
    "eval_stderr": "standard error of eval_success, over prompts",
    "eval_finished": "share that the game itself ended (goal, hole, last mistake, any purchase)",
    "train_success": "of all rollouts that the iteration played (at --temperature)",
    "train_reward": "their mean return",
    "train_finished": "share that the game itself ended, not the limit of turns",
    "equal_groups": "share of groups whose rewards are all alike: they teach nothing",
    "loss": "mean over tokens, with entropy bonus and KL; near zero by construction",
    "entropy": "nats per generated token",
    "kl": "from the policy that played to the one being updated, k3 estimate, per token",
    "kl_reference": "from the policy that played to the reference, k1 (with --kl-coef only)",
    "clip_fraction": "share of generated tokens whose ratio is clipped",
    "grad_norm": "gradient norm before clipping, mean over the updates",
    "skipped_updates": "left out, since their gradient was not finite",
    "gradient_agreement": "mean cosine of the gradients of successive mini-batches (empty for "
    "models of over 200M parameters)",
    "advantage_mean": "over generated tokens",
    "advantage_std": "over generated tokens",
    "value_loss": "of PPO's critic before it is fitted to these rollouts",
    "explained_variance": "share of the variance of returns that the critic foresaw",
    "turns": "assistant turns per episode (from here on, of the groups that --keep-groups keeps)",
    "cut_turns": "share of turns not ended by the end-of-turn token: mostly at a limit",
    "response_tokens": "generated tokens per episode",
    "action_fraction": "share of ACTION tokens among the generated ones",
    "reasoning_accuracy": "share of true ones among the facts that the reasoning states",
    "turns_without_facts": "share of turns whose reasoning states no fact that could be checked",
    "mean_weight": "mean weight of a generated token: a reasoning token's share of the update "
    "changes by alpha / this",
    "reasoning_weight_share": "share of the total weight that lies on reasoning tokens",
    "seconds": "of the iteration without evaluation",
    "seconds_play": "of playing alone",
}
PANELS = {  # column: title, label of the y axis
    "eval_success": ("Evaluation on fixed episodes", "success rate"),
    "train_success": ("Success of training rollouts", "success rate"),
    "train_reward": ("Reward of training rollouts", "mean reward"),
    "reasoning_accuracy": ("Facts stated in reasoning", "share that is true"),
    "turns_without_facts": ("Turns that state no fact", "share of turns"),
    "entropy": ("Entropy", "nats per generated token"),
    "reasoning_weight_share": ("Weight on reasoning tokens", "share of total weight"),
    "gradient_agreement": ("Gradients of successive mini-batches", "mean cosine"),
}
T_975 = (  # 97.5 % quantiles of Student's t, by degrees of freedom from 1
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
MEASURES = {  # of a run: what several seeds are compared by
    "final": "points of evaluation success after the run",
    "peak": "the highest mean of three evaluations in a row, in points",
    "fall": "from that peak to the last three, in points",
    "area": "mean evaluation success, by the area under its curve, in points",
    "training": "mean success of all training rollouts, in points",
    "reach": "iterations until an evaluation reaches a threshold; inf: never",
}
LARGE = 200_000_000  # parameters: a copy of the gradient of a larger model may not fit


# --------------------------------------------------------------------------------------------- logs
def log(path: Path, row: dict[str, float]) -> None:
    """Append a row to a CSV with a column for each of COLUMNS; one without a value stays empty."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(COLUMNS))
        if new:
            writer.writeheader()
        writer.writerow(rounded(row))


def rounded(row: dict) -> dict:
    """Floats as they stand in a CSV.

    >>> rounded({"iteration": 3, "loss": 1 / 3})
    {'iteration': 3, 'loss': '0.333333'}
    """
    return {
        name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()
    }


def logs(out: Path) -> list[Path]:
    """The logs of a run, one an arm."""
    return [path for path in (out / f"{name}.csv" for name in ARMS) if path.exists()]


def appended(out: Path) -> list[Path]:
    """All files that a run appends to, as far as they are there."""
    others = (out / name for name in ("prompts.csv", "evaluations.csv", "samples.txt"))
    return logs(out) + [path for path in others if path.exists()]


def column(path: Path, name: str) -> tuple[list[int], list[float]]:
    """The iterations at which a column of a log has a value, and the values."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get(name)]
    return [int(row["iteration"]) for row in rows], [float(row[name]) for row in rows]


def draw(out: Path) -> None:
    """curves.png: every arm that the folder has a log of, if any, one panel a quantity."""
    if not logs(out):
        return
    figure = Figure(figsize=(16, 7), layout="constrained")
    for axes, name in zip(figure.subplots(2, 4).flat, PANELS, strict=True):
        title, label = PANELS[name]
        for path in logs(out):
            arm = ARMS[path.stem]
            points = column(path, name)
            style = "o-" if name == "eval_success" or len(points[0]) == 1 else "-"
            axes.plot(*points, style, color=arm.color, label=arm.label)
        low, high = axes.dataLim.intervaly
        axes.set(title=title, xlabel="training iterations", ylabel=label)
        axes.set(ylim=(1.1 * min(0, low), 1.1 * max(0, high) or 1))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    figure.savefig(out / "curves.png", dpi=120)


def log_prompts(
    path: Path, arm: str, iteration: int, prompts: Sequence[int], rollouts: Rollouts
) -> None:
    """Append to a CSV how each group of an iteration ended: what pairs the arms of a run."""
    new = not path.exists()
    groups = rollouts.success.float().view(len(prompts), -1)  # (P, G)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(("arm", "iteration", "prompt", "success"))
        for prompt, success in zip(prompts, groups.mean(dim=1).tolist(), strict=True):
            writer.writerow((arm, iteration, prompt, f"{success:.6g}"))


def paired_difference(
    path: Path, arm: str, baseline: str, iteration: int | None = None
) -> tuple[float, float, int]:
    """Success of an arm less that of another, over the prompts that both played in the same
    iteration (any, or this one): mean, its standard error (nan for less than two), their number."""
    played = {arm: {}, baseline: {}}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["arm"] in played and iteration in (None, int(row["iteration"])):
                pair = row["iteration"], row["prompt"]
                played[row["arm"]][pair] = float(row["success"])
    both = played[arm].keys() & played[baseline].keys()
    gains = torch.tensor([played[arm][pair] - played[baseline][pair] for pair in both])
    error = (gains.std() / len(gains) ** 0.5).item() if len(gains) > 1 else math.nan
    return gains.mean().item(), error, len(gains)


def verdict(mean: float, error: float, prompts: int) -> str:
    """A paired difference in words.

    >>> verdict(0.25, 0.1, 64)
    '+25.0, standard error 10.0 over 64 prompts: more than noise'
    """
    said = "more than noise" if abs(mean) > 2 * error else "not more than noise"
    said = "too few to tell" if prompts < 8 else said
    return f"{100 * mean:+.1f}, standard error {100 * error:.1f} over {prompts} prompts: {said}"


def summary(out: Path) -> str:
    """A table of the arms: evaluation success before, best and after with its standard error; mean
    success in training; seconds an iteration. Below, each arm less the first, prompt by prompt."""
    heads = f"{'start':>10}{'best':>8}{'final':>8}{'+-':>6}{'gain':>8}"
    lines = [f"{'':14}{heads}{'training mean':>15}{'s/iteration':>13}"]
    for path in logs(out):
        success = column(path, "eval_success")[1]
        training = column(path, "train_success")[1]
        seconds = column(path, "seconds")[1]
        line = f"{path.stem:14}{success[0]:>10.1%}{max(success):>8.1%}{success[-1]:>8.1%}"
        line += f"{100 * column(path, 'eval_stderr')[1][-1]:>6.1f}{success[-1] - success[0]:>+8.1%}"
        if training:
            line += f"{sum(training) / len(training):>15.1%}{sum(seconds) / len(seconds):>13.1f}"
        lines.append(line)
    lines.append(f"success on fixed evaluation episodes, and over training; {out / 'curves.png'}")
    names = [path.stem for path in logs(out) if column(path, "train_success")[1]]
    last = min((column(path, "eval_success")[0][-1] for path in logs(out)), default=0)
    for name in names[1:]:
        lines.append(f"{name} less {names[0]}, in points (another seed is another run):")
        phases = (("training", "prompts", None), (f"after {last} iterations", "evaluations", last))
        for phase, file, iteration in phases:
            pairs = paired_difference(out / f"{file}.csv", name, names[0], iteration)
            lines.append(f"  {phase}: {verdict(*pairs)}")
    return "\n".join(lines)


def write_rows(path: Path, rows: list[dict]) -> None:
    """A CSV of rows with the same keys."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(map(rounded, rows))


# ----------------------------------------------------------------------------------- several seeds
def t_interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a mean of independent values (Student's t): inf for a
    single one, nan if one is nan.

    >>> round(t_interval([1.0, 2.0, 3.0]), 3)  # 4.303 * 1 / sqrt(3)
    2.484
    """
    n = len(values)
    if n < 2:
        return math.inf
    quantile = T_975[n - 2] if n - 2 < len(T_975) else 1.96 + 2.4 / (n - 1)
    return quantile * float(np.std(values, ddof=1)) / math.sqrt(n)


def measures(log: Path, threshold: float) -> dict[str, float]:
    """MEASURES of a run, by its log."""
    training = column(log, "train_success")[1]
    return measures_of(column(log, "eval_success"), training, threshold)


def measures_of(
    evaluations: tuple[Sequence[int], Sequence[float]], training: Sequence[float], threshold: float
) -> dict[str, float]:
    """MEASURES of a run, by the iterations and success of its evaluations and the success of its
    training rollouts, one an iteration."""
    iterations, success = (np.array(values) for values in evaluations)
    of_three = np.convolve(success, np.full(3, 1 / 3), "valid") if len(success) > 2 else success
    return {
        "final": 100 * success[-1],
        "peak": 100 * of_three.max(),
        "fall": 100 * (of_three.max() - of_three[-1]),
        "area": 100 * np.trapezoid(success, iterations) / iterations[-1],
        "training": 100 * float(np.mean(training)),
        "reach": min(iterations[success >= threshold], default=np.inf),
    }


def draw_seeds(axes: Axes, arm: Arm, runs: list) -> None:
    """Runs of one arm, (iterations, values) each: faint, and their mean with its 95 % interval."""
    if not runs:
        return
    x, color = runs[0][0], arm.color
    values = np.array([values for _, values in runs])  # (seeds, iterations)
    mean, half = values.mean(0), np.array([t_interval(each) for each in values.T])
    axes.plot(x, values.T, color=color, linewidth=0.7, alpha=min(0.4, 1.2 / len(runs)))
    marker = "o" if len(x) == 1 else None
    axes.plot(x, mean, color=color, linewidth=2, marker=marker, label=arm.label)
    if len(runs) > 1:
        axes.fill_between(x, mean - half, mean + half, color=color, alpha=0.08)


# ------------------------------------------------------------------------------------ measurements
def outcomes(rollouts: Rollouts, phase: str) -> dict[str, float]:
    """How episodes ended: columns of the log."""
    return {
        f"{phase}_success": rollouts.success.float().mean().item(),
        f"{phase}_reward": rollouts.rewards.mean().item(),
        f"{phase}_finished": rollouts.finished.float().mean().item(),
    }


def standard_error(success: Tensor, group_size: int) -> float:
    """Of the mean of B successes, (B,) bool. Rollouts of one prompt are alike, so what counts are
    the means of the groups; 0 for a single one.

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
    """The share of the groups of (B,) rewards in which all are alike.

    >>> equal_groups(torch.tensor([1.0, 0.0, 2.0, 2.0]), group_size=2)
    0.5
    """
    groups = rewards.view(-1, group_size)  # (P, G)
    return (groups == groups[:, :1]).all(dim=1).float().mean().item()


def flat_gradient(model: torch.nn.Module) -> Tensor | None:
    """A copy of all gradients as (P,), or None if the model is too large for one more."""
    if sum(p.numel() for p in model.parameters()) > LARGE:
        return None
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def behaviour(
    rollouts: Rollouts, weights: Tensor, advantages: Tensor, end_of_turn: int
) -> dict[str, float]:
    """What was generated, how true its reasoning is, where the weight lies and what there is to
    learn from: columns of the log. weights, advantages: (B, T)."""
    credit = advantages[rollouts.response]
    following = torch.nn.functional.pad(rollouts.response, (0, 1))[:, 1:]
    last = rollouts.ids[rollouts.response & ~following]  # (turns,): the last token of each
    tokens, reasoning = rollouts.response.sum().item(), rollouts.labels == Segment.REASONING
    return {
        "advantage_mean": credit.mean().item(),
        "advantage_std": credit.std(correction=0).item(),
        "turns": rollouts.turns.float().mean().item(),
        "cut_turns": (last != end_of_turn).float().mean().item(),
        "response_tokens": tokens / len(rollouts.ids),
        "action_fraction": (rollouts.labels == Segment.ACTION).sum().item() / tokens,
        # nan if no fact is stated
        "reasoning_accuracy": (rollouts.true_facts.sum() / rollouts.facts.sum()).item(),
        "turns_without_facts": (rollouts.turns_without_facts.sum() / rollouts.turns.sum()).item(),
        "mean_weight": weights.sum().item() / tokens,
        "reasoning_weight_share": (weights[reasoning].sum() / weights.sum().clamp(min=1e-9)).item(),
    }


def warn_if_untagged(reasoning: Tensor, response: Tensor) -> None:
    """Say so if next to nothing that was generated is REASONING."""
    share = reasoning.sum().item() / response.sum().item()
    if share < 0.02:
        tqdm.write(
            f"note: {share:.1%} of the generated tokens are reasoning in <think> </think>; "
            "without it, ActFocus and GRPO are nearly the same"
        )


def write_samples(path: Path, title: str, policy: Policy, rollouts: Rollouts) -> None:
    """Append two whole transcripts to a file, control tokens included."""
    with path.open("a", encoding="utf-8") as file:
        for row in range(min(2, len(rollouts.ids))):
            text = policy.tokenizer.decode(rollouts.ids[row, : rollouts.lengths[row]].tolist())
            verdict = "success" if rollouts.success[row] else "failure"
            file.write(f"===== {title}: {verdict}\n{text}\n\n")
