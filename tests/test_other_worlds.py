"""The adapters of examples/other_worlds.py. A test is skipped where the package that it needs,
gymnasium or trl, is not installed; .ci/run installs both."""

import importlib.util
import math
import random
from pathlib import Path

import pytest
from test_hostile import MARK, hostile_reply
from test_train import read, run_script

from envs import Step, check_tools, write_turn
from worlds import make_env

FILE = Path(__file__).parents[1] / "examples" / "other_worlds.py"
GYMNASIUM = ["frozen_lake", "taxi"]
ADAPTED = [*GYMNASIUM, "higher_lower"]


def adapted(name: str):
    """A world of examples/other_worlds.py, or a skipped test."""
    if name in GYMNASIUM:
        pytest.importorskip("gymnasium")
    return make_env(f"{FILE}:{name}")


def some_replies(env, seed: int, turns: int = 30) -> list[str]:
    """Turns with calls that fit the schema, drawn at random, and some malformed ones."""
    rng = random.Random(f"replies {seed}")
    (tool,) = env.tools
    ((argument, schema),) = tool["function"]["parameters"]["properties"].items()
    replies = []
    for _ in range(turns):
        value = rng.choice(schema.get("enum", range(1, 21)))
        reply = write_turn("Hm.", tool["function"]["name"], {argument: value})
        replies.append(reply if rng.random() < 0.9 else reply.replace("</think>", ""))
    return replies


def episode(env, seed: int, replies: list[str]):
    """The texts, rewards and ends of an episode, one turn at a time."""
    yield env.reset(seed)
    for reply in replies:
        step = env.step(reply)
        yield step
        if step.done:
            return


@pytest.mark.parametrize("name", ADAPTED)
def test_a_seed_and_the_replies_decide_on_an_episode(name):
    """Alone, once more in the same world, and in turns with an episode of another world."""
    env, same, other = (adapted(name) for _ in range(3))
    distinct, turns = set(), 0
    for seed in (0, 1, 2, 3, 4, 3_000_000_005):
        replies = some_replies(env, seed)
        alone = list(episode(env, seed, replies))
        assert list(episode(env, seed, replies)) == alone
        interleaved = []
        besides = episode(other, seed + 9, some_replies(env, seed + 9))
        for step in episode(same, seed, replies):
            interleaved.append(step)
            next(besides, None)
        assert interleaved == alone
        distinct.add(str(alone))
        turns += len(alone) - 1
    assert len(distinct) >= 4 and turns > 12  # or the above would show little


@pytest.mark.parametrize("name", ADAPTED)
def test_no_reply_breaks_an_adapter(name):
    """As test_hostile.py attacks our own worlds."""
    env, rng, said, calls = adapted(name), random.Random(7), 0, 0
    while said < 2000:
        env.reset(rng.randrange(10**9))
        step, total, turns = None, 0.0, 0
        while step is None or not step.done:
            reply = hostile_reply(env, rng)
            step = env.step(reply)
            assert isinstance(step, Step) and isinstance(step.observation, str)
            assert math.isfinite(step.reward) and -0.6 <= step.reward <= 1, reply[:200]
            assert not step.success or step.finished
            assert not step.finished or step.done
            assert MARK not in step.observation and "<|" not in step.observation
            assert len(step.observation) < 2000
            total, turns, said = total + step.reward, turns + 1, said + 1
            calls += "must be" not in step.observation and "no <tool_call>" not in step.observation
            assert turns <= 20
        assert total <= 1
    assert calls > 100


@pytest.mark.parametrize("name", ["frozen_lake", "higher_lower"])
def test_both_arms_train_in_an_adapted_world(name, tiny_folder, tmp_path):
    adapted(name)
    flags = "--iterations 1 --prompts 1 --group-size 2 --minibatch 2 --eval-episodes 2 "
    flags += f"--max-turn-tokens 8 --env {FILE}:{name}"
    result = run_script("train_actfocus.py", tiny_folder, tmp_path / "run", *flags.split())
    assert result.returncode == 0, result.stderr
    for arm in ("grpo", "actfocus"):
        (log,) = (tmp_path / "run").rglob(f"{arm}.csv")
        assert [row["iteration"] for row in read(log)] == ["0", "1"]


def test_the_lake_of_gymnasium_is_shown_with_its_player_and_solved_at_its_goal():
    env = adapted("frozen_lake")
    solved = 0
    for seed in range(30):
        first = env.reset(seed)
        board = [line.split() for line in first.splitlines()[:4]]
        assert [len(row) for row in board] == [4] * 4 and board[0][0] == "P" and board[3][3] == "G"
        assert "\x1b" not in first and first.endswith("Turns left: 12")
        for step in list(episode(env, seed, some_replies(env, seed)))[1:]:
            board = [line.split() for line in step.observation.splitlines()[1:5]]
            assert sum(row.count("P") for row in board) == 1
        if step.success:
            assert step.reward in (1, 0.9) and step.finished and board[3][3] == "P"
            solved += 1
    assert solved < 30


def test_the_lake_of_gymnasium_can_be_solved():
    env = adapted("frozen_lake")
    solved = 0
    for seed in range(20):
        env.reset(seed)
        step = None
        while step is None or not step.done:
            state = env.game.unwrapped
            step = env.step(write_turn("Hm.", "move", {"direction": toward_the_goal(state, env)}))
        solved += step.success
        assert step.success == (step.reward == 1)
    assert solved >= 10


def toward_the_goal(state, env) -> str:
    """The first move of a shortest way around the holes, by what Gymnasium knows of its game."""
    came_from = {state.s: None}
    queue = [state.s]
    for cell in queue:
        for action in range(4):
            _, there, reward, ended = max(state.P[cell][action])  # the most probable outcome
            if there not in came_from and (reward or not ended):
                came_from[there] = cell, action
                queue.append(there)
    cell = state.nrow * state.ncol - 1
    while came_from[cell][0] != state.s:
        cell = came_from[cell][0]
    return env.actions[came_from[cell][1]]


def test_every_ride_of_the_taxi_fits_into_its_turns():
    """The longest of all rides, by breadth first over what Gymnasium knows of its game."""
    env = adapted("taxi")
    env.reset(0)
    state = env.game.unwrapped
    longest = 0
    for start in state.initial_state_distrib.nonzero()[0]:
        distance, queue, length = {int(start): 0}, [int(start)], None
        for here in queue:
            for outcomes in state.P[here].values():
                _, there, _, ended = outcomes[0]
                if ended and length is None:
                    length = distance[here] + 1
                if there not in distance:
                    distance[there] = distance[here] + 1
                    queue.append(there)
        longest = max(longest, length)
    assert longest == 18 < env.limit


def test_the_taxi_says_where_everyone_is_and_pays_as_gymnasium_does():
    env = adapted("taxi")
    text = env.reset(5)
    assert text.startswith("+---------+\n|R: | : :G|") and "\x1b" not in text
    row, column, passenger, destination = env.game.unwrapped.decode(env.game.unwrapped.s)
    where = f"The taxi is in row {row + 1}, column {column + 1}. The passenger waits at "
    assert where + "RGYB"[passenger] in text and "go to " + "RGYB"[destination] in text
    step = env.step(write_turn("Hm.", "drive", {"action": "drop off"}))  # nobody is in the taxi
    assert step.reward == -0.5 and not step.done
    assert env.step(write_turn("Hm.", "drive", {"action": "north"})).reward == -0.05
    assert env.step("no call").reward == -0.1


# ---------------------------------------------------------------------------------------------- TRL
def guess(number: int) -> str:
    return write_turn("Hm.", "guess", {"number": number})


def test_a_class_for_trl_is_played_and_paid_as_its_reward_function_says():
    env = adapted("higher_lower")
    assert env.reset(3) == "Find the number. It is a number from 1 to 20."
    number = random.Random(3).randint(1, 20)
    assert number not in (1, 20)
    assert env.step(guess(1)) == Step("It is higher.", 0.0, done=False)
    assert env.step(guess(20)).observation == "It is lower."
    assert env.step(guess(21)).observation == "{'error': 'The number is from 1 to 20.'}"
    assert "must be of type integer" in env.step(guess("one")).observation
    assert env.step(guess(number)) == Step("Found.", 1.0, done=True, success=True, finished=True)
    env.reset(3)
    steps = [env.step(guess(1)) for _ in range(6)]
    assert [step.done for step in steps] == [False] * 5 + [True]
    assert steps[-1] == Step("It is higher.", 0.0, done=True)  # the limit of turns ended it
    env.reset(3)
    stopped = env.step("<think>I have had enough.</think>")
    assert (stopped.done, stopped.reward, stopped.finished) == (True, 0.0, True)
    assert stopped.success is False


def load_examples():
    spec = importlib.util.spec_from_file_location("other_worlds_of_the_test", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reward_may_come_from_the_environment_and_arguments_may_be_optional():
    examples = load_examples()

    class Counter:
        def reset(self, **row):
            self.total = row["start"]

        def add(self, by: int = 1, notes: list[str] | None = None) -> int:
            """
            Add.

            Args:
                by: How much.
                notes: Anything.
            """
            self.total += by
            return self.total

        def get_reward(self) -> float:
            return self.total / 10

        def _hidden(self):
            raise AssertionError

    world = examples.TRLWorld(
        Counter, "Count.", lambda seed: {"prompt": [{"content": "Go."}], "start": seed}, turns=3
    )
    assert check_tools(world.tools) == "" and list(world.methods) == ["add"]
    assert world.reset(5) == "Go."
    assert world.step(write_turn("Hm.", "add", {})).observation == "6"
    assert world.step(write_turn("Hm.", "add", {"by": 2, "notes": ["a"]})).observation == "8"
    refused = world.step(write_turn("Hm.", "add", {"wrong": 2}))
    assert "optional are: by, notes" in refused.observation
    assert (refused.reward, refused.done, refused.success) == (0.8, True, False)


def test_trl_finds_the_same_tools(tiny_folder, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import get_json_schema

    examples = load_examples()
    world = examples.higher_lower()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_folder)
    template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    tokenizer.chat_template = template.read_text()  # TRL wants one that it knows
    trainer = trl.GRPOTrainer(
        model=str(tiny_folder),
        processing_class=tokenizer,
        reward_funcs=examples.found,
        args=trl.GRPOConfig(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, num_generations=2,
            per_device_train_batch_size=2,
        ),
        train_dataset=Dataset.from_list([world.row(seed) for seed in range(4)]),
        environment_factory=examples.HigherLower,
    )  # fmt: skip
    assert [get_json_schema(tool) for tool in trainer._env_tools[None]] == world.tools
