"""ActFocus against GRPO: the same loop, weights, prompts and seeds; only the token weights differ.

    python train_actfocus.py                  # both arms, one picture
    python train_actfocus.py --arms actfocus  # only one arm; arms.py lists them all
    python train_actfocus.py --arms grpo,discount,placebo  # ActFocus without the energy, and its
                                                           # weights on random tokens

The loop is `train` of train_grpo.py. What ActFocus changes in it is stage 6, the weights of the
tokens, and nothing else. This script shows these weights on one turn of the policy, and then trains
the arms: those of a small model side by side, each in a process of its own.
"""

from __future__ import annotations

import torch

from arms import Arm
from envs import Step
from policy import Policy
from rollout import CannotPlay, rollout, score_all
from support.config import ActFocusConfig, parse
from support.transcripts import first_turn, pieces, print_token_table, print_weight_shares
from train_grpo import run
from worlds import make_env

TURN_SEED = 0  # the prompt whose first turn is shown


class OneTurn:
    """A world in which every episode ends after its first turn."""

    def __init__(self, env):
        self.env = env
        self.system, self.tools = env.system, env.tools

    def reset(self, seed: int) -> str:
        return self.env.reset(seed)

    def step(self, reply: str) -> Step:
        return self.env.step(reply)._replace(done=True)


def show_one_turn(policy: Policy, config: ActFocusConfig, arms: dict[str, Arm]) -> None:
    """Play one turn, and print what each of its tokens weighs in the loss of each arm.

    Before training the policy equals the frozen reference, so energies and entropies are read from
    the policy, and no second model is needed. Nothing of the training depends on this: the policy
    stays as it is, and the sampling uses random numbers of its own.
    """
    try:
        rollouts = rollout(
            policy, lambda: OneTurn(make_env(config.env)), [TURN_SEED], config.temperature,
            sampling_seed=config.seed, max_turn_tokens=config.max_turn_tokens,
            max_tokens=config.max_tokens,
        )  # fmt: skip
    except CannotPlay as error:  # this one prompt; others may do
        print(f"No turn is shown: {error}.")
        return
    action, response = rollouts.action, rollouts.response  # (1, T) bool
    stats = score_all(policy, rollouts, response, config.temperature, config.micro_tokens)
    weights = {
        name: arm.weights(rollouts, stats, config.seed, policy_entropy=stats.entropy)
        for name, arm in arms.items()
    }
    energy = stats.energy.masked_fill(~action, torch.nan)  # (1, T)

    print(
        "\nOne turn of the policy before training, and how much each token of it weighs in\n"
        "the loss. The energy tells how unsure the reference is before an action token: the\n"
        "higher it is among the action tokens of the batch, the more the token weighs. Here\n"
        "the batch is this one turn, so in training the weights are somewhat different. A\n"
        "line for several tokens shows their mean weight.\n"
    )
    _, turn, _ = first_turn(pieces(policy, rollouts, row=0))
    columns = {"energy": energy[0]} | {name: values[0] for name, values in weights.items()}
    print_token_table(turn, rollouts.labels[0], columns)
    if not action.any():
        print("The policy has written no tool call in this turn, so no token is an action.")
    print("\nThe share of the whole weight that lies on the tokens of each class:\n")
    print_weight_shares(rollouts.labels, weights)
    print()


if __name__ == "__main__":
    config = parse(ActFocusConfig, "ActFocus and GRPO side by side on a tool-calling environment.")
    run(config, config.chosen_arms(), show=show_one_turn, script=__file__)
