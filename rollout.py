"""Many episodes in one batch, tokens in, tokens out.

A row is one episode. All rows of a batch stand at the same position. At each step, every row feeds
one token to the model: either the token that it has just sampled, or the next token that is forced
on it (the rest of its prompt, the end of a turn that was cut, a tool's response). Two rows over
eight positions:

    position  0 1 2 3 4 5 6 7        P: prompt, s: sampled, R: a tool's response
    row 0     P P s s R R s s        its turn ended at 3: a response is forced, then it samples
    row 1     P P P s s s s R        a longer prompt and a longer turn

So no row waits for another's turn, nothing is padded on the left, causality is the only mask, and
one key-value cache lives across all turns. The ids that training sees are the ids that were
sampled: nothing is decoded and encoded a second time.

    seeds = [7, 7, 8, 8]                 # two groups of two
    rollouts = rollout(policy, lambda: make_env("frozenlake"), seeds, temperature=1.0)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import Cache

from energy import TokenStats, token_stats
from envs import Step
from kv_cache import preallocated_cache
from policy import Policy
from segment import Segment, segment_batch


@dataclass
class Rollouts:
    """B finished episodes, right-padded to T tokens. Position t of `old_logprob` and `labels` is
    about the token ids[:, t]."""

    # (B, T) int64: prompt, turns and tool responses as the model saw them; 0 after the end
    ids: Tensor
    labels: Tensor  # (B, T) int64: Segment; OTHER for whatever the model did not sample
    old_logprob: Tensor  # (B, T) float32: of each sampled token at the sampling temperature, else 0
    rewards: Tensor  # (B,) float32: sum over the episode
    success: Tensor  # (B,) bool
    lengths: Tensor  # (B,) int64: tokens of the episode
    finished: Tensor  # (B,) bool: the game itself came to an end; see envs.Step
    turns: Tensor  # (B,) int64: assistant turns
    turns_without_facts: Tensor  # (B,) int64: turns whose reasoning states no fact about the board
    facts: Tensor  # (B,) int64: facts stated in all turns
    true_facts: Tensor  # (B,) int64
    # (B, T) float32: what was noted while sampling. It is old_logprob until that is taken anew.
    sampled_logprob: Tensor | None = None

    def __post_init__(self):
        if self.sampled_logprob is None:
            self.sampled_logprob = self.old_logprob

    @property
    def response(self) -> Tensor:
        """(B, T) bool: the tokens that the model sampled."""
        return self.labels != Segment.OTHER

    @property
    def reasoning(self) -> Tensor:
        """(B, T) bool: the sampled tokens that are reasoning."""
        return self.labels == Segment.REASONING

    @property
    def action(self) -> Tensor:
        """(B, T) bool: the sampled tokens that are the call of a tool."""
        return self.labels == Segment.ACTION

    def take(self, indices: Tensor) -> Rollouts:
        """The episodes with these indices, in their order."""
        taken = {each.name: getattr(self, each.name)[indices] for each in fields(self)}
        return Rollouts(**taken)

    def micro_batches(self, indices: Tensor, micro_tokens: int) -> list[Tensor]:
        """Split indices of episodes into batches of similar length. Each batch holds at most
        micro_tokens tokens, padding included, but always at least one episode."""
        lengths = self.lengths.tolist()
        batches = [[]]
        for index in sorted(indices.tolist(), key=lengths.__getitem__):
            # The newest episode is the longest so far, and all others are padded to its length.
            padded_tokens = (len(batches[-1]) + 1) * lengths[index]
            if batches[-1] and padded_tokens > micro_tokens:
                batches.append([])
            batches[-1].append(index)
        return [torch.tensor(batch) for batch in batches]


@dataclass
class Row:
    """One episode in play: the tokens known so far, of which the cache may hold fewer, and the turn
    being sampled."""

    env: object
    uniforms: np.ndarray  # one number in [0, 1) per position
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)  # which of them the model sampled
    logprobs: list[float] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    done: bool = False

    def samples_at(self, position: int) -> bool:
        """Is the token at this position, which comes next in the batch, one for the model to
        sample? It is unless the token is already known or the episode is over."""
        return len(self.ids) == position and not self.done

    def token_at(self, position: int) -> int:
        """The token to feed at a position: 0 if the episode was over before."""
        return self.ids[position] if position < len(self.ids) else 0

    def force(self, ids: list[int]) -> None:
        """Append tokens that the model did not sample."""
        self.ids += ids
        self.sampled += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)

    def append(self, token: int, logprob: float) -> None:
        """Append a token that the model sampled."""
        self.ids.append(token)
        self.sampled.append(True)
        self.logprobs.append(logprob)
        self.turn.append(token)

    def end_turn(self, policy: Policy) -> None:
        """Let the environment play the turn, and force what the model sees next."""
        is_closed = self.turn[-1] == policy.end_of_turn
        step = self.env.step(policy.turn_text(self.turn))
        self.turn = []
        self.steps.append(step)
        self.done = step.done
        if step.done:
            return
        # A turn that was cut, or that ended in another control token, is closed for the model: what
        # it wrote cannot pose as a tool's response or as another role.
        if not is_closed:
            self.force([policy.end_of_turn])
        self.force(policy.result(step.observation))


@torch.no_grad()
def rollout(
    policy: Policy,
    env_factory: Callable[[], object],
    seeds: Sequence[int],
    temperature: float = 1.0,
    *,
    max_turn_tokens: int = 160,
    max_tokens: int = 4096,
    sampling_seed: int = 0,
    at_once: int = 256,
) -> Rollouts:
    """Play one episode per seed, `at_once` of them in a batch. A seed that is given G times makes a
    GRPO group of G.

    A turn ends at the end-of-turn token, at any other control token, or after `max_turn_tokens`. An
    episode that reaches `max_tokens` positions ends there as it stands. The random numbers of an
    episode depend on sampling_seed, its seed and how many equal seeds came before it, so neither
    the batch's size nor its order changes what is played (beyond rounding). An episode whose prompt
    leaves no room for a turn is over at once, with the reward 0, and a note is printed.

    Raises ValueError for no seeds or a temperature that is not positive, and CannotPlay if no
    prompt leaves room for a turn, or if the rewards of an episode do not add up to a finite number.
    """
    if not len(seeds) or not temperature > 0:
        raise ValueError(f"{len(seeds)} seeds at temperature {temperature}: both must be positive")
    rows = new_rows(policy, env_factory, seeds, sampling_seed, max_tokens)
    to_play = [row for row in rows if not row.done]
    with policy.autocast():  # once around all steps: it casts the weights once
        for first in range(0, len(to_play), at_once):
            batch = to_play[first : first + at_once]
            play_batch(policy, batch, temperature, max_turn_tokens, max_tokens)
    rollouts = collate(policy, rows, max_tokens)
    for seed, reward in zip(seeds, rollouts.rewards.tolist(), strict=True):
        if not math.isfinite(reward):
            raise CannotPlay(f"the world's rewards in the episode of seed {seed} sum to {reward}")
    return rollouts


@torch.inference_mode()  # as no_grad, but the many small operations of decoding cost less
def play_batch(
    policy: Policy, rows: list[Row], temperature: float, max_turn_tokens: int, max_tokens: int
) -> None:
    """Play the episodes of one batch to their end, in place."""
    cache = preallocated_cache(policy.model, max_tokens)
    position, hidden = prefill(policy, rows, cache)
    while True:
        # `hidden` (rows, H) predicts the tokens at `position`. Every row draws one, and the rows
        # that already know theirs do not use it.
        uniforms = [row.uniforms[position] for row in rows]
        tokens, logprobs = sample(hidden, policy.head, temperature, uniforms)
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            if row.samples_at(position):
                row.append(token, logprob)
                if token in policy.control_tokens or len(row.turn) == max_turn_tokens:
                    row.end_turn(policy)
        playing = [index for index, row in enumerate(rows) if not row.done]
        if not playing or position + 1 == max_tokens:
            return
        if len(playing) < 0.9 * len(rows):  # several leave at a time, since the cache is copied
            rows = [rows[index] for index in playing]
            cache.batch_select_indices(torch.tensor(playing, device=policy.device))
        fed = torch.tensor([row.token_at(position) for row in rows], device=policy.device)
        hidden = policy.hidden(fed[:, None], cache)[:, -1]  # (rows, H)
        position += 1


def repeated(seeds: Sequence[int], times: int) -> list[int]:
    """Seeds of groups: each seed several times, one group after the other.

    >>> repeated([7, 8], times=2)
    [7, 7, 8, 8]
    """
    return [seed for seed in seeds for _ in range(times)]


def new_rows(
    policy: Policy, env_factory: Callable, seeds: Sequence[int], sampling_seed: int, max_tokens: int
) -> list[Row]:
    """A row per seed, with its prompt as the first tokens. One whose prompt is too long is done."""
    rows = []
    times_seen = Counter()
    for seed in seeds:
        env = env_factory()
        prompt = policy.prompt(env.system, env.tools, env.reset(seed))
        generator = np.random.default_rng([sampling_seed, seed, times_seen[seed]])
        times_seen[seed] += 1
        row = Row(env, generator.random(max_tokens, dtype=np.float32))
        row.force(prompt)
        row.done = len(prompt) >= max_tokens
        rows.append(row)
    note_long_prompts(rows, seeds, max_tokens)
    return rows


class CannotPlay(ValueError):
    """Episodes that cannot be played, or not be learned from, and why."""


def note_long_prompts(rows: list[Row], seeds: Sequence[int], max_tokens: int) -> None:
    """Print a note if some rows are done because of their prompts. Raises CannotPlay if all are."""
    too_long = [seed for row, seed in zip(rows, seeds, strict=True) if row.done]
    if not too_long:
        return
    if len(too_long) == len(rows):
        check_prompt_length(rows[0].ids, too_long[0], max_tokens)
    longest = max(len(row.ids) for row in rows)
    tqdm.write(
        f"note: {len(too_long)} of {len(rows)} episodes cannot be played and count as failed: "
        f"their prompts have up to {longest} tokens, and max_tokens is {max_tokens} (the first "
        f"has seed {too_long[0]})"
    )


def check_prompt_length(prompt: list[int], seed: int, max_tokens: int) -> None:
    """Raises CannotPlay if the prompt of an episode leaves no room for a turn."""
    if len(prompt) >= max_tokens:
        raise CannotPlay(
            f"the prompt of seed {seed} has {len(prompt)} tokens: "
            f"max_tokens is {max_tokens}, raise it"
        )


def prefill(policy: Policy, rows: list[Row], cache: Cache) -> tuple[int, Tensor]:
    """Feed the beginning of all prompts at once, up to the length of the shortest prompt.

    The rows of a group share their prompt: it is computed once, and the cache is then copied for
    each of them. What is left of longer prompts is forced token by token.

    Returns the position that comes next and the hidden states (rows, H) that predict it.
    """
    shortest = min(len(row.ids) for row in rows)
    beginnings = [tuple(row.ids[:shortest]) for row in rows]
    distinct = list(dict.fromkeys(beginnings))
    ids = torch.tensor(distinct, device=policy.device)  # (distinct, shortest)
    hidden = policy.hidden(ids, cache)[:, -1]  # (distinct, H)
    number_of = {beginning: number for number, beginning in enumerate(distinct)}
    indices = torch.tensor([number_of[each] for each in beginnings], device=policy.device)
    cache.batch_select_indices(indices)  # from one entry a prompt to one a row
    return shortest, hidden[indices]


def sample(
    hidden: Tensor, head: Tensor, temperature: float, uniforms: list[float]
) -> tuple[list[int], list[float]]:
    """A token id and its log-prob per row, by inverting the cumulative distribution at the row's
    random number. What is sampled from is not rounded, under autocast either."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.float() @ head.float().T  # (rows, V)
        logprobs = (logits / temperature).log_softmax(-1)
    cumulative = logprobs.exp().cumsum(-1)
    points = torch.tensor(np.array(uniforms), device=hidden.device)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, points, right=True)  # (rows, 1)
    tokens = tokens.clamp(max=logprobs.shape[1] - 1)  # of logits that are nan it finds none
    return tokens.squeeze(1).tolist(), logprobs.gather(1, tokens).squeeze(1).tolist()


def collate(policy: Policy, rows: list[Row], stop: int) -> Rollouts:
    """Pad the rows into tensors on the policy's device, and label them. An unfinished row is cut at
    `stop`, its last turn labelled as it is."""

    def padded(name: str, dtype: torch.dtype) -> Tensor:  # (B, T)
        values = [torch.tensor(getattr(row, name)[:stop], dtype=dtype) for row in rows]
        return pad_sequence(values, batch_first=True)

    def total(value: Callable[[Step], float], dtype: torch.dtype = torch.int64) -> Tensor:  # (B,)
        sums = [sum(map(value, row.steps)) for row in rows]  # over the turns
        return torch.tensor(sums, dtype=dtype, device=policy.device)

    ids, sampled = padded("ids", torch.int64), padded("sampled", torch.bool)
    lengths = [min(len(row.ids), stop) for row in rows]
    return Rollouts(
        ids=ids.to(policy.device),
        labels=segment_batch(ids, sampled, policy.bytes_of, policy.opening).to(policy.device),
        old_logprob=padded("logprobs", torch.float32).to(policy.device),
        lengths=torch.tensor(lengths, device=policy.device),
        rewards=total(lambda step: step.reward, torch.float32),
        success=total(lambda step: step.success, torch.bool),
        finished=total(lambda step: step.finished, torch.bool),
        turns=total(lambda step: 1),
        turns_without_facts=total(lambda step: not step.facts),
        facts=total(lambda step: step.facts),
        true_facts=total(lambda step: step.true_facts),
    )


def scored_hidden(
    policy: Policy, rollouts: Rollouts, indices: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The hidden states (N, H) that predict the N tokens in a mask (B, T) of some episodes, and
    these tokens (N,). The token at position t is predicted at position t - 1."""
    stop = int(rollouts.lengths[indices].max())
    ids = rollouts.ids[indices, :stop]  # (b, stop)
    mask = mask[indices, 1:stop]  # (b, stop - 1)
    return policy.hidden(ids[:, :-1])[mask], ids[:, 1:][mask]


@torch.no_grad()
def score_all(
    policy: Policy, rollouts: Rollouts, mask: Tensor, temperature: float, micro_tokens: int
) -> TokenStats:
    """Statistics of the tokens in a mask (B, T), each (B, T); 0 at all other tokens, which are left
    out of the product with the head. Nothing predicts the first token of an episode, and after its
    end there is no token: the statistics are 0 there too, whatever the mask says."""
    full = TokenStats(*torch.zeros(3, *rollouts.ids.shape, device=policy.device))
    inside = torch.arange(mask.shape[1], device=mask.device) < rollouts.lengths[:, None]  # (B, T)
    mask = mask & inside
    for indices in rollouts.micro_batches(torch.arange(len(rollouts.ids)), micro_tokens):
        hidden, targets = scored_hidden(policy, rollouts, indices, mask)
        with policy.autocast():
            stats = token_stats(hidden, policy.head, targets, temperature=temperature)
        within, positions = mask[indices, 1:].nonzero(as_tuple=True)  # (N,), (N,)
        episodes = indices.to(policy.device)[within]  # (N,)
        for laid_out, packed in zip(full, stats, strict=True):
            laid_out[episodes, positions + 1] = packed
    return full
