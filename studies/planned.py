"""Does a policy of frozenlake-planned still do what its thought has decided?

python -m studies.planned starts/frozenlake-planned runs/planned/*/frozenlake-planned/*/*/

Of each policy (runs with --save), in shares of all turns: how often a call moves as its thought
said, and how often that leads nearer to the goal, over 128 evaluation episodes at temperature 1.
"""

import re
import sys

from envs import read_call
from policy import load_policy
from rollout import rollout
from support.warm_start import EVAL_SEEDS
from worlds import PlannedLake


class Watched(PlannedLake):
    """Counts, over all its episodes, plans, calls that follow them, and good ones of either."""

    counts = {"turns": 0, "planned": 0, "followed": 0, "good plan": 0, "good move": 0}

    def step(self, reply: str):
        plan = re.search(r"So I go (left|down|right|up)\.\n</think>", reply)
        call, _ = read_call(reply, self.tools)
        move = call and call.arguments["direction"]
        nearer = {cell for cell, left in self.distance.items() if left < self.distance[self.player]}
        self.counts["turns"] += 1
        self.counts["planned"] += plan is not None
        self.counts["followed"] += plan is not None and plan[1] == move
        self.counts["good plan"] += bool(plan and self._neighbour(self.player, plan[1]) in nearer)
        self.counts["good move"] += bool(move and self._neighbour(self.player, move) in nearer)
        return super().step(reply)


def main(folders: list[str]) -> None:
    for folder in folders:
        Watched.counts = dict.fromkeys(Watched.counts, 0)
        rollout(load_policy(folder), Watched, range(EVAL_SEEDS, EVAL_SEEDS + 128))
        turns = Watched.counts["turns"]
        shares = {name: f"{n / turns:.1%}" for name, n in Watched.counts.items() if name != "turns"}
        print(folder, f"{turns} turns", shares)


if __name__ == "__main__":
    main(sys.argv[1:])
