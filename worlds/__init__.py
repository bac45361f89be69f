"""The five worlds by name, and any other by its file or module.

    env = make_env("sokoban")                # or frozenlake, sudoku, shop, frozenlake-planned
    env = make_env("frozenlake", thoughts=0, slip=0.2)
    env = make_env("path/to/guess.py:Guess") # a class or function of yours (imported.py)

Solving any of the five earns a reward of 1 (in Sokoban up to a tenth more), so that rewards of
different worlds can be compared. Each of them also checks the facts that the reasoning of a turn
states against the state of the game, as far as they are worded as in its demonstrations.
"""

from __future__ import annotations

from envs import FrozenLake
from worlds.frozenlake_planned import PlannedLake
from worlds.imported import is_imported, make_imported
from worlds.shop import Shop
from worlds.sokoban import Sokoban
from worlds.sudoku import Sudoku

ENVIRONMENTS = {
    "frozenlake": FrozenLake,
    "sokoban": Sokoban,
    "sudoku": Sudoku,
    "shop": Shop,
    "frozenlake-planned": PlannedLake,
}


def make_env(name: str, **options):
    """An environment by name, with its options: `make_env("frozenlake", size=5, slip=0.2)`. One of
    yours, by its file or module, has no options.

    Raises ValueError for a name that is not in ENVIRONMENTS, for options that leave no game, and
    for a file or module that holds no such world; WorldFailed, with the cause, for an error in the
    code of a world of yours.
    """
    if is_imported(name):
        if options:
            raise ValueError(f"{name} has no options, but was given {', '.join(options)}")
        return make_imported(name)
    if name not in ENVIRONMENTS:
        choices = ", ".join(ENVIRONMENTS)
        raise ValueError(
            f"there is no environment {name!r}: choose one of {choices}, or name your own as "
            "FILE.py:NAME"
        )
    return ENVIRONMENTS[name](**options)
