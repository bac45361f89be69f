"""A lake on which the thought decides, and the call only repeats it."""

from __future__ import annotations

from envs import FrozenLake


class PlannedLake(FrozenLake):
    """FrozenLake, but a demonstrated thought ends with its decision ("So I go left."), and the call
    only repeats it. ActFocus should not help here: what can be learned is decided in reasoning
    tokens (results/evidence.md)."""

    plan = " So I go {direction}."
