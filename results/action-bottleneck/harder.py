"""The Action Bottleneck after a demonstrator that errs more where the way is longer: python results/action-bottleneck/harder.py

The default demonstrator plays a best move with the same probability everywhere, so nothing in its lessons makes one board more
uncertain than another. People are not like that: who is one move from the end sees it, who is five moves away often does not.
Here a best move that is d moves from the end is played with probability skill ** (d / 3), which is the default skill at d = 3.
The rule was written down before the first run and not changed after it. Folders beside this file: frozenlake-harder and so on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from diagnose import DiagnoseConfig, diagnose  # noqa: E402
from envs import ENVIRONMENTS, FrozenLake, Sokoban  # noqa: E402


class HarderLake(FrozenLake):
    def demonstrate(self, rng, skill):
        return super().demonstrate(rng, skill ** (self.distance[self.player] / 3))


class HarderSokoban(Sokoban):
    def demonstrate(self, rng, skill):
        needs = self._needs((self.player, self.boxes))  # 99 if it is lost or too far: then a best move is never played
        return super().demonstrate(rng, skill ** (needs / 3))


def main() -> None:
    # NOTE: the built-in model is kept by the world's name: after a change of the rule above, remove it from the cache.
    ENVIRONMENTS.update({"frozenlake-harder": HarderLake, "sokoban-harder": HarderSokoban})
    for env in ("sokoban-harder", "frozenlake-harder"):
        for temperature in (1.0, 0.5):
            name = env if temperature == 1 else f"{env}-t05"
            diagnose(DiagnoseConfig(env=env, temperature=temperature, out=str(Path(__file__).with_name(name))))


if __name__ == "__main__":
    main()
