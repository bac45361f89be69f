"""Many episodes in one batch, tokens in, tokens out.

Every row holds its own episode, and all rows stand at the same position: at each step a row feeds
either the token that it just sampled or the next token that is forced on it (the rest of its
prompt, the end of a cut turn, a tool's response). Two rows, eight positions:

    position  0 1 2 3 4 5 6 7        P: prompt, s: sampled, R: a tool's response
    row 0     P P s s R R s s        its turn ended at 3: a response is forced, then it samples
    row 1     P P P s s s s R        a longer prompt and a longer turn

So no row waits for another's turn, nothing is padded on the left, causality is the only mask, and
one key-value cache lives across all turns. The ids that training sees are the ids that were
sampled: nothing is decoded and encoded again.

    seeds = [7, 7, 8, 8]                 # two groups of two
    rollouts = rollout(policy, lambda: make_env("frozenlake"), seeds, temperature=1.0)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache

from energy import TokenStats, token_stats
from envs import Step
from kv_cache import preallocated_cache
from policy import Policy
from segment import Segment, segment_batch


@dataclass
class Rollouts:
    """B finished episodes, right-padded to T tokens. Position t of `old_logprob` and `labels`
    speaks of the token ids[:, t]."""

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

    @property
    def response(self) -> Tensor:
        """(B, T) bool: the tokens that the model sampled."""
        return self.labels != Segment.OTHER

    def take(self, rows: Tensor) -> Rollouts:
        """Some of the episodes."""
        return Rollouts(*(getattr(self, each.name)[rows] for each in fields(self)))

    def micro_batches(self, rows: Tensor, micro_tokens: int) -> list[Tensor]:
        """Split rows into batches of like length that hold at most micro_tokens with their padding
        (but always one row)."""
        lengths, batches = self.lengths.tolist(), [[]]
        for row in sorted(rows.tolist(), key=lengths.__getitem__):  # the newest row is the longest
            if batches[-1] and (len(batches[-1]) + 1) * lengths[row] > micro_tokens:
                batches.append([])
            batches[-1].append(row)
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

    def force(self, ids: list[int]) -> None:
        """Append tokens that the model did not sample."""
        self.ids += ids
        self.sampled += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)

    def sample(self, token: int, logprob: float) -> None:
        """Append a token that the model sampled."""
        self.ids.append(token)
        self.sampled.append(True)
        self.logprobs.append(logprob)
        self.turn.append(token)

    def end_turn(self, policy: Policy) -> None:
        """Let the environment play the turn, and force what the model sees next."""
        ended = self.turn[-1] == policy.end_of_turn
        step = self.env.step(policy.turn_text(self.turn))
        self.turn, self.done = [], step.done
        self.steps.append(step)
        if not step.done:
            # A turn that was cut, or that ended in another control token, is closed for the model:
            # what it wrote cannot pose as a tool's response or as another role.
            if not ended:
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

    A turn ends at the end-of-turn token, at any other control token, or after `max_turn_tokens`; an
    episode that reaches `max_tokens` positions ends there as it stands. The random numbers of an
    episode depend on sampling_seed, its seed and how many equal seeds came before it, so neither
    the batch's size nor its order changes what is played (beyond rounding). Raises ValueError for
    no seeds, a temperature that is not positive, or a prompt over max_tokens.
    """
    if not len(seeds) or not temperature > 0:
        raise ValueError(f"{len(seeds)} seeds at temperature {temperature}: both must be positive")
    rows = start_rows(policy, env_factory, seeds, sampling_seed, max_tokens)
    with policy.autocast():  # once around all steps: it casts the weights once
        for start in range(0, len(rows), at_once):
            some = rows[start : start + at_once]
            play_rows(policy, some, temperature, max_turn_tokens, max_tokens)
    return collate(policy, rows, max_tokens)


def play_rows(
    policy: Policy, rows: list[Row], temperature: float, max_turn_tokens: int, max_tokens: int
) -> None:
    """Play the episodes of one batch, in place."""
    cache = preallocated_cache(policy.model, max_tokens)
    position, hidden = prefill(policy, rows, cache)
    while True:
        # `hidden` predicts the token at `position`: a row that does not know it samples it.
        uniforms = [row.uniforms[position] for row in rows]
        tokens, logprobs = sample(hidden, policy.head, temperature, uniforms)
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            if len(row.ids) == position and not row.done:
                row.sample(token, logprob)
                if token in policy.control_tokens or len(row.turn) == max_turn_tokens:
                    row.end_turn(policy)
        position += 1
        playing = [i for i, row in enumerate(rows) if not row.done]
        if not playing or position == max_tokens:
            return
        if len(playing) < 0.9 * len(rows):  # several leave at a time, since the cache is copied
            rows = [rows[i] for i in playing]
            cache.batch_select_indices(torch.tensor(playing, device=policy.device))
        fed = [row.ids[position - 1] if position <= len(row.ids) else 0 for row in rows]
        ids = torch.tensor(fed, device=policy.device)[:, None]  # (rows, 1)
        hidden = policy.hidden(ids, cache)[:, -1]  # (rows, H)


def repeated(seeds: Sequence[int], times: int) -> list[int]:
    """Seeds of groups.

    >>> repeated([7, 8], times=2)
    [7, 7, 8, 8]
    """
    return [seed for seed in seeds for _ in range(times)]


def start_rows(
    policy: Policy, env_factory: Callable, seeds: Sequence[int], sampling_seed: int, max_tokens: int
) -> list[Row]:
    """A row per seed, with its prompt as the first tokens."""
    rows, seen = [], Counter()
    for seed in seeds:
        env = env_factory()
        prompt = policy.prompt(env.system, env.tools, env.reset(seed))
        if len(prompt) >= max_tokens:
            raise ValueError(
                f"the prompt of seed {seed} has {len(prompt)} tokens: "
                f"max_tokens is {max_tokens}, raise it"
            )
        generator = np.random.default_rng([sampling_seed, seed, seen[seed]])
        seen[seed] += 1
        row = Row(env, generator.random(max_tokens, dtype=np.float32))
        row.force(prompt)
        rows.append(row)
    return rows


def prefill(policy: Policy, rows: list[Row], cache: Cache) -> tuple[int, Tensor]:
    """Feed what all prompts have in length at once, each distinct beginning only once; the rest is
    forced token by token.

    Returns the position that comes next and the hidden states (rows, H) that predict it.
    """
    shortest = min(len(row.ids) for row in rows)
    ids = [tuple(row.ids[:shortest]) for row in rows]
    number_of = {beginning: number for number, beginning in enumerate(dict.fromkeys(ids))}
    beginnings = torch.tensor(list(number_of), device=policy.device)  # (distinct, shortest)
    hidden = policy.hidden(beginnings, cache)[:, -1]  # (distinct, H)
    which = torch.tensor([number_of[beginning] for beginning in ids], device=policy.device)
    cache.batch_select_indices(which)
    return shortest, hidden[which]


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
    tokens = tokens.clamp(max=logprobs.shape[1] - 1)
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
    policy: Policy, rollouts: Rollouts, rows: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """The hidden states (N, H) that predict the N tokens of some rows that are chosen, (B, T) bool,
    and these tokens (N,). Position t - 1 predicts the token at t."""
    stop = int(rollouts.lengths[rows].max())
    ids = rollouts.ids[rows, :stop]  # (b, stop)
    chosen = chosen[rows, 1:stop]  # (b, stop - 1)
    return policy.hidden(ids[:, :-1])[chosen], ids[:, 1:][chosen]


@torch.no_grad()
def score_all(
    policy: Policy, rollouts: Rollouts, chosen: Tensor, temperature: float, micro_tokens: int
) -> TokenStats:
    """Statistics of the chosen tokens, each (B, T); 0 at the others, which cost no product with the
    head."""
    full = TokenStats(*torch.zeros(3, *rollouts.ids.shape, device=policy.device))
    for rows in rollouts.micro_batches(torch.arange(len(rollouts.ids)), micro_tokens):
        hidden, targets = scored_hidden(policy, rollouts, rows, chosen)
        row, position = chosen[rows].nonzero(as_tuple=True)  # (N,), (N,)
        with policy.autocast():
            stats = token_stats(hidden, policy.head, targets, temperature=temperature)
        for laid_out, packed in zip(full, stats, strict=True):
            laid_out[rows.to(policy.device)[row], position] = packed
    return full
