"""Does ActFocus forgive turns that never call? `python results/sudoku/blame.py 1` trains seed 1; our runs of it are in blame/.

A turn that never leaves its thought has reasoning tokens alone, so ActFocus blames it with a tenth of the weight that GRPO gives
it. Here the reasoning of such turns weighs 1; all else is `python train_actfocus.py --env sudoku --no-baseline --seed 1`.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from diagnose import turn_numbers  # noqa: E402
from energy import TokenStats  # noqa: E402
from rollout import Rollouts  # noqa: E402
from segment import Segment  # noqa: E402
from train_actfocus import ActFocusConfig, actfocus  # noqa: E402
from train_grpo import run  # noqa: E402


def without_call(rollouts: Rollouts) -> Tensor:
    """(B, T) bool: the sampled tokens of turns that hold no ACTION token."""
    turn = turn_numbers(rollouts)  # (B, T)
    calls = torch.zeros_like(turn).scatter_reduce(1, turn, (rollouts.labels == Segment.ACTION).long(), "amax")
    return rollouts.response & (calls.gather(1, turn) == 0)


def main(seed: int) -> None:
    config = ActFocusConfig(env="sudoku", seed=seed)
    plain = actfocus(config)

    def weigh(rollouts: Rollouts, reference: TokenStats) -> Tensor:
        return plain.weigh(rollouts, reference).masked_fill(without_call(rollouts), 1.0)

    run(config, [plain._replace(weigh=weigh)])


if __name__ == "__main__":
    main(int(sys.argv[1]))
