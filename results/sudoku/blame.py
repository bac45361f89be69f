"""Does ActFocus forgive turns that never call? `python results/sudoku/blame.py 1` trains seed 1.

A turn that never leaves its thought has reasoning tokens alone, so ActFocus blames it with a tenth
of the weight that GRPO gives it. Here every token of such turns weighs 1; all else is
`python train_actfocus.py --env sudoku --no-baseline --seed 1`.

Our runs of it, in short-thoughts/blame/, were made with earlier starts and `thoughts=0` (no free
sentences in a demonstrated thought), so a run made now is another one.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
import train_grpo  # noqa: E402
from actfocus import actfocus_weights  # noqa: E402
from diagnose import turn_numbers  # noqa: E402
from train_actfocus import ActFocusConfig  # noqa: E402


def without_call(action: Tensor, response: Tensor) -> Tensor:
    """(B, T) bool: the sampled tokens of turns that hold no action token. action, response: (B, T)
    bool, and each run of `response` is a turn."""
    turn = turn_numbers(response)  # (B, T)
    none = torch.zeros_like(turn)
    calls = none.scatter_reduce(1, turn, action.long(), "amax")  # (B, T), by turn
    return response & (calls.gather(1, turn) == 0)


def blaming_weights(
    signal: Tensor,
    reasoning: Tensor,
    action: Tensor,
    response: Tensor,
    alpha: float = 0.1,
    beta: float = 0.5,
) -> Tensor:
    """`actfocus_weights`, but 1 in turns without a call."""
    weights = actfocus_weights(signal, reasoning, action, response, alpha, beta)
    return weights.masked_fill(without_call(action & response, response), 1.0)


def main(seed: int) -> None:
    config = ActFocusConfig(env="sudoku", seed=seed)
    train_grpo.actfocus_weights = blaming_weights  # what stage 6 of the loop calls
    focus = train_grpo.ActFocus(alpha=config.alpha, beta=config.beta)
    train_grpo.run(config, {"actfocus": focus})


if __name__ == "__main__":
    main(int(sys.argv[1]))
