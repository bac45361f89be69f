"""The Action Bottleneck after a demonstrator that errs more where the way is longer:

    python -m studies.harder

The default demonstrator plays a best move with the same probability everywhere, so nothing in its
demonstrations makes one board more uncertain than another. People are not like that: who is one
move from the end sees it, who is five moves away often does not. Here a best move that is d moves
from the end is played with probability skill ** (d / 3), which is the default skill at d = 3.
The rule was written down before the first run and not changed after it. Our runs, which the tables
of results/data call action-bottleneck/frozenlake-harder and so on, are of earlier starts, whose
thoughts were short.
"""

import random

from envs import FrozenLake
from studies.diagnose import DiagnoseConfig, diagnose
from worlds import ENVIRONMENTS, Sokoban


class HarderLake(FrozenLake):
    """FrozenLake with this demonstrator; it takes the same options."""

    def demonstrate(self, rng: random.Random, skill: float) -> str:
        needed = self.distance[self.player]
        return super().demonstrate(rng, skill ** (needed / 3))


class HarderSokoban(Sokoban):
    """Sokoban with this demonstrator; it takes the same options."""

    def demonstrate(self, rng: random.Random, skill: float) -> str:
        # 99 if the level is lost or too far from its end: then a best move is never played
        needed = self._moves_needed((self.player, self.boxes))
        return super().demonstrate(rng, skill ** (needed / 3))


def main() -> None:
    ENVIRONMENTS["sokoban-harder"] = HarderSokoban
    ENVIRONMENTS["frozenlake-harder"] = HarderLake
    for env in ("sokoban-harder", "frozenlake-harder"):
        diagnose(DiagnoseConfig(env=env, temperature=1.0, out=f"runs/{env}"))
        diagnose(DiagnoseConfig(env=env, temperature=0.5, out=f"runs/{env}-t05"))


if __name__ == "__main__":
    main()
