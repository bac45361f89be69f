"""GRPO on a tool-calling environment: the training loop, which train_actfocus.py reuses with other token weights.

    python train_grpo.py                                        # the built-in model on FrozenLake, minutes on a laptop
    python train_grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --device cuda

Stages, as numbered in the code: 1 load or warm-start the policy, 2 evaluate, 3 play groups, 4 segment, 5 advantages,
6 reference statistics and weights, 7 mini-batch updates, 8 log, 9 draw. All results go to one folder: config.json, a CSV and
sample transcripts per arm, curves.png.

Simplified away: several GPUs, a separate inference engine, sharded or quantised weights, learned rewards, resuming.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from actfocus import clipped_loss, group_advantages
from energy import TokenStats, token_stats
from envs import make_env
from policy import Policy, load_policy
from rollout import Rollouts, rollout
from segment import Segment

EVAL_SEEDS = 2_000_000_000  # and on: maps that neither training (below 1e9) nor the warm start (from 1e9) draws


def option(default, text: str, low: float = -math.inf, high: float = math.inf):
    """A field of the config, which is a flag of the command line; numbers outside [low, high] are refused."""
    return dataclasses.field(default=default, metadata={"help": text, "low": low, "high": high})


@dataclass
class Config:
    """Every flag of the command line. Defaults of the method are the paper's; sizes are for the built-in model."""

    env: str = option("frozenlake", "environment to play")
    model: str = option("", "checkpoint folder or hub id of a causal LM; the built-in model if not given")
    iterations: int = option(20, "rounds of playing and updating", 1)
    prompts: int = option(16, "prompts an iteration", 1)
    group_size: int = option(8, "rollouts of each prompt", 1)
    minibatch: int = option(64, "rollouts an optimizer step", 1)
    micro_tokens: int = option(8192, "tokens a forward pass, padding included; lower it if memory runs out", 1)
    lr: float = option(0.0, "Adam's learning rate; 0 means 3e-4 for the built-in model, 1e-6 for any other", 0)
    temperature: float = option(1.0, "sampling temperature of training rollouts", 0.01)
    clip_low: float = option(0.2, "the ratio is clipped at 1 - this", 0, 1)
    clip_high: float = option(0.28, "the ratio is clipped at 1 + this", 0)
    entropy_coef: float = option(0.001, "entropy bonus", 0)
    kl_coef: float = option(0.0, "penalty on the KL divergence from the reference; 0 turns it off", 0)
    keep_groups: float = option(1.0, "share of groups to train on, those with the highest reward variance", 0.01, 1)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", 1e-6)
    max_turn_tokens: int = option(160, "a turn is cut after this many tokens", 1)
    max_tokens: int = option(4096, "an episode is cut after this many tokens, prompt included", 1)
    eval_every: int = option(5, "iterations between evaluations", 1)
    eval_episodes: int = option(128, "episodes an evaluation, the same ones each time", 1)
    eval_temperature: float = option(0.5, "sampling temperature of evaluations", 0.01)
    seed: int = option(0, "of the prompts and of sampling", 0)
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    out: str = option("", "folder for results; runs/<time>-<env>-seed<seed> if not given")
    save: bool = option(False, "also save the trained policies as checkpoint folders")


class Arm(NamedTuple):
    """A training method: how it weighs tokens, and whether it looks at the frozen reference for that."""

    name: str
    weigh: Callable[[Rollouts, TokenStats | None], Tensor]  # -> (B, T) float32, 0 outside the response
    needs_reference: bool


GRPO = Arm("grpo", lambda rollouts, reference: rollouts.response.float(), needs_reference=False)


# ------------------------------------------------------------------------------------------------------------- the loop
def run(config: Config, arms: list[Arm]) -> Path:
    """Train each arm from the same weights on the same prompts, and draw them together. Returns the folder of results."""
    out = prepare_folder(config)
    policy = load_policy(config.model or None, config.env, config.device)  # 1. load, or warm-start on first use
    start = copy.deepcopy(policy.model.state_dict())
    print(f"results go to {out}\nA GRPO loss near zero is normal: advantages sum to zero in each group. Watch success instead.")
    try:
        for arm in arms:
            policy.model.load_state_dict(start)
            train(policy, config, arm, out)
            if config.save:
                policy.save(out / arm.name)
    finally:  # also when interrupted: what has been done is drawn and stays
        draw(out)  # 9. draw
    print(summary(out))
    return out


def train(policy: Policy, config: Config, arm: Arm, out: Path) -> None:
    """Train one arm in place, logging to out/<arm>.csv. Row k of the log is about the policy after k iterations."""
    reference = policy.frozen_copy() if arm.needs_reference or config.kl_coef else None
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=config.lr or (1e-6 if config.model else 3e-4))
    rng = random.Random(config.seed)
    progress = tqdm(range(config.iterations + 1), desc=arm.name, unit="it", dynamic_ncols=True)
    for iteration in progress:
        row, last = {"iteration": iteration}, iteration == config.iterations
        # 2. evaluate: before training, every few iterations, and at the end
        if iteration % config.eval_every == 0 or last:
            row |= evaluate(policy, config, out / f"{arm.name}-samples.txt", f"after {iteration} iterations")
            progress.set_postfix(eval_success=f"{row['eval_success']:.2f}", refresh=True)
        if not last:
            began = time.perf_counter()
            # 3. play groups: every prompt group_size times
            seeds = [seed for _ in range(config.prompts) for seed in [rng.randrange(10**9)] * config.group_size]
            rollouts = play(policy, config, seeds, config.temperature, config.seed)
            row |= {"train_success": rollouts.success.float().mean().item(), "train_reward": rollouts.rewards.mean().item()}
            played = time.perf_counter()
            # 4. segment: every sampled token has been labelled from its bytes, as its turn ended (rollout.py, segment.py)
            # 5. advantages, within groups; groups that all end alike teach nothing and may be left out
            advantages = group_advantages(rollouts.rewards, config.group_size)
            rows = most_varied_groups(rollouts.rewards, config)
            rollouts, advantages = rollouts.take(rows), advantages[rows]
            # 6. reference statistics, and from them the weights: the one line in which the arms differ
            frozen = score_all(reference, rollouts, config) if reference else None
            weights = arm.weigh(rollouts, frozen)
            # 7. mini-batch updates
            row |= token_shares(rollouts, weights) | update(policy, optimizer, rollouts, advantages, weights, frozen, config, rng)
            done = time.perf_counter()
            row |= {"seconds": done - began, "seconds_play": played - began}
        log(out / f"{arm.name}.csv", row)  # 8. log


def play(policy: Policy, config: Config, seeds: list[int], temperature: float, sampling_seed: int) -> Rollouts:
    limits = {"max_turn_tokens": config.max_turn_tokens, "max_tokens": config.max_tokens}
    return rollout(policy, lambda: make_env(config.env), seeds, temperature, sampling_seed=sampling_seed, **limits)


def evaluate(policy: Policy, config: Config, samples: Path, title: str) -> dict[str, float]:
    """Success and reward on fixed episodes that training never sees, with the same luck every time; a few are written down."""
    rollouts = play(policy, config, [EVAL_SEEDS + i for i in range(config.eval_episodes)], config.eval_temperature, 0)
    with samples.open("a", encoding="utf-8") as file:
        for ids, length, success in zip(rollouts.ids[:2], rollouts.lengths, rollouts.success, strict=False):
            transcript = policy.tokenizer.decode(ids[:length])
            file.write(f"===== {title}: {'success' if success else 'failure'}\n{transcript}\n\n")
    return {"eval_success": rollouts.success.float().mean().item(), "eval_reward": rollouts.rewards.mean().item()}


def most_varied_groups(rewards: Tensor, config: Config) -> Tensor:
    """Indices of the rollouts in the share `keep_groups` of groups whose rewards vary most (paper: the reward-variance filter)."""
    groups = torch.arange(len(rewards), device=rewards.device).view(-1, config.group_size)  # (P, G)
    kept = math.ceil(config.keep_groups * len(groups))
    order = rewards[groups].var(dim=1, correction=0).argsort(descending=True, stable=True)
    return groups[order[:kept].sort().values].flatten()


def score(policy: Policy, rollouts: Rollouts, rows: Tensor, temperature: float) -> TokenStats:
    """Statistics of the rows' N response tokens, packed row by row into (N,)."""
    stop = int(rollouts.lengths[rows].max())
    ids, response = rollouts.ids[rows, :stop], rollouts.response[rows, 1:stop]  # (b, stop), (b, stop - 1)
    with policy.autocast():
        hidden = policy.hidden(ids[:, :-1])[response]  # (N, H): position t - 1 predicts the token at t
        return token_stats(hidden, policy.head, ids[:, 1:][response], temperature=temperature)


@torch.no_grad()
def score_all(policy: Policy, rollouts: Rollouts, config: Config) -> TokenStats:
    """Statistics of all response tokens, laid out as (B, T); 0 elsewhere."""
    laid_out = TokenStats(*torch.zeros(3, *rollouts.ids.shape, device=rollouts.ids.device))
    for rows in micro_batches(torch.arange(len(rollouts.ids)), rollouts.lengths, config.micro_tokens):
        row, position = rollouts.response[rows].nonzero(as_tuple=True)
        for full, packed in zip(laid_out, score(policy, rollouts, rows, config.temperature), strict=True):
            full[rows.to(row.device)[row], position] = packed
    return laid_out


def micro_batches(rows: Tensor, lengths: Tensor, max_tokens: int) -> list[Tensor]:
    """Split rows into batches of like length that hold at most max_tokens with their padding (but always one row)."""
    lengths, batches = lengths.tolist(), [[]]
    for row in sorted(rows.tolist(), key=lengths.__getitem__):  # so that the newest row is the longest
        if batches[-1] and (len(batches[-1]) + 1) * lengths[row] > max_tokens:
            batches.append([])
        batches[-1].append(row)
    return [torch.tensor(batch) for batch in batches]


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, rollouts: Rollouts, advantages: Tensor, weights: Tensor,
    frozen: TokenStats | None, config: Config, rng: random.Random,
) -> dict[str, float]:  # fmt: skip
    """One pass over the rollouts in shuffled mini-batches. Returns means over tokens (grad_norm: over steps)."""
    # In bfloat16 a cached decoding step and a full forward pass round differently, so there the old log-probs are taken again.
    old = rollouts.old_logprob if policy.device.type == "cpu" else score_all(policy, rollouts, config).logprob
    sums, norms = torch.zeros(5, dtype=torch.float64), []
    for rows in torch.tensor(rng.sample(range(len(advantages)), len(advantages))).split(config.minibatch):
        weight_sum, tokens = weights[rows].sum(), rollouts.response[rows].sum()
        for some in micro_batches(rows, rollouts.lengths, config.micro_tokens):
            mask = rollouts.response[some]  # (b, T); mask.sum() = N
            stats = score(policy, rollouts, some, config.temperature)
            old_logprob, advantage = old[some][mask], advantages[some, None].expand_as(mask)[mask]  # (N,), (N,)
            clip = (config.clip_low, config.clip_high)
            loss = clipped_loss(stats.logprob, old_logprob, advantage, weights[some][mask], *clip, normalizer=weight_sum)
            loss = loss - config.entropy_coef * stats.entropy.sum() / tokens
            log_ratio = stats.logprob - old_logprob
            if config.kl_coef:
                # k1 = log pi - log ref. NOTE: its gradient is 0 on average unless the ratio stands before it (our decision).
                loss = loss + config.kl_coef * (log_ratio.exp() * (stats.logprob - frozen.logprob[some][mask])).sum() / tokens
            loss.backward()
            with torch.no_grad():
                clipped = (log_ratio.exp() > 1 + clip[1]) & (advantage > 0) | (log_ratio.exp() < 1 - clip[0]) & (advantage < 0)
                k3 = log_ratio.exp() - 1 - log_ratio
                terms = [loss * tokens, stats.entropy.sum(), k3.sum(), clipped.sum(), torch.tensor(len(k3))]
                sums += torch.stack([term.double().cpu() for term in terms])
        norms.append(torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm).item())
        if math.isfinite(norms[-1]):
            optimizer.step()
        else:
            tqdm.write(f"skipped an update: its gradient norm is {norms[-1]}; lower --lr if this recurs")
        optimizer.zero_grad()
    means = (sums[:4] / sums[4]).tolist()
    row = dict(zip(["loss", "entropy", "kl", "clip_fraction"], means, strict=True)) | {"grad_norm": sum(norms) / len(norms)}
    if frozen:
        row["kl_reference"] = ((old - frozen.logprob) * rollouts.response).sum().item() / rollouts.response.sum().item()
    return row


def token_shares(rollouts: Rollouts, weights: Tensor) -> dict[str, float]:
    """How many tokens were generated, how many of them are actions, and what share of the gradient weight is on reasoning."""
    tokens, reasoning = rollouts.response.sum().item(), rollouts.labels == Segment.REASONING
    return {
        "turns": rollouts.turns.float().mean().item(),
        "response_tokens": tokens / len(rollouts.ids),
        "action_fraction": (rollouts.labels == Segment.ACTION).sum().item() / tokens,
        "reasoning_weight_share": (weights[reasoning].sum() / weights.sum().clamp(min=1e-9)).item(),
    }


# --------------------------------------------------------------------------------------------------------------- results
COLUMNS = [
    "iteration", "seconds", "seconds_play", "train_success", "train_reward", "eval_success", "eval_reward", "loss", "entropy", "kl",
    "kl_reference", "clip_fraction", "grad_norm", "turns", "response_tokens", "action_fraction", "reasoning_weight_share",
]  # fmt: skip
PANELS = {  # column: title, label of the y axis
    "eval_success": ("Evaluation", "success rate"),
    "train_success": ("Training rollouts", "success rate"),
    "train_reward": ("Training rollouts", "mean reward"),
    "entropy": ("Entropy", "nats per generated token"),
    "reasoning_weight_share": ("Gradient weight on reasoning", "share of total weight"),
    "seconds": ("Time", "seconds per iteration"),
}


def log(path: Path, row: dict) -> None:
    """Append a row to a CSV, so that an interrupted run keeps all that it did. Columns without a value stay empty."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})


def read_log(path: Path, column: str) -> tuple[list[int], list[float]]:
    """The iterations at which a column has a value, and the values."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row[column]]
    return [int(row["iteration"]) for row in rows], [float(row[column]) for row in rows]


def logs(out: Path) -> list[Path]:
    return [path for path in (out / "grpo.csv", out / "actfocus.csv") if path.exists()]


def draw(out: Path) -> None:
    """curves.png: every arm that the folder has a log of, one panel a quantity."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    for axes, (column, (title, label)) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for path, color in zip(logs(out), ["tab:gray", "tab:red"], strict=False):
            style = "o-" if column == "eval_success" else "-"
            axes.plot(*read_log(path, column), style, color=color, label={"grpo": "GRPO", "actfocus": "ActFocus"}[path.stem])
        axes.set(title=title, xlabel="iterations of training", ylabel=label)
        axes.set_ylim(bottom=0 if column != "train_reward" else None)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(out / "curves.png", dpi=120)


def summary(out: Path) -> str:
    """A table of the arms: evaluation success before, best and after, and the mean seconds of an iteration."""
    lines = [f"{'':10}{'warm start':>12}{'best':>8}{'final':>8}{'gain':>8}{'s/iteration':>13}"]
    for path in logs(out):
        success, seconds = read_log(path, "eval_success")[1], read_log(path, "seconds")[1]
        start, best, final = success[0], max(success), success[-1]
        pace = f"{sum(seconds) / len(seconds):.1f}" if seconds else "-"
        lines.append(f"{path.stem:10}{start:>12.1%}{best:>8.1%}{final:>8.1%}{final - start:>+8.1%}{pace:>13}")
    return "\n".join([*lines, f"evaluation success on fixed episodes; curves: {out / 'curves.png'}"])


# ----------------------------------------------------------------------------------------------------------- command line
def parse(kind: type[Config], description: str, argv: list[str] | None = None) -> Config:
    """A config from the command line: one flag per field. Wrong values are refused here, before anything runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for field in dataclasses.fields(kind):
        flag, text = f"--{field.name.replace('_', '-')}", field.metadata["help"]
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true", help=text)
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default, help=text)
    config = kind(**vars(parser.parse_args(argv)))
    try:
        check(config)
    except ValueError as error:
        parser.error(str(error))
    return config


def check(config: Config) -> None:
    """Raise ValueError, naming the flag, for a value that cannot work."""
    for field in dataclasses.fields(config):
        value, low, high = getattr(config, field.name), field.metadata["low"], field.metadata["high"]
        if isinstance(value, (int, float)) and not (low <= value <= high and math.isfinite(value)):
            bound = f"at least {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
            raise ValueError(f"--{field.name.replace('_', '-')} is {value}: it must be {bound}")
    make_env(config.env)
    try:
        torch.zeros(1, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {config.device} cannot be used: {str(error).splitlines()[0]}") from None
    if config.out and logs(Path(config.out)):
        raise ValueError(f"--out {config.out} holds an earlier run: choose another folder")


def prepare_folder(config: Config) -> Path:
    """Make the folder of results, with the config in it."""
    out = Path(config.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{config.env}-seed{config.seed}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    return out


if __name__ == "__main__":
    run(parse(Config, "GRPO on a tool-calling environment."), [GRPO])
