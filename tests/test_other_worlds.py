"""Worlds that --env takes from a file or a module, and the adapters of examples/other_worlds.py.

The tests of an adapter are skipped where its package is not installed; .ci/run installs both.
"""

import importlib.util
import json
import math
import random
import re
import sys
from pathlib import Path

import pytest
from test_hostile import MARK, hostile_reply
from test_train import read, run_script

from envs import TYPES, Step, check_tools, write_turn
from studies import compare
from studies.collect import collect
from studies.diagnose import DiagnoseConfig, diagnose, load_policies
from support import warm_start
from support.config import ActFocusConfig, parse
from support.logs import title_of
from support.warm_start import start_folder
from worlds import ENVIRONMENTS, make_env
from worlds.imported import WorldFailed

ROOT = Path(__file__).parents[1]
FILE = ROOT / "examples" / "other_worlds.py"
GYMNASIUM = ["frozen_lake", "taxi"]
ADAPTED = [*GYMNASIUM, "higher_lower"]
HEAD = "from envs import Step, tool_schema\n"
SAY = """
class Say:
    system = "Say it."
    tools = [tool_schema("say", "Say it.", {"word": {"type": "string"}})]

    def __init__(self):
        self.turns = 0

    def reset(self, seed):
        return f"Number {seed}"

    def step(self, reply):
        return Step("Well.", 0.5, done=True, success=True, finished=True)
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes guess.py into a folder that the process then stands in."""
    monkeypatch.chdir(tmp_path)
    return lambda source: (tmp_path / "guess.py").write_text(source)


# ----------------------------------------------------------------------------- how a world is named
def test_a_class_or_a_factory_of_a_file_plays(write, tmp_path):
    write(HEAD + SAY + "\ndef twice(times=2):\n    return Say()\n\nalso = Say\n")
    for name in ("guess.py:Say", "guess.py:twice", f"{tmp_path}/guess.py:also"):
        env = make_env(name)
        assert env.reset(7) == "Number 7" and env.step("").reward == 0.5
    assert make_env("guess.py:Say") is not make_env("guess.py:Say")
    assert make_env("worlds.sudoku:Sudoku").reset(3) == make_env("sudoku").reset(3)


def test_a_file_may_hold_dataclasses_and_have_the_name_of_another_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataclass = "\nfrom dataclasses import dataclass\n\n@dataclass\nclass Card:\n    value: int\n"
    source = "from __future__ import annotations\n" + HEAD + dataclass + SAY
    (tmp_path / "random.py").write_text(source)
    assert make_env("random.py:Say").reset(1) == "Number 1"
    assert sys.modules["random"] is random


@pytest.mark.parametrize(
    "env, said",
    [
        ("nowhere.py:Guess", "there is no file .*nowhere.py"),
        ("no.such.module:Guess", "the import of no.such.module failed: No module named 'no'"),
        ("guess.py:Nothing", "guess.py has no Nothing"),
        ("guess.py:", "say FILE.py:NAME, or MODULE:NAME"),
        ("some words:Guess", "say FILE.py:NAME, or MODULE:NAME"),
        ("guess.py:number", "number is neither a class nor a function"),
        ("guess.py:Sized", "Sized is called without arguments, but needs size"),
        ("guess.py:Empty", "it has no system"),
        ("guess.py:NoStep", "it has no step"),
        ("guess.py:StepIsNone", "its step is not a method"),
        ("guess.py:NoText", "its system is int"),
        ("guess.py:NoTools", "its tools are no list"),
        ("guess.py:OddTool", "the tool say takes word of the type date"),
        ("guess.py:ResetsToNone", r"reset\(0\) returns NoneType, where text is needed"),
        ("guess.py:Random", "reset.0. began two different episodes"),
        ("guess.py:Tuple", r"step\(reply\) returns tuple, where envs.Step is needed"),
        ("guess.py:NoReward", "the reward of a step is None"),
        ("guess.py:Nan", "the reward of a step is nan"),
        ("guess.py:Bytes", "the observation of a step is bytes"),
        ("guess.py:needs_a_package", "needs_a_package failed: No module named 'no_such_package'"),
    ],
)
def test_what_is_no_world_is_named_in_one_sentence(env, said, write, capsys):
    write(
        HEAD
        + "import itertools\n"
        + SAY
        + """
number, count = 7, itertools.count()
class Empty: pass
class Sized(Say):
    def __init__(self, size): pass
class NoStep:
    system, tools, reset = Say.system, Say.tools, Say.reset
class StepIsNone(Say):
    step = None
class NoText(Say):
    system = 7
class NoTools(Say):
    tools = []
class OddTool(Say):
    tools = [tool_schema("say", "Say it.", {"word": {"type": "string"}})]
    tools[0]["function"]["parameters"]["properties"]["word"]["type"] = "date"
class ResetsToNone(Say):
    def reset(self, seed): pass
class Random(Say):
    def reset(self, seed): return f"Number {next(count)}"
class Tuple(Say):
    def step(self, reply): return "Well.", 0.5, True, {}
class NoReward(Say):
    def step(self, reply): return Step("Well.", None, True)
class Nan(Say):
    def step(self, reply): return Step("Well.", float("nan"), True)
class Bytes(Say):
    def step(self, reply): return Step(b"Well.", 0, True)
def needs_a_package():
    import no_such_package
"""
    )
    with pytest.raises(ValueError, match=f"^{env} cannot be used as a world: .*{said}"):
        make_env(env)
    with pytest.raises(SystemExit) as ended:
        parse(ActFocusConfig, "", ["--env", env, "--model", "folder", "--device", "cpu"])
    assert ended.value.code == 2 and "cannot be used as a world" in capsys.readouterr().err


def test_a_file_that_is_no_python_is_named_with_the_line(write):
    write("class Say:\n    system = = 1\n")
    with pytest.raises(ValueError, match=r"guess.py is no Python: .*guess.py, line 2"):
        make_env("guess.py:Say")
    write(HEAD + "from no_such_package import anything\n" + SAY)
    with pytest.raises(ValueError, match="the import of guess.py failed: .*no_such_package"):
        make_env("guess.py:Say")
    write(HEAD + SAY)  # it is read again once it is mended
    assert make_env("guess.py:Say").reset(1) == "Number 1"


@pytest.mark.parametrize("error", [ValueError, OSError, ZeroDivisionError, RuntimeError])
@pytest.mark.parametrize("where", ["at the top", "__init__", "reset", "step"])
def test_an_error_in_its_own_code_keeps_its_traceback(where, error, write):
    broken = f"raise {error.__name__}('my own bug')\n"
    if where == "at the top":
        write(HEAD + SAY + broken)
    else:
        write(HEAD + SAY + f"\n    def {where}(self, *_):\n        {broken}")
    with pytest.raises(WorldFailed, match=f"raised {error.__name__}: my own bug") as failed:
        parse(ActFocusConfig, "", ["--env", "guess.py:Say", "--model", "folder"])
    frames = failed.value.__cause__.__traceback__
    while frames.tb_next:
        frames = frames.tb_next
    assert frames.tb_frame.f_code.co_filename.endswith("guess.py")


def test_a_name_that_is_not_there_says_how_to_bring_ones_own():
    with pytest.raises(ValueError, match="no environment 'guess.py': .*FILE.py:NAME"):
        make_env("guess.py")
    with pytest.raises(ValueError, match="has no options, but was given size"):
        make_env("worlds.sudoku:Sudoku", size=3)


@pytest.mark.parametrize(
    "tools, said",
    [
        ((), "no list"),
        ([], "no list"),
        ([1], r"tools\[0\] is not of the form"),
        ([{"type": "function"}], r"tools\[0\] is not of the form"),
        ([{"function": {"name": "a"}}], r"tools\[0\] is not of the form"),
        ([{"type": "function", "function": {"name": ""}}], r"tools\[0\] has no name"),
        ([{"type": "function", "function": {"name": "a"}}], "the tool a has parameters that are"),
    ],
)
def test_what_is_no_schema_of_a_tool_is_named(tools, said):
    assert re.search(said, check_tools(tools))


def test_what_is_no_schema_of_parameters_is_named():
    def problem(properties, **others):
        parameters = {"type": "object", "properties": properties} | others
        function = {"name": "a", "parameters": parameters}
        return check_tools([{"type": "function", "function": function}])

    for kind in TYPES:
        assert problem({"x": {"type": kind}}) == "" == problem({"x": {"type": kind}}, required=[])
    assert problem({}) == "" == problem({"x": {"type": "string", "enum": ["a"]}}, required=["x"])
    assert "without properties" in problem(None)
    for kind in (["string", "null"], {"a": 1}, "date", None):
        assert "takes x of the type" in problem({"x": {"type": kind}})
    assert "takes x of the type None" in problem({"x": "string"})
    for choices in ([], "ab", None):
        assert "an enum that is no list" in problem({"x": {"type": "string", "enum": choices}})
    one = {"x": {"type": "string"}}
    for required in (["y"], [["x"]], "x", {"x": 1}):
        assert "is no list of its properties" in problem(one, required=required)
    for env in ENVIRONMENTS:
        assert check_tools(make_env(env).tools) == ""


# ------------------------------------------------------------------------------ what commands do
def test_a_run_has_its_name_alone_and_is_resumed_with_the_same_text(
    write, tiny_folder, tmp_path, capsys, monkeypatch
):
    write(HEAD + SAY)
    flags = ["--env", f"{tmp_path}/guess.py:Say", "--model", str(tiny_folder), "--device", "cpu"]
    config = parse(ActFocusConfig, "", flags)
    config.resolve()
    assert Path(config.out).parent == Path("runs") and "-Say-seed0-" in config.out
    assert ":" not in config.out and config.lr == 1e-6

    out = tmp_path / "run"
    out.mkdir()
    relative = {"env": "guess.py:Say", "model": str(tiny_folder)}
    settings = vars(parse(ActFocusConfig, "", ["--device", "cpu"])) | relative
    (out / "config.json").write_text(json.dumps(settings))
    assert title_of(out).startswith("Say, ")
    with pytest.raises(SystemExit):
        parse(ActFocusConfig, "", ["--resume", str(out)])
    assert "say --env guess.py:Say as well" in capsys.readouterr().err
    again = ["--resume", str(out), "--env", "guess.py:Say"]
    assert parse(ActFocusConfig, "", again).env == "guess.py:Say"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with pytest.raises(SystemExit):
        parse(ActFocusConfig, "", again)
    assert f"there is no file {elsewhere}/guess.py" in capsys.readouterr().err


def test_no_settings_of_a_run_make_code_run(write, tmp_path, capsys):
    """A folder of a run may come from anywhere, and its settings name what was played."""
    (tmp_path / "evil.py").write_text("open('it_ran', 'w')\n")
    out = tmp_path / "compared" / "World" / "grpo-seed0"
    out.mkdir(parents=True)
    settings = vars(parse(ActFocusConfig, "", ["--device", "cpu"]))
    settings |= {"env": "evil.py:World", "model": "folder", "arms": "grpo"}
    (out / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit):
        parse(ActFocusConfig, "", ["--resume", str(out)])
    asked = [compare.Cell("sudoku", "grpo", None, 0)]
    runs, left_out = compare.collect(asked, [], tmp_path / "compared")
    assert runs == [] and "evil.py:World, whose code is run, is not named" in left_out[0]
    assert not (tmp_path / "it_ran").exists()


def test_each_command_says_that_there_is_no_built_in_model(write, capsys):
    write(HEAD + SAY)
    said = "guess.py:Say has no built-in model: give one with --model"
    with pytest.raises(ValueError, match=said):
        start_folder("guess.py:Say")
    for run in (
        lambda: parse(ActFocusConfig, "", ["--env", "guess.py:Say"]),
        lambda: parse(compare.PPOConfig, "", ["--env", "guess.py:Say"]),
        lambda: compare.main(["--env", "guess.py:Say"]),
    ):
        with pytest.raises(SystemExit):
            run()
        assert said in capsys.readouterr().err
    config = DiagnoseConfig(env="guess.py:Say", device="cpu")
    config.validate()
    with pytest.raises(SystemExit, match=said):
        load_policies(config)


def test_comparisons_and_diagnoses_bear_its_name_alone(write, tiny_folder, tmp_path, capsys):
    write(HEAD + SAY)
    flags = "--env guess.py:Say --arms grpo --seeds 1 --iterations 1 --prompts 1 --group-size 2 "
    flags += f"--minibatch 2 --eval-episodes 2 --device cpu --model {tiny_folder}"
    compare.main(flags.split())
    assert list((tmp_path / "runs/compare/Say/grpo-seed1").rglob("grpo.csv"))
    assert (tmp_path / "runs/compare/table.txt").read_text().startswith("Say, lr 1e-06")
    assert (tmp_path / "runs/compare/compare.csv").read_text().splitlines()[1].startswith("Say,")
    collect(tmp_path / "runs/compare", "mine", tmp_path / "data")
    assert "mine,Say,grpo," in (tmp_path / "data" / "training.csv").read_text()
    diagnose(
        DiagnoseConfig(
            env="guess.py:Say", model=str(tiny_folder), groups=8, blocks=0, group_size=2,
            device="cpu",
        )
    )  # fmt: skip
    assert list(tmp_path.glob("runs/*-Say-diagnosis-*/bottleneck.png"))
    with pytest.raises(SystemExit):
        compare.main(["--env", "a.py:Say", "b.py:Say"])
    assert "two worlds of one name" in capsys.readouterr().err


def test_a_world_with_a_scripted_player_can_be_taught(
    write, tiny_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(warm_start, "measure", lambda *_, **options: "not measured")
    write(HEAD + SAY + "\nfrom envs import FrozenLake\n\nclass Pond(FrozenLake):\n    pass\n")
    teach = ["--model", str(tiny_folder), "--out", str(tmp_path / "taught")]
    small = ["--episodes", "8", "--window-steps", "2", "--episode-steps", "0"]
    with pytest.raises(SystemExit):
        warm_start.main(["--env", "guess.py:Say", *teach])
    assert "it lacks demonstrate, skill" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        warm_start.main(["--env", "guess.py:Pond", *small])
    assert "needs --out" in capsys.readouterr().err
    warm_start.main(["--env", "guess.py:Pond", *teach, *small])
    assert (tmp_path / "taught" / "model.safetensors").exists()


# --------------------------------------------------------------------------------------- adapters
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
