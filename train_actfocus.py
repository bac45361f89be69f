"""ActFocus against GRPO: the same loop, weights, prompts and seeds; only the token weights differ.

    python train_actfocus.py                  # both arms, one picture
    python train_actfocus.py --arms actfocus  # ActFocus alone
    python train_actfocus.py --arms grpo,discount,placebo    # any arms of arms.py

The loop is `train` of train_grpo.py. What ActFocus changes is its stage 6, and nothing else.
"""

from __future__ import annotations

from support.config import ActFocusConfig, parse
from train_grpo import run

if __name__ == "__main__":
    config = parse(ActFocusConfig, "ActFocus and GRPO side by side on a tool-calling environment.")
    run(config, config.chosen_arms())
