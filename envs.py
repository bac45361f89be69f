"""Worlds that a language model plays through tool calls. Standard library only.

    env = make_env("frozenlake")
    observation = env.reset(seed=7)          # the first user message
    step = env.step(reply)                   # reply: the whole assistant turn, as text

An environment is any object with
- `tools`: JSON schemas in the OpenAI form, which chat templates take as `tools=`,
- `system`: the instructions, with what each symbol means and what each mistake costs,
- `reset(seed) -> str` and `step(reply) -> Step`, a pure function of the seed and the replies,
- `demonstrate(rng, skill) -> str`: a scripted turn for the warm start of the built-in policy.

The environment parses the turn itself and executes exactly what `segment.py` labels ACTION: the text between the first
`<tool_call>` and the next `</tool_call>`, or the end of the turn. A reply is untrusted: nothing in it raises, and none of
it is repeated in an observation, so that a model cannot write its own tool response.
"""

from __future__ import annotations

import json
import random
from typing import NamedTuple

FORMAT_PENALTY = -0.1  # for a turn without a valid structure (the paper's value)


class Step(NamedTuple):
    """What one turn led to. `success` is only ever True together with `done`."""

    observation: str
    reward: float
    done: bool
    success: bool


class Call(NamedTuple):
    """A tool call whose name and arguments have passed the tool's schema."""

    name: str
    arguments: dict


# ------------------------------------------------------------------------------------------------ the protocol of a turn
def tool_schema(name: str, description: str, properties: dict[str, dict]) -> dict:
    """A tool in the OpenAI form; every property is required and no other is allowed."""
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def write_turn(thought: str, name: str, arguments: dict) -> str:
    """An assistant turn with a valid structure, as demonstrations write it."""
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<think>\n{thought}\n</think>\n<tool_call>\n{call}\n</tool_call>"


def read_call(reply: str, tools: list[dict]) -> tuple[Call | None, str]:
    """The call to execute (None if there is none that can be) and one sentence on what is wrong with the turn ("" if nothing).

    A call is executed whenever the ACTION text is valid, for that text is what training credits; a turn that lacks its
    `<think>` block or its closing tag is still malformed and pays for it (our decision).

    >>> walk = [tool_schema("walk", "Walk.", {"to": {"type": "string", "enum": ["here", "there"]}})]
    >>> read_call(write_turn("There is better.", "walk", {"to": "there"}), walk)
    (Call(name='walk', arguments={'to': 'there'}), '')
    >>> read_call("<think>Hm.</think><tool_call>walk there</tool_call>", walk)
    (None, 'The tool call is not valid JSON.')
    """
    before, opening, rest = reply.partition("<tool_call>")
    action, closing, _ = rest.partition("</tool_call>")
    if not opening:
        return None, "The turn has no <tool_call>."
    try:
        call = json.loads(action)
    except (ValueError, RecursionError):  # RecursionError: "[[[[..." a thousand deep
        return None, "The tool call is not valid JSON."
    if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
        return None, 'The tool call must be a JSON object with exactly the keys "name" and "arguments".'
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    if not isinstance(call["name"], str) or call["name"] not in schemas:
        return None, f"There is no such tool: the tools are {', '.join(schemas)}."
    problem = check_arguments(call["arguments"], schemas[call["name"]])
    if problem:
        return None, problem
    if not closing:
        problem = "The <tool_call> is not closed by </tool_call>."
    elif "</think>" not in before.partition("<think>")[2]:
        problem = "The turn has no <think> ... </think> before its tool call."
    return Call(call["name"], call["arguments"]), problem


def check_arguments(arguments: object, schema: dict) -> str:
    """One sentence on how `arguments` break a tool's schema, "" if they do not."""
    properties = schema["properties"]
    if not isinstance(arguments, dict) or set(arguments) != set(schema["required"]):
        return f"The arguments must be a JSON object with exactly: {', '.join(schema['required'])}."
    for name, value in arguments.items():
        wanted = {"string": str, "integer": int}[properties[name]["type"]]
        if type(value) is not wanted:  # not isinstance: True is an int, but no JSON integer
            return f"The argument {name} must be of type {properties[name]['type']}."
        choices = properties[name].get("enum", [value])
        if value not in choices:
            return f"The argument {name} must be one of {', '.join(map(str, choices))}."
    return ""


# ------------------------------------------------------------------------------------------------------------ frozen lake
DIRECTIONS = {"left": (0, -1), "down": (1, 0), "right": (0, 1), "up": (-1, 0)}
COLUMNS = "abcdefghi"
SIDEWAYS = {"left": ("up", "down"), "right": ("up", "down"), "up": ("left", "right"), "down": ("left", "right")}


class FrozenLake:
    """Walk from P to G over slippery ice without falling into a hole O.

    A map is solvable by construction: holes are put anywhere but on one shortest walk from start to goal. A move slips to
    one of its two sides with probability `slip`. The slips are drawn from the seed alone, so that the episodes of a GRPO
    group, which share a seed, share their luck too. Raises ValueError for options that leave no playable map.
    """

    def __init__(self, size: int = 4, holes: int = 3, slip: float = 0.1, moves: int = 6):
        if not 2 <= size <= 9:
            raise ValueError(f"size is {size}: choose 2 to 9 (a row is named by one digit)")
        if not size - 1 <= moves:
            raise ValueError(f"moves is {moves}: a lake of size {size} wants at least {size - 1}")
        if not 0 <= slip <= 0.9:
            raise ValueError(f"slip is {slip}: choose a probability from 0 to 0.9")
        self.size, self.slip, self.moves = size, slip, moves
        self.span = min(moves - 1, 2 * size - 2) if moves >= size else moves  # the longest start-to-goal walk: room for a slip
        if not 0 <= holes <= size * size - self.span - 1:
            raise ValueError(f"holes is {holes}: this lake has room for 0 to {size * size - self.span - 1}")
        self.holes = holes
        self.tools = [tool_schema("move", "Move one cell.", {"direction": {"type": "string", "enum": list(DIRECTIONS)}})]
        self.system = (
            f"You are P on a frozen lake: rows 1 to {size} from the top, columns a to {COLUMNS[size - 1]} from the left. "
            f"G is the goal, O a hole, _ ice. Reach G in {moves} moves for a reward of 1; a hole ends the game. "
            f"A move slips to one side with probability {slip:g}. "
            "Think in <think> </think>, then call one tool. "
            f"A malformed turn costs a move and {-FORMAT_PENALTY:g}."
        )
        self.done = True  # until the first reset

    def reset(self, seed: int) -> str:
        """Lay the map of `seed` and return the first observation."""
        rng = random.Random(f"frozenlake {seed}")  # a string seeds alike in every process
        cells = [(row, column) for row in range(self.size) for column in range(self.size)]
        while True:
            self.player, self.goal = rng.sample(cells, 2)
            if self.size - 1 <= _steps_between(self.player, self.goal) <= self.span:
                break
        free = set(cells) - set(self._shortest_walk(rng))
        self.hole_cells = set(rng.sample(sorted(free), self.holes))
        self.luck = random.Random(f"frozenlake slips {seed}")
        self.moves_left, self.done = self.moves, False
        self.distance = self._distances()
        return self._show("")

    def step(self, reply: str) -> Step:
        """Play one assistant turn. Raises RuntimeError once the episode is over (or before the first reset)."""
        if self.done:
            raise RuntimeError("this episode is over: call reset(seed) before another step")
        call, problem = read_call(reply, self.tools)
        self.moves_left -= 1
        slips, side = self.luck.random() < self.slip, self.luck.randrange(2)  # drawn every turn: luck ignores the replies
        said = [f"{problem} That costs a move and {-FORMAT_PENALTY:g}."] if problem else []
        if call:
            wish = call.arguments["direction"]
            said.append(self._walk(SIDEWAYS[wish][side] if slips else wish, slips))
        success = self.player == self.goal
        if success:
            said.append("You reached the goal.")
        elif self.player in self.hole_cells:
            said.append("You fell into a hole.")
        elif not self.moves_left:
            said.append("You have no moves left.")
        self.done = success or self.player in self.hole_cells or not self.moves_left
        return Step(self._show(" ".join(said)), success + (FORMAT_PENALTY if problem else 0.0), self.done, success)

    def demonstrate(self, rng: random.Random, skill: float) -> str:
        """A turn with true facts about the board, and a move that is a best one with probability `skill`.

        A best move comes nearer to the goal along a shortest walk that avoids holes; any other move is drawn evenly from
        the rest. The move is decided in the tool call: the thought states facts, in varied words, and no plan.
        """
        after = {name: self.distance.get(self._neighbour(self.player, name), 99) for name in DIRECTIONS}
        best = [name for name in DIRECTIONS if after[name] < self.distance[self.player]]
        rest = [name for name in DIRECTIONS if name not in best]
        return write_turn(self._facts(rng), "move", {"direction": rng.choice(best if rng.random() < skill or not rest else rest)})

    def _facts(self, rng: random.Random) -> str:
        down, right = self.goal[0] - self.player[0], self.goal[1] - self.player[1]
        offset = [f"{abs(down)} {'down' if down > 0 else 'up'}"] * (down != 0)
        offset += [f"{abs(right)} {'right' if right > 0 else 'left'}"] * (right != 0)
        sides = [f"{side} is {self._name_of(self._neighbour(self.player, side))}" for side in rng.sample(list(DIRECTIONS), 4)]
        here = f"{rng.choice(['I am', 'I stand', 'P is'])} on {_cell_name(self.player)}"
        there = f"{rng.choice(['G is', 'the goal is'])} on {_cell_name(self.goal)}"
        way = f"{rng.choice(['The goal lies', 'G lies', 'From here G is'])} {rng.choice([' and ', ', ']).join(offset)}."
        around = f"{rng.choice(['Next to me', 'Around me', 'I see'])} {', '.join(sides)}."
        return f"{here}, {there}. " + " ".join(rng.sample([way, around], 2))

    def _name_of(self, cell: tuple[int, int]) -> str:
        if cell == self.goal:
            return "goal"
        if cell in self.hole_cells:
            return "hole"
        return "ice" if cell != self.player else "edge"  # _neighbour stays in place at an edge

    def _neighbour(self, cell: tuple[int, int], direction: str) -> tuple[int, int]:
        (row, column), (down, right) = cell, DIRECTIONS[direction]
        there = (row + down, column + right)
        return there if 0 <= min(there) and max(there) < self.size else cell

    def _walk(self, direction: str, slipped: bool) -> str:
        """Move the player; the sentence that tells what happened."""
        before, self.player = self.player, self._neighbour(self.player, direction)
        way = f"You slipped {direction}" if slipped else f"You moved {direction}"
        return f"{way}." if self.player != before else f"{way} against the edge and stayed."

    def _shortest_walk(self, rng: random.Random) -> list[tuple[int, int]]:
        """One of the shortest walks from the player to the goal over an empty board, both ends included."""
        (row, column), (goal_row, goal_column) = self.player, self.goal
        moves = [(1 if goal_row > row else -1, 0)] * abs(goal_row - row)
        moves += [(0, 1 if goal_column > column else -1)] * abs(goal_column - column)
        rng.shuffle(moves)
        walk = [self.player]
        for down, right in moves:
            walk.append((walk[-1][0] + down, walk[-1][1] + right))
        return walk

    def _distances(self) -> dict[tuple[int, int], int]:
        """Steps to the goal from every cell that can reach it without a hole (breadth first from the goal)."""
        distance, queue = {self.goal: 0}, [self.goal]
        for cell in queue:  # grows while it is read
            for direction in DIRECTIONS:
                there = self._neighbour(cell, direction)
                if there not in distance and there not in self.hole_cells:
                    distance[there] = distance[cell] + 1
                    queue.append(there)
        return distance

    def _show(self, said: str) -> str:
        symbols = {self.goal: "G", **{hole: "O" for hole in self.hole_cells}, self.player: "P"}
        columns = range(self.size)
        board = [f"{row + 1} {' '.join(symbols.get((row, column), '_') for column in columns)}" for row in columns]
        status = f"P {_cell_name(self.player)}, G {_cell_name(self.goal)}, moves left {self.moves_left}"
        return "\n".join([said] * bool(said) + board + [status])


def _cell_name(cell: tuple[int, int]) -> str:
    return f"{COLUMNS[cell[1]]}{cell[0] + 1}"


def _steps_between(a: tuple[int, int], b: tuple[int, int]) -> int:
    return abs(a[0] - b[0]) + abs(a[1] - b[1])


ENVIRONMENTS = {"frozenlake": FrozenLake}


def make_env(name: str, **options):
    """An environment by name, with its options: `make_env("frozenlake", size=5, slip=0.2)`."""
    if name not in ENVIRONMENTS:
        raise ValueError(f"there is no environment {name!r}: choose one of {', '.join(ENVIRONMENTS)}")
    return ENVIRONMENTS[name](**options)
