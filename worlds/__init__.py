"""The five worlds by name.

    env = make_env("sokoban")                # or frozenlake, sudoku, shop, frozenlake-planned
    env = make_env("frozenlake", thoughts=0, slip=0.2)

Solving any of them earns a reward of 1 (in Sokoban up to a tenth more), so that rewards of
different worlds can be compared. Each world also checks the facts that the reasoning of a turn
states against the state of the game, as far as they are worded as in its demonstrations.
"""

from __future__ import annotations

from envs import FrozenLake
from worlds.frozenlake_planned import PlannedLake
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
    """An environment by name, with its options: `make_env("frozenlake", size=5, slip=0.2)`.

    Raises ValueError for a name that is not in ENVIRONMENTS, and for options that leave no game.
    """
    if name not in ENVIRONMENTS:
        choices = ", ".join(ENVIRONMENTS)
        raise ValueError(f"there is no environment {name!r}: choose one of {choices}")
    return ENVIRONMENTS[name](**options)
