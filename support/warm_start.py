"""The warm start: how a model that knows nothing, or any checkpoint, learns to play at all.

    python -m support.warm_start --env sokoban                 # makes starts/sokoban anew
    python -m support.warm_start --env sokoban --model FOLDER --out OUT  # teaches a checkpoint

Random weights cannot play, and small pretrained models seldom call a tool as they should. So a
policy first imitates scripted turns of mediocre skill; the choice of good moves is left to RL.

The built-in model of a world is a Qwen2 of 0.4M parameters with a byte-level BPE of its own. It is
committed (starts/), since rounding makes it another model on another machine; one with other
settings is made on first use and kept in $ACTFOCUS_CACHE (default ~/.cache/actfocus).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from energy import token_stats
from fused_loss import fused_policy_loss
from policy import Policy, load_policy
from rollout import rollout
from worlds import ENVIRONMENTS, make_env

STARTS = Path(__file__).parents[1] / "starts"
WARM_START_SEEDS = 1_000_000_000  # and on: demonstrated (training draws seeds below)
EVAL_SEEDS = 2_000_000_000  # and on: evaluated
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen2's splitting rule, but a digit takes its space along; a cell's name and a tag are one piece.
PATTERN = (
    r"</?[a-z_]+>\n?| ?\b[a-z]\d\b|[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen2.5's template, without its explanation of what a tool call looks like.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.role == 'system' and tools %}{{ '\n<tools>' }}"
    "{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}{{ '\n</tools>' }}{% endif %}"
    "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
Episode = tuple[list[str], list[str]]  # what was shown, and the turns that answered it


@dataclass(frozen=True)
class WarmStart:
    """What shapes the built-in model of a world, beside the words of its demonstrations."""

    env: str = "frozenlake"
    thoughts: int | None = None  # free sentences in a demonstrated thought; None: the world's own
    skill: float | None = None  # how often a demonstrated act is a best one; None: the world's own
    episodes: int = 10_000  # demonstrated; the steps draw from these
    window: int = 2  # turns in a window: short and cheap, they come first
    window_steps: int = 3000
    window_batch: int = 8  # and at most half as many episodes, being longer
    episode_steps: int = 1200  # then whole episodes
    lr: float = 3e-3
    hidden: int = 96
    layers: int = 3
    vocabulary: int = 800
    seed: int = 0

    def make_env(self):
        """The world to demonstrate in. Raises ValueError for one that cannot."""
        env = make_env(self.env, **({} if self.thoughts is None else {"thoughts": self.thoughts}))
        if not hasattr(env, "demonstrate"):
            raise ValueError(f"{self.env} has no demonstrations to learn from: give --model")
        return env


def start_folder(env: str, **settings) -> Path:
    """The checkpoint folder of a world's built-in model: the committed one if it has these
    settings (fields of `WarmStart`), else one from the cache, where it is made on first use, moved
    there whole, and made anew if it was damaged since. Raises ValueError for a world or an option
    that there is not, and if the committed one is damaged."""
    wanted = WarmStart(env, **settings)
    shape, committed = fingerprint(wanted), STARTS / env
    if committed.exists():
        belongs_to, undamaged = stamp_of(committed)
        if not undamaged:
            raise ValueError(f"{committed} is damaged: `git checkout {committed}` brings it back")
        if belongs_to == shape:
            return committed
    cache = Path(os.environ.get("ACTFOCUS_CACHE", Path.home() / ".cache" / "actfocus")).expanduser()
    folder = cache / f"{env}-{shape}"
    if folder.exists() and stamp_of(folder) != (shape, True):
        print(f"note: {folder} is damaged and is made anew", file=sys.stderr)
        shutil.rmtree(folder)
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="half-written-", dir=cache) as scratch:
            done = Path(scratch) / "done"
            build(wanted).save(done)
            write_stamp(done, wanted)
            with contextlib.suppress(OSError):  # another process was faster: its folder is equal
                os.rename(done, folder)
    return folder


def write_stamp(folder: Path, settings: WarmStart) -> None:
    """start.json: what the model in a folder belongs to, and a checksum of its files."""
    stamp = {"fingerprint": fingerprint(settings), "files": checksum(folder), **asdict(settings)}
    (folder / "start.json").write_text(json.dumps(stamp, indent=2) + "\n")


def stamp_of(folder: Path) -> tuple[str, bool]:
    """What its start.json says that a folder belongs to, and whether all of it is as it was."""
    try:
        stamp = json.loads((folder / "start.json").read_text())
        return stamp["fingerprint"], stamp["files"] == checksum(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return "", False


def checksum(folder: Path) -> str:
    """16 hex digits of the SHA-256 over the files of a model and its tokenizer."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".safetensors") and path.name != "start.json":
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def fingerprint(settings: WarmStart) -> str:
    """16 hex digits that stand for what shapes the model: settings, the tokenizer's rule, the chat
    template, what a few demonstrations say. Not the source, for a comment may change."""
    env, rng = settings.make_env(), random.Random(0)
    shown = [play_demonstration(env, seed, rng, env.skill) for seed in range(20)]
    parts = [asdict(settings), PATTERN, CHAT_TEMPLATE, env.system, env.tools, env.skill, shown]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def build(settings: WarmStart, device: str = "cpu") -> Policy:
    """Learn the tokenizer from demonstrations, make the model from a config, and warm-start it."""
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
    """One scripted episode; the last observation, which nothing answers, is left out."""
    seen, said = [env.reset(seed)], []
    while not env.done:
        said.append(env.demonstrate(rng, skill))
        seen.append(env.step(said[-1]).observation)
    return seen[:-1], said


def demonstrations(env, settings: WarmStart) -> list[Episode]:
    rng = random.Random(settings.seed)
    skill = env.skill if settings.skill is None else settings.skill
    seeds = range(WARM_START_SEEDS, WARM_START_SEEDS + settings.episodes)
    return [play_demonstration(env, seed, rng, skill) for seed in seeds]


def learn_tokenizer(env, episodes: list[Episode], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE learned from the text that episodes consist of."""
    blank = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    blank.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    blank.decoder = decoders.ByteLevel()
    tools = "\n".join(map(json.dumps, env.tools))
    texts = [env.system, f"{tools}\n<tools>\n</tools>\nsystem\nuser\nassistant\n"] * len(episodes)
    pairs = [pair for seen, said in episodes for pair in zip(seen, said, strict=True)]
    texts += [f"{turn}\n<tool_response>\n{shown}\n</tool_response>\n" for shown, turn in pairs]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    blank.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=blank, chat_template=CHAT_TEMPLATE, made_by="actfocus",
        pad_token=SPECIAL[0], extra_special_tokens=[SPECIAL[1]], eos_token=SPECIAL[2],
    )  # fmt: skip


# ------------------------------------------------------------------------------ supervised training
def imitation_target(frames: list[list[int]], replies: list[list[int]]) -> tuple[Tensor, Tensor]:
    """ids (T,) of what the model is shown and replies to in turn; a mask (T,) of the replies."""
    ids, mask = [], []
    for frame, reply in zip(frames, replies, strict=True):
        ids += frame + reply
        mask += [False] * len(frame) + [True] * len(reply)
    return torch.tensor(ids), torch.tensor(mask)


def imitate(policy: Policy, env, episodes: list[Episode], settings: WarmStart) -> None:
    """Supervised training on the assistant's tokens, in place: windows of turns, then episodes."""
    windows, wholes = [], []
    written = "<think>\n" if policy.opening else ""  # of a turn, by the template
    for seen, said in episodes:
        said = [policy.encode(turn.removeprefix(written)) + [policy.end_of_turn] for turn in said]
        results = [policy.result(observation) for observation in seen]
        for i in range(0, len(said), settings.window):
            some = slice(i, i + settings.window)
            windows.append(imitation_target(results[some], said[some]))
        opening = policy.prompt(env.system, env.tools, seen[0])
        wholes.append(imitation_target([opening] + results[1:], said))
    rng = random.Random(settings.seed)
    batches = [rng.sample(windows, settings.window_batch) for _ in range(settings.window_steps)]
    mean_length = sum(len(ids) for ids, _ in wholes) / len(wholes)
    few = max(1, min(settings.window_batch // 2, int(3000 / mean_length)))  # some 3000 tokens
    batches += [rng.sample(wholes, few) for _ in range(settings.episode_steps)]
    model = policy.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr, (0.9, 0.98), weight_decay=0.01)
    steps = max(21, len(batches))  # with 20 and these 5 % OneCycleLR divides by zero
    schedule = OneCycleLR(optimizer, settings.lr, total_steps=steps, pct_start=0.05)
    progress = tqdm(batches, desc="warm start", unit="step", dynamic_ncols=True)
    for batch in progress:
        padded = [pad_sequence(x, batch_first=True) for x in zip(*batch, strict=True)]
        ids, mask = (x.to(policy.device) for x in padded)  # (B, T) each
        hidden = policy.hidden(ids)[:, :-1][mask[:, 1:]]  # (N, H): what predicts each reply token
        targets = ids[:, 1:][mask[:, 1:]]  # (N,)
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


# ------------------------------------------------------------------------------------ as a script
def measure(policy: Policy, settings: WarmStart, temperature: float, episodes: int = 128) -> str:
    """How a policy plays the first episodes of evaluation, in a line."""
    worlds = [settings.make_env() for _ in range(episodes)]
    seeds = range(EVAL_SEEDS, EVAL_SEEDS + episodes)
    rollouts = rollout(policy, iter(worlds).__next__, seeds, temperature)
    turns = max(1, rollouts.turns.sum().item())
    malformed = sum(world.malformed for world in worlds) / turns
    success = rollouts.success.float().mean().item()
    facts = (rollouts.true_facts.sum() / rollouts.facts.sum().clamp(min=1)).item()
    silent = rollouts.turns_without_facts.sum().item() / turns
    action = (rollouts.action.sum() / rollouts.response.sum()).item()
    return (
        f"temperature {temperature:g}: success {success:.1%}, {facts:.1%} of the facts true, "
        f"{silent:.1%} of the turns without, {malformed:.1%} malformed, {action:.1%} action tokens"
    )


START_README = """# The built-in model of {env}

What training starts from, for everyone: {parameters:,} parameters, float32, made by

    python -m support.warm_start --env {env}

with torch {torch} and transformers {transformers}; rounding makes it another model on another
machine. `start.json` names what it belongs to. Over the 128 episodes of evaluation:

{lines}
"""


def make_start(settings: WarmStart, folder: Path) -> None:
    """Build the model of a world and write it with what belongs to it."""
    policy = build(settings)
    policy.save(folder)
    lines = [f"- {measure(policy, settings, temperature)}" for temperature in (1.0, 0.5)]
    write_stamp(folder, settings)
    text = START_README.format(
        env=settings.env, parameters=policy.model.num_parameters(), lines="\n".join(lines),
        torch=torch.__version__.partition("+")[0], transformers=transformers.__version__,
    )  # fmt: skip
    (folder / "README.md").write_text(text)
    print(text)


def teach(policy: Policy, settings: WarmStart, folder: Path) -> None:
    """Warm-start a checkpoint on the demonstrations of a world, and say what it changed."""
    env = settings.make_env()
    print("playing 32 episodes, before and after: minutes, for a large model", flush=True)
    print(f"before: {measure(policy, settings, 0.5, episodes=32)}", flush=True)
    imitate(policy, env, demonstrations(env, settings), settings)
    policy.save(folder)
    print(f"after:  {measure(policy, settings, 0.5, episodes=32)}\nwritten to {folder}")


def main(argv: list[str] | None = None) -> None:
    about = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, argument_default=argparse.SUPPRESS)
    parser.add_argument("--env", choices=list(ENVIRONMENTS), help="world (frozenlake)")
    parser.add_argument("--model", help="chat model to teach, folder or hub id; else a new one")
    parser.add_argument("--out", type=Path, help="folder to write; needed with --model")
    parser.add_argument("--thoughts", type=int, help="free sentences in a thought (the world's)")
    parser.add_argument("--skill", type=float, help="share of best acts shown (the world's)")
    parser.add_argument("--seed", type=int, help="another one is another model (0)")
    parser.add_argument("--episodes", type=int, help="demonstrated (10,000; with --model 1,000)")
    parser.add_argument("--window-steps", type=int, help="on two turns each (3000; 300)")
    parser.add_argument("--episode-steps", type=int, help="on whole episodes (1200; 0)")
    parser.add_argument("--lr", type=float, help="learning rate (3e-3; 1e-4)")
    parser.add_argument("--device", help="for --model (cpu)")
    parser.add_argument("--bfloat16", action="store_true", help="compute in it on a CPU, too")
    given = vars(parser.parse_args(argv))  # only what was given
    model, out, device, half = (given.pop(x, None) for x in ("model", "out", "device", "bfloat16"))
    usual = {"episodes": 1000, "window_steps": 300, "window_batch": 4, "episode_steps": 0}
    try:
        settings = WarmStart(**({"lr": 1e-4, **usual} if model else {}) | given)
        settings.make_env()
        least = settings.window_batch  # windows; an episode has one at least
        if settings.window_steps + settings.episode_steps < 1 or settings.episodes < least:
            raise ValueError(f"there must be a step, and at least {least} --episodes for it")
        if not out and (model or settings != WarmStart(settings.env)):
            raise ValueError("--model or another setting needs --out: no other is written over")
        policy = load_policy(model, device or "cpu", bool(half)) if model else None
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # no such device
        parser.error(str(error).splitlines()[0])
    if policy:
        teach(policy, settings, out)
    else:
        make_start(settings, out or STARTS / settings.env)


if __name__ == "__main__":
    main()
