"""Worlds of other libraries, which --env takes by this file and their name:

    python train_actfocus.py --env examples/other_worlds.py:frozen_lake --model FOLDER
    python train_actfocus.py --env examples/other_worlds.py:taxi --model FOLDER
    python train_actfocus.py --env examples/other_worlds.py:higher_lower --model FOLDER

Two adapters, each of which can be read and copied alone:

- `GymnasiumWorld` plays a Gymnasium environment that has discrete actions and shows itself as text
  (render_mode="ansi"). Its games here are FrozenLake and Taxi. It needs `pip install gymnasium`.
- `TRLWorld` plays a class that was written for `environment_factory` of TRL's GRPOTrainer. TRL
  itself is not needed.

A world's `reset(seed)` decides on all that is random in an episode, since the rollouts of a group
must begin alike. Gymnasium keeps to that by itself; a class for TRL does if it draws its random
numbers from a column of the data set.
"""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable

from transformers.utils import get_json_schema

from envs import Call, Effect, Step, World, read_call, tool_schema


# ---------------------------------------------------------------------------------------- Gymnasium
class GymnasiumWorld(World):
    """A Gymnasium environment with discrete actions, each turn of which is one action.

    make(seed): the environment, where only its layout may depend on the seed; `reset` is called
    with the seed, too. tool: a schema with one argument, whose enum names the actions in the order
    of their numbers. show(game): the state as text. pay(reward): its reward on the scale of our
    worlds, where solving the task earns 1. turns: how many an episode has.

    The task is solved when the environment ends the episode with a positive reward. From `World`
    come what a malformed turn costs and what happens after the last turn.
    """

    unit = "turn"

    def __init__(
        self,
        make: Callable,
        tool: dict,
        show: Callable[[object], str],
        pay: Callable[[float], float],
        turns: int,
        rules: str,
    ):
        super().__init__(limit=turns, thoughts=0)
        self.make = make
        self.show = show
        self.pay = pay
        self.tools = [tool]
        (argument,) = tool["function"]["parameters"]["properties"].values()
        self.actions = argument["enum"]
        self.system = f"{rules} You have {turns} turns. {self.rules}"

    def _lay_out(self, seed: int) -> None:
        self.game = self.make(seed)
        self.game.reset(seed=seed)

    def _play(self, call: Call) -> Effect:
        (action,) = call.arguments.values()
        _, reward, terminated, _, _ = self.game.step(self.actions.index(action))
        return Effect(
            message=f"You chose {action}.",
            reward=self.pay(float(reward)),
            finished=terminated,
            success=terminated and reward > 0,
        )

    def _truths(self) -> dict[str, set[str]]:
        return {}  # no sentence about the board is checked

    def _show(self) -> list[str]:
        return [self.show(self.game), f"Turns left: {self.turns_left}"]


def frozen_lake() -> GymnasiumWorld:
    """FrozenLake-v1 on a map of 4 by 4 that is made from the seed. Success is to reach the goal
    within 12 turns; the way there is at least 6 moves long, and one move in ten slips."""
    import gymnasium
    from gymnasium.envs.toy_text.frozen_lake import generate_random_map

    def make(seed: int) -> gymnasium.Env:
        board = generate_random_map(size=4, p=0.8, seed=seed)
        return gymnasium.make("FrozenLake-v1", desc=board, success_rate=0.9, render_mode="ansi")

    def show(game: gymnasium.Env) -> str:
        text = game.render().rpartition(")\n")[2].strip()  # after the line on the last move
        player = re.sub(r"\x1b\[41m.\x1b\[0m", "P", text)  # Gymnasium colours the player's cell
        return "\n".join(" ".join(row) for row in player.splitlines())

    direction = {"type": "string", "enum": ["left", "down", "right", "up"]}
    return GymnasiumWorld(
        make=make,
        tool=tool_schema("move", "Move one cell.", {"direction": direction}),
        show=show,
        pay=lambda reward: reward,  # 1 at the goal
        turns=12,
        rules="You are P on a frozen lake. S is the start, F is ice, H is a hole and G is the "
        "goal. Reach G for a reward of 1; a hole ends the game. One move in ten slips to a side.",
    )


def taxi() -> GymnasiumWorld:
    """Taxi-v4. Success is to deliver the passenger within 20 turns; no ride needs more than 18. As
    in Gymnasium, a turn costs a twentieth of what the delivery earns, and to pick up or drop off in
    a wrong place costs half of it."""
    import gymnasium

    def show(game: gymnasium.Env) -> str:
        state = game.unwrapped
        row, column, passenger, destination = state.decode(state.s)
        where = "is in the taxi" if passenger == 4 else f"waits at {'RGYB'[passenger]}"
        board = re.sub(r"\x1b\[[\d;]*m", "", game.render()).partition("\n  (")[0].strip()
        return (
            f"{board}\nThe taxi is in row {row + 1}, column {column + 1}. "
            f"The passenger {where} and wants to go to {'RGYB'[destination]}."
        )

    action = {
        "type": "string",
        "enum": ["south", "north", "east", "west", "pick up", "drop off"],
    }
    return GymnasiumWorld(
        make=lambda seed: gymnasium.make("Taxi-v4", render_mode="ansi"),
        tool=tool_schema("drive", "Act once.", {"action": action}),
        show=show,
        pay=lambda reward: reward / 20,  # from -1 a turn, -10 for a mistake and 20 at the end
        turns=20,
        rules="You drive a taxi in a town of 5 rows from the top and 5 columns from the left, "
        "with the stands R, G, Y and B; | is a wall, : is none. Pick up the passenger and drop "
        "them off at their destination for a reward of 1. Each other turn costs 0.05, and to pick "
        "up or drop off in a wrong place costs 0.5.",
    )


# ---------------------------------------------------------------------------------------------- TRL
class TRLWorld:
    """A class that was written for `environment_factory` of TRL's GRPOTrainer, as a world.

    factory: that class. system: the instructions. row(seed): the row of the data set to which the
    seed belongs; as in TRL, its columns are the arguments of `reset`, and what `reset` returns is
    appended to its prompt. turns: how many tool calls an episode has at most, which TRL calls
    max_tool_calling_iterations.

    - **The tools** are the public methods, described by their docstrings. What a tool returns is
      shown to the model as text, and so is the message of an exception, by which such classes say
      that a call is not possible.
    - **The reward** comes at the end of the episode: from reward_func, which gets the list
      `environments` as in TRL, or without one from the environment's own `get_reward`. A malformed
      turn costs nothing beyond the turn. The task is solved if the reward is at least `solved`.
    - **The episode ends** with the first turn that has no `<tool_call>`, as in TRL: a model that
      calls no tool has nothing more to do. It also ends after the last turn, and as soon as
      over(environment) is true; TRL lets the model go on there until it stops by itself.

    Tools that are coroutines, and images, are not supported.
    """

    def __init__(
        self,
        factory: Callable,
        system: str,
        row: Callable[[int], dict],
        turns: int,
        reward_func: Callable | None = None,
        solved: float = 1.0,
        over: Callable[[object], bool] = lambda environment: False,
    ):
        self.environment = factory()
        self.system = system
        self.row = row
        self.turns = turns
        self.reward_func = reward_func
        self.solved = solved
        self.over = over
        self.methods = {
            name: getattr(self.environment, name)
            for name, _ in inspect.getmembers(type(self.environment), inspect.isfunction)
            if name not in ("reset", "get_reward") and not name.startswith("_")
        }
        self.tools = [get_json_schema(method) for method in self.methods.values()]

    def reset(self, seed: int) -> str:
        """Begin the episode of the seed's row, and return its prompt."""
        row = self.row(seed)
        self.turns_left = self.turns
        observation = self.environment.reset(**row)
        return row["prompt"][-1]["content"] + (observation or "")

    def step(self, reply: str) -> Step:
        """Play one assistant turn."""
        self.turns_left -= 1
        call, problem = read_call(reply, self.tools)
        observation = self._result(call) if call else problem
        ended = "<tool_call>" not in reply or bool(self.over(self.environment))
        if not ended and self.turns_left > 0:
            return Step(observation, reward=0.0, done=False)
        reward = self._reward()
        success = reward >= self.solved
        finished = ended or success
        return Step(observation, reward, done=True, success=success, finished=finished)

    def _result(self, call: Call) -> str:
        """What the tool says, as TRL writes it."""
        try:
            result = self.methods[call.name](**call.arguments)
        except Exception as error:  # TRL shows it to the model, too
            result = {"error": str(error)}
        return str(result)

    def _reward(self) -> float:
        if self.reward_func is None:
            return float(self.environment.get_reward())
        (reward,) = self.reward_func(environments=[self.environment])
        return float(reward)


class HigherLower:
    """Find a number from 1 to 20: a small environment, written as TRL's documentation shows one."""

    def reset(self, seed: int, **kwargs) -> str | None:
        self._number = random.Random(seed).randint(1, 20)
        self.reward = 0.0
        self.done = False
        return "It is a number from 1 to 20."

    def guess(self, number: int) -> str:
        """
        Guess the number.

        Args:
            number: The guess, from 1 to 20.

        Returns:
            Whether the number is higher or lower.
        """
        if self.done:
            raise ValueError("Game over.")
        if not 1 <= number <= 20:
            raise ValueError("The number is from 1 to 20.")
        if number == self._number:
            self.reward = 1.0
            self.done = True
            return "Found."
        return "It is higher." if number < self._number else "It is lower."


def found(environments: list[HigherLower], **kwargs) -> list[float]:
    """The reward function, as TRL calls it."""
    return [environment.reward for environment in environments]


def higher_lower() -> TRLWorld:
    """Success is to find the number with 6 calls; 5 are enough for whoever halves the range."""
    return TRLWorld(
        HigherLower,
        system="You play a game. Think in <think> </think>, then call the tool.",
        row=lambda seed: {
            "prompt": [{"role": "user", "content": "Find the number. "}],
            "seed": seed,
        },
        turns=6,
        reward_func=found,
        over=lambda environment: environment.done,
    )
