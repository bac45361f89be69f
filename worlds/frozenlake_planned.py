"""A frozen lake where the thought decides on the move and the call only repeats it."""

from __future__ import annotations

from envs import FrozenLake


class PlannedLake(FrozenLake):
    """FrozenLake, but each demonstrated thought ends with its decision ("So I go left."), and the
    call only repeats it. ActFocus should not help here, because what there is to learn is decided
    in reasoning tokens (results/evidence.md)."""

    plan = " So I go {direction}."
