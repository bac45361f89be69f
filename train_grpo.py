"""GRPO on a tool-calling environment: the training loop, which ActFocus and PPO share.

    python train_grpo.py                                    # the built-in model, on a laptop
    python train_grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --device cuda

The stages, with the numbers that the README and walkthrough.py use as well:

    1   load the policy          once, and give every arm the same weights
    2   evaluate                 every few iterations, on fixed episodes
    3   play groups              each prompt several times
    3b  most varied groups       the paper's filter; off by default
    4   segment                  each sampled token is reasoning, action or format
    4b  log-probs anew           where the model computes in bfloat16
    5   advantages               within each group, or from PPO's critic
    6a  the reference reads      only for arms that use its energy, or for a KL penalty
    6b  token weights            all that ActFocus changes in the update
    7   mini-batch updates       one optimizer step for each mini-batch
    7b  the critic learns        in PPO
    8   log                      a row of the CSV
    9   draw                     curves.png at each evaluation, episodes.html at the end

An *arm* is one way of crediting tokens (GRPO, ActFocus, a control); arms.py lists them all. The
loop reaches the functions of actfocus.py through others: `arm.weights` calls `actfocus_weights`,
`fused_policy_loss` is `clipped_loss` in chunks, and `rollout` labels tokens with segment.py. Left
out, to keep the loop readable: several devices, an inference engine, asynchronous rollouts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from actfocus import group_advantages, most_varied_groups
from arms import ARMS, Arm
from energy import TokenStats
from fused_loss import LossSettings, fused_policy_loss
from model_checks import check_length
from policy import Policy, load_policy
from rollout import (
    CannotPlay,
    Rollouts,
    check_prompt_length,
    repeated,
    rollout,
    score_all,
    scored_hidden,
)
from support import logs, memory, transcripts
from support.arm_runs import ArmRun, open_run
from support.checkpoint import Checkpoints, how_to_resume
from support.config import MAY_CHANGE_ON_RESUME, Config, parse
from support.folder import RunFolderError, hold, writing
from support.lora import load_with_adapters
from support.processes import Interruption
from support.side_by_side import arms_at_once, choose_threads, train_side_by_side
from support.warm_start import EVAL_SEEDS, WARM_START_SEEDS, start_folder
from worlds import make_env

ModelState = dict[str, Tensor]  # the weights of a model, by name
# A token has nearly the same log-prob when it is sampled and when the update begins. If the 99th
# percentile of the difference exceeds this, in nats, the run ends with a sentence. Rounding alone
# makes 0.00002 in float32 and 0.08 in bfloat16 (measured on SmolLM2-135M).
SAMPLING_GAP = 0.05
SAMPLING_GAP_BFLOAT16 = 0.5


# ---------------------------------------------------------------------------------------- the loop
def train(
    policy: Policy,
    start: ModelState,
    config: Config,
    name: str,
    arm: Arm,
    checkpoints: Checkpoints,
    make_critic: Callable | None = None,
) -> None:
    """Train one arm from the weights `start`, in place, and log to <config.out>/<name>.csv.

    checkpoints: of this arm; where they have loaded a state, training goes on from there.
    """
    out = Path(config.out)
    policy.load_state_dict(start)  # 1
    # NOTE: the reference and the critic are copies of the start, so a state is restored after them.
    reference = policy.frozen_copy() if arm.needs_reference or config.kl_coef else None
    estimator = make_critic(policy, config) if arm.critic else GroupAdvantages(config.group_size)
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=config.lr)
    rng = random.Random(config.seed)  # draws prompts and shuffles mini-batches
    guard = Guard(name)  # leaves out updates that are not finite
    stateful = {"policy": policy, "optimizer": optimizer}
    if arm.critic:
        stateful["critic"] = estimator
    first = checkpoints.restore(stateful, rng)
    progress = tqdm(total=config.iterations, initial=first, desc=name, dynamic_ncols=True)

    for iteration in range(first, config.iterations):
        log = {"iteration": iteration}
        if iteration % config.eval_every == 0:
            log |= evaluate(policy, start, config, name, arm, iteration)  # 2
        began = time.perf_counter()
        # A prompt is a seed of the world. None is drawn from WARM_START_SEEDS (1e9) on: such seeds
        # were demonstrated in the warm start, or belong to evaluations.
        prompts = [rng.randrange(WARM_START_SEEDS) for _ in range(config.prompts)]
        played = play_groups(policy, config, prompts)  # 3 and 4
        log["seconds_play"] = time.perf_counter() - began
        rollouts = trained_on(played, config)  # 3b: the paper's filter, off by default
        rollouts = rescored(rollouts, policy, config)  # 4b: in bfloat16 only
        advantages = estimator.advantages(rollouts)  # 5
        reference_stats = read(reference, rollouts, config)  # 6a
        weights = weigh(arm, rollouts, reference_stats, advantages, policy, config, iteration)  # 6b
        batch = Batch(rollouts, advantages, weights, reference_stats)
        guard.iteration = iteration
        memory.give_back()  # what playing and reading have freed
        log |= update(policy, optimizer, batch, config, rng, guard)  # 7
        memory.give_back()
        log |= estimator.fit(rollouts)  # 7b: PPO's critic learns; GRPO has none
        log["seconds"] = time.perf_counter() - began
        log |= measure(played, batch, policy, start, config)
        logs.log_prompts(out / "prompts.csv", name, iteration, prompts, played)
        logs.log(out / f"{name}.csv", log)  # 8
        if iteration == 0 and not arm.uniform:
            logs.warn_if_untagged(rollouts.reasoning, rollouts.response)
        if iteration % config.eval_every == 0:
            logs.draw(checkpoints.whole)  # 9: what there is so far, so that a run can be watched
        progress.set_postfix_str(f"training success {log['train_success']:.2f}")
        progress.update()
        healthy = guard.healthy(policy.model) and estimator.healthy()
        checkpoints.maybe_save(name, iteration + 1, stateful, rng, last=False, healthy=healthy)

    if first <= config.iterations:  # else this arm was complete before, and is only resumed
        log = {"iteration": config.iterations}
        log |= evaluate(policy, start, config, name, arm, config.iterations)
        logs.log(out / f"{name}.csv", log)
        healthy = guard.healthy(policy.model) and estimator.healthy()
        after_last = config.iterations + 1
        checkpoints.maybe_save(name, after_last, stateful, rng, last=True, healthy=healthy)
    progress.close()


class Batch(NamedTuple):
    """What an iteration trains on, B rollouts of up to T tokens: the outcome of stages 3 to 6b."""

    rollouts: Rollouts
    advantages: Tensor  # (B, T)
    weights: Tensor  # (B, T)
    reference_stats: TokenStats | None  # (B, T) each; None if no reference reads the rollouts


# ------------------------------------------------------------------------------ 2 to 6a, one by one
def evaluate(
    policy: Policy, start: ModelState, config: Config, name: str, arm: Arm, iteration: int
) -> dict[str, float]:
    """2. Play the evaluation's episodes, the same ones every time. Returns columns of the log.

    The evaluation after the last iteration may play more episodes (--final-eval-episodes). Its
    first ones are the usual ones. The columns eval_* count only these, so that all points of a
    curve can be compared; the columns final_* count all.
    """
    out, group_size = Path(config.out), config.eval_group_size
    final = iteration == config.iterations and config.final_eval_episodes is not None
    episodes = config.final_eval_episodes if final else config.eval_episodes
    prompts = range(EVAL_SEEDS, EVAL_SEEDS + episodes // group_size)
    seeds = repeated(prompts, group_size)
    everything = play(policy, config, seeds, config.eval_temperature, sampling_seed=0)
    logs.log_prompts(out / "evaluations.csv", name, iteration, prompts, everything)
    rollouts = everything.take(torch.arange(config.eval_episodes))
    if iteration in (0, config.iterations):
        keep_examples(policy, start, config, name, arm, iteration, rollouts)
    columns = logs.outcomes(rollouts, "eval")
    columns["eval_stderr"] = logs.standard_error(rollouts.success, group_size)
    if final:
        columns["final_success"] = everything.success.float().mean().item()
        columns["final_stderr"] = logs.standard_error(everything.success, group_size)
    return columns


def keep_examples(
    policy: Policy,
    start: ModelState,
    config: Config,
    name: str,
    arm: Arm,
    iteration: int,
    rollouts: Rollouts,
) -> None:
    """Keep a few episodes of an evaluation, as text and for episodes.html, with what the starting
    model says of each token and the weight that the token would have in the loss. (The energies
    are standardised over these few episodes, and in training over a whole iteration.)"""
    out = Path(config.out)
    title = f"{name} after {iteration} iterations"
    logs.write_samples(out / "samples.txt", title, policy, rollouts)
    few = transcripts.shown_episodes(rollouts, config.eval_group_size)
    # Before training, the policy is the starting model itself.
    at_start = other_weights(policy, start) if iteration else contextlib.nullcontext(policy)
    with at_start as starting_policy:
        temperature, micro_tokens = config.eval_temperature, config.micro_tokens
        reference_stats = score_all(starting_policy, few, few.response, temperature, micro_tokens)
    entropy = policy_entropy(policy, few, config) if arm.needs_policy_entropy else None
    weights = arm.weights(few, reference_stats, config.seed, policy_entropy=entropy)
    transcripts.save_episodes(out, name, iteration, policy, few, reference_stats, weights)


def play_groups(policy: Policy, config: Config, prompts: Sequence[int]) -> Rollouts:
    """3. Play each prompt group_size times. 4. rollout() labels every token from its bytes.

    Each rollout of a prompt has random numbers of its own, which depend on the prompt and on the
    seed of the run: a prompt that is drawn in a later iteration meets the same ones."""
    seeds = repeated(prompts, config.group_size)
    return play(policy, config, seeds, config.temperature, sampling_seed=config.seed)


def trained_on(played: Rollouts, config: Config) -> Rollouts:
    """3b. The groups whose rewards vary most. Groups that end alike teach nothing, and the paper
    leaves three quarters of the groups out in some of its worlds (--keep-groups 0.25). A group
    whose prompt was too long to be played has no token to learn from, and is left out first."""
    indices = torch.arange(len(played.rewards), device=played.rewards.device)
    groups = indices.view(-1, config.group_size)  # (P, G)
    could_play = played.response.any(dim=1)[groups].all(dim=1)
    if not could_play.any():  # a world whose resets do not follow their seed
        raise CannotPlay(
            f"every group has a prompt that is too long: max_tokens is {config.max_tokens}, raise "
            "it, and let the prompts of the world depend on the seed alone"
        )
    playable = groups[could_play].flatten()
    rewards = played.rewards[playable]
    return played.take(playable[most_varied_groups(rewards, config.group_size, config.keep_groups)])


def rescored(rollouts: Rollouts, policy: Policy, config: Config) -> Rollouts:
    """4b. In bfloat16 a decoding step with a cache rounds otherwise than a pass over the whole
    episode, so the log-probs of the sampled tokens are taken anew, as the update will see them."""
    if not policy.bfloat16:
        return rollouts
    anew = score(policy, rollouts, rollouts.response, config).logprob
    return replace(rollouts, old_logprob=anew)


class GroupAdvantages:
    """5. GRPO's advantages. It has the methods of PPO's `Critic` (train_ppo.py)."""

    def __init__(self, group_size: int):
        self.group_size = group_size

    def advantages(self, rollouts: Rollouts) -> Tensor:
        """(B, T): one number a rollout, at every token."""
        per_rollout = group_advantages(rollouts.rewards, self.group_size)  # (B,)
        return per_rollout[:, None].expand(rollouts.ids.shape)

    def fit(self, rollouts: Rollouts) -> dict[str, float]:
        """7b. There is nothing to learn, and nothing to log."""
        return {}

    def healthy(self) -> bool:
        """Is this a state that is worth a checkpoint?"""
        return True


def read(reference: Policy | None, rollouts: Rollouts, config: Config) -> TokenStats | None:
    """6a. What the frozen reference says of the sampled tokens. ActFocus looks at action tokens
    alone; the KL penalty needs all of them. None if neither asks for it."""
    if reference is None:
        return None
    wanted = rollouts.response if config.kl_coef else rollouts.action
    return score(reference, rollouts, wanted, config)


def weigh(
    arm: Arm,
    rollouts: Rollouts,
    reference_stats: TokenStats | None,
    advantages: Tensor,
    policy: Policy,
    config: Config,
    iteration: int,
) -> Tensor:
    """6b. The weight of every token, (B, T). An arm that looks at the policy's entropy costs one
    more forward pass, which in bfloat16 repeats that of 4b; no other arm does."""
    entropy = policy_entropy(policy, rollouts, config) if arm.needs_policy_entropy else None
    # For arms that draw at random, such as the placebo. No two iterations of a run share a
    # seed, and neither do two runs whose seeds are below 1000.
    seed = config.seed + 1000 * iteration
    return arm.weights(
        rollouts, reference_stats, seed, policy_entropy=entropy, advantages=advantages
    )


def policy_entropy(policy: Policy, rollouts: Rollouts, config: Config) -> Tensor:
    """(B, T): the entropy of the policy at each sampled token, 0 at all others."""
    return score(policy, rollouts, rollouts.response, config).entropy


# ---------------------------------------------------------------------------- 7. mini-batch updates
def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: Config,
    rng: random.Random,
    guard: Guard,
) -> dict[str, float]:
    """7. One pass over the rollouts in shuffled mini-batches, with an optimizer step for each.

    A mini-batch is split into micro-batches that fit into memory; their gradients add up to that of
    the whole, since each divides by the sums of the whole. What the reference says is used only for
    the KL penalty. With --skip-equal nothing steps if no token has an advantage. Returns columns of
    the log.
    """
    rollouts, advantages, weights, reference_stats = batch
    may_step = not config.skip_equal or bool(advantages.any())
    settings = LossSettings(
        temperature=config.temperature,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        entropy_coef=config.entropy_coef,
        kl_coef=config.kl_coef,
    )
    meter = logs.UpdateMeter(config.clip_low, config.clip_high)
    order = torch.tensor(rng.sample(range(len(advantages)), len(advantages)))
    for step, minibatch in enumerate(order.split(config.minibatch)):
        normalizer = weights[minibatch].sum()  # the clipped loss is a mean by weight,
        count = rollouts.response[minibatch].sum()  # entropy bonus and KL are means over tokens
        for indices in rollouts.micro_batches(minibatch, config.micro_tokens):
            hidden, targets = scored_hidden(policy, rollouts, indices, rollouts.response)
            # The same N tokens, row by row: no first token is sampled, and none after the end.
            mask = rollouts.response[indices]  # (b, T)
            old_logprob = rollouts.old_logprob[indices][mask]  # (N,), as all that follow
            advantage = advantages[indices][mask]
            ref_logprob = reference_stats.logprob[indices][mask] if config.kl_coef else None
            with policy.autocast():
                result = fused_policy_loss(
                    hidden, policy.head, targets, old_logprob, advantage, weights[indices][mask],
                    settings, normalizer=normalizer, count=count, ref_logprob=ref_logprob,
                )  # fmt: skip
            result.loss.backward()
            labels = rollouts.labels[indices][mask]
            meter.add_micro_batch(result, old_logprob, advantage, labels, count)
            if step == 0:  # the policy is still the one that played
                meter.add_sampling_gaps(result.logprob - rollouts.sampled_logprob[indices][mask])
        if step == 0:
            check_sampling_gaps(meter.sampling_gaps(), policy.bfloat16, config.temperature)
        meter.add_gradient(policy.model)
        norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
        if guard.allows(norm.item(), result.loss.item(), policy.model) and may_step:
            optimizer.step()
        meter.add_step(norm.item())
        optimizer.zero_grad()
    columns = meter.columns(tokens=rollouts.response.sum().item())
    if config.kl_coef:
        difference = (rollouts.old_logprob - reference_stats.logprob) * rollouts.response
        columns["kl_reference"] = difference.sum().item() / rollouts.response.sum().item()
    return columns


def check_sampling_gaps(gaps: Tensor, bfloat16: bool, temperature: float = 1.0) -> None:
    """End the run if the model that is trained is not the model that played.

    gaps: (N,), the log-prob of each token in the training pass less that noted while sampling,
    before the first optimizer step of an iteration: both are of the same weights, so nothing but
    rounding may lie between them. A layer that is random while it trains, a position coding that
    changes with the length, or a fault in the cache make more of it, and such a model would be
    trained on ratios that mean nothing. A temperature below 1 enlarges the rounding of logits.
    """
    limit = (SAMPLING_GAP_BFLOAT16 if bfloat16 else SAMPLING_GAP) / min(1.0, temperature)
    gap = gaps.abs().float().quantile(0.99).item()
    if gap > limit:
        raise SystemExit(
            f"the training pass and the sampling of the same tokens differ by {gap:.3g} nats (99th "
            f"percentile; rounding makes less than {limit:g}): this model is not computed alike "
            "when it plays and when it trains, and cannot be trained here"
        )


class Guard:
    """Leaves out an update whose gradient is not finite; the third in a row ends the run."""

    def __init__(self, name: str, flag: str = "--lr"):
        self.flag = flag  # the learning rate's
        self.name = name  # of the arm, or "the critic"
        self.iteration: int | None = None
        self.left_out_in_a_row = 0

    def allows(self, norm: float, loss: float, model: torch.nn.Module) -> bool:
        """May the optimizer step? norm: of the gradient; loss: of the last micro-batch."""
        if math.isfinite(norm):
            self.left_out_in_a_row = 0
            return True
        cause = f"gradient (last loss: {loss:g}) is" if is_finite(model) else "weights are"
        place = self.name if self.iteration is None else f"{self.name}, iteration {self.iteration}"
        message = f"{place}: left out an update, since the {cause} not finite"
        self.left_out_in_a_row += 1
        if self.left_out_in_a_row == 3:
            raise SystemExit(
                f"{message}, for the third time in a row; a lower {self.flag} may help"
            )
        tqdm.write(f"note: {message}")
        return False

    def healthy(self, model: torch.nn.Module) -> bool:
        """Is this a state that is worth a checkpoint?"""
        return self.left_out_in_a_row == 0 and is_finite(model)


def is_finite(model: torch.nn.Module) -> bool:
    return all(p.isfinite().all() for p in model.parameters())


# --------------------------------------------------------------------------------------- 8. log
def measure(
    played: Rollouts, batch: Batch, policy: Policy, start: ModelState, config: Config
) -> dict[str, float]:
    """8. Columns of the log. played: all rollouts, also those that were not trained on; start: the
    weights that training began with."""
    columns = logs.outcomes(played, "train")
    columns["equal_groups"] = logs.equal_groups(played.rewards, config.group_size)
    columns |= logs.batch_statistics(
        batch.rollouts, batch.weights, batch.advantages, policy.end_of_turn
    )
    columns["distance"] = distance_from(start, policy.model)
    return columns


@torch.no_grad()
def distance_from(start: ModelState, model: torch.nn.Module) -> float:
    """How far training has moved a model: |now - start| / |start|, the L2 norms over all weights
    that are trained. Each tensor is brought to the CPU on its own, where the start is kept, so that
    a GPU holds no second model.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> round(distance_from({"weight": torch.tensor([[1.0, 3.0]])}, model), 4)  # 2 / sqrt(10)
    0.6325
    """
    moved = size = 0.0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            before = start[name].float()
            now = parameter.cpu().float()
            moved += torch.linalg.vector_norm(now - before, dtype=torch.float64).item() ** 2
            size += torch.linalg.vector_norm(before, dtype=torch.float64).item() ** 2
    return math.sqrt(moved / size)


# ------------------------------------------------------------------------- playing and scoring
def play(
    policy: Policy, config: Config, seeds: Sequence[int], temperature: float, sampling_seed: int
) -> Rollouts:
    """Play one episode for each seed, under the limits of the config."""
    return rollout(
        policy, lambda: make_env(config.env), seeds, temperature, sampling_seed=sampling_seed,
        max_turn_tokens=config.max_turn_tokens, max_tokens=config.max_tokens,
        at_once=config.play_batch,
    )  # fmt: skip


def score(policy: Policy, rollouts: Rollouts, wanted: Tensor, config: Config) -> TokenStats:
    """Log-prob, energy and entropy of the wanted tokens, (B, T) bool; 0 at all others."""
    return score_all(policy, rollouts, wanted, config.temperature, config.micro_tokens)


@contextlib.contextmanager
def other_weights(policy: Policy, weights: ModelState) -> Iterator[Policy]:
    """The policy with other weights for a while: without the memory of a second model."""
    trained = copy_of_weights(policy)
    policy.load_state_dict(weights)
    try:
        yield policy
    finally:
        policy.load_state_dict(trained)


def copy_of_weights(policy: Policy) -> ModelState:
    """On the CPU."""
    return {name: value.cpu().clone() for name, value in policy.state_dict().items()}


# --------------------------------------------------------------------------- a run of several arms
def run(
    config: Config,
    arms: dict[str, Arm],
    make_critic: Callable | None = None,
    show: Callable | None = None,
    script: str | None = None,
) -> None:
    """Train each arm from the same weights on the same prompts, and draw them together.

    A run of one arm writes into the folder config.out. A run of several arms is a folder of such
    runs: each arm has its own in there, and can be resumed alone or with the others.

    make_critic(policy, config): for arms with a critic (train_ppo.py). show(policy, config, arms):
    called once before a new run trains (train_actfocus.py). script: the file that a process can run
    to train one of the arms; with it, several of them go side by side where `arms_at_once` says so.

    Raises ValueError for settings that cannot run, and for an arm whose name is not in `ARMS`,
    where logs and pictures look it up; SystemExit, with a sentence, for whatever else ends a run.
    """
    config.validate()
    if unknown := [name for name in arms if name not in ARMS]:
        raise ValueError(f"{', '.join(unknown)}: no such arm; add a line to ARMS in arms.py")
    config.resolve()
    out = Path(config.out)
    with memory.explain_out_of_memory(config.device):
        policy = load(config, arms)  # 1
        prompt = first_prompt(policy, config)
        choose_threads(policy.model, config)
        start = copy_of_weights(policy)
        can_resume = config.checkpoint_every > 0  # then Ctrl-C lets the iteration end, and saves it
        with hold(out), Interruption(can_resume) as interruption:
            origin = origin_of(config, policy.model.state_dict(), prompt)
            to_train = open_run(config, list(arms), origin, interruption)
            if show is not None and not config.resume:
                show(policy, config, arms)
            print(f"results go to {out}\nThe loss stays near zero by construction: watch success.")
            at_once = arms_at_once(policy.model, config, arms, len(to_train)) if script else 1
            with drawn_at_the_end(config):
                if at_once > 1:
                    del policy, start  # each process has its own
                    configs = {name: own for name, own, _ in to_train}
                    train_side_by_side(script, configs, out, at_once, interruption)
                else:
                    for each in to_train:
                        train_one(policy, start, each, arms[each.name], make_critic)
            print(logs.summary(out))


def load(config: Config, arms: dict[str, Arm]) -> Policy:
    """1. The policy to train. Whatever makes training impossible is found out here, and is told in
    a sentence, except for what a world raises."""
    try:
        folder = config.model or start_folder(config.env, thoughts=config.thoughts)
        memory.print_estimate(folder, config, arms.values())
        if config.lora:
            policy = load_with_adapters(folder, config)
        else:
            policy = load_policy(folder, config.device, config.bfloat16)
        check_length(policy.model.config, config.max_tokens)
        if config.gradient_checkpointing:
            policy.recompute()
    except (OSError, ValueError) as error:
        raise SystemExit(f"the run cannot begin: {error}") from None
    return policy


def first_prompt(policy: Policy, config: Config) -> list[int]:
    """The ids of the first evaluation's first prompt, in which a template has shown all it writes
    around messages. Raises SystemExit if it leaves no room for a turn, or if the template cannot
    carry it."""
    env = make_env(config.env)
    observation = env.reset(EVAL_SEEDS)  # what a world raises keeps its traceback
    try:
        prompt = policy.prompt(env.system, env.tools, observation)
        check_prompt_length(prompt, EVAL_SEEDS, config.max_tokens)
    except ValueError as error:
        raise SystemExit(f"the run cannot begin: {error}") from None
    return prompt


def train_one(
    policy: Policy, start: ModelState, arm_run: ArmRun, arm: Arm, make_critic: Callable | None
) -> None:
    """Train an arm to its end in this process, from its last checkpoint if the run is resumed. Its
    checkpoints are removed last: without them it counts as finished."""
    name, config, checkpoints = arm_run
    out = Path(config.out)
    with hold(out):  # a run of one arm holds it already, which does no harm
        if config.resume:
            try:
                checkpoints.load_latest()
            except (OSError, ValueError) as error:
                raise SystemExit(f"{out} cannot be used: {error}") from None
        try:
            train(policy, start, config, name, arm, checkpoints, make_critic)
        except CannotPlay as error:
            raise SystemExit(f"{name} cannot go on: {error}") from None
        if config.save:
            with writing(out / "policy"):
                policy.save(out / "policy")
        with writing(out):
            shutil.rmtree(checkpoints.folder, ignore_errors=True)


@contextlib.contextmanager
def drawn_at_the_end(config: Config) -> Iterator[None]:
    """Around training: however it ends, what has been done is drawn and stays. Raises SystemExit if
    the folder cannot be written."""
    out = Path(config.out)
    try:
        yield
    except RunFolderError as error:  # an OSError of a world keeps its traceback
        traceback.clear_frames(error.__traceback__)  # the progress bar ends before the sentence
        how = how_to_resume(out, config.checkpoint_every, config.env)
        raise SystemExit(f"{out} cannot be written: {error}; {how}") from None
    finally:
        with contextlib.suppress(OSError):  # a full disk, which has been told of
            logs.draw(out)  # 9
            transcripts.write_episodes_page(out)


def origin_of(config: Config, weights: ModelState, prompt: list[int]) -> dict:
    """What must be the same for a run to be resumed: settings, threads, weights and a prompt."""
    origin = asdict(config)
    for name in ("out", "resume", *MAY_CHANGE_ON_RESUME):
        origin[name] = None
    # Another number of threads adds in another order, and so rounds otherwise.
    origin["OMP_NUM_THREADS"] = torch.get_num_threads() if config.device == "cpu" else 0
    digest = hashlib.sha256()
    for name, value in weights.items():  # one by one: all at once would take the model's size again
        digest.update(name.encode())
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    origin["weights"] = digest.hexdigest()
    origin["prompt"] = hashlib.sha256(json.dumps(prompt).encode()).hexdigest()
    return origin


if __name__ == "__main__":
    run(parse(Config, "GRPO on a tool-calling environment."), {"grpo": ARMS["grpo"]})
