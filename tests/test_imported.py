"""Worlds that --env takes from a file or a module (worlds/imported.py), and what commands do with
them."""

import json
import random
import re
import sys
from pathlib import Path

import pytest

from envs import TYPES, check_tools
from studies import compare
from studies.collect import collect
from studies.diagnose import DiagnoseConfig, diagnose, load_policies
from support import warm_start
from support.config import ActFocusConfig, parse
from support.logs import title_of
from support.warm_start import start_folder
from worlds import ENVIRONMENTS, make_env
from worlds.imported import WorldFailed

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
