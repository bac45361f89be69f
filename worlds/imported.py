"""A world from a file or a module of yours, named by the text of --env.

    env = make_env("path/to/guess.py:Guess")   # a file, and a class or function in it
    env = make_env("package.module:name")      # a module that Python finds, and what is in it

The class or function is called without arguments and gives a world as envs.py describes it. Before
its first use it is tried out: an episode is begun twice and two turns are played, so that what
cannot be trained in is named in a sentence before a model is loaded. What the world's own code
raises is no such sentence, and keeps its traceback.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from types import ModuleType

from envs import Step, check_tools, write_turn

EXAMPLES = {"string": "a", "integer": 1, "number": 1, "boolean": True, "array": [], "object": {}}


class WorldFailed(Exception):
    """The world's own code raised; its cause has the traceback. It is no ValueError, which commands
    take for a sentence to the user and print without a traceback."""


class NoWorld(ValueError):
    """Why something cannot be used as a world, as the end of a sentence."""


def is_imported(env: str) -> bool:
    """Does this text of --env name a world in a file or module, and not one of this project's?

    >>> is_imported("path/to/guess.py:Guess"), is_imported("sudoku")
    (True, False)
    """
    return ":" in env


def world_name(env: str) -> str:
    """The name of a world alone, for folders and titles.

    >>> world_name("path/to/guess.py:Guess"), world_name("sudoku")
    ('Guess', 'sudoku')
    """
    return env.rpartition(":")[2]


def make_imported(env: str) -> object:
    """A world by its text of --env. A relative path begins at the current folder.

    Raises ValueError, naming what is wrong, if the text leads to no world as envs.py describes it;
    and WorldFailed for an error in the world's own code.
    """
    return find_factory(env, Path.cwd())()


@functools.cache
def find_factory(env: str, folder: Path) -> Callable[[], object]:
    """The class or function that a text of --env names, once it has been tried out."""
    place, _, name = env.rpartition(":")
    try:
        if not name.isidentifier():
            raise NoWorld("say FILE.py:NAME, or MODULE:NAME")
        module = import_file(folder / place) if place.endswith(".py") else import_module(place)
        if not hasattr(module, name):
            raise NoWorld(f"{place} has no {name}")
        factory = getattr(module, name)
        check_factory(factory, name)
        try_out(factory, name)
    except NoWorld as problem:
        raise ValueError(f"{env} cannot be used as a world: {problem}") from None
    return factory


# ------------------------------------------------------------------------------------ what it names
def import_file(path: Path) -> ModuleType:
    """A Python file as a module. It is imported by its path alone, wherever it lies."""
    if not path.is_file():
        raise NoWorld(f"there is no file {path}")
    name = f"world_in_{path.stem}"  # its own file name may also be that of another module
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a dataclass looks its module up here
    import_or_say_why(path.name, spec.loader.exec_module, module)
    return module


def import_module(name: str) -> ModuleType:
    """A module by its dotted name."""
    if not all(part.isidentifier() for part in name.split(".")):
        raise NoWorld("say FILE.py:NAME, or MODULE:NAME")
    return import_or_say_why(name, importlib.import_module, name)


def import_or_say_why(what: str, importer: Callable, argument: object) -> object:
    """Import; that a file is no Python is told in a sentence."""
    try:
        return run_own_code(f"the import of {what}", importer, argument)
    except WorldFailed as error:
        if isinstance(error.__cause__, SyntaxError):
            raise NoWorld(f"{what} is no Python: {error.__cause__}") from None
        raise


def check_factory(factory: object, name: str) -> None:
    """Raise NoWorld unless this can be called without arguments."""
    if not callable(factory):
        raise NoWorld(f"{name} is neither a class nor a function")
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # of something that is not written in Python
        return
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [
        each.name
        for each in signature.parameters.values()
        if each.default is each.empty and each.kind not in variadic
    ]
    if needed:
        raise NoWorld(
            f"{name} is called without arguments, but needs {', '.join(needed)}: give defaults, "
            "or write a function that calls it"
        )


# -------------------------------------------------------------------------------------- a first try
def try_out(factory: Callable, name: str) -> None:
    """Begin an episode in two worlds, play a turn without a call in one and a turn with a call in
    the other, and raise NoWorld for what is not as envs.py says."""
    worlds = [run_own_code(name, factory) for _ in range(2)]
    check_attributes(worlds[0])
    observations = [run_own_code(f"{name}.reset(0)", world.reset, 0) for world in worlds]
    if not isinstance(observations[0], str):
        raise NoWorld(f"reset(0) returns {type(observations[0]).__name__}, where text is needed")
    if observations[0] != observations[1]:
        raise NoWorld(
            "reset(0) began two different episodes, but the rollouts of a group need the same one: "
            "draw all that is random from the seed"
        )
    for world, reply in zip(worlds, ("I wait.", an_example(worlds[1].tools[0])), strict=True):
        check_step(run_own_code(f"{name}.step(reply)", world.step, reply))


def check_attributes(world: object) -> None:
    """Raise NoWorld for a world that lacks one of the four things that envs.py lists."""
    for name in ("system", "tools", "reset", "step"):
        if not hasattr(world, name):
            raise NoWorld(f"it has no {name}, which envs.py says every world has")
    for name in ("reset", "step"):
        if not callable(getattr(world, name)):
            raise NoWorld(f"its {name} is not a method")
    if not isinstance(world.system, str):
        raise NoWorld(f"its system is {type(world.system).__name__}, where text is needed")
    if problem := check_tools(world.tools):
        raise NoWorld(problem)


def check_step(step: object) -> None:
    """Raise NoWorld for what is no Step with a text and a reward that is a finite number."""
    if not isinstance(step, Step):
        raise NoWorld(f"step(reply) returns {type(step).__name__}, where envs.Step is needed")
    if not isinstance(step.observation, str):
        what = type(step.observation).__name__
        raise NoWorld(f"the observation of a step is {what}, where text is needed")
    if not isinstance(step.reward, Real) or not math.isfinite(step.reward):
        raise NoWorld(f"the reward of a step is {step.reward!r}, where a finite number is needed")


def an_example(tool: dict) -> str:
    """A well-formed turn that calls a tool with some arguments that fit its schema."""
    function = tool["function"]
    arguments = {
        name: schema.get("enum", [EXAMPLES[schema["type"]]])[0]
        for name, schema in function["parameters"]["properties"].items()
    }
    return write_turn("I try it.", function["name"], arguments)


def run_own_code(what: str, function: Callable, *arguments: object) -> object:
    """Run code of the world. Raises NoWorld for an import that fails, since a package may not be
    installed, and WorldFailed for whatever else it raises."""
    try:
        return function(*arguments)
    except ImportError as error:
        raise NoWorld(f"{what} failed: {error}") from None
    except Exception as error:
        raise WorldFailed(f"{what} raised {type(error).__name__}: {error}") from error
