"""GRPO on a tool-calling environment: the training loop, which train_actfocus.py shares.

    python train_grpo.py                                    # the built-in model, on a laptop
    python train_grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --device cuda

Stages: 1 load the policy, 2 evaluate, 3 play groups, 4 segment, 5 advantages, 6 token weights (the
one that ActFocus changes), 7 mini-batch updates, 8 log, 9 draw. One device, no inference engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from actfocus import actfocus_weights, group_advantages, most_varied_groups
from arms import ARMS, Arm, token_signals
from energy import TokenStats
from fused_loss import LossSettings, fused_policy_loss
from policy import Policy, load_policy
from rollout import Rollouts, check_prompt_fits, repeated, rollout, score_all, scored_hidden
from segment import Segment
from support import logs, memory
from support.checkpoint import Checkpoints, sync
from support.config import FREE, Config, parse
from support.warm_start import EVAL_SEEDS, WARM_START_SEEDS, start_folder
from worlds import make_env


@memory.told
def run(config: Config, arms: dict[str, Arm], make_critic: Callable | None = None) -> None:
    """Train each arm from the same weights on the same prompts, and draw them together.
    make_critic(policy, config): for arms with one (train_ppo.py)."""
    config.resolve()
    try:  # 1. load the policy
        folder = config.model or start_folder(config.env, thoughts=config.thoughts)
        memory.announce(folder, config, arms.values())
        policy = load_policy(folder, config.device, config.bfloat16)
        check_prompt_fits(policy, make_env(config.env), config.max_tokens, seed=EVAL_SEEDS)
    except (OSError, ValueError) as error:
        raise SystemExit(f"the run cannot begin: {error}") from None
    if config.gradient_checkpointing:
        policy.recompute()
    start = {name: value.cpu().clone() for name, value in policy.model.state_dict().items()}
    out = Path(config.out)
    checkpoints, names = open_run(config, list(arms), out, start)
    print(f"results go to {out}\nThe loss says little, near zero by construction: watch success.")
    try:
        with checkpoints:
            for name in names:
                policy.model.load_state_dict(start)
                critic = make_critic(policy, config) if arms[name].critic else None
                train(policy, config, name, arms[name], out, checkpoints, critic)
                if config.save:
                    policy.save(out / name)
    except (OSError, safetensors.SafetensorError) as error:
        raise SystemExit(f"{out} cannot be written: {error}; {checkpoints.again()}") from None
    finally:  # also when interrupted: what has been done is drawn and stays
        with contextlib.suppress(OSError):  # a full disk, which has been told of
            logs.draw(out)  # 9. draw
    print(logs.summary(out))
    shutil.rmtree(checkpoints.folder, ignore_errors=True)


def open_run(
    config: Config, names: list[str], out: Path, start: dict[str, Tensor]
) -> tuple[Checkpoints, list[str]]:
    """The checkpoints of a new run or of one to go on with, and the arms that are still to train.
    A folder that cannot be written is found out here, by a first checkpoint."""
    origin = asdict(config) | dict.fromkeys(("out", "resume", *FREE))
    origin["OMP_NUM_THREADS"] = torch.get_num_threads() if config.device == "cpu" else 0  # rounds
    origin["weights"] = hashlib.sha256(safetensors.torch.save(start)).hexdigest()
    checkpoints = Checkpoints(out, config.checkpoint_every, origin, logs.appended)
    try:
        if config.resume:
            return checkpoints, names[names.index(checkpoints.go_on()) :]
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
        sync(out / "config.json")
        if config.checkpoint_every:
            checkpoints.save({"arm": names[0], "iteration": 0})
    except (OSError, ValueError) as error:
        raise SystemExit(f"{out} cannot be used: {error}") from None
    return checkpoints, names


def train(
    policy: Policy, config: Config, name: str, arm: Arm, out: Path, checkpoints: Checkpoints,
    critic=None,
) -> None:  # fmt: skip
    """Train one arm in place, logging to out/<name>.csv. critic: of train_ppo.py, for PPO."""
    reference = policy.frozen_copy() if arm.beta or config.kl_coef else None
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=config.lr)
    rng = random.Random(config.seed)
    guard, success = Guard(), {}
    parts = {"policy": policy.model, "optimizer": optimizer}  # what training changes
    parts |= {"critic": critic} if critic else {}
    rows = range(checkpoints.restore(name, parts, rng), config.iterations + 1)
    progress = tqdm(rows, desc=name, initial=rows.start, total=rows.stop, dynamic_ncols=True)
    for iteration in progress:
        row, last = {"iteration": iteration}, iteration == config.iterations
        # 2. evaluate: before training, every few iterations, and at the end
        if iteration % config.eval_every == 0 or last:
            prompts = range(EVAL_SEEDS, EVAL_SEEDS + config.eval_episodes // config.eval_group_size)
            seeds = repeated(prompts, config.eval_group_size)
            rollouts = play(policy, config, seeds, config.eval_temperature, sampling_seed=0)
            row |= logs.outcomes(rollouts, "eval")
            logs.log_prompts(out / "evaluations.csv", name, iteration, prompts, rollouts)
            row["eval_stderr"] = logs.standard_error(rollouts.success, config.eval_group_size)
            if iteration == 0 or last:
                title = f"{name} after {iteration} iterations"
                logs.write_samples(out / "samples.txt", title, policy, rollouts)
        if not last:
            began = time.perf_counter()
            # 3. play groups: every prompt group_size times
            prompts = [rng.randrange(WARM_START_SEEDS) for _ in range(config.prompts)]
            seeds = repeated(prompts, config.group_size)
            rollouts = play(policy, config, seeds, config.temperature, config.seed)
            played = time.perf_counter()
            row |= logs.outcomes(rollouts, "train")
            logs.log_prompts(out / "prompts.csv", name, iteration, prompts, rollouts)
            row["equal_groups"] = logs.equal_groups(rollouts.rewards, config.group_size)
            # groups that end alike teach nothing and may be left out (the paper's filter)
            kept = most_varied_groups(rollouts.rewards, config.group_size, config.keep_groups)
            rollouts = rollouts.take(kept)
            # 4. segment: rollout() has labelled every sampled token from its bytes (segment.py)
            response = rollouts.response
            reasoning = rollouts.labels == Segment.REASONING
            action = rollouts.labels == Segment.ACTION
            if policy.bfloat16:  # there a cached decoding step rounds otherwise
                rollouts.old_logprob = score(policy, rollouts, response, config).logprob
            # 5. advantages: within groups, or of a critic
            if critic is None:
                per_rollout = group_advantages(rollouts.rewards, config.group_size)
                advantages = per_rollout[:, None].expand(response.shape)  # (B, T)
            else:
                advantages, returns = critic.advantages(rollouts)  # (B, T) each
            # 6. token weights: all that ActFocus changes. GRPO: alpha 1, beta 0
            signal, ref_logprob = torch.zeros(response.shape, device=policy.device), None
            if reference is not None:  # KL needs it at all tokens, the weights at action tokens
                frozen = score(reference, rollouts, response if config.kl_coef else action, config)
                signal = token_signals(frozen, rollouts.old_logprob)[arm.signal]
                ref_logprob = frozen.logprob if config.kl_coef else None
            weights = actfocus_weights(signal, reasoning, action, response, arm.alpha, arm.beta)
            if arm.change:  # a control
                weights = arm.change(weights, rollouts, seed=config.seed + 1000 * iteration)
            # 7. mini-batch updates
            row |= logs.behaviour(rollouts, weights, advantages, policy.end_of_turn)
            guard.place = f"{name}, iteration {iteration}"
            row |= update(
                policy, optimizer, rollouts, advantages, weights, ref_logprob, config, rng, guard
            )
            if critic is not None:
                row |= critic.fit(rollouts, returns)
            row |= {"seconds": time.perf_counter() - began, "seconds_play": played - began}
            if not arm.uniform and iteration == 0:
                logs.warn_if_untagged(reasoning, response)
        logs.log(out / f"{name}.csv", row)  # 8. log
        success |= {key: f"{row[key]:.2f}" for key in row if key.endswith("success")}
        progress.set_postfix(success)
        checkpoints.keep(name, iteration + 1, parts, rng, last, guard.sound(policy.model))


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, rollouts: Rollouts, advantages: Tensor,
    weights: Tensor, ref_logprob: Tensor | None, config: Config, rng: random.Random, guard: Guard,
) -> dict[str, float]:  # fmt: skip
    """A pass in shuffled mini-batches, a step each. advantages, weights, ref_logprob (KL): (B, T).
    Returns columns of the log: means over tokens; of the gradient, over steps."""
    response, old_logprob = rollouts.response, rollouts.old_logprob
    settings = LossSettings(
        temperature=config.temperature, clip_low=config.clip_low, clip_high=config.clip_high,
        entropy_coef=config.entropy_coef, kl_coef=config.kl_coef,
    )  # fmt: skip
    sums = dict.fromkeys(("loss", "entropy", "kl", "clip_fraction"), 0.0)
    norms, cosines, previous = [], [], None
    shuffled = torch.tensor(rng.sample(range(len(advantages)), len(advantages)))
    for rows in shuffled.split(config.minibatch):
        normalizer, count = weights[rows].sum(), response[rows].sum()  # of the whole mini-batch
        for batch in rollouts.micro_batches(rows, config.micro_tokens):
            hidden, targets = scored_hidden(policy, rollouts, batch, response)  # (N, H), (N,)
            mask = response[batch]  # (b, T); mask.sum() = N
            old = old_logprob[batch][mask]  # (N,), as all per-token tensors from here on
            advantage = advantages[batch][mask]
            with policy.autocast():
                loss, logprob, entropy = fused_policy_loss(
                    hidden, policy.head, targets, old, advantage, weights[batch][mask], settings,
                    normalizer=normalizer, count=count,
                    ref_logprob=None if ref_logprob is None else ref_logprob[batch][mask],
                )  # fmt: skip
            loss.backward()
            ratio = (logprob - old).exp()
            above = (ratio > 1 + config.clip_high) & (advantage > 0)
            below = (ratio < 1 - config.clip_low) & (advantage < 0)
            sums["loss"] += (loss.detach() * count).item()
            sums["entropy"] += entropy.double().sum().item()
            sums["kl"] += (ratio - 1 - (logprob - old)).double().sum().item()
            sums["clip_fraction"] += (above | below).sum().item()
        gradient = logs.flat_gradient(policy.model)  # (P,), or None for a large model
        if previous is not None:
            cosines.append(torch.cosine_similarity(previous, gradient, dim=0).item())
        previous = gradient
        norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
        norms.append(norm.item())
        if guard.passes(norms[-1], loss.item(), policy.model):
            optimizer.step()
        optimizer.zero_grad()
    tokens = response.sum().item()
    row = {name: total / tokens for name, total in sums.items()}
    row["grad_norm"] = sum(norms) / len(norms)
    row["skipped_updates"] = sum(not math.isfinite(norm) for norm in norms)
    if cosines:
        row["gradient_agreement"] = sum(cosines) / len(cosines)
    if ref_logprob is not None:
        row["kl_reference"] = ((old_logprob - ref_logprob) * response).sum().item() / tokens
    return row


class Guard:
    """Leaves out updates whose gradient is not finite; the third in a row ends the run."""

    place, in_a_row = "", 0

    def passes(self, norm: float, loss: float, model: torch.nn.Module) -> bool:
        if math.isfinite(norm):
            self.in_a_row = 0
            return True
        cause = f"gradient (last loss: {loss:g}) is" if finite(model) else "weights are"
        said = f"{self.place}: left out an update, since the {cause} not finite"
        self.in_a_row += 1
        if self.in_a_row == 3:
            raise SystemExit(f"{said}, for the third time in a row; a lower --lr may help")
        tqdm.write(said)
        return False

    def sound(self, model: torch.nn.Module) -> bool:
        """Is this a state to go on from?"""
        return self.in_a_row == 0 and finite(model)


def finite(model: torch.nn.Module) -> bool:
    return all(p.isfinite().all() for p in model.parameters())


def play(
    policy: Policy, config: Config, seeds: Sequence[int], temperature: float, sampling_seed: int
) -> Rollouts:
    return rollout(
        policy, lambda: make_env(config.env), seeds, temperature, sampling_seed=sampling_seed,
        max_turn_tokens=config.max_turn_tokens, max_tokens=config.max_tokens,
        at_once=config.play_batch,
    )  # fmt: skip


def score(policy: Policy, rollouts: Rollouts, chosen: Tensor, config: Config) -> TokenStats:
    return score_all(policy, rollouts, chosen, config.temperature, config.micro_tokens)


if __name__ == "__main__":
    run(parse(Config, "GRPO on a tool-calling environment."), {"grpo": ARMS["grpo"]})
