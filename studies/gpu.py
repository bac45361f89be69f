"""Everything that waits for a GPU, in one command, a step after the other:

    python -m studies.gpu --out runs/gpu                  # every step, on the GPU
    python -m studies.gpu loss rollout --out runs/gpu     # only these
    python -m studies.gpu --device cpu --small            # all of it on work that a CPU can do, too
    python -m studies.collect runs/gpu --experiment gpu   # what was measured becomes rows of tables

A step is a command of this project in a process of its own, with a limit of time. What it prints
goes to a file in the output folder; a step that fails or takes too long is told, and the next one
begins. No line of this project has run on a GPU yet, so the first steps look for what breaks:

    tests      the tests that have a part for CUDA
    run        the default run
    kills      a run that is killed ten times by SIGKILL at random moments, and resumed each time
    loss       value and gradients of the loss at the shape that TRL publishes figures for (8,192
               tokens, width 4,096, vocabulary 151,936, bfloat16), and at Qwen2.5-0.5B's width:
               ours, all logits, TRL's, Liger's, and the three bare matrix products that all need
    rollout    sampled tokens a second: the built-in model beside a loop of `generate`, and the cost
               of a token in a model of Qwen2.5-0.5B's shape
    iteration  update and iteration of Qwen2.5-0.5B's shape: ActFocus, GRPO and TRL's GRPOTrainer
    paper      an iteration with the paper's settings of Qwen2.5-0.5B's shape with random weights,
               whose turns all go on to their limit: time and memory at their worst
    smollm2    GRPO and ActFocus with a warm-started SmolLM2 (--smollm2 FOLDER), eight seeds side by
               side
"""

from __future__ import annotations

import argparse
import csv
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from studies.bench import SHAPES, random_policy
from support.processes import ROOT

NAMES = ("tests", "run", "kills", "loss", "rollout", "iteration", "paper", "smollm2")
TINY = (64, 128, 2, 4, 2, 2000)  # a shape as in SHAPES, to try the commands with
TESTED = ("energy", "fused", "policy", "rollout", "lora", "checkpoint")
KILLS = 10
PAUSE = (5.0, 25.0)  # seconds from the start of a run to its death, drawn at random


class Step(NamedTuple):
    """A command of the project: what follows `python`."""

    name: str
    words: list[str]
    minutes: float  # its limit


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = args.steps or NAMES
    if "paper" in wanted:
        shape = TINY if args.small else SHAPES["qwen-0.5b"]
        random_policy(shape, "cpu").save(args.out / "random-model")
    failed = []
    for step in steps(args):
        if step.name.partition("-")[0] not in wanted:
            continue
        began = time.perf_counter()
        problem = carry_out(step, args.out)
        seconds = time.perf_counter() - began
        print(f"{step.name:16} {seconds:6.0f} s   {problem or 'done'}", flush=True)
        if problem:
            failed.append(step.name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; {args.out}/STEP.txt says why")


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("steps", nargs="*", help="The steps to take; all if none is named.")
    flag("--device", default="cuda", help="The torch device.")
    flag("--small", action="store_true", help="Little work in each step, to try the commands.")
    flag("--smollm2", type=Path, help="The folder of a warm-started SmolLM2.")
    flag("--out", type=Path, default=Path("runs/gpu"), help="The folder of the results.")
    flag("--kills", type=int, help="Only kill and resume one run so many times, in --out.")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, and torch sees none: --device cpu --small tries the steps")
    if unknown := set(args.steps) - set(NAMES):
        parser.error(f"there is no step {', '.join(sorted(unknown))}: choose of {', '.join(NAMES)}")
    if "smollm2" in args.steps and not args.smollm2:
        parser.error("the step smollm2 needs --smollm2 FOLDER, a warm-started model")
    return args


def steps(args: argparse.Namespace) -> list[Step]:
    """Every step, in order; one with several commands has several names with a common beginning."""
    small, out, device = args.small, args.out.resolve(), ["--device", args.device]
    bench = ["-m", "studies.bench"]
    shape = ["--shape", "qwen-0.5b"] if not small else []
    repeats = ["--repeats", "1" if small else "5"]
    tokens = ["--tokens", "256" if small else "8192"]
    vocabulary = ["--vocabulary", "2000" if small else "151936"]
    tests = [f"tests/test_{name}.py" for name in (TESTED[:2] if small else TESTED)]
    little = ["--iterations", "1", "--prompts", "2", "--minibatch", "16", "--eval-episodes", "8"]
    found = [
        Step("tests", ["-m", "pytest", "-q", *tests], 10),
        Step(
            "run",
            ["train_actfocus.py", *device, "--out", f"{out}/run", *(little if small else [])],
            10,
        ),
        Step(
            "kills",
            ["-m", "studies.gpu", *device, "--kills", "2" if small else str(KILLS),
             "--out", f"{out}/kills"],
            10,
        ),
    ]  # fmt: skip
    for width in ("64",) if small else ("4096", "896"):
        words = [*bench, "loss", *device, "--dtype", "bfloat16", "--width", width, *tokens]
        found.append(
            Step(f"loss-{width}", [*words, *vocabulary, "--out", f"{out}/loss-{width}"], 8)
        )
    sizes = ["--rows", "8", "--positions", "64", *vocabulary] if small else [
        "--rows", "64", "256", "--positions", "512", *vocabulary
    ]  # fmt: skip
    prompts = ["--prompts", "2"] if small else []
    rollout = [*bench, "rollout", *device, *repeats, *prompts]
    growth = [*bench, "growth", *device, *repeats, *shape, *sizes]
    whole = [*bench, "update", "iteration", *device, *repeats, *shape, *prompts]
    found += [
        Step("rollout-built-in", [*rollout, "--out", f"{out}/rollout"], 5),
        Step("rollout-shape", [*growth, "--out", f"{out}/growth"], 8),
        Step(
            "iteration",
            [*whole, "--completion", "16" if small else "256", "--out", f"{out}/iteration"],
            10,
        ),
        Step(
            "paper",
            ["train_actfocus.py", "--model", f"{out}/random-model", "--preset", "paper",
             "--env", "frozenlake", *device, "--iterations", "1", "--eval-episodes", "16",
             "--eval-every", "1", "--arms", "actfocus", "--gradient-checkpointing",
             "--play-batch", "4" if small else "128",
             *(["--prompts", "1", "--minibatch", "16"] if small else []), "--out", f"{out}/paper"],
            10,
        ),
    ]  # fmt: skip
    if args.smollm2:
        runs = [
            "-m", "studies.compare", "--env", "frozenlake", "--arms", "grpo", "actfocus",
            "--model", str(args.smollm2.resolve()), "--lr", "3e-5", "--iterations", "8",
            "--eval-every", "4", "--eval-episodes", "64", "--prompts", "8", "--minibatch", "16",
            "--seeds", "0-7", "--jobs", "8", *device, "--out", f"{out}/smollm2",
        ]  # fmt: skip
        found.append(Step("smollm2", runs, 30))
    return found


def carry_out(step: Step, out: Path) -> str:
    """Run a step. Returns "" or what went wrong, in a few words."""
    with (out / f"{step.name}.txt").open("w", encoding="utf-8") as file:
        command = [sys.executable, *step.words]
        print(" ".join(["python", *step.words]), file=file, flush=True)
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=file, timeout=60 * step.minutes
            ).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {step.minutes:g} minutes"
    return f"exit code {code}" if code else ""


def kill_and_resume(out: Path, device: str, kills: int) -> None:
    """A run that is killed so many times at random moments and resumed; at its end, the log must
    have each iteration once. Raises SystemExit if it has not, or if the run fails by itself."""
    rng = random.Random(0)
    iterations = 2 + kills
    words = ["--arms", "actfocus", "--iterations", str(iterations), "--eval-every", "1"]
    words += ["--prompts", "2", "--minibatch", "16", "--eval-episodes", "8", "--device", device]
    flags = [*words, "--checkpoint-every", "1", "--out", str(out)]
    killed = 0
    while True:
        process = subprocess.Popen([sys.executable, "train_actfocus.py", *flags], cwd=ROOT)
        try:
            code = process.wait(rng.uniform(*PAUSE) if killed < kills else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            print(f"killed {killed} times", flush=True)
            if (out / "config.json").exists():
                flags = ["--resume", str(out)]
            continue
        if code:
            raise SystemExit(f"the run failed by itself, after {killed} deaths")
        break
    with (out / "actfocus.csv").open(newline="", encoding="utf-8") as file:
        found = [int(row["iteration"]) for row in csv.DictReader(file)]
    if found != list(range(iterations + 1)):
        raise SystemExit(f"after {killed} deaths, the log has the iterations {found}")
    print(f"{killed} deaths, and the log has each of {iterations} iterations once")


if __name__ == "__main__":
    asked = parse_flags(None)
    if asked.kills is not None:
        kill_and_resume(asked.out, asked.device, asked.kills)
    else:
        main()
