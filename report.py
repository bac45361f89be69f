"""What a run takes and leaves behind: flags of the command line, CSV logs, pictures, a table.

A config is a dataclass whose fields are made by `option`: each is a flag with a sentence of help. A
log is one CSV per arm, a row an iteration; everything that is drawn is drawn from the CSVs, so that
an interrupted run keeps all that it did.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from policy import Policy
from rollout import Rollouts
from segment import Segment
from worlds import make_env

COLUMNS = {  # of a log; row k is about the policy after k iterations and the rollouts it plays then
    "iteration": "iterations before this row",
    "eval_success": "of the fixed evaluation episodes (at --eval-temperature)",
    "eval_reward": "their mean return",
    "eval_finished": "share that the game itself ended (goal, hole, last mistake, any purchase)",
    "train_success": "of all rollouts that the iteration played (at --temperature)",
    "train_reward": "their mean return",
    "train_finished": "share that the game itself ended, not the limit of turns",
    "loss": "mean over tokens, with entropy bonus and KL; near zero by construction",
    "entropy": "nats per generated token",
    "kl": "from the policy that played to the one being updated, k3 estimate, per token",
    "kl_reference": "from the policy that played to the reference, k1 (with --kl-coef only)",
    "clip_fraction": "share of generated tokens whose ratio is clipped",
    "grad_norm": "gradient norm before clipping, mean over the updates",
    "turns": "assistant turns per episode",
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
    "seconds": ("Time", "seconds per iteration"),
}
ARMS = {"grpo": ("GRPO", "tab:gray"), "actfocus": ("ActFocus", "tab:red")}  # name: label, color


# --------------------------------------------------------------------------------------------- logs
def log(path: Path, row: dict[str, float]) -> None:
    """Append a row to a CSV with a column for each of COLUMNS; one without a value stays empty."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(COLUMNS))
        if new:
            writer.writeheader()
        shown = {
            name: f"{value:.6g}" if isinstance(value, float) else value
            for name, value in row.items()
        }
        writer.writerow(shown)


def logs(out: Path) -> list[Path]:
    """The logs of a run, one an arm."""
    return [path for path in (out / f"{name}.csv" for name in ARMS) if path.exists()]


def column(path: Path, name: str) -> tuple[list[int], list[float]]:
    """The iterations at which a column of a log has a value, and the values."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get(name)]
    return [int(row["iteration"]) for row in rows], [float(row[name]) for row in rows]


def draw(out: Path) -> None:
    """curves.png: every arm that the folder has a log of, one panel a quantity."""
    figure = Figure(figsize=(16, 7), layout="constrained")
    for axes, name in zip(figure.subplots(2, 4).flat, PANELS, strict=True):
        title, label = PANELS[name]
        for path in logs(out):
            arm, color = ARMS[path.stem]
            style = "o-" if name == "eval_success" else "-"
            axes.plot(*column(path, name), style, color=color, label=arm)
        low, high = axes.dataLim.intervaly
        axes.set(title=title, xlabel="training iterations", ylabel=label)
        axes.set(ylim=(1.1 * min(0, low), 1.1 * max(0, high) or 1))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    figure.savefig(out / "curves.png", dpi=120)


def summary(out: Path) -> str:
    """A table of the arms: evaluation success before, best and after; mean success of all training
    rollouts; seconds an iteration."""
    heads = (
        f"{'start':>10}{'best':>8}{'final':>8}{'gain':>8}{'training mean':>15}{'s/iteration':>13}"
    )
    lines = [f"{'':10}{heads}"]
    for path in logs(out):
        success = column(path, "eval_success")[1]
        training = column(path, "train_success")[1]
        seconds = column(path, "seconds")[1]
        line = f"{path.stem:10}{success[0]:>10.1%}{max(success):>8.1%}{success[-1]:>8.1%}"
        line += f"{success[-1] - success[0]:>+8.1%}"
        if training:
            line += f"{sum(training) / len(training):>15.1%}{sum(seconds) / len(seconds):>13.1f}"
        lines.append(line)
    lines.append(f"success on fixed evaluation episodes, and over training; {out / 'curves.png'}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ measurements
def outcomes(rollouts: Rollouts, phase: str) -> dict[str, float]:
    """How episodes ended: columns of the log."""
    return {
        f"{phase}_success": rollouts.success.float().mean().item(),
        f"{phase}_reward": rollouts.rewards.mean().item(),
        f"{phase}_finished": rollouts.finished.float().mean().item(),
    }


def behaviour(rollouts: Rollouts, weights: Tensor) -> dict[str, float]:
    """What was generated, how true its reasoning is, and where the weight lies: columns of the
    log."""
    tokens, reasoning = rollouts.response.sum().item(), rollouts.labels == Segment.REASONING
    return {
        "turns": rollouts.turns.float().mean().item(),
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


# -------------------------------------------------------------------------------------------- flags
def option(
    default, text: str, low: float = -math.inf, high: float = math.inf, kind: type | None = None
):
    """A field of a config that is a flag; numbers outside [low, high] are refused. kind: the type
    of a flag whose default is None, for "not given"."""
    kind = kind or type(default)
    return field(default=default, metadata={"help": text, "low": low, "high": high, "kind": kind})


def parse(config_class: type, description: str, argv: list[str] | None = None):
    """A config from the command line. Wrong values are refused here, before anything runs: by their
    bounds, and by the config's own `check`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if issubclass(config_class, Config):
        columns = "\n".join(f"  {name:24}{text}" for name, text in COLUMNS.items())
        parser.epilog = f"columns of the logs:\n{columns}"
    for each in fields(config_class):
        flag, text = f"--{each.name.replace('_', '-')}", each.metadata["help"]
        if each.metadata["kind"] is bool:
            parser.add_argument(flag, help=text, action="store_true")
        else:
            shown = "" if each.default in (None, MISSING) else f" (default: {each.default})"
            kind = each.metadata["kind"]
            parser.add_argument(flag, help=text + shown, type=kind, default=each.default)
    config = config_class(**vars(parser.parse_args(argv)))
    try:
        check_bounds(config)
        config.check()
    except ValueError as error:
        parser.error(str(error))
    return config


def check_bounds(config) -> None:
    """Raise ValueError, naming the flag, for a value that is out of its bounds, and for a device
    that cannot be used."""
    for each in fields(config):
        value, low, high = getattr(config, each.name), each.metadata["low"], each.metadata["high"]
        if isinstance(value, (int, float)) and not (low <= value <= high and math.isfinite(value)):
            bound = f"at least {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
            flag = each.name.replace("_", "-")
            raise ValueError(f"--{flag} is {value}: it must be {bound}")
    try:
        torch.zeros(1, device=config.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:80]
        raise ValueError(f"--device {config.device} cannot be used: {reason}") from None


# -------------------------------------------------------------------------- the flags of training
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Config:
    """Every flag. Defaults are the paper's, but that all groups are kept, and sizes and learning
    rate suit the built-in model."""

    env: str = option("frozenlake", "frozenlake, sokoban, sudoku or shop")
    model: str | None = option(None, "chat model to train, not the built-in: folder, id", kind=str)
    thoughts: int | None = option(
        None, "of a start with another number of free sentences", 0, 30, kind=int
    )
    iterations: int = option(10, "rounds of playing and updating", 1)
    prompts: int = option(8, "prompts an iteration", 1)
    group_size: int = option(8, "rollouts of each prompt", 1)
    minibatch: int = option(16, "rollouts an optimizer step", 1)
    micro_tokens: int = option(8192, "tokens a forward pass, padding included", 1)
    lr: float | None = option(
        None, "learning rate; 3e-4 if built in (shop 1e-4), else 1e-6", 0, kind=float
    )
    temperature: float = option(1.0, "sampling temperature of training rollouts", 0.01)
    clip_low: float = option(0.2, "the ratio is clipped at 1 - this", 0, 1)
    clip_high: float = option(0.28, "the ratio is clipped at 1 + this", 0)
    entropy_coef: float = option(0.001, "entropy bonus", 0)
    kl_coef: float = option(0.0, "penalty on the KL divergence from the reference; 0: off", 0)
    keep_groups: float = option(1.0, "share of groups trained on, by reward variance", 0.01, 1)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", 1e-6)
    max_turn_tokens: int = option(160, "a turn is cut after this many tokens", 1)
    max_tokens: int = option(4096, "an episode is cut after this many tokens, prompt included", 1)
    eval_every: int = option(5, "iterations between evaluations", 1)
    eval_episodes: int | None = option(
        None, "episodes an evaluation; 128 if built in, else 32", 1, kind=int
    )
    eval_temperature: float = option(0.5, "sampling temperature of evaluations", 0.01)
    seed: int = option(0, "of the prompts and of sampling", 0)
    device: str = option(DEVICE, "torch device")
    out: str | None = option(None, "results folder; else runs/<time>-<env>-seed<seed>", kind=str)
    save: bool = option(False, "also save the trained policies as checkpoint folders")

    def check(self) -> None:
        """Raise ValueError for what cannot run."""
        make_env(self.env)
        if self.model and self.thoughts is not None:
            raise ValueError("--thoughts is of the built-in model: leave it out with --model")
        if self.out and logs(Path(self.out)):
            raise ValueError(f"--out {self.out} holds an earlier run: choose another folder")

    def resolve(self) -> None:
        """Fill in what was not given; a built-in model is quick to evaluate and learns fast."""
        if self.lr is None:
            built_in = 1e-4 if self.env == "shop" else 3e-4  # 3e-4 was not steady in the shop
            self.lr = 1e-6 if self.model else built_in
        if self.eval_episodes is None:
            self.eval_episodes = 32 if self.model else 128
        if self.out is None:
            self.out = f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{self.env}-seed{self.seed}"
