"""GRPO on a tool-calling environment: the training loop, which train_actfocus.py reuses with other token weights.

    python train_grpo.py                                        # the built-in model on FrozenLake, minutes on a laptop
    python train_grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --device cuda

Stages: 1 load or warm-start the policy, 2 evaluate, 3 play groups, 4 segment, 5 advantages, 6 reference statistics and weights,
7 mini-batch updates, 8 log, 9 draw. Simplified away: several GPUs, an inference engine, learned rewards, resuming.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from actfocus import fused_policy_loss, group_advantages, most_varied_groups
from energy import TokenStats
from envs import make_env
from policy import Policy, load_policy
from rollout import Rollouts, rollout, score_all, scored_hidden
from segment import Segment

BUILT_IN_LR = {"shop": 1e-4}  # of the built-in model where 3e-4 is not steady: in the shop both arms gained and lost again
EVAL_SEEDS = 2_000_000_000  # and on: seeds that neither training (below 1e9) nor the warm start (from 1e9) draws


def option(default, text: str, low: float = -math.inf, high: float = math.inf):  # numbers outside [low, high] are refused
    return field(default=default, metadata={"help": text, "low": low, "high": high})


@dataclass
class Config:
    """Every flag of the command line. Defaults are the paper's, but that all groups are kept; sizes suit the built-in model."""

    env: str = option("frozenlake", "environment to play")
    model: str = option("", "checkpoint folder or hub id of a causal LM; the built-in model if not given")
    iterations: int = option(16, "rounds of playing and updating", 1)
    prompts: int = option(16, "prompts an iteration", 1)
    group_size: int = option(8, "rollouts of each prompt", 1)
    minibatch: int = option(32, "rollouts an optimizer step", 1)
    micro_tokens: int = option(8192, "tokens a forward pass, padding included; lower it if memory runs out", 1)
    lr: float = option(0.0, "Adam's learning rate; 0 means 3e-4 for the built-in model (shop: 1e-4), 1e-6 for any other", 0)
    temperature: float = option(1.0, "sampling temperature of training rollouts", 0.01)
    clip_low: float = option(0.2, "the ratio is clipped at 1 - this", 0, 1)
    clip_high: float = option(0.28, "the ratio is clipped at 1 + this", 0)
    entropy_coef: float = option(0.001, "entropy bonus", 0)
    kl_coef: float = option(0.0, "penalty on the KL divergence from the reference; 0 turns it off", 0)
    keep_groups: float = option(1.0, "share of groups to train on, those with the highest reward variance", 0.01, 1)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", 1e-6)
    max_turn_tokens: int = option(160, "a turn is cut after this many tokens", 1)
    max_tokens: int = option(4096, "an episode is cut after this many tokens, prompt included", 1)
    eval_every: int = option(4, "iterations between evaluations", 1)
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
def run(config: Config, arms: list[Arm]) -> None:
    """Train each arm from the same weights on the same prompts, and draw them together."""
    config.lr = config.lr or (1e-6 if config.model else BUILT_IN_LR.get(config.env, 3e-4))
    try:
        policy = load_policy(config.model or None, config.env, config.device)  # 1. load, or warm-start on first use
    except (OSError, ValueError) as error:
        raise SystemExit(f"the policy cannot be loaded: {error}") from None
    out = Path(config.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{config.env}-seed{config.seed}")
    out.mkdir(parents=True, exist_ok=bool(config.out))
    (out / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    start = copy.deepcopy(policy.model.state_dict())
    print(f"results go to {out}\nThe loss says little, and GRPO's is often near zero. Watch success instead.")
    try:
        for arm in arms:
            policy.model.load_state_dict(start)
            train(policy, config, arm, out)
            if config.save:
                policy.save(out / arm.name)
    finally:  # also when interrupted: what has been done is drawn and stays
        if logs(out):
            draw(out)  # 9. draw
    print(summary(out))


def train(policy: Policy, config: Config, arm: Arm, out: Path) -> None:
    """Train one arm in place, logging to out/<arm>.csv. Row k of the log is about the policy after k iterations."""
    reference = policy.frozen_copy() if arm.needs_reference or config.kl_coef else None
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=config.lr)
    rng, shown = random.Random(config.seed), {}
    for iteration in (progress := tqdm(range(config.iterations + 1), desc=arm.name, unit="it", dynamic_ncols=True)):
        row, last = {"iteration": iteration}, iteration == config.iterations
        # 2. evaluate: before training, every few iterations, and at the end
        if iteration % config.eval_every == 0 or last:
            rollouts = play(policy, config, range(EVAL_SEEDS, EVAL_SEEDS + config.eval_episodes), config.eval_temperature, 0)
            row |= outcomes(rollouts, "eval")
            if iteration == 0 or last:
                write_samples(out / "samples.txt", f"{arm.name} after {iteration} iterations", policy, rollouts)
        if not last:
            began = time.perf_counter()
            # 3. play groups: every prompt group_size times
            seeds = [seed for _ in range(config.prompts) for seed in [rng.randrange(10**9)] * config.group_size]
            rollouts = play(policy, config, seeds, config.temperature, config.seed)
            played = time.perf_counter()
            row |= outcomes(rollouts, "train")
            # 4. segment: every sampled token has been labelled from its bytes, as its turn ended (rollout.py, segment.py)
            # 5. advantages, within groups; groups that all end alike teach nothing and may be left out
            advantages = group_advantages(rollouts.rewards, config.group_size)
            rows = most_varied_groups(rollouts.rewards, config.group_size, config.keep_groups)
            rollouts, advantages = rollouts.take(rows), advantages[rows]
            row |= learn(policy, reference, optimizer, rollouts, advantages, arm, config, rng)  # 6. and 7.
            row |= {"seconds": time.perf_counter() - began, "seconds_play": played - began}
        log(out / f"{arm.name}.csv", row)  # 8. log
        progress.set_postfix(shown := shown | {name: f"{row[name]:.2f}" for name in row if name.endswith("success")})


def play(policy: Policy, config: Config, seeds: list[int], temperature: float, sampling_seed: int) -> Rollouts:
    limits = {name: getattr(config, name) for name in ("max_turn_tokens", "max_tokens")}
    return rollout(policy, lambda: make_env(config.env), seeds, temperature, sampling_seed=sampling_seed, **limits)


def write_samples(path: Path, title: str, policy: Policy, rollouts: Rollouts) -> None:
    """Append a few whole transcripts to a file, control tokens included."""
    with path.open("a", encoding="utf-8") as file:
        for ids, length, success in list(zip(rollouts.ids, rollouts.lengths, rollouts.success, strict=True))[:2]:
            file.write(f"===== {title}: {'success' if success else 'failure'}\n{policy.tokenizer.decode(ids[:length].tolist())}\n\n")


def mean(values: Tensor) -> float:
    return values.float().mean().item()


def learn(
    policy: Policy, reference: Policy | None, optimizer: torch.optim.Optimizer, rollouts: Rollouts, advantages: Tensor,
    arm: Arm, config: Config, rng: random.Random,
) -> dict[str, float]:  # fmt: skip
    """What an iteration does with its rollouts. Returns columns of the log."""
    # 6. reference statistics (KL needs them of all tokens, weights of actions), and from them the weights: where the arms differ
    chosen = rollouts.response if config.kl_coef else rollouts.labels == Segment.ACTION
    frozen = score_all(reference, rollouts, chosen, config.temperature, config.micro_tokens) if reference else None
    weights = arm.weigh(rollouts, frozen)
    # 7. mini-batch updates
    return behaviour(rollouts, weights) | update(policy, optimizer, rollouts, advantages, weights, frozen, config, rng)


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, rollouts: Rollouts, advantages: Tensor, weights: Tensor,
    frozen: TokenStats | None, config: Config, rng: random.Random,
) -> dict[str, float]:  # fmt: skip
    """One pass over the rollouts in shuffled mini-batches. Returns means over tokens (grad_norm: over steps)."""
    old = rollouts.old_logprob
    if policy.device.type == "cuda":  # in bfloat16 a cached decoding step rounds differently from a full forward pass
        old = score_all(policy, rollouts, rollouts.response, config.temperature, config.micro_tokens).logprob
    names = ("temperature", "clip_low", "clip_high", "kl_coef", "entropy_coef")
    options, sums, norms = {name: getattr(config, name) for name in names}, torch.zeros(5, dtype=torch.float64), []
    for rows in torch.tensor(rng.sample(range(len(advantages)), len(advantages))).split(config.minibatch):
        options |= {"normalizer": weights[rows].sum(), "count": rollouts.response[rows].sum()}  # of the whole mini-batch
        for some in rollouts.micro_batches(rows, config.micro_tokens):
            hidden, targets = scored_hidden(policy, rollouts, some, rollouts.response)  # (N, H), (N,)
            mask = rollouts.response[some]  # (b, T); mask.sum() = N
            old_logprob, advantage = old[some][mask], advantages[some, None].expand_as(mask)[mask]  # (N,), (N,)
            per_token = [old_logprob, advantage, weights[some][mask]]
            options["ref_logprob"] = frozen.logprob[some][mask] if config.kl_coef else None
            with policy.autocast():
                loss, logprob, entropy = fused_policy_loss(hidden, policy.head, targets, *per_token, **options, return_stats=True)
            loss.backward()
            ratio = (log_ratio := logprob - old_logprob).exp()
            clipped = (ratio > 1 + config.clip_high) & (advantage > 0) | (ratio < 1 - config.clip_low) & (advantage < 0)
            k3 = (ratio - 1 - log_ratio).sum()
            terms = [loss.detach() * options["count"], entropy.sum(), k3, clipped.sum(), torch.tensor(len(ratio))]
            sums += torch.stack([term.cpu().double() for term in terms])
        norms.append(torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm).item())
        if math.isfinite(norms[-1]):
            optimizer.step()
        else:
            tqdm.write(f"skipped an update: its gradient norm is {norms[-1]}; lower --lr if this recurs")
        optimizer.zero_grad()
    means = (sums[:4] / sums[4]).tolist()
    row = dict(zip(["loss", "entropy", "kl", "clip_fraction"], means, strict=True)) | {"grad_norm": sum(norms) / len(norms)}
    if config.kl_coef:
        row["kl_reference"] = ((old - frozen.logprob) * rollouts.response).sum().item() / rollouts.response.sum().item()
    return row


def outcomes(rollouts: Rollouts, phase: str) -> dict[str, float]:
    values = {"success": rollouts.success, "reward": rollouts.rewards, "finished": rollouts.finished}
    return {f"{phase}_{name}": mean(value) for name, value in values.items()}


def behaviour(rollouts: Rollouts, weights: Tensor) -> dict[str, float]:
    """What was generated, how true its reasoning is about the board, and what share of the gradient weight is on reasoning."""
    tokens, reasoning = rollouts.response.sum().item(), rollouts.labels == Segment.REASONING
    return {
        "turns": mean(rollouts.turns),
        "response_tokens": tokens / len(rollouts.ids),
        "action_fraction": (rollouts.labels == Segment.ACTION).sum().item() / tokens,
        "reasoning_accuracy": (rollouts.true_facts.sum() / rollouts.facts.sum()).item(),  # nan if no fact is stated
        "turns_without_facts": (rollouts.factless.sum() / rollouts.turns.sum()).item(),
        "reasoning_weight_share": (weights[reasoning].sum() / weights.sum().clamp(min=1e-9)).item(),
    }


# --------------------------------------------------------------------------------------------------------------- results
PANELS = {  # column: title, label of the y axis
    "eval_success": ("Evaluation on fixed episodes", "success rate"),
    "train_success": ("Training rollouts", "success rate"),
    "train_reward": ("Training rollouts", "mean reward"),
    "reasoning_accuracy": ("Facts stated in reasoning", "share that is true"),
    "turns_without_facts": ("Turns that state no fact", "share of turns"),
    "entropy": ("Entropy", "nats per generated token"),
    "reasoning_weight_share": ("Gradient weight on reasoning tokens", "share of total weight"),
    "seconds": ("Time", "seconds per iteration"),
}
ARMS = {"grpo": ("GRPO", "tab:gray"), "actfocus": ("ActFocus", "tab:red")}  # name: label, color


def log(path: Path, row: dict) -> None:
    """Append a row to a CSV, so that an interrupted run keeps all that it did. The first row has a value for every column."""
    new = not path.exists()
    with path.open("a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        writer = csv.DictWriter(file, list(row) if new else next(csv.reader(file)))
        if new:
            writer.writeheader()
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})


def logs(out: Path) -> list[Path]:
    return [path for path in (out / f"{name}.csv" for name in ARMS) if path.exists()]


def column(path: Path, name: str) -> tuple[list[int], list[float]]:
    """The iterations at which a column of a log has a value, and the values."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get(name)]
    return [int(row["iteration"]) for row in rows], [float(row[name]) for row in rows]


def draw(out: Path) -> None:
    """curves.png: every arm that the folder has a log of, one panel a quantity."""
    figure = Figure(figsize=(16, 7), layout="constrained")
    for axes, (name, (title, label)) in zip(figure.subplots(2, 4).flat, PANELS.items(), strict=True):
        for path in logs(out):
            arm, color = ARMS[path.stem]
            axes.plot(*column(path, name), "o-" if name == "eval_success" else "-", color=color, label=arm)
        low, high = axes.dataLim.intervaly
        axes.set(title=title, xlabel="training iterations", ylabel=label, ylim=(1.1 * min(0, low), 1.1 * max(0, high) or 1))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(out / "curves.png", dpi=120)


def summary(out: Path) -> str:
    """A table of the arms: evaluation success before, best and after; mean success of all training rollouts; time."""
    lines = [f"{'':10}{'warm start':>12}{'best':>8}{'final':>8}{'gain':>8}{'training mean':>15}{'s/iteration':>13}"]
    for path in logs(out):
        success, training, seconds = (column(path, name)[1] for name in ("eval_success", "train_success", "seconds"))
        line = f"{path.stem:10}{success[0]:>12.1%}{max(success):>8.1%}{success[-1]:>8.1%}{success[-1] - success[0]:>+8.1%}"
        lines.append(f"{line}{sum(training) / len(training):>15.1%}{sum(seconds) / len(seconds):>13.1f}")
    return "\n".join([*lines, f"success on fixed evaluation episodes, and over training; curves: {out / 'curves.png'}"])


# ----------------------------------------------------------------------------------------------------------- command line
def parse(kind: type[Config], description: str, argv: list[str] | None = None) -> Config:
    """A config from the command line, one flag per field. Wrong values are refused here, before anything runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for each in fields(kind):
        value = {"action": "store_true"} if each.default is False else {"type": type(each.default), "default": each.default}
        parser.add_argument(f"--{each.name.replace('_', '-')}", help=each.metadata["help"], **value)
    config = kind(**vars(parser.parse_args(argv)))
    try:
        check(config)
    except ValueError as error:
        parser.error(str(error))
    return config


def check(config: Config) -> None:
    """Raise ValueError, naming the flag, for a value that cannot work."""
    for each in fields(config):
        value, low, high = getattr(config, each.name), each.metadata["low"], each.metadata["high"]
        if isinstance(value, (int, float)) and not (low <= value <= high and math.isfinite(value)):
            bound = f"at least {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
            raise ValueError(f"--{each.name.replace('_', '-')} is {value}: it must be {bound}")
    make_env(config.env)
    try:
        torch.zeros(1, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {config.device} cannot be used: {str(error).splitlines()[0][:80]}") from None
    if config.out and logs(Path(config.out)):
        raise ValueError(f"--out {config.out} holds an earlier run: choose another folder")


if __name__ == "__main__":
    run(parse(Config, "GRPO on a tool-calling environment."), [GRPO])
