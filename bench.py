"""How fast, and in how much memory, beside what one would use instead; all on the same work, in one run on one machine.

    python bench.py                                     # every section, some 45 minutes on 2 CPU cores
    python bench.py loss --tokens 4096                  # one section, one size
    python bench.py --device cuda --shape qwen-0.5b     # a model of Qwen2.5-0.5B's shape, random weights

loss       value and gradients, entropy bonus included: all logits, selective log-softmax, recomputed in backward, fused
update     an iteration's update: ActFocus against GRPO, KL off and on
rollout    sampled tokens a second: ours against a loop of `model.generate`, a call per turn
iteration  play and update: ours against TRL's GRPOTrainer (optional: pip install trl)
growth     cost per token while rows, positions and vocabulary grow

Each result is a line on the screen and a row of bench.csv in the output folder; growth.png is drawn from its own rows.
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
from operator import itemgetter
from pathlib import Path

import torch
import transformers
from matplotlib.figure import Figure
from torch import Tensor

from actfocus import fused_policy_loss, group_advantages, policy_loss, stats_loss
from energy import token_stats
from envs import Step, make_env
from policy import Policy, load_policy, serve
from rollout import rollout
from train_actfocus import ActFocusConfig, actfocus
from train_grpo import GRPO, learn

SHAPES = {  # hidden size, intermediate size, layers, heads, key-value heads, vocabulary
    "qwen-0.5b": (896, 4864, 24, 14, 2, 151_936),
    "qwen-3b": (2048, 11008, 36, 16, 2, 151_936),
}


# ------------------------------------------------------------------------------------------------------------------- loss
def selective(hidden: Tensor, weight: Tensor, targets: Tensor, *per_token: Tensor, entropy_coef: float) -> Tensor:
    """Logits kept, but not their log-softmax: a logsumexp per block, as in `selective_log_softmax` of many trainers. No entropy."""
    logits = hidden @ weight.T
    lse = torch.cat([block.float().logsumexp(-1) for block in logits.split(256)])
    return stats_loss(logits.gather(-1, targets[:, None]).squeeze(-1).float() - lse, None, *per_token)


def recomputed(hidden: Tensor, weight: Tensor, targets: Tensor, *per_token: Tensor, entropy_coef: float, **options) -> Tensor:
    """Statistics chunk by chunk, each chunk's logits computed again in backward."""
    stats = token_stats(hidden, weight, targets, **options)
    return stats_loss(stats.logprob, stats.entropy, *per_token, entropy_coef=entropy_coef)


def trl(hidden: Tensor, weight: Tensor, targets: Tensor, *per_token: Tensor, entropy_coef: float) -> Tensor:
    """The fused head of TRL 1.16's GRPOTrainer: tiles of the vocabulary, computed again in backward (Triton on CUDA)."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as TILE

    logprob, entropy, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, TILE, None, 1.0, ("entropy",))
    return stats_loss(logprob, entropy, *per_token, entropy_coef=entropy_coef)


LOSSES = {"full": policy_loss, "selective": selective, "recomputed": recomputed, "trl": trl, "fused": fused_policy_loss}
COPIES = {"full": 6, "selective": 3, "recomputed": 0, "trl": 0, "fused": 0}  # of the logits that a way holds, about


def measure_loss(
    way: str, tokens: int, vocabulary: int, width: int, device: str, dtype: torch.dtype, chunk_size: int | None = None
) -> tuple[float, float]:
    """Seconds and peak extra GiB of a loss's value and gradients; run in a process of its own, since peaks never fall."""
    generator = torch.Generator(device).manual_seed(0)
    loss = partial(LOSSES[way], entropy_coef=0.001, **({"chunk_size": chunk_size} if chunk_size else {}))

    def run(tokens: int, vocabulary: int) -> tuple[float, float]:
        hidden = torch.randn(tokens, width, device=device, dtype=dtype, generator=generator).requires_grad_()
        weight = torch.randn(vocabulary, width, device=device, dtype=dtype, generator=generator).mul_(0.02).requires_grad_()
        targets = torch.randint(vocabulary, (tokens,), device=device, generator=generator)
        per_token = [torch.randn(tokens, device=device, generator=generator) for _ in range(2)]
        per_token = [per_token[0] * 0.1 - 12, per_token[1], torch.rand(tokens, device=device, generator=generator)]
        before, seconds = peak_gib(device), []
        for _ in range(2):  # the first pays for fresh memory
            hidden.grad = weight.grad = None
            began = time.perf_counter()
            loss(hidden, weight, targets, *per_token).backward()
            synchronize(device)
            seconds.append(time.perf_counter() - began)
        return min(seconds), peak_gib(device) - before

    run(64, 1024)  # the libraries set themselves up
    return run(tokens, vocabulary)


def peak_gib(device: str) -> float:
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**30
    return kilobytes("/proc/self/status", "VmHWM") / 2**20  # not getrusage's ru_maxrss, which starts at the parent's


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def bench_loss(args: argparse.Namespace, report: Report) -> None:
    room = torch.cuda.mem_get_info()[1] / 2**30 if args.device != "cpu" else kilobytes("/proc/meminfo", "MemAvailable") / 2**20
    for vocabulary in args.vocabulary:
        for tokens in args.tokens:
            results = {}
            for way in LOSSES:
                needed = (COPIES[way] * tokens + 3 * args.width) * vocabulary * 4 / 2**30
                if needed > 0.9 * room:
                    print(f"loss, {way}, {tokens} tokens, vocabulary {vocabulary}: left out, it needs some {needed:.0f} GiB")
                    continue
                flags = [way, str(tokens), str(vocabulary), str(args.width), args.device, args.dtype]
                child = subprocess.run([sys.executable, __file__, "--child", *flags], capture_output=True, text=True)
                if child.returncode:
                    print(f"loss, {way}, {tokens} tokens, vocabulary {vocabulary}: failed: {child.stderr.strip()[-200:]}")
                    continue
                results[way] = json.loads(child.stdout)
            for way, costs in results.items():
                for unit, cost, base in zip(("seconds", "extra GiB"), costs, results.get("full", (0, 0)), strict=True):
                    what = f"{unit}: {way}, {tokens} tokens, vocabulary {vocabulary}"
                    report("loss", what, cost, cost / base if base else None)  # small work may not show in the peak


def kilobytes(path: str, field: str) -> int:
    """A line of Linux's counts."""
    return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(field + ":"))


# ----------------------------------------------------------------------------------------------- the work that all share
class Babble:
    """One turn about nothing, whose length is the limit's: the same work for everyone, whatever the model says."""

    system, tools, done = "Say anything.", [], True

    def reset(self, seed: int) -> str:
        self.done = False
        return f"Go on from {seed % 900 + 100}."

    def step(self, reply: str) -> Step:
        self.done = True
        return Step("", reward_of(reply), True, False, True, 0, 0)


def reward_of(reply: str) -> float:
    return reply.count("e") / 100


def shaped_policy(args: argparse.Namespace) -> Policy:
    """The built-in model, or one of another's shape with random weights and the built-in tokenizer."""
    policy = load_policy(env="frozenlake", device=args.device)
    if args.shape:
        hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[args.shape]
        config = transformers.Qwen2Config(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=True,
            bos_token_id=None, pad_token_id=policy.tokenizer.pad_token_id, eos_token_id=policy.end_of_turn,
        )  # fmt: skip
        model = transformers.Qwen2ForCausalLM(config).to(args.device)
        policy = Policy(model, policy.tokenizer, *serve(policy.tokenizer, with_tiktoken=True))
    return policy


def stock(policy: Policy) -> Policy:
    """With attention as transformers has it, for what is compared with."""
    policy.model.set_attn_implementation("sdpa")
    return policy


def endless(policy: Policy) -> Policy:
    """A turn ends at its limit only, so that all rows are equally long."""
    policy.is_control = lambda token: False
    return policy


def timed(args: argparse.Namespace, work: Callable[[], object]) -> tuple[float, object]:
    synchronize(args.device)
    began = time.perf_counter()
    result = work()
    synchronize(args.device)
    return time.perf_counter() - began, result


def side_by_side(args: argparse.Namespace, ours: Callable[[], float], theirs: Callable[[], float]) -> tuple[float, float, float]:
    """Medians of two costs and of their ratio theirs / ours, measured in turns, since the machine's speed drifts."""
    ours(), theirs()  # warm up
    pairs = [(ours(), theirs()) if i % 2 else (theirs(), ours())[::-1] for i in range(args.repeats)]
    return *(statistics.median(costs) for costs in zip(*pairs, strict=True)), statistics.median(b / a for a, b in pairs)


# ----------------------------------------------------------------------------------------------------------------- update
def bench_update(args: argparse.Namespace, report: Report) -> None:
    """Reference pass, weights and mini-batches on the rollouts of one iteration, which both arms share."""
    policy = load_policy(env="frozenlake", device=args.device)
    seeds = [seed for seed in range(args.prompts) for _ in range(8)]
    rollouts = rollout(policy, lambda: make_env("frozenlake"), seeds)
    policy, reference = (shaped := shaped_policy(args)), shaped.frozen_copy()
    for kl_coef in (0.0, 0.001):

        def cost(arm, kl_coef=kl_coef) -> float:
            config = ActFocusConfig(lr=0.0, kl_coef=kl_coef, device=args.device, micro_tokens=args.micro_tokens)
            optimizer = torch.optim.Adam(policy.model.parameters(), lr=0.0)
            used = reference if arm.needs_reference or kl_coef else None
            advantages = group_advantages(rollouts.rewards, 8)
            return timed(args, lambda: learn(policy, used, optimizer, rollouts, advantages, arm, config, random.Random(0)))[0]

        focus = actfocus(ActFocusConfig())
        grpo, act, ratio = side_by_side(args, lambda: cost(GRPO), lambda: cost(focus))
        report("update", f"GRPO, KL {'on' if kl_coef else 'off'}, seconds", grpo)
        report("update", f"ActFocus, KL {'on' if kl_coef else 'off'}, seconds; ratio: over GRPO", act, ratio)
    if args.device != "cpu":  # 2 FLOPs a weight and token forward, 4 backward; attention left out
        flops = 6 * policy.model.num_parameters() * rollouts.lengths.sum().item()
        what = f"share of a peak of {args.peak_tflops:g} TFLOP/s (GRPO with KL, reference pass left out)"
        report("update", what, flops / grpo / args.peak_tflops / 1e12)


# ---------------------------------------------------------------------------------------------------------------- rollout
@torch.no_grad()
def generate_loop(policy: Policy, seeds: list[int]) -> int:
    """What small repositories do: each turn, the whole conversation is written out, encoded, padded on the left, and given to
    `model.generate`. Returns how many tokens were sampled."""
    envs, talks, sampled, tokenizer = [make_env("frozenlake") for _ in seeds], [], 0, policy.tokenizer
    for env, seed in zip(envs, seeds, strict=True):
        talks.append([{"role": "system", "content": env.system}, {"role": "user", "content": env.reset(seed)}])
    tokenizer.padding_side = "left"
    while playing := [i for i, env in enumerate(envs) if not env.done]:
        options = {"tools": envs[0].tools, "tokenize": False, "add_generation_prompt": True}
        texts = [tokenizer.apply_chat_template(talks[i], **options) for i in playing]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(policy.device)
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
            talks[i] += [{"role": "assistant", "content": reply}, {"role": "tool", "content": envs[i].step(reply).observation}]
    return sampled


def bench_rollout(args: argparse.Namespace, report: Report) -> None:
    policy, plain = load_policy(env="frozenlake", device=args.device), stock(load_policy(env="frozenlake", device=args.device))
    seeds = [seed for seed in range(args.prompts) for _ in range(8)]

    def ours() -> float:
        seconds, rollouts = timed(args, lambda: rollout(policy, lambda: make_env("frozenlake"), seeds))
        return seconds / rollouts.response.sum().item()

    def theirs() -> float:
        seconds, sampled = timed(args, lambda: generate_loop(plain, seeds))
        return seconds / sampled

    one, other, ratio = side_by_side(args, ours, theirs)
    report("rollout", "ours, sampled tokens a second; ratio: over the generate loop", 1 / one, ratio)
    report("rollout", "generate loop, sampled tokens a second", 1 / other)


# -------------------------------------------------------------------------------------------------------------- iteration
def bench_iteration(args: argparse.Namespace, report: Report) -> None:
    """16 prompts x 8 completions of 256 tokens, then four optimizer steps of 32 completions."""
    try:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        print("iteration: left out, TRL is not installed (pip install trl)")
        return
    policy, length, steps = endless(shaped_policy(args)), args.completion, 4
    config = ActFocusConfig(device=args.device, entropy_coef=0.0, micro_tokens=args.micro_tokens)
    optimizer, reference, number = torch.optim.AdamW(policy.model.parameters(), lr=3e-4), policy.frozen_copy(), itertools.count()

    def ours(arm) -> float:
        def iteration() -> None:
            seeds = [seed for seed in range(16) for _ in range(8)]
            rollouts = rollout(policy, Babble, seeds, max_turn_tokens=length, sampling_seed=next(number))
            used = reference if arm.needs_reference else None
            learn(policy, used, optimizer, rollouts, group_advantages(rollouts.rewards, 8), arm, config, random.Random(0))

        return timed(args, iteration)[0]

    stamps: list[float] = []

    def reward(completions: list[str], **_) -> list[float]:  # called once an iteration
        stamps.append(time.perf_counter())
        return [reward_of(each) for each in completions]

    def theirs() -> list[float]:
        prompts = [policy.tokenizer.decode(policy.prompt(Babble.system, [], Babble().reset(seed))) for seed in range(16)]
        with tempfile.TemporaryDirectory() as folder:
            options = GRPOConfig(
                folder, per_device_train_batch_size=32, steps_per_generation=steps, num_generations=8, beta=0.0, learning_rate=3e-4,
                max_completion_length=length, generation_kwargs={"min_new_tokens": length}, temperature=1.0, top_k=0,
                max_steps=steps * (args.repeats + 2), use_cpu=args.device == "cpu", bf16=args.device != "cpu",
                gradient_checkpointing=False, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            data = Dataset.from_dict({"prompt": prompts})
            GRPOTrainer(stock(shaped_policy(args)).model, reward, options, data, processing_class=policy.tokenizer).train()
        return [b - a for a, b in zip(stamps, stamps[1:], strict=False)][1:]  # a reward to the next: an update and a generation

    arms, costs = {"GRPO": GRPO, "ActFocus": actfocus(config)}, {"GRPO": [], "ActFocus": []}
    for turn in range(2):  # ours before and after, since the machine's speed drifts
        for name, arm in arms.items():
            costs[name] += [ours(arm) for _ in range(1 + args.repeats // 2)][turn == 0 :]
        trl_costs = theirs() if turn == 0 else trl_costs
    for name in arms:
        ratio = statistics.median(trl_costs) / statistics.median(costs[name])
        report("iteration", f"ours, {name}, seconds; ratio: TRL over ours", statistics.median(costs[name]), ratio)
    report("iteration", "TRL's GRPOTrainer, seconds", statistics.median(trl_costs))


# ----------------------------------------------------------------------------------------------------------------- growth
def bench_growth(args: argparse.Namespace, report: Report) -> None:
    """Microseconds a sampled token (the least over the repeats) while one size grows: of playing and the update, and of the loss."""
    policy = endless(shaped_policy(args))
    config = ActFocusConfig(device=args.device, micro_tokens=args.micro_tokens)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)

    def costs(rows: int, positions: int) -> tuple[float, float]:
        limits = {"max_turn_tokens": positions, "max_tokens": positions}
        seconds, rollouts = timed(args, lambda: rollout(policy, Babble, range(rows), **limits))
        learning = [policy, None, optimizer, rollouts, torch.ones(rows, device=args.device), GRPO, config]
        tokens = rollouts.response.sum().item() / 1e6
        return seconds / tokens, timed(args, lambda: learn(*learning, random.Random(0)))[0] / tokens

    def panel(axes, label: str, sizes: list[int], rounds: list, names: tuple[str, str], title: str) -> None:
        """Rounds (repeats, sizes, 2): all sizes in turn, since the machine's speed drifts."""
        for name, values in zip(names, torch.tensor(rounds).amin(0).T.tolist(), strict=True):
            axes.loglog(sizes, values, "o-", base=2, label=name)
            for size, value in zip(sizes, values, strict=True):
                report("growth", f"{name}, {size} {label}, microseconds a token; ratio: over {sizes[0]}", value, value / values[0])
        axes.set(title=title, xlabel=label, ylabel="microseconds a sampled token", xticks=sizes, xticklabels=sizes)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend()

    costs(32, 64)  # warm up
    figure, repeats, names = Figure(figsize=(13, 4), layout="constrained"), range(args.repeats), ("playing", "update")
    left, middle, right = figure.subplots(1, 3)
    middle.sharey(left)
    panel(left, "rows", args.rows, [[costs(size, 256) for size in args.rows] for _ in repeats], names, "256 positions")
    panel(middle, "positions", args.positions, [[costs(64, size) for size in args.positions] for _ in repeats], names, "64 rows")
    loss = partial(measure_loss, tokens=1024, width=args.width, device=args.device, dtype=getattr(torch, args.dtype))
    ways, title = ("full", "fused"), f"the loss alone: 1024 tokens, width {args.width}"
    rounds = [[[loss(way, vocabulary=size)[0] / 1024e-6 for way in ways] for size in args.vocabulary] for _ in repeats]
    panel(right, "vocabulary", args.vocabulary, rounds, ("all logits", "fused"), title)
    figure.savefig(args.out / "growth.png", dpi=150)


# ------------------------------------------------------------------------------------------------------------------- main
class Report:
    """Prints each result and keeps it in bench.csv."""

    def __init__(self, path: Path, machine: str):
        self.path, self.machine = path, machine
        if not path.exists():
            path.write_text("section,what,value,ratio,machine\n")

    def __call__(self, section: str, what: str, value: float, ratio: float | None = None) -> None:
        print(f"{section:10} {what:88} {value:10.4g}" + (f"   ratio {ratio:.3f}" if ratio is not None else ""), flush=True)
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([section, what, f"{value:.6g}", "" if ratio is None else f"{ratio:.4g}", self.machine])


BENCHES = (bench_loss, bench_update, bench_rollout, bench_iteration, bench_growth)
SECTIONS = {each.__name__.removeprefix("bench_"): each for each in BENCHES}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all if none is given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=list(SHAPES), help="of the model but in rollout; the built-in one if not given")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384], help="of the loss")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[600, 32_000, 151_936], help="of the loss")
    parser.add_argument("--width", type=int, default=896, help="of the hidden states, in the loss")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the loss's inputs")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--positions", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--prompts", type=int, default=16, help="of 8 rollouts each, in update and rollout")
    parser.add_argument("--completion", type=int, default=256, help="tokens of each completion, in iteration")
    parser.add_argument("--micro-tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5, help="of what is timed in turn")
    parser.add_argument("--peak-tflops", type=float, default=989, help="of the GPU in bfloat16; an H100's or H200's by default")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args(argv)
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"there is no section {', '.join(unknown)}: choose of {', '.join(SECTIONS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name() if args.device != "cpu" else f"{torch.get_num_threads()} threads of {platform.machine()}"
    report = Report(args.out / "bench.csv", f"{machine}, torch {torch.__version__}, transformers {transformers.__version__}")
    for section in args.sections or SECTIONS:
        SECTIONS[section](args, report)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        way, tokens, vocabulary, width, device, dtype, *chunk_size = sys.argv[2:]
        sizes = [int(each) for each in (tokens, vocabulary, width)]
        print(json.dumps(measure_loss(way, *sizes, device, getattr(torch, dtype), *map(int, chunk_size))))
    else:
        main()
