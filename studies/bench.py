"""How fast, and in how much memory, beside what one would use instead; all on the same work, in one
run on one machine. (Long, since half of it is what we are compared with.)

    python -m studies.bench               # every section, some 45 minutes on 2 cores
    python -m studies.bench loss --tokens 4096               # one section, one size
    python -m studies.bench --device cuda --shape qwen-0.5b   # Qwen2.5-0.5B, random weights

loss       value and gradients, entropy bonus included: all logits, selective log-softmax,
           recomputed in backward, fused
update     an iteration's update: ActFocus against GRPO, KL off and on
rollout    sampled tokens a second: ours against a loop of `model.generate`, a call per turn
iteration  play and update: ours against TRL's GRPOTrainer (optional: pip install trl)
growth     cost per token while rows, positions and vocabulary grow

Each result is a line on the screen and a row of bench.csv in the output folder; growth.png is drawn
from its own rows.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from actfocus import actfocus_weights, group_advantages
from arms import ARMS, Arm, token_signals
from energy import CHUNK_ELEMENTS, matmul
from envs import Step
from fused_loss import LossSettings, fused_policy_loss, policy_loss, token_loss
from policy import Policy, load_policy
from rollout import Rollouts, rollout
from segment import Segment
from support.config import Config
from support.warm_start import start_folder
from train_grpo import Guard, score, update
from worlds import make_env

GROUP = 8  # rollouts of a prompt
COMPARED = {ARMS[name].label: ARMS[name] for name in ("grpo", "actfocus")}
SHAPES = {  # hidden size, intermediate size, layers, heads, key-value heads, vocabulary
    "qwen-0.5b": (896, 4864, 24, 14, 2, 151_936),
    "qwen-3b": (2048, 11008, 36, 16, 2, 151_936),
}


# --------------------------------------------------------------------------------------------- loss
class LossInputs(NamedTuple):
    """What a loss is computed from, in the order that `policy_loss` takes it."""

    hidden: Tensor  # (N, H)
    head: Tensor  # (V, H)
    targets: Tensor  # (N,)
    old_logprob: Tensor  # (N,), as the next two
    advantages: Tensor
    weights: Tensor


def full(given: LossInputs, entropy_coef: float) -> Tensor:
    """All logits, and their log-softmax."""
    return policy_loss(*given, LossSettings(entropy_coef=entropy_coef)).loss


def selective(given: LossInputs, entropy_coef: float) -> Tensor:
    """Logits kept, but not their log-softmax: a logsumexp per block, as in `selective_log_softmax`
    of many trainers. No entropy."""
    logits = given.hidden @ given.head.T
    lse = torch.cat([block.float().logsumexp(-1) for block in logits.split(256)])
    logprob = logits.gather(-1, given.targets[:, None]).squeeze(-1).float() - lse
    return token_loss(
        logprob, None, given.old_logprob, given.advantages, given.weights, LossSettings()
    )


def recomputed(given: LossInputs, entropy_coef: float, chunk_size: int | None = None) -> Tensor:
    """Statistics chunk by chunk, each chunk's logits computed again in backward."""

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
    return token_loss(
        logprob, entropy, given.old_logprob, given.advantages, given.weights,
        LossSettings(entropy_coef=entropy_coef),
    )  # fmt: skip


def trl(given: LossInputs, entropy_coef: float) -> Tensor:
    """The fused head of TRL 1.16's GRPOTrainer: tiles of the vocabulary, computed again in backward
    (Triton on CUDA)."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as TILE

    logprob, entropy, *_ = ChunkedLogProbFunction.apply(
        given.hidden, given.head, None, given.targets, 1.0, TILE, None, 1.0, ("entropy",)
    )
    return token_loss(
        logprob, entropy, given.old_logprob, given.advantages, given.weights,
        LossSettings(entropy_coef=entropy_coef),
    )  # fmt: skip


def fused(given: LossInputs, entropy_coef: float, chunk_size: int | None = None) -> Tensor:
    """Chunk by chunk, the gradient together with the value."""
    settings = LossSettings(entropy_coef=entropy_coef)
    return fused_policy_loss(*given, settings, chunk_size=chunk_size).loss


WAYS = (full, selective, recomputed, trl, fused)
LOSSES = {way.__name__: way for way in WAYS}
COPIES = {"full": 6, "selective": 3}  # of the logits that a way holds, about; the others: none


def measure_loss(
    way: str,
    tokens: int,
    vocabulary: int,
    width: int,
    device: str,
    dtype: str,
    chunk_size: int | None = None,
) -> tuple[float, float]:
    """Seconds and peak extra GiB of a loss's value and gradients; run in a process of its own,
    since peaks never fall."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = {} if chunk_size is None else {"chunk_size": chunk_size}

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

    def measure(tokens: int, vocabulary: int) -> tuple[float, float]:
        given = LossInputs(
            hidden=normal(tokens, width, dtype=getattr(torch, dtype)).requires_grad_(),
            head=normal(vocabulary, width, dtype=getattr(torch, dtype)).mul_(0.02).requires_grad_(),
            targets=torch.randint(vocabulary, (tokens,), device=device, generator=generator),
            old_logprob=normal(tokens) * 0.1 - 12,
            advantages=normal(tokens),
            weights=torch.rand(tokens, device=device, generator=generator),
        )
        before, seconds = peak_gib(device), []
        for _ in range(2):  # the first pays for fresh memory
            given.hidden.grad = given.head.grad = None
            began = time.perf_counter()
            LOSSES[way](given, entropy_coef=0.001, **sizes).backward()
            synchronize(device)
            seconds.append(time.perf_counter() - began)
        return min(seconds), peak_gib(device) - before

    measure(64, 1024)  # the libraries set themselves up
    return measure(tokens, vocabulary)


def measure_in_child(way: str, *sizes) -> tuple[float, float] | None:
    """`measure_loss` in a process of its own; None, with a line on the screen, if it fails."""
    command = [sys.executable, "-m", "studies.bench", "--child", way, *map(str, sizes)]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        tokens, vocabulary, *_ = sizes
        reason = child.stderr.strip()[-200:]
        print(f"loss, {way}, {tokens} tokens, vocabulary {vocabulary}: failed: {reason}")
        return None
    return tuple(json.loads(child.stdout))


def peak_gib(device: str) -> float:
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**30
    # not getrusage's ru_maxrss, which starts at the parent's
    return kilobytes("/proc/self/status", "VmHWM") / 2**20


def kilobytes(path: str, field: str) -> int:
    """A line of Linux's counts."""
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def bench_loss(args: argparse.Namespace, results: Results) -> None:
    if args.device == "cpu":
        memory = kilobytes("/proc/meminfo", "MemAvailable") / 2**20
    else:
        memory = torch.cuda.mem_get_info()[1] / 2**30
    for vocabulary, tokens in itertools.product(args.vocabulary, args.tokens):
        size = f"{tokens} tokens, vocabulary {vocabulary}"
        costs = {}
        for way in LOSSES:
            needed = (COPIES.get(way, 0) * tokens + 3 * args.width) * vocabulary * 4 / 2**30
            if needed > 0.9 * memory:
                print(f"loss, {way}, {size}: left out, it needs some {needed:.0f} GiB")
                continue
            cost = measure_in_child(way, tokens, vocabulary, args.width, args.device, args.dtype)
            if cost:
                costs[way] = cost
        base_seconds, base_gib = costs.get("full", (0, 0))  # small work may not show in the peak
        for way, (seconds, gib) in costs.items():
            ratio = seconds / base_seconds if base_seconds else None
            results.add("loss", f"seconds: {way}, {size}", seconds, ratio)
            ratio = gib / base_gib if base_gib else None
            results.add("loss", f"extra GiB: {way}, {size}", gib, ratio)


# -------------------------------------------------------------------------- the work that all share
class Babble:
    """One turn about nothing, whose length is the limit's: the same work for everyone, whatever the
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
    return reply.count("e") / 100


def frozen_lake():
    return make_env("frozenlake")


def seeds_of(prompts: int) -> list[int]:
    return [seed for seed in range(prompts) for _ in range(GROUP)]


def shaped_policy(args: argparse.Namespace) -> Policy:
    """The built-in model, or one of another's shape with random weights and the built-in
    tokenizer."""
    policy = load_policy(start_folder("frozenlake"), args.device)
    if not args.shape:
        return policy
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[args.shape]
    tokenizer = policy.tokenizer
    config = transformers.Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        tie_word_embeddings=True, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=policy.end_of_turn,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).to(args.device)
    return Policy(model, tokenizer)


def stock(policy: Policy) -> Policy:
    """With attention as transformers has it, for what is compared with."""
    policy.model.set_attn_implementation("sdpa")
    return policy


def endless(policy: Policy) -> Policy:
    """A turn ends at its limit only, so that all rows are equally long."""
    policy.control_tokens = frozenset()
    return policy


def learn(
    policy: Policy, reference: Policy | None, optimizer: torch.optim.Optimizer,
    rollouts: Rollouts, advantages: Tensor, arm: Arm, config: Config,
) -> None:  # fmt: skip
    """Stages 6 and 7 of train_grpo.py: reference pass, weights, update."""
    response = rollouts.response
    reasoning = rollouts.labels == Segment.REASONING
    action = rollouts.labels == Segment.ACTION
    signal = torch.zeros(response.shape, device=policy.device)
    if arm.beta or config.kl_coef:
        chosen = response if config.kl_coef else action
        frozen = score(reference, rollouts, chosen, config)
        signal = token_signals(frozen, rollouts.old_logprob)[arm.signal]
    weights = actfocus_weights(signal, reasoning, action, response, arm.alpha, arm.beta)
    ref_logprob = frozen.logprob if config.kl_coef else None
    rng = random.Random(0)
    advantages = advantages[:, None].expand(response.shape)  # (B, T)
    update(policy, optimizer, rollouts, advantages, weights, ref_logprob, config, rng, Guard())


def timed(args: argparse.Namespace, work: Callable[[], object]) -> tuple[float, object]:
    synchronize(args.device)
    began = time.perf_counter()
    result = work()
    synchronize(args.device)
    return time.perf_counter() - began, result


class Medians(NamedTuple):
    one: float
    other: float
    ratio: float  # the median of other / one


def side_by_side(
    args: argparse.Namespace, one: Callable[[], float], other: Callable[[], float]
) -> Medians:
    """Two costs, measured in turns, since the machine's speed drifts."""
    one()  # warm up
    other()
    ones, others = [], []
    for i in range(args.repeats):
        if i % 2:
            ones.append(one())
            others.append(other())
        else:
            others.append(other())
            ones.append(one())
    ratios = [b / a for a, b in zip(ones, others, strict=True)]
    return Medians(statistics.median(ones), statistics.median(others), statistics.median(ratios))


# ------------------------------------------------------------------------------------------- update
def bench_update(args: argparse.Namespace, results: Results) -> None:
    """Reference pass, weights and mini-batches on the rollouts of one iteration, which both arms
    share."""
    player = load_policy(start_folder("frozenlake"), args.device)
    rollouts = rollout(player, frozen_lake, seeds_of(args.prompts))
    advantages = group_advantages(rollouts.rewards, GROUP)
    policy = shaped_policy(args)
    reference = policy.frozen_copy()

    def cost(arm: Arm, kl_coef: float) -> float:
        config = Config(kl_coef=kl_coef, micro_tokens=args.micro_tokens)
        optimizer = torch.optim.Adam(policy.model.parameters(), lr=0.0)
        seconds, _ = timed(
            args, lambda: learn(policy, reference, optimizer, rollouts, advantages, arm, config)
        )
        return seconds

    for kl_coef, kl in ((0.0, "KL off"), (0.001, "KL on")):
        grpo, act, ratio = side_by_side(
            args,
            partial(cost, ARMS["grpo"], kl_coef),
            partial(cost, ARMS["actfocus"], kl_coef),
        )
        results.add("update", f"GRPO, {kl}, seconds", grpo)
        results.add("update", f"ActFocus, {kl}, seconds; ratio: over GRPO", act, ratio)
    if args.device != "cpu":  # 2 FLOPs a weight and token forward, 4 backward; attention left out
        flops = 6 * policy.model.num_parameters() * rollouts.lengths.sum().item()
        what = f"share of a peak of {args.peak_tflops:g} TFLOP/s"
        what += " (GRPO with KL, reference pass left out)"
        results.add("update", what, flops / grpo / args.peak_tflops / 1e12)


# ------------------------------------------------------------------------------------------ rollout
def generate_loop(policy: Policy, seeds: list[int]) -> int:
    """What small repositories do: each turn, the whole conversation is written out, encoded, padded
    on the left, and given to `model.generate`. Returns how many tokens were sampled."""
    envs, talks, sampled, tokenizer = [], [], 0, policy.tokenizer
    for seed in seeds:
        envs.append(frozen_lake())
        system = {"role": "system", "content": envs[-1].system}
        talks.append([system, {"role": "user", "content": envs[-1].reset(seed)}])
    tokenizer.padding_side = "left"
    while playing := [i for i, env in enumerate(envs) if not env.done]:
        texts = [
            tokenizer.apply_chat_template(
                talks[i], tools=envs[i].tools, tokenize=False, add_generation_prompt=True
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
        for i, turn in zip(playing, ids[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            ended = policy.end_of_turn in turn
            turn = turn[: turn.index(policy.end_of_turn)] if ended else turn
            sampled += len(turn) + ended
            reply = tokenizer.decode(turn)
            talks[i].append({"role": "assistant", "content": reply})
            talks[i].append({"role": "tool", "content": envs[i].step(reply).observation})
    return sampled


def bench_rollout(args: argparse.Namespace, results: Results) -> None:
    policy = load_policy(start_folder("frozenlake"), args.device)
    plain = stock(load_policy(start_folder("frozenlake"), args.device))
    seeds = seeds_of(args.prompts)

    def ours() -> float:
        seconds, rollouts = timed(args, lambda: rollout(policy, frozen_lake, seeds))
        return seconds / rollouts.response.sum().item()

    def theirs() -> float:
        seconds, sampled = timed(args, lambda: generate_loop(plain, seeds))
        return seconds / sampled

    one, other, ratio = side_by_side(args, ours, theirs)
    what = "ours, sampled tokens a second; ratio: over the generate loop"
    results.add("rollout", what, 1 / one, ratio)
    results.add("rollout", "generate loop, sampled tokens a second", 1 / other)


# ---------------------------------------------------------------------------------------- iteration
def bench_iteration(args: argparse.Namespace, results: Results) -> None:
    """16 prompts x 8 completions of 256 tokens, then four optimizer steps of 32 completions."""
    try:
        import trl  # noqa: F401
    except ImportError:
        print("iteration: left out, TRL is not installed (pip install trl)")
        return
    policy = endless(shaped_policy(args))
    reference = policy.frozen_copy()
    config = Config(entropy_coef=0.0, micro_tokens=args.micro_tokens)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=3e-4)
    number = itertools.count()
    costs = {label: [] for label in COMPARED}

    def iterate(arm: Arm) -> None:
        rollouts = rollout(
            policy,
            Babble,
            seeds_of(16),
            max_turn_tokens=args.completion,
            sampling_seed=next(number),
        )
        advantages = group_advantages(rollouts.rewards, GROUP)
        learn(policy, reference, optimizer, rollouts, advantages, arm, config)

    def measure_ours(repeats: int) -> None:
        for label, arm in COMPARED.items():
            for _ in range(repeats):
                seconds, _ = timed(args, partial(iterate, arm))
                costs[label].append(seconds)

    for arm in COMPARED.values():  # warm up
        iterate(arm)
    measure_ours(args.repeats // 2)  # before and after TRL's, since the machine's speed drifts
    theirs = trl_iterations(args, policy)
    measure_ours(1 + args.repeats // 2)
    for label in COMPARED:
        ours = statistics.median(costs[label])
        what = f"ours, {label}, seconds; ratio: TRL over ours"
        results.add("iteration", what, ours, statistics.median(theirs) / ours)
    results.add("iteration", "TRL's GRPOTrainer, seconds", statistics.median(theirs))


def trl_iterations(args: argparse.Namespace, policy: Policy) -> list[float]:
    """Seconds of iterations of TRL's trainer: an update and a generation each."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    stamps, steps = [], 4

    def reward(completions: list[str], **_) -> list[float]:  # called once an iteration
        stamps.append(time.perf_counter())
        return [reward_of(each) for each in completions]

    prompts = [policy.prompt(Babble.system, [], Babble().reset(seed)) for seed in range(16)]
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
        model = stock(shaped_policy(args)).model
        trainer = GRPOTrainer(model, reward, options, data, processing_class=policy.tokenizer)
        trainer.train()
    return [after - before for before, after in itertools.pairwise(stamps)][1:]


# ------------------------------------------------------------------------------------------- growth
def bench_growth(args: argparse.Namespace, results: Results) -> None:
    """Microseconds a sampled token (the least over the repeats) while one size grows: of playing
    and the update, and of the loss."""
    policy = endless(shaped_policy(args))
    config = Config(micro_tokens=args.micro_tokens)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)

    def costs(rows: int, positions: int) -> tuple[float, float]:
        limits = {"max_turn_tokens": positions, "max_tokens": positions}
        playing, rollouts = timed(args, lambda: rollout(policy, Babble, range(rows), **limits))
        advantages = torch.ones(rows, device=args.device)
        learning, _ = timed(
            args, lambda: learn(policy, None, optimizer, rollouts, advantages, ARMS["grpo"], config)
        )
        tokens = rollouts.response.sum().item() / 1e6
        return playing / tokens, learning / tokens

    def loss_costs(vocabulary: int) -> list[float]:
        return [
            measure_loss(way, 1024, vocabulary, args.width, args.device, args.dtype)[0] / 1024e-6
            for way in ("full", "fused")
        ]

    costs(32, 64)  # warm up
    figure, repeats = Figure(figsize=(13, 4), layout="constrained"), range(args.repeats)
    left, middle, right = figure.subplots(1, 3)
    middle.sharey(left)
    # All sizes in turn, several times, since the machine's speed drifts.
    rounds = [[costs(size, 256) for size in args.rows] for _ in repeats]
    left.set_title("256 positions")
    draw_growth(left, results, "rows", args.rows, rounds, ("playing", "update"))
    rounds = [[costs(64, size) for size in args.positions] for _ in repeats]
    middle.set_title("64 rows")
    draw_growth(middle, results, "positions", args.positions, rounds, ("playing", "update"))
    rounds = [[loss_costs(size) for size in args.vocabulary] for _ in repeats]
    right.set_title(f"the loss alone: 1024 tokens, width {args.width}")
    draw_growth(right, results, "vocabulary", args.vocabulary, rounds, ("all logits", "fused"))
    figure.savefig(args.out / "growth.png", dpi=150)


def draw_growth(
    axes: Axes,
    results: Results,
    label: str,
    sizes: list[int],
    rounds: list[list],
    names: tuple[str, str],
) -> None:
    """A line per name over the sizes. rounds: (repeats, sizes, 2), microseconds a token."""
    least = torch.tensor(rounds).amin(0).T.tolist()  # (2, sizes)
    for name, values in zip(names, least, strict=True):
        axes.loglog(sizes, values, "o-", base=2, label=name)
        for size, value in zip(sizes, values, strict=True):
            what = f"{name}, {size} {label}, microseconds a token; ratio: over {sizes[0]}"
            results.add("growth", what, value, value / values[0])
    axes.set(xlabel=label, ylabel="microseconds a sampled token", xticks=sizes, xticklabels=sizes)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend()


# --------------------------------------------------------------------------------------------- main
class Results:
    """Prints each result and keeps it in bench.csv."""

    def __init__(self, path: Path, machine: str):
        self.path, self.machine = path, machine
        if not path.exists():
            path.write_text("section,what,value,ratio,machine\n")

    def add(self, section: str, what: str, value: float, ratio: float | None = None) -> None:
        shown = "" if ratio is None else f"   ratio {ratio:.3f}"
        print(f"{section:10} {what:88} {value:10.4g}{shown}", flush=True)
        cells = [section, what, f"{value:.6g}", "" if ratio is None else f"{ratio:.4g}"]
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([*cells, self.machine])


SECTIONS = {
    "loss": bench_loss,
    "update": bench_update,
    "rollout": bench_rollout,
    "iteration": bench_iteration,
    "growth": bench_growth,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag, named = parser.add_argument, ", ".join(SECTIONS)
    flag("sections", nargs="*", help=f"of {named}; all if none is given")
    flag("--device", default="cpu")
    flag("--shape", choices=list(SHAPES), help="of the model but in rollout; or the built-in one")
    flag("--tokens", type=int, nargs="+", default=[1024, 4096, 16384], help="of the loss")
    flag("--vocabulary", type=int, nargs="+", default=[600, 32_000, 151_936], help="of the loss")
    flag("--width", type=int, default=896, help="of the hidden states, in the loss")
    flag("--dtype", choices=["float32", "bfloat16"], default="float32", help="in the loss")
    flag("--rows", type=int, nargs="+", default=[32, 64, 128, 256, 512], help="in growth")
    flag("--positions", type=int, nargs="+", default=[256, 512, 1024, 2048], help="in growth")
    flag("--prompts", type=int, default=16, help="of 8 rollouts each, in update and rollout")
    flag("--completion", type=int, default=256, help="tokens of each completion, in iteration")
    flag("--micro-tokens", type=int, default=8192)
    flag("--repeats", type=int, default=5, help="of what is timed in turn")
    flag(
        "--peak-tflops", type=float, default=989, help="of the GPU in bfloat16; an H100's or H200's"
    )
    flag("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args(argv)
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"there is no section {', '.join(unknown)}: choose of {named}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    machine = f"{torch.get_num_threads()} threads of {platform.machine()}"
    if args.device != "cpu":
        machine = torch.cuda.get_device_name()
    machine += f", torch {torch.__version__}, transformers {transformers.__version__}"
    results = Results(args.out / "bench.csv", machine)
    for section in args.sections or SECTIONS:
        SECTIONS[section](args, results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        way, tokens, vocabulary, width, device, dtype, *chunk = sys.argv[2:]
        chunk_size = int(chunk[0]) if chunk else None
        sizes = int(tokens), int(vocabulary), int(width)
        print(json.dumps(measure_loss(way, *sizes, device, dtype, chunk_size)))
    else:
        main()
