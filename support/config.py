"""The settings of a training run, each of which is also a flag of the command line.

    config = parse(Config, "GRPO on a tool-calling environment.")    # from the command line
    config = Config(env="sudoku", iterations=20)                     # the same from Python

A config is a dataclass. Its field `group_size` is the flag `--group-size`, and its annotation says
of which type the value is. `parse` makes an argparse parser from these fields; `validate` then
refuses settings that cannot run, before anything does.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

import torch

from arms import ARMS, SIGNALS, Arm
from support.logs import COLUMNS, holds_logs
from worlds import ENVIRONMENTS, make_env
from worlds.imported import is_imported, world_name

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A resumed run may change these: they save memory and leave what is computed as it is.
MAY_CHANGE_ON_RESUME = ("micro_tokens", "play_batch", "gradient_checkpointing")
# --alpha, --beta and --signal are for the arms of ActFocus as a whole. The name of any other arm
# says what it weighs ("discount alone"), and would be untrue of an arm that a flag has changed.
ADJUSTABLE = ("actfocus", "ppo-actfocus")


# ------------------------------------------------------------------------ fields that become flags
def flag(default, help: str):
    """A field of a config: its default, and the sentence that --help prints."""
    return field(default=default, metadata={"help": help})


def same_flag(config_class: type, name: str, default):
    """A flag of another config, with the same sentence of help and a default of its own."""
    return flag(default, config_class.__dataclass_fields__[name].metadata["help"])


def flag_name(field_name: str) -> str:
    """How a field is spelled on the command line.

    >>> flag_name("group_size")
    '--group-size'
    """
    return f"--{field_name.replace('_', '-')}"


def make_parser(config_class: type, description: str) -> argparse.ArgumentParser:
    """An argparse parser with a flag for every field of a config class."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if issubclass(config_class, Config):
        columns = "\n".join(f"  {name:24}{text}" for name, text in COLUMNS.items())
        parser.epilog = f"columns of the logs:\n{columns}"
    types = get_type_hints(config_class)
    for each in fields(config_class):
        name, text = flag_name(each.name), each.metadata["help"]
        if types[each.name] is bool:
            parser.add_argument(name, help=text, action="store_true")
            continue
        if each.default is not None:
            text += f" (default: {each.default})"
        parser.add_argument(
            name, help=text, type=type_of_value(types[each.name]), default=each.default
        )
    return parser


def type_of_value(annotation) -> type:
    """The type that a flag's text is converted to.

    >>> type_of_value(int), type_of_value(float | None)
    (<class 'int'>, <class 'float'>)
    """
    given = [kind for kind in get_args(annotation) if kind is not NoneType]
    return given[0] if given else annotation


def parse(config_class: type, description: str, argv: list[str] | None = None):
    """A validated config from the command line.

    config_class: a dataclass whose fields are made by `flag`, with a method `validate`. argv: the
    words of the command line without the script's name; None: this process's. Ends the process
    with exit code 2 and a sentence if a flag is wrong, as argparse does. From then on, what is
    printed may hold any character, see `print_anything`.
    """
    print_anything()
    parser = make_parser(config_class, description)
    args = parser.parse_args(argv)
    if getattr(args, "preset", None) == "paper":
        names = getattr(args, "arms", "grpo").split(",")
        critic = any(ARMS[name].critic for name in names if name in ARMS)
        settings = paper_settings(args.env, critic)
        if args.lora:
            del settings["lr"]  # it is for all weights
        parser.set_defaults(**settings)
        args = parser.parse_args(argv)  # what stands on the command line comes before the preset
    try:
        if getattr(args, "resume", None):
            args = parse_resumed(parser, argv, args.resume)
        config = config_class(**vars(args))
        config.validate()
    except ValueError as error:
        parser.error(str(error))
    return config


def print_anything() -> None:
    """Let `print` write a question mark for a character that the terminal's encoding does not have
    (± in ASCII), where it would end a run of hours with an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def parse_resumed(
    parser: argparse.ArgumentParser, argv: list[str] | None, folder: str
) -> argparse.Namespace:
    """The settings that the run in a folder was begun with, and those few that may change.

    Raises ValueError for a folder without settings, for a run of another script or of an earlier
    version of this code, and for a flag beside --resume that contradicts the run's own.
    """
    path = Path(folder) / "config.json"
    try:
        begun_with = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(begun_with, dict):
            raise ValueError(f"{path} holds no settings")
    except (OSError, ValueError) as error:
        raise ValueError(f"--resume {folder} is no run that can be resumed: {error}") from None
    check_named_again(parser, argv, begun_with, folder)
    known = vars(parser.parse_args([]))
    differing = sorted(begun_with.keys() ^ known.keys())
    if differing:
        raise ValueError(
            f"--resume {folder} has other settings than this script ({', '.join(differing)}): "
            "another script or an earlier version of this code began it; resume it with that "
            "script, from the commit that began it"
        )
    begun_with |= {"resume": folder, "out": folder}
    args = parser.parse_args(argv, argparse.Namespace(**begun_with))
    for name, value in vars(args).items():
        if value != begun_with[name] and name not in MAY_CHANGE_ON_RESUME:
            raise ValueError(
                f"{flag_name(name)} is {value}, but {folder} was run with {begun_with[name]}: "
                "leave it out, or begin another run"
            )
    return args


def flags_of(config) -> list[str]:
    """The command line that `parse` makes this config of.

    Every setting stands in it, since those of a preset depend on the arms, which another command
    line may have fewer of.
    """
    words = []
    for each in fields(config):
        value = getattr(config, each.name)
        if value is True:
            words.append(flag_name(each.name))
        elif value is not None and value is not False:
            words.append(f"{flag_name(each.name)}={value}")
    return words


def check_named_again(
    parser: argparse.ArgumentParser, argv: list[str] | None, begun_with: dict, folder: str
) -> None:
    """Raise ValueError if a run's settings name a world in a file or module, and the command line
    does not. To make such a world runs its code, and a file of settings, which may come from
    anywhere, makes no code run."""
    env = str(begun_with.get("env"))
    if is_imported(env) and parser.parse_args(argv).env != env:
        raise ValueError(
            f"--resume {folder} was run in {env}, whose code is run: say --env {env} as well"
        )


def read_config(config_class: type, path: Path):
    """The config of a run of before, from its config.json.

    A setting that the class no longer has is ignored; one that the run did not know yet has its
    default. Raises OSError or ValueError for a file that cannot be read.
    """
    settings = json.loads(path.read_text(encoding="utf-8"))
    known = {each.name for each in fields(config_class)}
    return config_class(**{name: value for name, value in settings.items() if name in known})


# ------------------------------------------------------------------------- checks for a `validate`
def check_range(config, at_least: float, at_most: float, *names: str) -> None:
    """Raise ValueError if one of these settings lies outside [at_least, at_most].

    Infinity and nan are refused whatever the range; None, for "not given", is not.
    """
    for name in names:
        value = getattr(config, name)
        if value is None or (at_least <= value <= at_most and value < math.inf):
            continue
        allowed = f"at least {at_least:g}"
        if at_most < math.inf:
            allowed += f" and at most {at_most:g}"
        raise ValueError(f"{flag_name(name)} is {value}: it must be {allowed}")


def check_device(device: str) -> None:
    """Raise ValueError for a device that torch cannot use."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:80]
        raise ValueError(f"--device {device} cannot be used: {reason}") from None


# -------------------------------------------------------------------------- the flags of training
def paper_settings(env: str, critic: bool) -> dict:
    """The paper's training settings (its appendix) where they differ from the defaults below.

    They depend on the world and on whether PPO is among the arms. A world that the paper does not
    have gets FrozenLake's. The worlds stay ours, with their own turns and penalties.
    """
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
    """The settings that every trainer has.

    The clip range, the entropy bonus, the KL penalty and the temperature of evaluations are the
    paper's; the other defaults suit the built-in model.
    """

    env: str = flag(
        "sudoku",
        f"The world to play in: {', '.join(ENVIRONMENTS)}; or one of yours, a class or function "
        "without arguments, as FILE.py:NAME or MODULE:NAME.",
    )
    model: str | None = flag(
        None,
        "The chat model to train, as a folder or a Hugging Face id. Without this flag it is the "
        "small built-in model of the world.",
    )
    thoughts: int | None = flag(
        None,
        "How many filler sentences each demonstrated thought of the built-in model contains; other "
        "values than the default need a new warm start, which is made and cached.",
    )
    preset: str | None = flag(
        None,
        'The only preset is "paper": it sets the paper\'s training settings for the world. Flags '
        "that you give beside it still count.",
    )
    iterations: int = flag(6, "How many times the policy plays and is then updated.")
    prompts: int = flag(8, "How many prompts each iteration plays.")
    group_size: int = flag(8, "How many rollouts of each prompt are played: they form a group.")
    minibatch: int = flag(16, "How many rollouts each optimizer step learns from.")
    micro_tokens: int = flag(
        8192,
        "How many tokens one forward pass may hold, padding included. Fewer need less memory; the "
        "result stays the same up to rounding.",
    )
    gradient_checkpointing: bool = flag(
        False,
        "Compute the activations again in the backward pass instead of keeping them. That takes "
        "less memory and more time.",
    )
    lora: int | None = flag(
        None,
        "Train adapters of this rank (LoRA, 16 is usual) beside some layers, and leave the model's "
        "own weights as they are. That takes far less memory. It needs peft: pip install peft.",
    )
    lora_alpha: float | None = flag(
        None,
        "What the adapters add is multiplied by this number and divided by their rank. Without "
        "this flag it is 32.",
    )
    lr: float | None = flag(
        None,
        "The learning rate. Without this flag it is 3e-4 for a built-in model (1e-4 in the shop) "
        "and 1e-6 with --model. With --lora it is 1e-2 (3e-3 in the shop), and 1e-5 with --model.",
    )
    temperature: float = flag(1.0, "The temperature at which training rollouts are sampled.")
    clip_low: float = flag(
        0.2, "The ratio of new to old probability of a token is clipped below at 1 minus this."
    )
    clip_high: float = flag(0.28, "The same ratio is clipped above at 1 plus this.")
    entropy_coef: float = flag(0.001, "The coefficient of the entropy bonus in the loss.")
    kl_coef: float = flag(
        0.0,
        "The coefficient of the penalty on the KL divergence from the reference. With 0 there is "
        "no penalty.",
    )
    keep_groups: float = flag(
        1.0,
        "The share of each iteration's groups to train on. Those whose rewards vary most are kept.",
    )
    skip_equal: bool = flag(
        False,
        "Leave the weights as they are in an iteration whose groups all end alike. Without this "
        "flag the entropy bonus and the KL penalty move them then.",
    )
    max_grad_norm: float = flag(1.0, "A gradient with a larger norm is scaled down to this norm.")
    play_batch: int = flag(
        256, "How many rollouts are played at the same time. Fewer need less memory."
    )
    max_turn_tokens: int = flag(160, "A turn is cut off after this many tokens.")
    max_tokens: int = flag(4096, "An episode ends after this many tokens, its prompt included.")
    eval_every: int = flag(2, "The policy is evaluated each time after this many iterations.")
    eval_episodes: int | None = flag(
        None,
        "How many episodes each evaluation plays. Without this flag it is 128 for a built-in model "
        "and 32 with --model.",
    )
    eval_group_size: int = flag(
        1,
        "How many of these episodes share a prompt. The paper evaluates 512 episodes, 16 of each "
        "prompt.",
    )
    final_eval_episodes: int | None = flag(
        None,
        "How many episodes the evaluation after the last iteration plays, the usual ones first. "
        "Their success has columns of its own. Without this flag it plays the usual ones alone.",
    )
    eval_temperature: float = flag(0.5, "The temperature at which evaluations are sampled.")
    seed: int = flag(0, "The seed of the training prompts and of sampling.")
    device: str = flag(DEVICE, "The torch device to train on.")
    bfloat16: bool = flag(
        False,
        "Compute in bfloat16 on a CPU as well. It is faster on a processor with AVX-512; a GPU "
        "does so anyway.",
    )
    out: str | None = flag(
        None, "The folder for the results. Without this flag it is a new folder in runs/."
    )
    save: bool = flag(
        False,
        "Also save each trained policy, as a folder that transformers can load: policy, in the "
        "folder of its arm.",
    )
    checkpoint_every: int = flag(
        5, "How many iterations lie between checkpoints. With 0 there are none to resume from."
    )
    resume: str | None = flag(
        None,
        "The folder of an interrupted run to resume, or of one of its arms. Its settings apply; "
        "of the other flags only --micro-tokens, --play-batch and --gradient-checkpointing may "
        "differ. In a world of yours --env is needed as well, since its code is run.",
    )
    with_critic = False  # no field: a class of settings whose trainer has a critic says True

    def validate(self) -> None:
        """Raise ValueError for settings that cannot run; it names the flag, its value and a fix."""
        check_range(self, 1, math.inf, "iterations", "prompts", "group_size", "minibatch")
        check_range(self, 1, math.inf, "micro_tokens", "play_batch", "max_turn_tokens")
        check_range(self, 1, math.inf, "max_tokens", "eval_every", "eval_episodes")
        check_range(self, 1, math.inf, "eval_group_size", "final_eval_episodes")
        check_range(self, 0, math.inf, "clip_high", "entropy_coef", "kl_coef", "checkpoint_every")
        check_range(self, 0, 1, "clip_low")
        check_range(self, 1, math.inf, "lora")
        check_range(self, 1e-6, math.inf, "lora_alpha")
        check_range(self, 0, 10, "lr")
        check_range(self, 0, 30, "thoughts")
        check_range(self, 0, 10**9, "seed")
        check_range(self, 0.01, 1, "keep_groups")
        check_range(self, 0.01, math.inf, "temperature", "eval_temperature")
        check_range(self, 1e-6, math.inf, "max_grad_norm")
        check_device(self.device)
        make_env(self.env)  # raises ValueError for a world that there is not
        if is_imported(self.env) and not self.model:
            raise ValueError(f"{self.env} has no built-in model: give one with --model")
        if self.lora and not find_spec("peft"):
            raise ValueError(
                f"--lora is {self.lora}: it needs peft, which is not installed; pip install peft"
            )
        if self.lora_alpha is not None and not self.lora:
            raise ValueError(
                f"--lora-alpha is {self.lora_alpha}: it is for adapters, so give --lora with it"
            )
        if self.preset not in (None, "paper"):
            raise ValueError(f"--preset is {self.preset}: there is only paper")
        if self.group_size == 1 and not self.with_critic:
            raise ValueError(
                "--group-size is 1: GRPO compares the rollouts of a prompt and needs at least 2"
            )
        if self.group_size == 1 and self.keep_groups < 1:
            raise ValueError(
                f"--keep-groups is {self.keep_groups}: it keeps the groups whose rewards vary "
                "most, and groups of one rollout (--group-size 1) do not vary; leave it out"
            )
        if self.evaluation_episodes() % self.eval_group_size:
            raise ValueError(
                f"--eval-episodes is {self.evaluation_episodes()}: it must be a multiple of "
                f"--eval-group-size, which is {self.eval_group_size}"
            )
        if self.final_eval_episodes is not None:
            self.check_final_evaluation()
        if self.model and self.thoughts is not None:
            raise ValueError(
                f"--thoughts is {self.thoughts}: it shapes the built-in model, so leave it out "
                "with --model"
            )
        if self.out and not self.resume and holds_logs(Path(self.out)):
            raise ValueError(f"--out {self.out} holds an earlier run: choose another folder")

    def check_final_evaluation(self) -> None:
        """Raise ValueError for a --final-eval-episodes that does not hold the usual episodes."""
        if self.final_eval_episodes < self.evaluation_episodes():
            raise ValueError(
                f"--final-eval-episodes is {self.final_eval_episodes}: it must be at least "
                f"--eval-episodes, which is {self.evaluation_episodes()}"
            )
        if self.final_eval_episodes % self.eval_group_size:
            raise ValueError(
                f"--final-eval-episodes is {self.final_eval_episodes}: it must be a multiple of "
                f"--eval-group-size, which is {self.eval_group_size}"
            )

    def evaluation_episodes(self) -> int:
        """How many episodes an evaluation plays; a built-in model is quick to evaluate."""
        if self.eval_episodes is not None:
            return self.eval_episodes
        return 32 if self.model else 128

    def usual_rate(self) -> float:
        """The learning rate without --lr. Adapters want a larger one than all weights do.

        For pretrained models ten times as much is the published advice (Schulman et al. 2025, "LoRA
        Without Regret"). For the built-in models, see results/evidence.md, 29.
        """
        if self.model:
            return 1e-5 if self.lora else 1e-6
        if self.env == "shop":  # 3e-4 was not steady there
            return 3e-3 if self.lora else 1e-4
        return 1e-2 if self.lora else 3e-4

    def usual_thoughts(self) -> int | None:
        """The world's own number of --thoughts; None for a world that is not there or has none."""
        if self.env not in ENVIRONMENTS:
            return None
        return getattr(make_env(self.env), "thoughts", None)

    def resolve(self) -> None:
        """Fill in what was not given and depends on other settings."""
        if self.lr is None:
            self.lr = self.usual_rate()
        if self.lora and self.lora_alpha is None:
            self.lora_alpha = 32.0
        self.eval_episodes = self.evaluation_episodes()
        if self.thoughts is not None and self.thoughts == self.usual_thoughts():
            self.thoughts = None  # the same built-in model as without the flag
        if self.out is None:
            self.out = new_folder(f"{world_name(self.env)}-seed{self.seed}")


def new_folder(what: str) -> str:
    """A name for the results of a run without --out.

    It has the time and the process in it, so that two runs that begin within the same second get
    two folders.
    """
    return f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{what}-{os.getpid()}"


@dataclass
class ActFocusConfig(Config):
    """The settings of a trainer that weighs tokens, in one arm or in several."""

    arms: str = flag(
        "grpo,actfocus",
        f"The arms to train, separated by commas: {', '.join(ARMS)}. Those of a small model on a "
        "CPU are trained side by side.",
    )
    alpha: float | None = flag(
        None,
        "The weight of a reasoning token in the arms actfocus and ppo-actfocus, in place of 0.1. "
        "With alpha 1 and beta 0, ActFocus is GRPO.",
    )
    beta: float | None = flag(
        None,
        "How much more an action token weighs where the reference is uncertain, in the arms "
        "actfocus and ppo-actfocus, in place of 0.5.",
    )
    signal: str | None = flag(
        None,
        "How uncertainty is measured in the arms actfocus and ppo-actfocus, in place of energy: "
        f"one of {', '.join(SIGNALS)}.",
    )

    def validate(self) -> None:
        """Raise ValueError for settings that cannot run; it names the flag, its value and a fix."""
        super().validate()
        check_range(self, 0, 1, "alpha")
        check_range(self, 0, math.inf, "beta")
        names = self.arms.split(",")
        for name in names:
            if name not in ARMS:
                raise ValueError(
                    f"--arms is {self.arms}: there is no arm {name!r}; choose among "
                    f"{', '.join(ARMS)}"
                )
            if ARMS[name].critic and not self.with_critic:
                raise ValueError(
                    f"--arms is {self.arms}: {name} has a critic, so train it with train_ppo.py"
                )
            if self.lora and ARMS[name].critic:
                raise ValueError(
                    f"--lora is {self.lora}: the arm {name} has a critic, which is a second model "
                    "that is trained as a whole; leave the arm or --lora out"
                )
            if self.group_size == 1 and not ARMS[name].critic:
                raise ValueError(
                    f"--group-size is 1: the arm {name} compares the rollouts of a prompt and "
                    "needs at least 2"
                )
        if len(set(names)) < len(names):
            raise ValueError(f"--arms is {self.arms}: it names an arm twice; name each once")
        if self.signal not in (None, *SIGNALS):
            raise ValueError(f"--signal is {self.signal}: choose one of {', '.join(SIGNALS)}")
        self.check_labels(names)

    def check_labels(self, names: list[str]) -> None:
        """Raise ValueError if --alpha, --beta or --signal would change an arm under its label."""
        for name in names:
            arm = ARMS[name]
            if arm.uniform or name in ADJUSTABLE:
                continue
            for setting, value in self.given_weighting().items():
                own = getattr(arm, setting)
                if value != own:
                    raise ValueError(
                        f"{flag_name(setting)} is {value}, but the arm {name} ({arm.label}) has "
                        f"{setting} {own}: the flag is for {' and '.join(ADJUSTABLE)}, so leave "
                        "the flag or the arm out"
                    )

    def given_weighting(self) -> dict:
        """--alpha, --beta and --signal by the fields of `Arm`, as far as they were given."""
        given = {"alpha": self.alpha, "beta": self.beta, "signal": self.signal}
        return {name: value for name, value in given.items() if value is not None}

    def chosen_arms(self) -> dict[str, Arm]:
        """The arms to train, by name.

        --alpha, --beta and --signal replace those of ActFocus. An arm that weighs all tokens alike
        is left as it is, and `validate` refuses the flags for any other arm that they would change;
        in runs of before this rule they may have changed it.
        """
        given = self.given_weighting()
        arms = {name: ARMS[name] for name in self.arms.split(",")}
        return {name: arm if arm.uniform else replace(arm, **given) for name, arm in arms.items()}
