"""What a run takes: the flags of the command line.

A config is a dataclass whose fields are made by `option`: each is a flag with a sentence of help,
and what cannot run is refused before anything does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path

import torch

from arms import ARMS, SIGNALS, Arm
from support.logs import COLUMNS, appended_files
from worlds import ENVIRONMENTS, make_env


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
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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
    args = parser.parse_args(argv)
    if getattr(args, "preset", None) == "paper":
        chosen = [ARMS[name] for name in getattr(args, "arms", "grpo").split(",") if name in ARMS]
        parser.set_defaults(**paper_settings(args.env, any(arm.critic for arm in chosen)))
        args = parser.parse_args(argv)  # what is given still counts
    try:
        if getattr(args, "resume", None):
            args = resumed(parser, argv, args.resume)
        config = config_class(**vars(args))
        check_bounds(config)
        config.check()
    except ValueError as error:
        parser.error(str(error))
    return config


def resumed(
    parser: argparse.ArgumentParser, argv: list[str] | None, folder: str
) -> argparse.Namespace:
    """The flags that a run was begun with. Raises ValueError for a folder that holds none, for a
    run of another script, and for flags beside --resume that say otherwise."""
    path, own = Path(folder) / "config.json", vars(parser.parse_args([]))
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--resume {folder} is no run that can go on: {error}") from None
    if not isinstance(before, dict) or before.keys() != own.keys():
        raise ValueError(f"{path} has other settings than this script takes: use the one it is of")
    before |= {"resume": folder, "out": folder}
    now = parser.parse_args(argv, argparse.Namespace(**before))
    for name, value in vars(now).items():
        if value != before[name] and name not in FREE:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} is {value}, but {folder} was run with {before[name]}")
    return now


def check_bounds(config) -> None:
    """Raise ValueError, naming the flag, for a value that is out of its bounds, and for a device
    that cannot be used."""
    for each in fields(config):
        value, low, high = getattr(config, each.name), each.metadata["low"], each.metadata["high"]
        if isinstance(value, (int, float)) and not (low <= value <= high and value < math.inf):
            bound = f"at least {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
            flag = each.name.replace("_", "-")
            raise ValueError(f"--{flag} is {value}: it must be {bound}")
    try:
        torch.zeros(1, device=config.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:80]
        raise ValueError(f"--device {config.device} cannot be used: {reason}") from None


# -------------------------------------------------------------------------- the flags of training
# may differ on --resume: they only save memory
FREE = ("micro_tokens", "play_batch", "gradient_checkpointing")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def paper_settings(env: str, critic: bool) -> dict:
    """The paper's training settings (its appendix) where they are not the defaults below, by world
    and whether PPO is among the arms; FrozenLake's for a world that it does not have. The worlds
    stay ours, with their turns and penalties."""
    settings = {
        "iterations": 200, "group_size": 16, "minibatch": 32, "lr": 1e-6, "eval_every": 10,
        "eval_episodes": 512, "eval_group_size": 16, "max_turn_tokens": 400, "max_tokens": 3600,
    }  # fmt: skip
    if critic:
        settings["critic_lr"] = 1e-5
    if env in ("sokoban", "sudoku") or (critic and env != "shop"):
        settings["keep_groups"] = 0.25
    if env == "shop":  # the paper's WebShop
        settings |= {"iterations": 100, "prompts": 16, "group_size": 8, "max_tokens": 8192}
        settings["kl_coef"] = 0.0 if critic else 0.001
    return settings


@dataclass
class Config:
    """Every flag. Clip, entropy bonus, KL and the temperature of evaluations are the paper's; the
    rest suits the built-in model."""

    env: str = option("frozenlake", f"of {', '.join(ENVIRONMENTS)}")
    model: str | None = option(None, "chat model to train, not the built-in: folder, id", kind=str)
    thoughts: int | None = option(
        None, "of a start with another number of free sentences", 0, 30, kind=int
    )
    preset: str | None = option(None, '"paper": its training settings for the world', kind=str)
    iterations: int = option(10, "rounds of playing and updating", 1)
    prompts: int = option(8, "prompts an iteration", 1)
    group_size: int = option(8, "rollouts of each prompt", 1)
    minibatch: int = option(16, "rollouts an optimizer step", 1)
    micro_tokens: int = option(8192, "tokens a forward pass, padding included", 1)
    gradient_checkpointing: bool = option(
        False, "compute activations again in the backward pass: less memory, more time"
    )
    lr: float | None = option(
        None, "learning rate; 3e-4 if built in (shop 1e-4), else 1e-6", 0, 10, kind=float
    )
    temperature: float = option(1.0, "sampling temperature of training rollouts", 0.01)
    clip_low: float = option(0.2, "the ratio is clipped at 1 - this", 0, 1)
    clip_high: float = option(0.28, "the ratio is clipped at 1 + this", 0)
    entropy_coef: float = option(0.001, "entropy bonus", 0)
    kl_coef: float = option(0.0, "penalty on the KL divergence from the reference; 0: off", 0)
    keep_groups: float = option(1.0, "share of groups trained on, by reward variance", 0.01, 1)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", 1e-6)
    play_batch: int = option(256, "rollouts played at once", 1)
    max_turn_tokens: int = option(160, "a turn is cut after this many tokens", 1)
    max_tokens: int = option(4096, "an episode is cut after this many tokens, prompt included", 1)
    eval_every: int = option(5, "iterations between evaluations", 1)
    eval_episodes: int | None = option(
        None, "episodes an evaluation; 128 if built in, else 32", 1, kind=int
    )
    eval_group_size: int = option(
        1, "of them with the same prompt (the paper has 512, in groups of 16)", 1
    )
    eval_temperature: float = option(0.5, "sampling temperature of evaluations", 0.01)
    seed: int = option(0, "of the prompts and of sampling", 0, 10**9)
    device: str = option(DEVICE, "torch device")
    bfloat16: bool = option(False, "compute in bfloat16 on a CPU, too: faster where it has AVX-512")
    out: str | None = option(None, "results folder; else a new one in runs/", kind=str)
    save: bool = option(False, "also save the trained policies as folders that transformers opens")
    checkpoint_every: int = option(5, "iterations between checkpoints; 0: none", 0)
    resume: str | None = option(None, "folder of a run to go on with; its flags count", kind=str)
    with_critic = False  # PPO has one, which train_ppo.py trains

    def check(self) -> None:
        """Raise ValueError for what cannot run."""
        make_env(self.env)
        if self.preset not in (None, "paper"):
            raise ValueError(f"--preset is {self.preset}: there is only paper")
        if self.group_size == 1 and not self.with_critic:
            raise ValueError("--group-size is 1: GRPO compares rollouts of a prompt, at least 2")
        if self.evaluated() % self.eval_group_size:
            raise ValueError(
                f"--eval-episodes {self.evaluated()} do not split into groups of "
                f"--eval-group-size {self.eval_group_size}"
            )
        if self.model and self.thoughts is not None:
            raise ValueError("--thoughts is of the built-in model: leave it out with --model")
        if self.out and not self.resume and appended_files(Path(self.out)):
            raise ValueError(f"--out {self.out} holds an earlier run: choose another folder")

    def evaluated(self) -> int:
        """Episodes of an evaluation; a built-in model is quick to evaluate."""
        return self.eval_episodes or (32 if self.model else 128)

    def resolve(self) -> None:
        """Fill in what was not given; a built-in model learns fast."""
        if self.lr is None:
            built_in = 1e-4 if self.env == "shop" else 3e-4  # 3e-4 was not steady in the shop
            self.lr = 1e-6 if self.model else built_in
        self.eval_episodes = self.evaluated()
        if self.out is None:
            self.out = new_folder(f"{self.env}-seed{self.seed}")


def new_folder(what: str) -> str:
    """Where results go without --out; two processes of the same second get two folders."""
    return f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{what}-{os.getpid()}"


@dataclass
class ActFocusConfig(Config):
    arms: str = option("grpo,actfocus", f"arms to train in turn, of {', '.join(ARMS)}")
    alpha: float | None = option(
        None,
        "weight of reasoning tokens (actfocus: 0.1); 1 with --beta 0 is GRPO",
        0,
        1,
        kind=float,
    )
    beta: float | None = option(
        None, "how much more an uncertain action token weighs (actfocus: 0.5)", 0, kind=float
    )
    signal: str | None = option(None, f"of uncertainty: {', '.join(SIGNALS)}", kind=str)
    no_baseline: bool = option(False, "leave the first arm out")

    def check(self) -> None:
        super().check()
        names = self.arms.split(",")
        for name in names:
            if name not in ARMS:
                raise ValueError(f"--arms: there is no arm {name!r}: choose of {', '.join(ARMS)}")
            if ARMS[name].critic and not self.with_critic:
                raise ValueError(f"--arms: {name} has a critic, which train_ppo.py trains")
            if self.group_size == 1 and not ARMS[name].critic:
                raise ValueError(f"--group-size is 1: --arms {name} compares rollouts, at least 2")
        if len(set(names)) < len(names):
            raise ValueError(f"--arms {self.arms} names an arm twice: name each once")
        if self.no_baseline and len(names) == 1:
            raise ValueError(f"--no-baseline leaves nothing of --arms {self.arms}: leave it out")
        if self.signal not in (None, *SIGNALS):
            raise ValueError(f"--signal is {self.signal}: choose one of {', '.join(SIGNALS)}")

    def chosen(self) -> dict[str, Arm]:
        """The arms to train. --alpha, --beta and --signal stand in for those of every arm but the
        uniform ones."""
        given = {"alpha": self.alpha, "beta": self.beta, "signal": self.signal}
        given = {name: value for name, value in given.items() if value is not None}
        names = self.arms.split(",")
        if self.no_baseline:
            del names[0]
        arms = {name: ARMS[name] for name in names}
        return {name: arm if arm.uniform else replace(arm, **given) for name, arm in arms.items()}
