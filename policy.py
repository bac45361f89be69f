"""The policy: a causal language model and its tokenizer behind one small interface.

    policy = load_policy(env="frozenlake")                       # the built-in model, warm-started on first use
    policy = load_policy("Qwen/Qwen2.5-0.5B-Instruct")           # or any causal LM with a chat template that takes tools

The built-in model is a Qwen2 of 0.25M parameters with a byte-level BPE of its own. Random weights cannot play, so a *warm
start* (supervised training on scripted turns of mediocre skill) first teaches it to read the board, to state facts about it
(mostly true ones: it is a small model) and to call the tool. The choice of good moves is left to RL.

Text is encoded once and piece by piece: the chat template's own text with its control tokens, any other text without, so that
no text can ever turn into a control token.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import jinja2
import tiktoken
import tokenizers
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from envs import make_env


# ---------------------------------------------------------------------------------------------------------- the interface
@dataclass
class Policy:
    """A model and what it takes to talk to it. Raises ValueError if the chat template cannot carry a tool-calling episode."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    encode: Callable[[str], list[int]]  # text -> ids, never a control token
    encode_framing: Callable[[str], list[int]]  # the chat template's own text -> ids, with control tokens
    bytes_of: list[bytes]  # by token id; b"" for control tokens and for ids of no token
    end_of_turn: int = field(init=False)
    _openings: dict = field(init=False, default_factory=dict)

    def __post_init__(self):
        if self.model.config._attn_implementation == "sdpa":
            self.model.set_attn_implementation("packed_sdpa")
        self.bytes_of += [b""] * (len(self.head) - len(self.bytes_of))  # checkpoints pad their vocabulary with ids of no token
        closing, after = self._framing(["system", "user", "assistant", "tool"])[3:]
        self.end_of_turn, *self._before_result = self.encode_framing(closing or "?")
        self._after_result, end = self.encode_framing(after), self.tokenizer.convert_ids_to_tokens(self.end_of_turn)
        if self.bytes_of[self.end_of_turn]:
            raise ValueError(f"the chat template ends a turn with {end!r}, which is no control token: choose a chat checkpoint")
        self.bytes_of[self.end_of_turn] = end.encode()

    def _framing(self, roles: list[str], tools: list[dict] | None = None) -> list[str]:
        """The template's own text before, between and after one message per role, the last followed by an assistant's turn."""
        messages = [{"role": role, "content": f"@{role}@"} for role in roles]
        try:
            shown = self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses one of the messages {', '.join(roles)}: {error}") from None
        pieces = re.split("|".join(message["content"] for message in messages), shown)
        if len(pieces) != len(roles) + 1:
            raise ValueError(f"the chat template loses one of the messages {', '.join(roles)}: choose one that takes tools")
        return pieces

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for: b"" for control tokens, but for the end-of-turn token its name."""
        return self.bytes_of[token]

    def is_control(self, token: int) -> bool:
        """Whether a sampled token ends the turn: the end-of-turn token, or any other token that only templates may write."""
        return token == self.end_of_turn or not self.bytes_of[token]

    def prompt(self, system: str, tools: list[dict], observation: str) -> list[int]:
        """The ids of an episode up to its first assistant turn."""
        key = json.dumps([system, tools])
        if key not in self._openings:  # rendering a template is slow, and episodes share it
            before, between, after = map(self.encode_framing, self._framing(["system", "user"], tools))
            self._openings[key] = before + self.encode(system) + between, after
        opening, closing = self._openings[key]
        return opening + self.encode(observation) + closing

    def result(self, observation: str) -> list[int]:
        """The ids from just after an end-of-turn token, through a tool's response, up to the next assistant turn."""
        return self._before_result + self.encode(observation) + self._after_result

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def head(self) -> Tensor:
        """The output embedding (V, H): hidden @ head.T are the logits."""
        return self.model.get_output_embeddings().weight

    def hidden(self, ids: Tensor, cache: transformers.Cache | None = None) -> Tensor:
        """Final hidden states (B, T, H) of ids (B, T). Rows are right-padded or not at all, so causality is the only mask."""
        with self.autocast():
            return self.model.base_model(input_ids=ids, past_key_values=cache, use_cache=cache is not None).last_hidden_state

    def autocast(self) -> torch.autocast:  # bfloat16 on CUDA, float32 elsewhere; the weights themselves stay float32
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def frozen_copy(self) -> Policy:
        """The same policy with a copy of the weights that never trains: the reference."""
        frozen = copy.copy(self)
        frozen.model = copy.deepcopy(self.model).requires_grad_(False)
        return frozen

    def save(self, folder: Path) -> None:  # a checkpoint that `load_policy(folder)` and any Hugging Face tool can load
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def packed_sdpa(module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options) -> tuple[Tensor, None]:
    """transformers' SDPA; but where every row feeds one token, query (B, heads, 1, D), the heads that share a key-value head
    become its query positions, so that the cache is read once, not once per query head. Decoding waits for little else."""
    if query.shape[2] > 1 or mask is not None:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    packed = query.reshape(len(query), key.shape[1], -1, query.shape[3])  # (B, kv heads, heads / kv heads, D)
    out = scaled_dot_product_attention(packed, key, value, scale=options.get("scaling"))
    return out.reshape(len(query), 1, -1, value.shape[3]), None  # (B, 1, heads, D)


transformers.AttentionInterface.register("packed_sdpa", packed_sdpa)
transformers.AttentionMaskInterface.register("packed_sdpa", sdpa_mask)


def load_policy(model: str | None = None, env: str = "frozenlake", device: str = "cpu", **warm_start) -> Policy:
    """The built-in policy of an environment (`warm_start`: fields of `WarmStart`) or a checkpoint; ValueError if it is unusable."""
    folder = model or built_in_checkpoint(env, device, WarmStart(**warm_start))
    safe = {"use_safetensors": True, "trust_remote_code": False}
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **safe).to(device)
    if kinds := set(getattr(network.config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"{folder} has layers without a key-value cache ({', '.join(kinds)}): such models are not supported")
    # NOTE: not AutoTokenizer: for a Qwen2 it puts Qwen2's own splitting rule in the place of the one in tokenizer.json.
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    policy = Policy(network.eval(), tokenizer, *serve(tokenizer, with_tiktoken=not model))
    with torch.no_grad():
        ids = torch.arange(8, device=device)[None]
        logits = network.base_model(input_ids=ids).last_hidden_state @ policy.head.T
        if not torch.allclose(logits, network(ids).logits, rtol=1e-3, atol=1e-3):
            raise ValueError(f"{folder} changes its logits after the head (a bias, a scale, a cap): such models are not supported")
    return policy


def bytes_by_id(tokenizer: transformers.PreTrainedTokenizerFast) -> list[bytes]:
    """The bytes of every token of a byte-level or SentencePiece-like tokenizer; b"" for control tokens and ids of no token."""
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}  # GPT-2's way to write bytes as characters
    byte_level = "ByteLevel" in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    table = [b""] * (1 + max(vocabulary.values()))
    for token, i in vocabulary.items():
        if i in added:
            table[i] = b"" if added[i].special else token.encode()
        elif byte_level:
            table[i] = b"".join(bytes([byte_of[c]]) if c in byte_of else c.encode() for c in token)
        else:
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
            table[i] = bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()
    return table


def serve(tokenizer: transformers.PreTrainedTokenizerFast, with_tiktoken: bool) -> tuple[Callable, Callable, list[bytes]]:
    """(encode, encode_framing, bytes_of): tiktoken serves the built-in tokenizer, transformers any other."""
    bytes_of = bytes_by_id(tokenizer)
    if with_tiktoken:
        special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
        ranks = {token: i for i, token in enumerate(bytes_of) if token}
        encoding = tiktoken.Encoding("actfocus", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
        return encoding.encode_ordinary, partial(encoding.encode, allowed_special="all"), bytes_of
    plain = partial(tokenizer.encode, add_special_tokens=False)
    return partial(plain, split_special_tokens=True), plain, bytes_of


# ------------------------------------------------------------------------------------------------------ the built-in model
@dataclass(frozen=True)
class WarmStart:
    """What shapes the built-in model, besides the sources of this file and of envs.py."""

    skill: float = 0.0  # how often a demonstrated act is a best one; 0 means the environment's own
    episodes: int = 5000  # demonstrated; the steps draw from these
    window: int = 2  # turns in a window: short and cheap, they come first
    window_steps: int = 800
    window_batch: int = 8  # and at most half as many episodes, being longer
    episode_steps: int = 400  # then whole episodes
    lr: float = 3e-3
    hidden: int = 96
    layers: int = 2
    vocabulary: int = 600
    seed: int = 0


WARM_START_SEEDS = 1_000_000_000  # and on: seeds that neither training nor evaluation draws
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen2's splitting rule, but that a digit takes its space along, and that a cell's name and a tag with its line end are one piece.
PATTERN = r"</?[a-z_]+>\n?| ?\b[a-z]\d\b|[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Qwen2.5's template, without its explanation of what a tool call looks like.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.role == 'system' and tools %}{{ '\n<tools>' }}"
    "{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}{{ '\n</tools>' }}{% endif %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def built_in_checkpoint(env: str, device: str, settings: WarmStart) -> Path:
    """The folder of the built-in model, made on first use in $ACTFOCUS_CACHE (default ~/.cache/actfocus). Its name hashes
    everything that shapes it; it is written elsewhere and moved there whole, so that a folder that exists is complete.
    """
    sources = [Path(__file__).with_name(name).read_text() for name in ("envs.py", "policy.py")]
    versions = [package.__version__ for package in (torch, transformers, tokenizers)]
    shape = json.dumps([env, torch.device(device).type, asdict(settings), versions, sources])
    cache = Path(os.environ.get("ACTFOCUS_CACHE", Path.home() / ".cache" / "actfocus")).expanduser()
    folder = cache / f"{env}-{hashlib.sha256(shape.encode()).hexdigest()[:16]}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="half-written-", dir=cache) as scratch:
            build(env, device, settings).save(Path(scratch) / "done")
            with contextlib.suppress(OSError):  # another process was faster: its folder is complete and equal
                os.rename(Path(scratch) / "done", folder)
    return folder


def build(env_name: str, device: str, settings: WarmStart) -> Policy:
    """Learn the tokenizer from demonstrations, make the model from a config, and warm-start it."""
    env, rng = make_env(env_name), random.Random(settings.seed)
    episodes = [play_demonstration(env, WARM_START_SEEDS + i, rng, settings.skill or env.skill) for i in range(settings.episodes)]
    tokenizer = learn_tokenizer(env, episodes[:300], settings.vocabulary)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=settings.hidden, intermediate_size=settings.hidden * 8 // 3,
        num_hidden_layers=settings.layers, num_attention_heads=settings.hidden // 32, num_key_value_heads=1,
        initializer_range=0.1,  # Qwen's 0.02 is for wide models, and learns slowly in a narrow one
        max_position_embeddings=8192, tie_word_embeddings=True,
        bos_token_id=None, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        policy = Policy(transformers.Qwen2ForCausalLM(config).to(device), tokenizer, *serve(tokenizer, with_tiktoken=True))
    warm_start(policy, env, episodes, settings)
    return policy


def play_demonstration(env, seed: int, rng: random.Random, skill: float) -> tuple[list[str], list[str]]:
    """The observations and the turns that answer them; the last observation, which nothing answers, is left out."""
    seen, said = [env.reset(seed)], []
    while not env.done:
        said.append(env.demonstrate(rng, skill))
        seen.append(env.step(said[-1]).observation)
    return seen[:-1], said


def learn_tokenizer(env, episodes: list, size: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE learned from the text that episodes consist of."""
    blank = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    blank.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    blank.decoder = decoders.ByteLevel()
    texts = [env.system, "\n".join(map(json.dumps, env.tools)) + "\n<tools>\n</tools>\nsystem\nuser\nassistant\n"] * len(episodes)
    for seen, said in episodes:
        texts += [f"{turn}\n<tool_response>\n{shown}\n</tool_response>\n" for shown, turn in zip(seen, said, strict=True)]
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    blank.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, **options))
    special = {"pad_token": SPECIAL[0], "extra_special_tokens": [SPECIAL[1]], "eos_token": SPECIAL[2]}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=blank, chat_template=CHAT_TEMPLATE, **special)


def imitation_target(frames: list[list[int]], replies: list[list[int]]) -> tuple[Tensor, Tensor]:
    """ids (T,) of what the model is shown and replies to in turn, and a mask (T,) of the replies."""
    ids, mask = [], []
    for frame, reply in zip(frames, replies, strict=True):
        ids += frame + reply
        mask += [False] * len(frame) + [True] * len(reply)
    return torch.tensor(ids), torch.tensor(mask)


def warm_start(policy: Policy, env, episodes: list[tuple[list[str], list[str]]], settings: WarmStart) -> None:
    """Supervised training on the assistant's tokens, in place: first on windows of a few turns, then on whole episodes."""
    windows, wholes = [], []
    for seen, said in episodes:
        replies = [policy.encode(turn) + [policy.end_of_turn] for turn in said]
        results = [policy.result(observation) for observation in seen]
        cuts = range(0, len(replies), settings.window)
        windows += [imitation_target(results[i : i + settings.window], replies[i : i + settings.window]) for i in cuts]
        wholes.append(imitation_target([policy.prompt(env.system, env.tools, seen[0])] + results[1:], replies))
    rng, model = random.Random(settings.seed), policy.model.train()
    lessons = [rng.sample(windows, settings.window_batch) for _ in range(settings.window_steps)]
    few = min(settings.window_batch // 2, 3000 * len(wholes) // sum(len(ids) for ids, _ in wholes))  # some 3000 tokens
    lessons += [rng.sample(wholes, max(1, few)) for _ in range(settings.episode_steps)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=len(lessons), pct_start=0.05)
    for lesson in (progress := tqdm(lessons, desc="warm start (once)", unit="step", dynamic_ncols=True)):
        ids = pad_sequence([ids for ids, _ in lesson], batch_first=True).to(policy.device)  # (B, T)
        spoken = pad_sequence([mask for _, mask in lesson], batch_first=True).to(policy.device)[:, 1:]
        hidden = policy.hidden(ids)[:, :-1][spoken]  # (N, H): what predicts each assistant token
        loss = cross_entropy(hidden @ policy.head.T, ids[:, 1:][spoken])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()
