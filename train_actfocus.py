"""ActFocus against GRPO: the same loop, the same weights, prompts and seeds; only the token weights differ.

    python train_actfocus.py                  # both arms, one picture
    python train_actfocus.py --no-baseline    # ActFocus alone

What changes with respect to GRPO is `actfocus` below, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from actfocus import actfocus_weights
from energy import TokenStats
from rollout import Rollouts
from segment import Segment
from train_grpo import GRPO, Arm, Config, option, parse, run


@dataclass
class ActFocusConfig(Config):
    alpha: float = option(0.1, "weight of reasoning tokens; 1 with --beta 0 is GRPO", 0, 1)
    beta: float = option(0.5, "how much more an action token weighs where the reference is unsure", 0)
    no_baseline: bool = option(False, "train ActFocus alone, without GRPO beside it")


def actfocus(config: ActFocusConfig) -> Arm:
    def weigh(rollouts: Rollouts, reference: TokenStats) -> Tensor:  # -> (B, T)
        reasoning, action = rollouts.labels == Segment.REASONING, rollouts.labels == Segment.ACTION
        return actfocus_weights(reference.energy, reasoning, action, rollouts.response, config.alpha, config.beta)

    return Arm("actfocus", weigh, needs_reference=True)


if __name__ == "__main__":
    config = parse(ActFocusConfig, "ActFocus and GRPO side by side on a tool-calling environment.")
    run(config, [actfocus(config)] if config.no_baseline else [GRPO, actfocus(config)])
