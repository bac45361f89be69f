"""The warm start: supervised training that teaches a model to play at all, before RL improves it.

    python -m support.warm_start --env sokoban                 # makes starts/sokoban anew
    python -m support.warm_start --env sokoban --model FOLDER --out OUT  # teaches a checkpoint
    python -m support.warm_start --env sokoban --check         # is starts/sokoban live?

A model with random weights cannot play, and a small pretrained model seldom calls a tool as it
should. RL would have no successes to learn from. So the policy first imitates a scripted player
that writes every turn in the right form and describes the board correctly, but often picks a bad
move: choosing good moves is left to RL.

The *built-in model* of a world is made this way: a Qwen2 of 0.4M parameters, with a byte-level BPE
tokenizer that is learned from the same demonstrations. The built-in models of all worlds are
committed to the folder starts/, because rounding would make them slightly different models on
another machine. One with other settings is made when it is first used, and cached in
$ACTFOCUS_CACHE, or ~/.cache/actfocus if that is not set.

RL makes what a model already tends to do more likely, so a start has to tend towards the right
calls. Two figures tell whether it does, and the rule is the same for every world: a start is *live*
if it succeeds at temperature 0.5 at least 1.5 times as often as at temperature 1, and if its calls
are best ones at least ten points more often than calls drawn at random would be.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from energy import token_stats
from envs import Step, read_call
from fused_loss import fused_policy_loss
from model_checks import check_length
from policy import Policy, load_policy
from rollout import check_prompt_length, rollout
from worlds import ENVIRONMENTS, make_env
from worlds.imported import is_imported

STARTS = Path(__file__).parents[1] / "starts"
# No episode is both demonstrated, trained on and evaluated: training draws seeds below the first of
# these numbers, demonstrations have seeds from it on, and evaluations from the second on.
WARM_START_SEEDS = 1_000_000_000
EVAL_SEEDS = 2_000_000_000
CHECK_SEEDS = 4_000_000_000  # and on: for the question whether a start is live, and nothing else
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # padding, start of a message, its end
# How the tokenizer splits text before it merges bytes: Qwen2's rule, except that a digit takes the
# space before it along, and that the name of a cell (c4) or a tag is one piece.
PATTERN = (
    r"</?[a-z_]+>\n?| ?\b[a-z]\d\b|[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen2.5's chat template, without its explanation of what a tool call looks like.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.role == 'system' and tools %}{{ '\n<tools>' }}"
    "{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}{{ '\n</tools>' }}{% endif %}"
    "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MAX_TOKENS = 4096  # of an episode that is played or imitated, as in training
Episode = tuple[list[str], list[str]]  # the observations, and the turn that answers each


@dataclass(frozen=True)
class WarmStart:
    """The settings of a warm start. Its steps draw first windows of turns, then whole episodes.

    Together with the words of the demonstrations, these settings determine the built-in model:
    `fingerprint` hashes them all, so a new field or another default orphans the committed starts.
    """

    env: str = "frozenlake"
    thoughts: int | None = None  # filler sentences in a demonstrated thought; None: the world's own
    skill: float | None = None  # how often a demonstrated move is a best one; None: the world's own
    episodes: int = 10_000  # how many are demonstrated
    window: int = 2  # turns in a window, which is short and cheap to train on
    window_steps: int = 3000  # optimizer steps on windows
    window_batch: int = 8  # windows in a step; of whole episodes, at most half as many
    episode_steps: int = 1200  # optimizer steps on whole episodes, after those on windows
    lr: float = 3e-3
    hidden: int = 96
    layers: int = 3
    vocabulary: int = 800
    seed: int = 0

    def make_env(self):
        """The world to demonstrate in. Raises ValueError for a world without a scripted player."""
        options = {} if self.thoughts is None else {"thoughts": self.thoughts}
        env = make_env(self.env, **options)
        missing = [name for name in ("demonstrate", "skill") if not hasattr(env, name)]
        if missing:
            raise ValueError(
                f"{self.env} has no demonstrations to learn from (it lacks {', '.join(missing)}); "
                "a run in it needs a model that can play already, by --model"
            )
        return env

    def without_defaults(self) -> WarmStart:
        """The same settings, with None where the world's own number of thoughts or skill is given.

        Both ways of saying it make the same model, and so must have the same fingerprint.
        """
        world = replace(self, thoughts=None, skill=None).make_env()
        same = {}
        for name in ("thoughts", "skill"):
            if getattr(self, name) == getattr(world, name, None):
                same[name] = None
        return replace(self, **same)


# ------------------------------------------------------------------- where built-in models are kept
def start_folder(env: str, **settings) -> Path:
    """The checkpoint folder of a world's built-in model.

    settings: fields of `WarmStart` that differ from the defaults. The committed model is taken if
    it has these settings. Otherwise the model is taken from the cache, where it is made on first
    use, and made anew if it was damaged since. Raises ValueError for a world or an option that does
    not exist, and if the committed model is damaged.
    """
    if is_imported(env):
        raise ValueError(f"{env} has no built-in model: give one with --model")
    wanted = WarmStart(env, **settings).without_defaults()
    wanted_fingerprint = fingerprint(wanted)
    committed = STARTS / env
    if committed.exists():
        belongs_to, undamaged = read_stamp(committed)
        if not undamaged:
            raise ValueError(f"{committed} is damaged: `git checkout {committed}` brings it back")
        if belongs_to == wanted_fingerprint:
            return committed
    folder = cache_folder() / f"{env}-{wanted_fingerprint}"
    if folder.exists() and read_stamp(folder) != (wanted_fingerprint, True):
        print(f"note: {folder} is damaged and is made anew", file=sys.stderr)
        shutil.rmtree(folder)
    if not folder.exists():
        build_in_cache(wanted, folder)
    return folder


def cache_folder() -> Path:
    """$ACTFOCUS_CACHE, or ~/.cache/actfocus if it is not set."""
    if given := os.environ.get("ACTFOCUS_CACHE"):
        return Path(given).expanduser()
    return Path.home() / ".cache" / "actfocus"


def build_in_cache(settings: WarmStart, folder: Path) -> None:
    """Make a model beside its folder and then rename it, so that the folder is always whole."""
    cache = folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="half-written-", dir=cache) as scratch:
        finished = Path(scratch) / "finished"
        build(settings).save(finished)
        write_stamp(finished, settings)
        with contextlib.suppress(OSError):  # another process was faster; its folder is equal
            os.rename(finished, folder)


def write_stamp(folder: Path, settings: WarmStart) -> None:
    """Write start.json: the fingerprint of a model's settings, and a checksum of its files."""
    stamp = {"fingerprint": fingerprint(settings), "files": checksum(folder), **asdict(settings)}
    (folder / "start.json").write_text(json.dumps(stamp, indent=2) + "\n")


def read_stamp(folder: Path) -> tuple[str, bool]:
    """The fingerprint in a folder's start.json, and whether all files are as they were written."""
    try:
        stamp = json.loads((folder / "start.json").read_text())
        return stamp["fingerprint"], stamp["files"] == checksum(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return "", False


def checksum(folder: Path) -> str:
    """The first 16 hex digits of the SHA-256 over the files of a model and its tokenizer."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".safetensors") and path.name != "start.json":
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def fingerprint(settings: WarmStart) -> str:
    """16 hex digits that change with everything that determines the model.

    These are the settings, the tokenizer's splitting rule, the chat template, the words of the
    world, and twenty demonstrations. The source code is not among them, since a comment may change.
    """
    settings = settings.without_defaults()
    env, rng = settings.make_env(), random.Random(0)
    episodes = [play_demonstration(env, seed, rng, env.skill) for seed in range(20)]
    hashed = [asdict(settings), PATTERN, CHAT_TEMPLATE, env.system, env.tools, env.skill, episodes]
    return hashlib.sha256(json.dumps(hashed).encode()).hexdigest()[:16]


def build(settings: WarmStart, device: str = "cpu") -> Policy:
    """Make a built-in model: learn its tokenizer, give it random weights, and let it imitate."""
    env = settings.make_env()
    episodes = demonstrations(env, settings)
    tokenizer = learn_tokenizer(env, episodes[:300], settings.vocabulary)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=settings.hidden, num_hidden_layers=settings.layers,
        intermediate_size=settings.hidden * 8 // 3, num_attention_heads=settings.hidden // 32,
        num_key_value_heads=1, max_position_embeddings=8192, tie_word_embeddings=True,
        initializer_range=0.1,  # Qwen's 0.02 is for wide models, and learns slowly in a narrow one
        bos_token_id=None, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = transformers.Qwen2ForCausalLM(config).to(device)
    policy = Policy(model, tokenizer)
    imitate(policy, env, episodes, settings)
    return policy


# ----------------------------------------------------------------------------------- demonstrations
def play_demonstration(env, seed: int, rng: random.Random, skill: float) -> Episode:
    """One episode of the scripted player, who picks a best move as often as skill says.

    The last observation is left out, because no turn answers it. Raises RuntimeError in place of
    an OSError or ValueError of the world, which are taken for a sentence to the user elsewhere.
    """
    turns = []
    try:
        observations = [env.reset(seed)]
        while not env.done:
            turn = env.demonstrate(rng, skill)
            turns.append(turn)
            observations.append(env.step(turn).observation)
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{type(env).__name__} failed in demonstration {seed}") from error
    return observations[:-1], turns


def demonstrations(env, settings: WarmStart) -> list[Episode]:
    """All demonstrated episodes of a warm start."""
    rng = random.Random(settings.seed)
    skill = env.skill if settings.skill is None else settings.skill
    seeds = range(WARM_START_SEEDS, WARM_START_SEEDS + settings.episodes)
    return [play_demonstration(env, seed, rng, skill) for seed in seeds]


def learn_tokenizer(env, episodes: list[Episode], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of so many tokens, learned from the text of episodes."""
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    # the instructions stand in every episode, so they are counted once for each
    tools = "\n".join(map(json.dumps, env.tools))
    texts = [env.system, f"{tools}\n<tools>\n</tools>\nsystem\nuser\nassistant\n"] * len(episodes)
    for observations, turns in episodes:
        for observation, turn in zip(observations, turns, strict=True):
            texts.append(f"{turn}\n<tool_response>\n{observation}\n</tool_response>\n")
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, chat_template=CHAT_TEMPLATE, made_by="actfocus",
        pad_token=SPECIAL[0], extra_special_tokens=[SPECIAL[1]], eos_token=SPECIAL[2],
    )  # fmt: skip


# ------------------------------------------------------------------------------ supervised training
def imitation_target(frames: list[list[int]], replies: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The token ids of a dialogue, and which of them the model learns to write.

    frames: for each turn, the ids of what the model is shown before it. replies: the ids of each
    turn. Returns ids (T,) int64 and a mask (T,) bool that is true on the replies.
    """
    ids, mask = [], []
    for frame, reply in zip(frames, replies, strict=True):
        ids += frame + reply
        mask += [False] * len(frame) + [True] * len(reply)
    return torch.tensor(ids), torch.tensor(mask)


def imitation_targets(
    policy: Policy, env, episodes: list[Episode], window: int
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """What to imitate, as in `imitation_target`: windows of so many turns, and whole episodes.

    A window begins with a tool response, without the instructions that only whole episodes have.
    """
    windows, whole_episodes = [], []
    opened_by_template = "<think>\n" if policy.opening else ""  # not for the model to write again
    for observations, turns in episodes:
        texts = [turn.removeprefix(opened_by_template) for turn in turns]
        replies = [policy.encode(text) + [policy.end_of_turn] for text in texts]
        results = [policy.result(observation) for observation in observations]
        for first in range(0, len(replies), window):
            some = slice(first, first + window)
            windows.append(imitation_target(results[some], replies[some]))
        prompt = policy.prompt(env.system, env.tools, observations[0])
        whole_episodes.append(imitation_target([prompt] + results[1:], replies))
    return windows, whole_episodes


def imitate(policy: Policy, env, episodes: list[Episode], settings: WarmStart) -> None:
    """Train the policy, in place, to write the demonstrated turns: the mean cross-entropy of their
    tokens, first in windows of turns and then in whole episodes."""
    windows, whole_episodes = imitation_targets(policy, env, episodes, settings.window)
    rng = random.Random(settings.seed)
    batches = [rng.sample(windows, settings.window_batch) for _ in range(settings.window_steps)]
    mean_length = sum(len(ids) for ids, _ in whole_episodes) / len(whole_episodes)
    # some 3000 tokens in a step
    episode_batch = max(1, min(settings.window_batch // 2, int(3000 / mean_length)))
    batches += [rng.sample(whole_episodes, episode_batch) for _ in range(settings.episode_steps)]
    model = policy.model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    steps = max(21, len(batches))  # with 20 steps and a warm-up of 5 %, OneCycleLR divides by zero
    schedule = OneCycleLR(optimizer, settings.lr, total_steps=steps, pct_start=0.05)
    progress = tqdm(batches, desc="warm start", unit="step", dynamic_ncols=True)
    for batch in progress:
        ids, mask = (pad_sequence(each, batch_first=True) for each in zip(*batch, strict=True))
        ids = ids.to(policy.device)  # (B, T)
        written = mask.to(policy.device)[:, 1:]  # (B, T - 1): is the next token one to imitate?
        hidden = policy.hidden(ids)[:, :-1][written]  # (N, H): what predicts each of those tokens
        targets = ids[:, 1:][written]  # (N,)
        with policy.autocast():
            # The gradient of the mean log-prob is the policy gradient of the model's own log-probs
            # where every token has the advantage 1 and the weight 1.
            logprob = token_stats(hidden, policy.head, targets).logprob
            ones = torch.ones_like(logprob)
            loss = fused_policy_loss(hidden, policy.head, targets, logprob, ones, ones).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{-logprob.mean().item():.3f}", refresh=False)
    model.eval()


# -------------------------------------------------------------------------------------- as a script
def measure(
    policy: Policy,
    settings: WarmStart,
    temperature: float,
    episodes: int = 128,
    max_tokens: int = MAX_TOKENS,
) -> str:
    """One line on how a policy plays the first episodes of the evaluation. An episode ends after
    max_tokens tokens."""
    worlds = [settings.make_env() for _ in range(episodes)]
    seeds = range(EVAL_SEEDS, EVAL_SEEDS + episodes)
    rollouts = rollout(policy, iter(worlds).__next__, seeds, temperature, max_tokens=max_tokens)
    turns = max(1, rollouts.turns.sum().item())
    malformed = sum(world.malformed for world in worlds) / turns
    success = rollouts.success.float().mean().item()
    facts = (rollouts.true_facts.sum() / rollouts.facts.sum().clamp(min=1)).item()
    without_facts = rollouts.turns_without_facts.sum().item() / turns
    action = (rollouts.action.sum() / rollouts.response.sum()).item()
    return (
        f"temperature {temperature:g}: success {success:.1%}, {facts:.1%} of the facts true, "
        f"{without_facts:.1%} of the turns without, {malformed:.1%} malformed, "
        f"{action:.1%} action tokens"
    )


class Judged:
    """A world that notes whether the call of each turn is a best one, and how likely one is that is
    drawn at random from all calls that make sense. Turns without a best call are left out."""

    def __init__(self, env):
        self.env = env
        self.system, self.tools, self.reset = env.system, env.tools, env.reset
        self.hits: list[bool] = []
        self.chances: list[float] = []

    def step(self, reply: str) -> Step:
        best, options = self.env.choices()
        if best:
            call, _ = read_call(reply, self.env.tools)
            self.hits.append(call in best)
            self.chances.append(len(best) / len(options))
        return self.env.step(reply)


class Liveness(NamedTuple):
    """What tells whether there is something in a start that RL can sharpen."""

    cool_success: float  # share of episodes that succeed at temperature 0.5
    success: float  # at temperature 1
    best: float  # share of turns whose call is a best one, at temperature 1
    chance: float  # what it would be if the calls were drawn at random

    @property
    def ratio(self) -> float:
        """How many times the success at temperature 1 that at 0.5 is."""
        if self.success == 0:
            return math.inf if self.cool_success else 0.0
        return self.cool_success / self.success

    @property
    def live(self) -> bool:
        return self.ratio >= 1.5 and self.best >= self.chance + 0.1

    def __str__(self) -> str:
        """In words.

        >>> print(Liveness(0.3, 0.1, 0.5, 0.25))  # doctest: +NORMALIZE_WHITESPACE
        live: success 30.0% at temperature 0.5 is 3.00 times the 10.0% at 1 (wanted: 1.50), and
        50.0% of the calls at 1 are best ones, by chance 25.0% (wanted: 35.0%)
        """
        return (
            f"{'live' if self.live else 'not live'}: success {self.cool_success:.1%} at "
            f"temperature 0.5 is {self.ratio:.2f} times the {self.success:.1%} at 1 (wanted: "
            f"1.50), and {self.best:.1%} of the calls at 1 are best ones, by chance "
            f"{self.chance:.1%} (wanted: {self.chance + 0.1:.1%})"
        )


def check(policy: Policy, settings: WarmStart, episodes: int = 512) -> Liveness:
    """Play so many episodes at either temperature, on boards that nothing else uses."""
    seeds = range(CHECK_SEEDS, CHECK_SEEDS + episodes)
    cool = rollout(policy, settings.make_env, seeds, temperature=0.5)
    worlds = [Judged(settings.make_env()) for _ in seeds]
    usual = rollout(policy, iter(worlds).__next__, seeds, temperature=1.0)
    hits = [hit for world in worlds for hit in world.hits]
    chances = [chance for world in worlds for chance in world.chances]
    return Liveness(
        cool_success=cool.success.float().mean().item(),
        success=usual.success.float().mean().item(),
        best=sum(hits) / len(hits),
        chance=sum(chances) / len(chances),
    )


START_README = """# The built-in model of {env}

What training starts from, for everyone: {parameters:,} parameters, float32, made by

    python -m support.warm_start --env {env}

with torch {torch} and transformers {transformers}; rounding makes it another model on another
machine. `start.json` names what it belongs to. Over the 128 episodes of evaluation:

{lines}

Over 512 other boards it is {liveness}.
"""


def make_start(settings: WarmStart, folder: Path) -> None:
    """Make the built-in model of a world, and write it to a folder with its stamp and a README."""
    policy = build(settings)
    policy.save(folder)
    lines = [f"- {measure(policy, settings, temperature)}" for temperature in (1.0, 0.5)]
    write_stamp(folder, settings)
    text = START_README.format(
        env=settings.env, parameters=policy.model.num_parameters(), lines="\n".join(lines),
        liveness=check(policy, settings),
        torch=torch.__version__.partition("+")[0], transformers=transformers.__version__,
    )  # fmt: skip
    (folder / "README.md").write_text(text)
    print(text)


def check_lengths(
    policy: Policy, env, episodes: list[Episode], settings: WarmStart, max_tokens: int
) -> None:
    """Raises ValueError if the model cannot carry max_tokens tokens, or if they are too few for a
    prompt or for something that is to be imitated."""
    check_length(policy.model.config, max_tokens)
    prompt = policy.prompt(env.system, env.tools, env.reset(EVAL_SEEDS))
    check_prompt_length(prompt, EVAL_SEEDS, max_tokens)
    windows, whole_episodes = imitation_targets(policy, env, episodes, settings.window)
    imitated = windows + whole_episodes if settings.episode_steps else windows
    longest = max(len(ids) for ids, _ in imitated)
    if longest > max_tokens:
        raise ValueError(
            f"a demonstration has {longest} tokens with this tokenizer, and --max-tokens is "
            f"{max_tokens}: raise it, or lower --thoughts"
        )


def teach(
    policy: Policy, episodes: list[Episode], settings: WarmStart, max_tokens: int, folder: Path
) -> None:
    """Let a pretrained model imitate the demonstrations of a world, and print what that changed."""
    print("playing 32 episodes before and after; a large model takes minutes", flush=True)
    before = measure(policy, settings, 0.5, episodes=32, max_tokens=max_tokens)
    print(f"before: {before}", flush=True)
    imitate(policy, settings.make_env(), episodes, settings)
    policy.save(folder)
    after = measure(policy, settings, 0.5, episodes=32, max_tokens=max_tokens)
    print(f"after:  {after}\nwritten to {folder}")


def make_parser() -> argparse.ArgumentParser:
    """The flags of this script. One that is not given is absent from what is parsed."""
    about = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "--env",
        help=f"The world to learn: {', '.join(ENVIRONMENTS)}; or one of yours that has a scripted "
        "player, as FILE.py:NAME or MODULE:NAME. (default: frozenlake)",
    )
    parser.add_argument(
        "--model",
        help="The chat model to teach, as a folder or a Hugging Face id. Without this flag a new "
        "built-in model is made.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="The folder to write to. It is needed with --model, and with settings other than the "
        "defaults.",
    )
    parser.add_argument(
        "--thoughts",
        type=int,
        help="How many filler sentences each demonstrated thought contains. (default: the world's)",
    )
    parser.add_argument(
        "--skill",
        type=float,
        help="How often the demonstrator picks a best move. (default: the world's)",
    )
    parser.add_argument(
        "--seed", type=int, help="Another seed makes another model of the same kind. (default: 0)"
    )
    parser.add_argument(
        "--episodes",
        type=int,
        help="How many episodes are demonstrated. (default: 10000; with --model 1000)",
    )
    parser.add_argument(
        "--window-steps",
        type=int,
        help="Optimizer steps on windows of two turns. (default: 3000; with --model 300)",
    )
    parser.add_argument(
        "--episode-steps",
        type=int,
        help="Optimizer steps on whole episodes, after those. (default: 1200; with --model 0)",
    )
    parser.add_argument(
        "--lr", type=float, help="The learning rate. (default: 3e-3; with --model 1e-4)"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        help="The most tokens of an episode that --model plays or imitates, the prompt included. "
        f"(default: {MAX_TOKENS})",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="Tell whether the built-in model of these settings, or the one in --out, is live, and "
        "write nothing.",
    )
    parser.add_argument("--device", help="The torch device to teach --model on. (default: cpu)")
    parser.add_argument(
        "--bfloat16", action="store_true", help="Teach --model in bfloat16 on a CPU as well."
    )
    return parser


FOR_A_CHECKPOINT = {  # settings for teaching a pretrained model, which needs less
    "lr": 1e-4, "episodes": 1000, "window_steps": 300, "window_batch": 4, "episode_steps": 0,
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    given = vars(parser.parse_args(argv))  # the flags that were given
    model = given.pop("model", None)
    out = given.pop("out", None)
    max_tokens = given.pop("max_tokens", MAX_TOKENS)
    device = given.pop("device", "cpu")
    bfloat16 = given.pop("bfloat16", False)
    only_check = given.pop("check", False)
    usual = FOR_A_CHECKPOINT if model else {}
    try:
        settings = WarmStart(**usual | given)
        settings = settings.without_defaults()  # or ValueError: it cannot be demonstrated
        settings.make_env()  # raises ValueError for a number of thoughts that it cannot have
        least = settings.window_batch  # windows; an episode has at least one
        if settings.window_steps + settings.episode_steps < 1 or settings.episodes < least:
            raise ValueError(f"there must be a step, and at least {least} --episodes for it")
        if only_check and model:
            raise ValueError("--check is for a start: leave out --model, and name it by --out")
        if only_check:
            policy = load_policy(out or start_folder(**asdict(settings)), device, bfloat16)
            print(f"{settings.env} is {check(policy, settings)}")
            return
        others = is_imported(settings.env) or settings != WarmStart(settings.env)
        if not out and (model or others):
            raise ValueError(
                "--model, a world of yours or a setting other than the default needs --out: no "
                "start is overwritten"
            )
        policy = load_policy(model, device, bfloat16) if model else None
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # the last: no such device
        parser.error(str(error).splitlines()[0])
    if not policy:
        make_start(settings, out or STARTS / settings.env)
        return
    env = settings.make_env()
    episodes = demonstrations(env, settings)
    try:
        check_lengths(policy, env, episodes, settings, max_tokens)
    except ValueError as error:
        parser.error(str(error))
    teach(policy, episodes, settings, max_tokens, out)


if __name__ == "__main__":
    main()
