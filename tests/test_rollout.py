"""rollout.py: tokens in, tokens out, over ragged multi-turn batches."""

import random

import pytest
import torch
from conftest import DEVICES

from envs import Step, tool_schema
from kv_cache import PreallocatedLayer
from policy import load_policy
from rollout import CannotPlay, rollout, sample, score_all
from segment import Segment, segment_turn
from worlds import make_env


class Ragged:
    """An environment with prompts and observations of very different lengths, and 1 to 4 turns,
    that keeps what it was told."""

    system, tools = "Say something.", [tool_schema("say", "Say it.", {"word": {"type": "string"}})]
    done = False

    def reset(self, seed):
        self.rng, self.heard = random.Random(seed), []
        self.turns = self.rng.randrange(1, 5)
        return "start " * self.rng.randrange(1, 30) + str(seed)

    def step(self, reply):
        assert len(self.heard) < self.turns
        self.heard.append(reply)
        done = len(self.heard) == self.turns
        facts = len(self.heard) - 1  # the first turn states none
        return Step(
            "word " * self.rng.randrange(20),
            0.5,
            done,
            done and self.turns > 2,
            done and self.turns > 1,
            facts,
            facts // 2,
        )


def play(policy, seeds, env_factory=Ragged, **options):
    """Rollouts, and the environments that they were played in."""
    envs = []

    def factory():
        envs.append(env_factory())
        return envs[-1]

    return rollout(
        policy, factory, seeds, **({"temperature": 1.0, "max_turn_tokens": 24} | options)
    ), envs


@pytest.fixture(params=DEVICES)
def policy(request, tiny, tiny_folder):
    return tiny if request.param == "cpu" else load_policy(tiny_folder, request.param)


def turns_of(policy, rollouts, row):
    """The sampled ids of each turn of an episode: runs of response positions."""
    ids, response = rollouts.ids[row].tolist(), rollouts.response[row].tolist() + [False]
    turns, turn = [], []
    for token, sampled in zip(ids + [0], response, strict=True):
        if sampled:
            turn.append(token)
        elif turn:
            turns, turn = turns + [turn], []
    return turns


def test_an_episode_is_prompt_turns_and_results_and_the_environment_heard_its_turns(policy):
    seeds = list(range(12))
    rollouts, envs = play(policy, seeds)
    assert len({env.turns for env in envs}) == 4 and len(set(rollouts.lengths.tolist())) > 6
    for row, env in enumerate(envs):
        turns, fresh = turns_of(policy, rollouts, row), Ragged()
        expected = policy.prompt(env.system, env.tools, fresh.reset(seeds[row]))
        for i, turn in enumerate(turns):
            ended = turn[-1] == policy.end_of_turn
            said = b"".join(policy.bytes_of[token] for token in turn).decode(errors="replace")
            assert env.heard[i] == said
            observation = fresh.step(said).observation
            expected += turn
            if i + 1 < len(turns):
                expected += [policy.end_of_turn] * (not ended) + policy.result(observation)
        assert len(turns) == env.turns == rollouts.turns[row]
        assert rollouts.ids[row, : rollouts.lengths[row]].tolist() == expected
        assert rollouts.ids[row, rollouts.lengths[row] :].sum() == 0
        assert rollouts.rewards[row] == 0.5 * env.turns and rollouts.success[row] == (env.turns > 2)
        assert rollouts.finished[row] == (env.turns > 1) and rollouts.turns_without_facts[row] == 1
        assert rollouts.facts[row] == sum(range(env.turns)) and rollouts.true_facts[row] == sum(
            n // 2 for n in range(env.turns)
        )


def test_labels_are_those_of_each_turn(policy, built_in):
    for model, factory in ((policy, Ragged), (built_in, lambda: make_env("frozenlake"))):
        rollouts, _ = play(model, list(range(8)), factory, max_turn_tokens=160)
        for row in range(8):
            labels = rollouts.labels[row][rollouts.response[row]].tolist()
            expected = [
                segment_turn([model.bytes_of[token] for token in turn])
                for turn in turns_of(model, rollouts, row)
            ]
            assert labels == sum(expected, [])
        assert (rollouts.labels[~rollouts.response] == Segment.OTHER).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_equal_those_of_a_fresh_forward_pass(policy, built_in, temperature):
    for model, factory in ((policy, Ragged), (built_in, lambda: make_env("frozenlake"))):
        rollouts, _ = play(
            model,
            [0, 1, 1, 2, 3, 4, 5, 6, 7, 8],
            factory,
            temperature=temperature,
            max_turn_tokens=160,
        )
        ends = 0
        for row, length in enumerate(
            rollouts.lengths.tolist()
        ):  # one at a time: no padding, no cache
            ids = rollouts.ids[row, :length]
            with torch.no_grad():
                logits = model.model(ids[None]).logits[0].float()
            logprob = (
                (logits[:-1] / temperature).log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
            )
            response = rollouts.response[row, 1:length]
            tolerance = 1e-4 if model.device.type == "cpu" else 0.2  # bfloat16 on CUDA
            torch.testing.assert_close(
                rollouts.old_logprob[row, 1:length][response],
                logprob[response],
                atol=tolerance,
                rtol=0,
            )
            ends += ((ids == model.end_of_turn) & rollouts.response[row, :length]).sum().item()
        assert (rollouts.old_logprob[~rollouts.response] == 0).all()
    assert ends > 10  # the last model ends its turns itself: those tokens were among the compared


def test_batch_size_and_order_change_nothing(built_in):
    seeds = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    limits = {"max_turn_tokens": 160, "max_tokens": 680}
    whole, _ = play(built_in, seeds, lambda: make_env("frozenlake"), **limits)
    assert len(set(whole.lengths.tolist())) > 3  # rows leave the batch one by one
    for order in ([10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [4, 0, 8, 2]):
        other, _ = play(
            built_in, [seeds[i] for i in order], lambda: make_env("frozenlake"),
            **limits, at_once=3,
        )  # fmt: skip
        for row, i in enumerate(order):
            equal = [j for j, seed in enumerate(seeds) if seed == seeds[i]]
            twin = equal[
                [seeds[j] for j in order[:row]].count(seeds[i])
            ]  # the k-th of equal seeds is the k-th wherever it stands
            length = whole.lengths[twin]
            assert other.lengths[row] == length
            assert torch.equal(other.ids[row, :length], whole.ids[twin, :length])
            torch.testing.assert_close(
                other.old_logprob[row, :length], whole.old_logprob[twin, :length], atol=1e-4, rtol=0
            )
            assert other.rewards[row] == whole.rewards[twin]


def test_equal_seeds_share_the_prompt_and_differ_in_what_is_sampled(built_in):
    limits = {"max_turn_tokens": 160, "max_tokens": 480}
    rollouts, _ = play(built_in, [7] * 6, lambda: make_env("frozenlake"), **limits)
    (start,) = set(rollouts.response.int().argmax(1).tolist())
    assert (
        len({tuple(ids.tolist()) for ids in rollouts.ids[:, :start]})
        == 1
        < len({tuple(ids.tolist()) for ids in rollouts.ids})
    )
    again, _ = play(built_in, [7] * 6, lambda: make_env("frozenlake"), **limits)
    other, _ = play(built_in, [7] * 6, lambda: make_env("frozenlake"), **limits, sampling_seed=1)
    assert torch.equal(again.ids, rollouts.ids)
    assert not torch.equal(other.ids[:, : start + 40], rollouts.ids[:, : start + 40])


def test_turns_are_cut_at_their_limit_and_one_token_turns_work(policy):
    for limit in (1, 5):
        rollouts, envs = play(policy, list(range(8)), max_turn_tokens=limit)
        for row in range(8):
            turns = turns_of(policy, rollouts, row)
            assert len(turns) == envs[row].turns
            assert all(len(turn) == limit or turn[-1] in policy.control_tokens for turn in turns)
            assert all(len(turn) <= limit for turn in turns)


def test_control_tokens_end_the_turn_and_reach_nobody(tiny):
    """A policy that only ever samples control tokens: each is one turn without text, closed by the
    template's own token."""
    (start,) = tiny.chat.encode_framing("<|im_start|>")
    head = tiny.head.detach().clone()
    try:
        with torch.no_grad():
            direction = tiny.hidden(torch.tensor([tiny.prompt(Ragged.system, Ragged.tools, "x")]))[
                0, -1
            ]
            tiny.head[start] += 1000 * direction / direction.norm()
        rollouts, envs = play(tiny, [2, 3], temperature=0.01)
    finally:
        with torch.no_grad():
            tiny.head.copy_(head)
    turn = turns_of(tiny, rollouts, 0)[0]
    assert turn == [start] and envs[0].heard[0] == ""
    position = rollouts.response[0].int().argmax().item()
    assert rollouts.labels[0, position] == Segment.FORMAT
    if envs[0].turns > 1:
        assert (
            rollouts.ids[0, position + 1] == tiny.end_of_turn
            and rollouts.labels[0, position + 1] == Segment.OTHER
        )


def test_episodes_are_cut_at_the_token_limit(policy):
    full, _ = play(policy, list(range(6)))
    prompt = max(
        len(policy.prompt(Ragged.system, Ragged.tools, Ragged().reset(seed))) for seed in range(6)
    )
    limit = prompt + 10
    cut, _ = play(policy, list(range(6)), max_tokens=limit)
    assert cut.ids.shape[1] == limit and (full.lengths > limit).any()
    for row in range(6):
        length = min(limit, full.lengths[row])
        assert cut.lengths[row] == length
        assert torch.equal(cut.ids[row, :length], full.ids[row, :length])
        assert torch.equal(cut.response[row, :length], full.response[row, :length])
    with pytest.raises(CannotPlay, match="max_tokens is 20, raise it"):
        play(policy, [0], max_tokens=20)


def test_an_episode_whose_prompt_is_too_long_is_over_at_once(policy, capsys):
    """A long run does not end because one of its prompts is too long; the others are played as they
    are without it."""
    lengths = {
        seed: len(policy.prompt(Ragged.system, Ragged.tools, Ragged().reset(seed)))
        for seed in range(12)
    }
    longest = max(lengths, key=lengths.get)
    short = [seed for seed in lengths if lengths[seed] + 5 < lengths[longest]][:4]
    limit = lengths[longest]
    alone, _ = play(policy, short, max_tokens=limit)
    assert not capsys.readouterr().out
    mixed, envs = play(policy, [*short, longest], max_tokens=limit)
    said = capsys.readouterr().out
    assert "1 of 5 episodes cannot be played" in said and f"has seed {longest})" in said
    width = alone.ids.shape[1]
    assert torch.equal(mixed.ids[:4, :width], alone.ids)
    assert torch.equal(mixed.labels[:4, :width], alone.labels)
    assert torch.equal(mixed.rewards[:4], alone.rewards)
    assert mixed.rewards[4] == 0 and not mixed.success[4] and mixed.turns[4] == 0
    assert not mixed.response[4].any() and envs[4].heard == []
    assert mixed.lengths[4] == limit


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_told_with_its_seed(policy, reward):
    class Broken(Ragged):
        def step(self, reply):
            step = super().step(reply)
            return step._replace(reward=reward) if self.seed == 2 else step

        def reset(self, seed):
            self.seed = seed
            return super().reset(seed)

    with pytest.raises(CannotPlay, match=f"the episode of seed 2 sum to {reward}"):
        play(policy, [0, 1, 2], Broken)


def test_the_cache_keeps_what_it_was_given_whatever_is_selected():
    generator, layer = torch.Generator().manual_seed(0), PreallocatedLayer(limit=33)
    expected = torch.zeros(3, 2, 0, 4), torch.zeros(3, 2, 0, 4)
    for step in range(40):
        if step in (7, 20, 21):
            rows = {
                7: torch.tensor([2, 0, 1]),
                20: torch.tensor([0, 0, 1, 2]),
                21: torch.tensor([3, 1]),
            }[step]
            layer.batch_select_indices(rows)
            expected = tuple(states[rows] for states in expected)
        new = [
            torch.randn(len(expected[0]), 2, 1 + 5 * (step == 0), 4, generator=generator)
            for _ in range(2)
        ]
        expected = tuple(
            torch.cat([states, more], dim=2) for states, more in zip(expected, new, strict=True)
        )
        assert all(torch.equal(a, b) for a, b in zip(layer.update(*new), expected, strict=True))


def test_sampling_follows_the_distribution():
    head = torch.log(torch.tensor([[0.5], [0.3], [0.0], [0.2]]))
    n = 20_000
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(0)).tolist()
    tokens, logprobs = sample(torch.ones(n, 1), head, 1.0, uniforms)
    counts = torch.bincount(torch.tensor(tokens), minlength=4) / n
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.3, 0.0, 0.2]), atol=0.015, rtol=0)
    assert {round(2.718281828**logprob, 4) for logprob in logprobs} == {0.5, 0.3, 0.2}
    cold, _ = sample(torch.ones(n, 1), head, 0.5, uniforms)  # probabilities squared and normalised
    assert abs(cold.count(0) / n - 0.25 / 0.38) < 0.015
    assert sample(torch.ones(2, 1), head, 1.0, [0.0, 1.0])[0] == [0, 3]


@pytest.mark.parametrize("seeds, temperature", [([], 1.0), ([1], 0.0), ([1], -1.0)])
def test_refuses(tiny, seeds, temperature):
    with pytest.raises(ValueError, match="must be positive"):
        rollout(tiny, Ragged, seeds, temperature)


def test_what_no_token_was_sampled_at_has_no_statistics(policy):
    """The first token is predicted by nothing, and after an episode's end there is padding."""
    rollouts, _ = play(policy, [0, 1, 2, 3])
    inside = torch.arange(rollouts.ids.shape[1]) < rollouts.lengths[:, None].cpu()  # (B, T)
    assert not inside.all()
    inside = inside.to(policy.device)
    predicted = inside.clone()
    predicted[:, 0] = False
    wanted = score_all(policy, rollouts, predicted, 1.0, 200)
    for mask in (torch.ones_like(inside), inside):
        found = score_all(policy, rollouts, mask, 1.0, 200)
        for full, expected in zip(found, wanted, strict=True):
            assert torch.equal(full, expected) and (full[~predicted] == 0).all()


def test_take_selects_episodes(tiny):
    rollouts, _ = play(tiny, [0, 1, 2, 3])
    some = rollouts.take(torch.tensor([2, 0]))
    assert some.lengths.tolist() == rollouts.lengths[[2, 0]].tolist() and torch.equal(
        some.ids[1], rollouts.ids[0]
    )


def test_in_bfloat16_keys_and_values_are_cached_in_it(start, monkeypatch):
    """Rotary embeddings leave keys in float32: without a cast as the cache is written, every
    decoding step would cast the whole key cache."""
    policy, seen = load_policy(start, bfloat16=True), []
    update = PreallocatedLayer.update

    def spy(layer, keys, values, *args, **kwargs):
        cached = update(layer, keys, values, *args, **kwargs)
        seen.append((keys.dtype, *(each.dtype for each in (*cached, *layer.buffers))))
        return cached

    monkeypatch.setattr(PreallocatedLayer, "update", spy)
    limits = {"max_turn_tokens": 160, "max_tokens": 680}
    rollouts, _ = play(policy, [1, 2, 3], lambda: make_env("frozenlake"), **limits)
    assert {dtypes[1:] for dtypes in seen} == {(torch.bfloat16,) * 4}
    assert seen[0][0] == torch.float32  # what the model hands over: the reason for the cast
    assert rollouts.facts.sum() > 10  # and it still plays


def test_selected_rows_share_nothing_with_what_they_were(built_in):
    layer = PreallocatedLayer(limit=8)
    ones = torch.ones(2, 1, 3, 4)
    layer.update(ones, ones)
    before = layer.keys
    layer.batch_select_indices(torch.tensor([1, 0]))
    layer.update(2 * ones[:, :, :1], 2 * ones[:, :, :1])
    assert before.shape[2] == 3 and (before == 1).all()
    assert layer.keys[0, 0, :, 0].tolist() == [1, 1, 1, 2]
