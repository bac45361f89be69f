"""How fast is it, and how much memory does it take, beside what one would use instead?

    python -m studies.bench               # every section, more than an hour on 2 cores
    python -m studies.bench loss --tokens 4096               # one section, one size
    python -m studies.bench --device cuda --shape qwen-0.5b   # Qwen2.5-0.5B, random weights

A section compares several ways of doing the same work, in one run on one machine:

    loss       the value and the gradients of the policy loss, with an entropy bonus: with all
               logits, with a selective log-softmax, recomputed in backward, TRL's, and fused;
               beside them the three bare matrix products that all of them need, and on CUDA
               Liger's cross-entropy
    update     the update of one iteration: ActFocus against GRPO, without and with the KL penalty
    rollout    sampled tokens a second: ours against a loop that calls `model.generate` every turn
    iteration  playing and updating: ours against TRL's GRPOTrainer (optional: pip install trl)
    growth     the cost of a token while the number of episodes, of positions, or the vocabulary
               grows; draws growth.png
    arms       whole runs of two arms: side by side, as the script does by itself, against one after
               the other with one thread and with two; on the machine as it is, and beside a busy
               process

A section is a function that yields its results one by one. Each is printed, and is a row of
bench.csv in the output folder.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from actfocus import group_advantages
from arms import ARMS, Arm
from energy import CHUNK_ELEMENTS, chunks_of, matmul
from envs import Step
from fused_loss import LossSettings, fused_policy_loss, policy_loss, token_loss
from policy import Policy, load_policy
from rollout import Rollouts, repeated, rollout
from support.config import Config
from support.warm_start import start_folder
from train_grpo import Batch, Guard, read, score, update, weigh
from worlds import make_env

ROOT = Path(__file__).parents[1]
TRAINER = ROOT / "train_actfocus.py"
GROUP = 8  # rollouts of a prompt
COMPARED = {ARMS[name].label: ARMS[name] for name in ("grpo", "actfocus")}
SHAPES = {  # hidden size, intermediate size, layers, heads, key-value heads, vocabulary
    "qwen-0.5b": (896, 4864, 24, 14, 2, 151_936),
    "qwen-3b": (2048, 11008, 36, 16, 2, 151_936),
}


class Result(NamedTuple):
    """A row of bench.csv."""

    what: str  # with the unit
    value: float
    ratio: float | None = None  # to what `what` says


# --------------------------------------------------------------------------------------------- loss
class LossInputs(NamedTuple):
    """What a loss is computed from, in the order in which `policy_loss` takes it."""

    hidden: Tensor  # (N, H)
    head: Tensor  # (V, H)
    targets: Tensor  # (N,) int64
    old_logprob: Tensor  # (N,) float32, as the next two
    advantages: Tensor
    weights: Tensor


def full(given: LossInputs, entropy_coef: float) -> Tensor:
    """All logits, and their log-softmax."""
    return policy_loss(*given, LossSettings(entropy_coef=entropy_coef)).loss


def selective(given: LossInputs, entropy_coef: float) -> Tensor:
    """The logits are kept but not their log-softmax: a logsumexp for each block of tokens, as in
    the `selective_log_softmax` of many trainers. It has no entropy."""
    logits = given.hidden @ given.head.T
    lse = torch.cat([block.float().logsumexp(-1) for block in logits.split(256)])
    logprob = logits.gather(-1, given.targets[:, None]).squeeze(-1).float() - lse
    return token_loss(
        logprob, None, given.old_logprob, given.advantages, given.weights, LossSettings()
    )


def recomputed(given: LossInputs, entropy_coef: float, chunk_size: int | None = None) -> Tensor:
    """Statistics chunk by chunk; each chunk's logits are computed again in backward."""

    def statistics(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logp = matmul(hidden, given.head.T).log_softmax(-1)
        logprob = logp.gather(-1, targets[:, None]).squeeze(-1)
        return logprob, -(logp.exp() * logp).sum(-1)

    chunk_size = chunk_size or max(1, CHUNK_ELEMENTS // len(given.head))
    hiddens, targets = given.hidden.split(chunk_size), given.targets.split(chunk_size)
    stats = [
        checkpoint(statistics, *chunk, use_reentrant=False)
        for chunk in zip(hiddens, targets, strict=True)
    ]
    logprob, entropy = map(torch.cat, zip(*stats, strict=True))
    return loss_of_stats(given, logprob, entropy, entropy_coef)


def trl(given: LossInputs, entropy_coef: float) -> Tensor:
    """The fused head of TRL 1.16's GRPOTrainer: tiles of the vocabulary, computed again in backward
    (by Triton on CUDA)."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as TILE

    logprob, entropy, *_ = ChunkedLogProbFunction.apply(
        given.hidden, given.head, None, given.targets, 1.0, TILE, None, 1.0, ("entropy",)
    )
    return loss_of_stats(given, logprob, entropy, entropy_coef)


def fused(given: LossInputs, entropy_coef: float, chunk_size: int | None = None) -> Tensor:
    """Chunk by chunk, the gradient together with the value."""
    settings = LossSettings(entropy_coef=entropy_coef)
    return fused_policy_loss(*given, settings, chunk_size=chunk_size).loss


def loss_of_stats(
    given: LossInputs, logprob: Tensor, entropy: Tensor, entropy_coef: float
) -> Tensor:
    """The loss from log-probs and entropies, (N,) each."""
    return token_loss(
        logprob, entropy, given.old_logprob, given.advantages, given.weights,
        LossSettings(entropy_coef=entropy_coef),
    )  # fmt: skip


def products(given: LossInputs, entropy_coef: float) -> Tensor:
    """No loss, but what every one of them needs: the three bare matrix products, of the logits and
    of the two gradients, chunk by chunk. Returns a 0 whose gradients are zeros."""
    hidden, head = given.hidden.detach(), given.head.detach()
    grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
    for chunk in chunks_of(len(hidden), max(1, 8 * CHUNK_ELEMENTS // len(head))):
        logits = hidden[chunk] @ head.T
        grad_hidden[chunk] = logits @ head
        grad_head.addmm_(logits.T, hidden[chunk])
    return 0 * given.hidden[0, 0]


def liger(given: LossInputs, entropy_coef: float) -> Tensor:
    """Liger's fused linear cross-entropy (Triton, CUDA only; pip install liger-kernel): no policy
    loss, since it has no ratio, no weights and no entropy, but the same passes over the logits."""
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )

    return LigerFusedLinearCrossEntropyLoss()(given.head, given.hidden, given.targets)


LOSSES = {way.__name__: way for way in (full, selective, recomputed, trl, fused)}
YARDSTICKS = {way.__name__: way for way in (products, liger)}  # the same work, and not the loss
COPIES = {"full": 6, "selective": 3}  # how many copies of the logits a way holds, about; else none


def bench_loss(args: argparse.Namespace) -> Iterator[Result]:
    """Seconds and memory of each way at each size; a ratio is to the way with all logits."""
    memory = free_gib(args.device)
    for vocabulary, tokens in itertools.product(args.vocabulary, args.tokens):
        size = f"{tokens} tokens, vocabulary {vocabulary}"
        costs = {}
        for way in LOSSES | YARDSTICKS:
            needed = (COPIES.get(way, 0) * tokens + 3 * args.width) * vocabulary * 4 / 2**30
            if needed > 0.9 * memory:
                print(f"loss, {way}, {size}: left out, it needs some {needed:.0f} GiB")
                continue
            cost = measure_in_child(way, tokens, vocabulary, args.width, args.device, args.dtype)
            if cost:
                costs[way] = cost
        of_full = costs.get("full")
        for way, cost in costs.items():
            ratios = (None, None)
            if of_full:
                # the memory of small work may not show in the peak
                gib_ratio = cost.gib / of_full.gib if of_full.gib else None
                ratios = cost.seconds / of_full.seconds, gib_ratio
            yield Result(f"seconds: {way}, {size}", cost.seconds, ratios[0])
            yield Result(f"extra GiB: {way}, {size}", cost.gib, ratios[1])


class Cost(NamedTuple):
    """Of a loss's value and gradients."""

    seconds: float
    gib: float  # the peak beyond the inputs


def measure_in_child(way: str, *sizes) -> Cost | None:
    """`measure_loss` in a process of its own, since a process's peak of memory never falls. None,
    after a line on the screen, if it fails."""
    command = [sys.executable, "-m", "studies.bench", "--child", way, *map(str, sizes)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if child.returncode:
        tokens, vocabulary, *_ = sizes
        reason = child.stderr.strip()[-200:]
        print(f"loss, {way}, {tokens} tokens, vocabulary {vocabulary}: failed: {reason}")
        return None
    return Cost(*json.loads(child.stdout))


def child(words: list[str]) -> None:
    """Print [seconds, GiB] of: way, tokens, vocabulary, width, device, dtype, and for the ways that
    take one a chunk size."""
    way, tokens, vocabulary, width, device, dtype, *rest = words
    chunk_size = int(rest[0]) if rest else None
    sizes = int(tokens), int(vocabulary), int(width)
    cost = measure_loss(way, *sizes, device, dtype, chunk_size)
    print(json.dumps(cost))


def measure_loss(
    way: str,
    tokens: int,
    vocabulary: int,
    width: int,
    device: str,
    dtype: str,
    chunk_size: int | None = None,
) -> Cost:
    """The cost of a loss's value and gradients, the faster of two times."""
    options = {} if chunk_size is None else {"chunk_size": chunk_size}
    loss = partial((LOSSES | YARDSTICKS)[way], entropy_coef=0.001, **options)
    generator = torch.Generator(device).manual_seed(0)
    time_loss(loss, random_inputs(64, 1024, width, dtype, generator))  # libraries set up
    given = random_inputs(tokens, vocabulary, width, dtype, generator)
    before = peak_gib(device)
    seconds = [time_loss(loss, given) for _ in range(2)]  # the first pays for fresh memory
    return Cost(min(seconds), peak_gib(device) - before)


def random_inputs(
    tokens: int, vocabulary: int, width: int, dtype: str, generator: torch.Generator
) -> LossInputs:
    """The inputs of a loss, on the generator's device."""
    options = {"device": generator.device, "generator": generator}
    precision = getattr(torch, dtype)
    hidden = torch.randn(tokens, width, dtype=precision, **options)
    head = torch.randn(vocabulary, width, dtype=precision, **options).mul_(0.02)
    return LossInputs(
        hidden=hidden.requires_grad_(),
        head=head.requires_grad_(),
        targets=torch.randint(vocabulary, (tokens,), **options),
        old_logprob=torch.randn(tokens, **options) * 0.1 - 12,
        advantages=torch.randn(tokens, **options),
        weights=torch.rand(tokens, **options),
    )


def time_loss(loss: Callable[[LossInputs], Tensor], given: LossInputs) -> float:
    """Seconds of the value and the gradients."""
    given.hidden.grad = None
    given.head.grad = None
    seconds, _ = timed(given.hidden.device.type, lambda: loss(given).backward())
    return seconds


def peak_gib(device: str) -> float:
    """The most memory that this process has used."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**30
    # not getrusage's ru_maxrss: a child begins with its parent's
    return kilobytes("/proc/self/status", "VmHWM") / 2**20


def free_gib(device: str) -> float:
    """The memory that is there to use."""
    if device != "cpu":
        return torch.cuda.mem_get_info()[1] / 2**30
    return kilobytes("/proc/meminfo", "MemAvailable") / 2**20


def kilobytes(path: str, name: str) -> int:
    """One of the counts that Linux keeps."""
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


# ------------------------------------------------------------------------------------------- update
def bench_update(args: argparse.Namespace) -> Iterator[Result]:
    """The reference's pass, the weights and the mini-batches, on one iteration's rollouts, which
    both arms share."""
    player = load_policy(start_folder("frozenlake"), args.device)
    seeds = repeated(range(args.prompts), GROUP)
    rollouts = rollout(player, frozen_lake, seeds)
    advantages = group_advantages(rollouts.rewards, GROUP)
    policy = shaped_policy(args)
    reference = policy.frozen_copy()
    # The player may be another model: the log-probs that the update compares with are the policy's.
    noted = score(policy, rollouts, rollouts.response, Config()).logprob
    rollouts = replace(rollouts, old_logprob=noted, sampled_logprob=noted)

    def cost(arm: Arm, kl_coef: float) -> float:
        config = Config(kl_coef=kl_coef, micro_tokens=args.micro_tokens)
        optimizer = torch.optim.Adam(policy.model.parameters(), lr=0.0)
        work = partial(learn, policy, reference, optimizer, rollouts, advantages, arm, config)
        seconds, _ = timed(args.device, work)
        return seconds

    for kl_coef, kl in ((0.0, "KL off"), (0.001, "KL on")):
        grpo = partial(cost, ARMS["grpo"], kl_coef)
        actfocus = partial(cost, ARMS["actfocus"], kl_coef)
        medians = compare_in_turn(grpo, actfocus, args.repeats)
        yield Result(f"GRPO, {kl}, seconds", medians.one)
        what = f"ActFocus, {kl}, seconds; ratio: over GRPO"
        yield Result(what, medians.other, medians.ratio)


def learn(
    policy: Policy,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    advantages: Tensor,
    arm: Arm,
    config: Config,
) -> None:
    """Stages 6 and 7 of train_grpo.py: the reference's pass, the weights, the update. advantages:
    (B,). reference: may be None for an arm that does not ask it."""
    asked = arm.needs_reference or config.kl_coef
    reference_stats = read(reference if asked else None, rollouts, config)
    advantages = advantages[:, None].expand(rollouts.ids.shape)  # (B, T)
    weights = weigh(arm, rollouts, reference_stats, advantages, policy, config, iteration=0)
    batch = Batch(rollouts, advantages, weights, reference_stats)
    update(policy, optimizer, batch, config, random.Random(0), Guard("bench"))


# ------------------------------------------------------------------------------------------ rollout
def bench_rollout(args: argparse.Namespace) -> Iterator[Result]:
    """Sampled tokens a second of the same episodes."""
    policy = load_policy(start_folder("frozenlake"), args.device)
    plain = load_policy(start_folder("frozenlake"), args.device)
    use_plain_attention(plain)
    seeds = repeated(range(args.prompts), GROUP)

    def ours() -> float:
        seconds, rollouts = timed(args.device, lambda: rollout(policy, frozen_lake, seeds))
        return seconds / rollouts.response.sum().item()

    def theirs() -> float:
        seconds, sampled = timed(args.device, lambda: generate_loop(plain, seeds))
        return seconds / sampled

    medians = compare_in_turn(ours, theirs, args.repeats)
    what = "ours, sampled tokens a second; ratio: over the generate loop"
    yield Result(what, 1 / medians.one, medians.ratio)
    yield Result("generate loop, sampled tokens a second", 1 / medians.other)


def generate_loop(policy: Policy, seeds: list[int]) -> int:
    """What small repositories do: every turn, each whole conversation is written out, encoded,
    padded on the left, and given to `model.generate`. Returns how many tokens were sampled."""
    tokenizer = policy.tokenizer
    tokenizer.padding_side = "left"
    envs, conversations, sampled = [], [], 0
    for seed in seeds:
        env = frozen_lake()
        system = {"role": "system", "content": env.system}
        conversations.append([system, {"role": "user", "content": env.reset(seed)}])
        envs.append(env)
    while playing := [i for i, env in enumerate(envs) if not env.done]:
        texts = [
            tokenizer.apply_chat_template(
                conversations[i], tools=envs[i].tools, tokenize=False, add_generation_prompt=True
            )
            for i in playing
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        batch = batch.to(policy.device)
        with policy.autocast():
            ids = policy.model.generate(
                **batch, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=160,
                eos_token_id=policy.end_of_turn, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        turns = ids[:, batch["input_ids"].shape[1] :].tolist()
        for i, turn in zip(playing, turns, strict=True):
            if policy.end_of_turn in turn:
                turn = turn[: turn.index(policy.end_of_turn)]
                sampled += 1  # the end of the turn
            sampled += len(turn)
            reply = tokenizer.decode(turn)
            conversations[i].append({"role": "assistant", "content": reply})
            observation = envs[i].step(reply).observation
            conversations[i].append({"role": "tool", "content": observation})
    return sampled


# ---------------------------------------------------------------------------------------- iteration
def bench_iteration(args: argparse.Namespace) -> Iterator[Result]:
    """16 prompts x 8 completions of 256 tokens, then four optimizer steps of 32 completions."""
    try:
        import trl  # noqa: F401
    except ImportError:
        print("iteration: left out, TRL is not installed (pip install trl)")
        return
    policy = shaped_policy(args)
    play_to_the_limit(policy)
    reference = policy.frozen_copy()
    config = Config(entropy_coef=0.0, micro_tokens=args.micro_tokens)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=3e-4)
    number = itertools.count()

    def iterate(arm: Arm) -> None:
        seeds = repeated(range(16), GROUP)
        limits = {"max_turn_tokens": args.completion, "sampling_seed": next(number)}
        rollouts = rollout(policy, Babble, seeds, **limits)
        advantages = group_advantages(rollouts.rewards, GROUP)
        learn(policy, reference, optimizer, rollouts, advantages, arm, config)

    def time_ours(repeats: int) -> dict[str, list[float]]:
        return {
            label: [timed(args.device, partial(iterate, arm))[0] for _ in range(repeats)]
            for label, arm in COMPARED.items()
        }

    for arm in COMPARED.values():  # warm up
        iterate(arm)
    before = time_ours(args.repeats // 2)  # before and after TRL's: the machine's speed drifts
    theirs = statistics.median(time_trl(args, policy))
    after = time_ours(1 + args.repeats // 2)
    for label in COMPARED:
        ours = statistics.median(before[label] + after[label])
        yield Result(f"ours, {label}, seconds; ratio: TRL over ours", ours, theirs / ours)
    yield Result("TRL's GRPOTrainer, seconds", theirs)


def time_trl(args: argparse.Namespace, policy: Policy) -> list[float]:
    """Seconds of iterations of TRL's trainer, each an update and a generation."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    stamps, steps = [], 4

    def reward(completions: list[str], **_) -> list[float]:  # called once an iteration
        stamps.append(time.perf_counter())
        return [reward_of(each) for each in completions]

    prompts = [policy.prompt(Babble.system, [], Babble().reset(seed)) for seed in range(16)]
    plain = shaped_policy(args)
    use_plain_attention(plain)
    with tempfile.TemporaryDirectory() as folder:
        options = GRPOConfig(
            folder, per_device_train_batch_size=32, steps_per_generation=steps,
            num_generations=GROUP, beta=0.0, learning_rate=3e-4, temperature=1.0, top_k=0,
            max_completion_length=args.completion,
            generation_kwargs={"min_new_tokens": args.completion},
            max_steps=steps * (args.repeats + 2),
            use_cpu=args.device == "cpu", bf16=args.device != "cpu", gradient_checkpointing=False,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": [policy.tokenizer.decode(ids) for ids in prompts]})
        trainer = GRPOTrainer(plain.model, reward, options, data, processing_class=policy.tokenizer)
        trainer.train()
    return [after - before for before, after in itertools.pairwise(stamps)][1:]


# ------------------------------------------------------------------------------------------- growth
def bench_growth(args: argparse.Namespace) -> Iterator[Result]:
    """Microseconds a sampled token, the least over the repeats, while one size grows: of playing
    and of the update, and of the loss. Draws growth.png."""
    policy = shaped_policy(args)
    play_to_the_limit(policy)
    config = Config(micro_tokens=args.micro_tokens)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)

    def play_and_update(episodes: int, positions: int) -> tuple[float, float]:
        limits = {"max_turn_tokens": positions, "max_tokens": positions}
        play = partial(rollout, policy, Babble, range(episodes), **limits)
        playing, rollouts = timed(args.device, play)
        advantages = torch.ones(episodes, device=args.device)
        work = partial(learn, policy, None, optimizer, rollouts, advantages, ARMS["grpo"], config)
        learning, _ = timed(args.device, work)
        millions = rollouts.response.sum().item() / 1e6
        return playing / millions, learning / millions

    def losses(vocabulary: int) -> tuple[float, float]:
        sizes = 1024, vocabulary, args.width, args.device, args.dtype
        seconds = [measure_loss(way, *sizes).seconds for way in ("full", "fused")]
        return seconds[0] / 1024e-6, seconds[1] / 1024e-6

    play_and_update(32, 64)  # warm up
    both, ways = ("playing", "update"), ("all logits", "fused")
    curves = (
        Curve("rows", args.rows, lambda size: play_and_update(size, 256), both, "256 positions"),
        Curve("positions", args.positions, lambda size: play_and_update(64, size), both, "64 rows"),
        Curve(
            "vocabulary", args.vocabulary, losses, ways,
            f"the loss alone: 1024 tokens, width {args.width}",
        ),
    )  # fmt: skip
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    panels[1].sharey(panels[0])
    for axes, curve in zip(panels, curves, strict=True):
        least = measure_curve(curve, args.repeats)
        draw_curve(axes, curve, least)
        for name, values in zip(curve.names, least, strict=True):
            for size, value in zip(curve.sizes, values, strict=True):
                what = f"{name}, {size} {curve.label}, microseconds a token; "
                what += f"ratio: over {curve.sizes[0]}"
                yield Result(what, value, value / values[0])
    figure.savefig(args.out / "growth.png", dpi=150)


class Curve(NamedTuple):
    """What is measured while one size grows."""

    label: str  # of the size
    sizes: list[int]
    cost: Callable[[int], tuple[float, float]]  # microseconds a token, of two things
    names: tuple[str, str]  # of these two
    title: str


def measure_curve(curve: Curve, repeats: int) -> list[list[float]]:
    """The least cost of each of the two things at each size. All sizes are measured in turn, again
    and again, since the machine's speed drifts."""
    rounds = [[curve.cost(size) for size in curve.sizes] for _ in range(repeats)]
    return torch.tensor(rounds).amin(0).T.tolist()  # (repeats, sizes, 2) to (2, sizes)


def draw_curve(axes: Axes, curve: Curve, least: list[list[float]]) -> None:
    """A line for each of the two things over the sizes. least: of `measure_curve`."""
    for name, values in zip(curve.names, least, strict=True):
        axes.loglog(curve.sizes, values, "o-", base=2, label=name)
    axes.set(title=curve.title, xlabel=curve.label, ylabel="microseconds a sampled token")
    axes.set(xticks=curve.sizes, xticklabels=curve.sizes)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend()


# --------------------------------------------------------------------------- what sections share
class Babble:
    """One turn about nothing, as long as the limit allows: the same work for everyone, whatever the
    model says."""

    system, tools, done = "Say anything.", [], True

    def reset(self, seed: int) -> str:
        self.done = False
        return f"Go on from {seed % 900 + 100}."

    def step(self, reply: str) -> Step:
        self.done = True
        return Step(
            observation="", reward=reward_of(reply), done=True, success=False, finished=True,
            facts=0, true_facts=0,
        )  # fmt: skip


def reward_of(reply: str) -> float:
    """Some number that differs between replies."""
    return reply.count("e") / 100


def frozen_lake():
    """The world of the sections that play a game."""
    return make_env("frozenlake")


def shaped_policy(args: argparse.Namespace) -> Policy:
    """The built-in model; or with --shape a model of that shape, with random weights and the
    built-in tokenizer."""
    if not args.shape:
        return load_policy(start_folder("frozenlake"), args.device)
    return random_policy(SHAPES[args.shape], args.device)


def random_policy(shape: tuple[int, ...], device: str) -> Policy:
    """A model with random weights and the built-in tokenizer. shape: as in SHAPES."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = shape
    built_in = load_policy(start_folder("frozenlake"), "cpu")
    config = transformers.Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        tie_word_embeddings=True, bos_token_id=None,
        pad_token_id=built_in.tokenizer.pad_token_id, eos_token_id=built_in.end_of_turn,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).to(device)
    return Policy(model, built_in.tokenizer)


def use_plain_attention(policy: Policy) -> None:
    """Attention as transformers has it, for what we are compared with."""
    policy.model.set_attn_implementation("sdpa")


def play_to_the_limit(policy: Policy) -> None:
    """A turn ends at its limit only, so that all episodes are equally long."""
    policy.control_tokens = frozenset()


def timed(device: str, work: Callable[[], object]) -> tuple[float, object]:
    """Seconds of some work, and what it returned."""
    synchronize(device)
    began = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - began, result


def synchronize(device: str) -> None:
    """Wait for a GPU to finish what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


class Medians(NamedTuple):
    """Of two costs that were measured in turn."""

    one: float
    other: float
    ratio: float  # the median of other / one


def compare_in_turn(one: Callable[[], float], other: Callable[[], float], repeats: int) -> Medians:
    """Measure two costs in turn, each first every second time, since the machine's speed drifts."""
    one()  # warm up
    other()
    ones, others = [], []
    for i in range(repeats):
        if i % 2:
            ones.append(one())
            others.append(other())
        else:
            others.append(other())
            ones.append(one())
    ratios = [b / a for a, b in zip(ones, others, strict=True)]
    return Medians(statistics.median(ones), statistics.median(others), statistics.median(ratios))


# --------------------------------------------------------------------------------------------- arms
BOTH = "grpo,actfocus"
WAYS_OF_ARMS = {  # --arms of the script's runs, one after the other; and the threads of each
    "side by side": ([BOTH], None),
    "one after the other, one thread": (BOTH.split(","), 1),
    "one after the other, two threads": (BOTH.split(","), 2),
}


def bench_arms(args: argparse.Namespace) -> Iterator[Result]:
    """Seconds of two iterations of two arms in FrozenLake, from the start of the script to its end;
    a ratio is to side by side. The ways are timed in turn, since the machine's speed drifts."""
    if args.device != "cpu":
        print("arms: left out, on a GPU they always go one after the other")
        return
    for busy in (False, True):
        seconds = {way: [] for way in WAYS_OF_ARMS}
        with busy_process() if busy else contextlib.nullcontext():
            for _ in range(args.repeats):
                for way, (runs, threads) in WAYS_OF_ARMS.items():
                    seconds[way].append(sum(time_run(args, arms, threads) for arms in runs))
        medians = {way: statistics.median(values) for way, values in seconds.items()}
        beside = ", beside a busy process" if busy else ""
        for way, median in medians.items():
            ratio = median / medians["side by side"]
            yield Result(f"two arms {way}{beside}, seconds; ratio: to side by side", median, ratio)


def time_run(args: argparse.Namespace, arms: str, threads: int | None) -> float:
    """Seconds of a run of the script. threads: None for as many as it takes by itself."""
    environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if threads is not None:
        environ["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(TRAINER), "--env", "frozenlake", "--device", "cpu"]
        command += ["--arms", arms, "--iterations", "2", "--prompts", str(args.prompts)]
        command += ["--eval-episodes", "16", "--out", f"{folder}/run"]
        began = time.perf_counter()
        subprocess.run(command, env=environ, check=True, capture_output=True)
        return time.perf_counter() - began


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """Another process that computes all the time."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


# --------------------------------------------------------------------------------------------- main
SECTIONS = {
    "loss": bench_loss,
    "update": bench_update,
    "rollout": bench_rollout,
    "iteration": bench_iteration,
    "growth": bench_growth,
    "arms": bench_arms,
}


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(args.device)
    for section in args.sections or SECTIONS:
        for result in SECTIONS[section](args):
            write(args.out / "bench.csv", section, result, machine)


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """The sections to run, and their sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag, names = parser.add_argument, ", ".join(SECTIONS)
    flag("sections", nargs="*", help=f"The sections to run, of {names}; all if none is given.")
    flag("--device", default="cpu", help="The torch device.")
    flag("--shape", choices=list(SHAPES), help="The model's shape, in all sections but rollout.")
    flag("--tokens", type=int, nargs="+", default=[1024, 4096, 16384], help="Sizes of the loss.")
    flag(
        "--vocabulary", type=int, nargs="+", default=[600, 32_000, 151_936],
        help="Sizes of the vocabulary, in loss and growth.",
    )  # fmt: skip
    flag("--width", type=int, default=896, help="The width of the hidden states, in the loss.")
    flag(
        "--dtype", choices=["float32", "bfloat16"], default="float32",
        help="The precision of the hidden states, in the loss.",
    )  # fmt: skip
    flag(
        "--rows", type=int, nargs="+", default=[32, 64, 128, 256, 512],
        help="How many episodes are played at once, in growth.",
    )  # fmt: skip
    flag(
        "--positions", type=int, nargs="+", default=[256, 512, 1024, 2048],
        help="How long the episodes are, in growth.",
    )  # fmt: skip
    flag(
        "--prompts", type=int, default=16,
        help=f"How many prompts, of {GROUP} rollouts each, in update, rollout and arms.",
    )  # fmt: skip
    flag("--completion", type=int, default=256, help="Tokens of each completion, in iteration.")
    flag("--micro-tokens", type=int, default=8192, help="Tokens that a forward pass may hold.")
    flag("--repeats", type=int, default=5, help="How often each thing is timed.")
    flag("--out", type=Path, default=Path("runs/bench"), help="The folder of the results.")
    args = parser.parse_args(argv)
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"there is no section {', '.join(unknown)}: choose of {names}")
    return args


def describe_machine(device: str) -> str:
    """What the figures were measured on."""
    machine = f"{torch.get_num_threads()} threads of {platform.machine()}"
    if device != "cpu":
        machine = torch.cuda.get_device_name()
    return f"{machine}, torch {torch.__version__}, transformers {transformers.__version__}"


def write(path: Path, section: str, result: Result, machine: str) -> None:
    """Print a result, and append it to a CSV."""
    what, value, ratio = result
    shown = "" if ratio is None else f"   ratio {ratio:.3f}"
    print(f"{section:10} {what:88} {value:10.4g}{shown}", flush=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(("section", "what", "value", "ratio", "machine"))
        cell = "" if ratio is None else f"{ratio:.4g}"
        writer.writerow((section, what, f"{value:.6g}", cell, machine))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
