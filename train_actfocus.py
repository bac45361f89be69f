"""ActFocus against GRPO: the same loop, weights, prompts and seeds; only the token weights differ.

    python train_actfocus.py                  # both arms, one picture
    python train_actfocus.py --no-baseline    # ActFocus alone

The loop is `train` of train_grpo.py. What ActFocus changes is its stage 6, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from report import Config, option, parse
from train_grpo import ActFocus, run


@dataclass
class ActFocusConfig(Config):
    alpha: float = option(0.1, "weight of reasoning tokens; 1 with --beta 0 is GRPO", 0, 1)
    beta: float = option(0.5, "how much more an uncertain action token weighs", 0)
    no_baseline: bool = option(False, "train ActFocus alone, without GRPO beside it")


if __name__ == "__main__":
    config = parse(ActFocusConfig, "ActFocus and GRPO side by side on a tool-calling environment.")
    arms = {} if config.no_baseline else {"grpo": None}
    run(config, arms | {"actfocus": ActFocus(config.alpha, config.beta)})
