"""Worlds that a language model plays through tool calls. Standard library only.

    env = make_env("sokoban")                # or frozenlake, sudoku, shop
    observation = env.reset(seed=7)          # the first user message
    step = env.step(reply)                   # reply: the whole assistant turn, as text

An environment is any object with
- `tools`: JSON schemas in the OpenAI form, which chat templates take as `tools=`,
- `system`: the instructions, with what each symbol means and what each mistake costs,
- `reset(seed) -> str`, `step(reply) -> Step` and `done`: an episode is a pure function of the seed and the replies,
- `demonstrate(rng, skill) -> str`: a scripted turn for the warm start of the built-in policy, and `skill`, its default there.

Solving any of them earns 1 (Sokoban: up to a tenth more), so that rewards compare. Each checks the facts that a turn's reasoning
states about the board, in the words of the demonstrations, against the state.

The environment parses the turn itself and executes exactly what `segment.py` labels ACTION: the text between the first
`<tool_call>` and the next `</tool_call>`, or the end of the turn. A reply is untrusted: nothing in it raises, and none of
it is repeated in an observation, so that a model cannot write its own tool response.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Iterator
from typing import NamedTuple

FORMAT_PENALTY = -0.1  # for a turn without a valid structure (the paper's value)


class Step(NamedTuple):
    """What one turn led to. `success` is only ever True together with `finished`, and that with `done`."""

    observation: str
    reward: float
    done: bool
    success: bool
    finished: bool  # the game ended: by success, in a hole, with any purchase; not because the turns ran out
    facts: int  # stated about the board in the turn's reasoning
    true_facts: int


class Call(NamedTuple):
    """A tool call whose name and arguments have passed the tool's schema."""

    name: str
    arguments: dict


class Effect(NamedTuple):
    """What a call did to a world, and the sentence that says so."""

    said: str
    reward: float = 0.0
    finished: bool = False
    success: bool = False


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


def check_facts(reply: str, truths: dict[str, set[str]]) -> tuple[int, int]:
    """How many facts the (first) thought of a turn states, and how many of them are true. `truths` maps a regular expression
    with one group to what the group may say.

    >>> check_facts("<think>P is on b2, G is on c2</think>", {r"P is on (\\w+)": {"b2"}, r"G is on (\\w+)": {"c3"}})
    (2, 1)
    """
    thought = reply.partition("<tool_call>")[0].partition("<think>")[2].partition("</think>")[0]
    verdicts = [said in truth for pattern, truth in truths.items() for said in re.findall(pattern, thought)]
    return len(verdicts), sum(verdicts)


# ----------------------------------------------------------------------------------------------- what the worlds share
class World:
    """A turn is checked, played and paid alike in all worlds. A world sets `tools`, `system` and `limit` (turns an episode),
    starts an episode with `reset`, and answers `_play` (what a call does), `_truths` (for `check_facts`) and `_show`.
    """

    unit = "move"  # what a turn is called
    turn_cost = 0.0
    done = True  # until the first reset

    def _begin(self) -> str:
        self.turns_left, self.done = self.limit, False
        return self._show("")

    def step(self, reply: str) -> Step:
        """Play one assistant turn. Raises RuntimeError once the episode is over (or before the first reset)."""
        if self.done:
            raise RuntimeError("this episode is over: call reset(seed) before another step")
        facts = check_facts(reply, self._truths())
        call, problem = read_call(reply, self.tools)
        self.turns_left -= 1
        effect = self._play(call) if call else Effect("")
        said = [f"{problem} That costs a {self.unit} and {-FORMAT_PENALTY:g}."] * bool(problem) + [effect.said] * bool(effect.said)
        self.done = effect.finished or not self.turns_left
        if self.done and not effect.finished:
            said.append(f"You have no {self.unit}s left.")
        reward = effect.reward - self.turn_cost + (FORMAT_PENALTY if problem else 0.0)
        return Step(self._show(" ".join(said)), reward, self.done, effect.success, effect.finished, *facts)

    def _format_rule(self) -> str:
        return f"Think in <think> </think>, then call one tool. A malformed turn costs a {self.unit} and {-FORMAT_PENALTY:g}."


def choose(rng: random.Random, skill: float, best: list, rest: list):
    """One of the best with probability `skill`, else one of the rest; of the other kind if there is none."""
    good = rng.random() < skill
    return rng.choice(best if best and (good or not rest) else rest)


def bounded(**options: tuple[float, float, float]) -> None:
    """Raise ValueError for an option (value, lowest, highest) out of its bounds."""
    for name, (value, low, high) in options.items():
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}: choose {low} to {high}")


DIRECTIONS = {"left": (0, -1), "down": (1, 0), "right": (0, 1), "up": (-1, 0)}
COLUMNS = "abcdefghi"


def cell_name(cell: tuple[int, int]) -> str:
    return f"{COLUMNS[cell[1]]}{cell[0] + 1}"


def offset(start: tuple[int, int], end: tuple[int, int]) -> list[str]:
    """How to get from one cell to another: ["2 down", "1 left"], rows first, no part that is zero."""
    down, right = end[0] - start[0], end[1] - start[1]
    rows = [f"{abs(down)} {'down' if down > 0 else 'up'}"] * (down != 0)
    return rows + [f"{abs(right)} {'right' if right > 0 else 'left'}"] * (right != 0)


def draw_board(rows: int, columns: int, symbols: dict) -> list[str]:
    """A line per row, named by its number; a cell without a symbol is "_"."""
    return [f"{row + 1} {' '.join(str(symbols.get((row, column), '_')) for column in range(columns))}" for row in range(rows)]


# ------------------------------------------------------------------------------------------------------------ frozen lake
SIDEWAYS = {"left": ("up", "down"), "right": ("up", "down"), "up": ("left", "right"), "down": ("left", "right")}


class FrozenLake(World):
    """Walk from P to G over slippery ice without falling into a hole O.

    A map is solvable by construction: holes are put anywhere but on one shortest walk from start to goal. A move slips to
    one of its two sides with probability `slip`. The slips are drawn from the seed alone, so that the episodes of a GRPO
    group, which share a seed, share their luck too. Raises ValueError for options that leave no playable map.
    """

    skill = 0.65

    def __init__(self, size: int = 4, holes: int = 3, slip: float = 0.1, moves: int = 6):
        bounded(size=(size, 2, 9), slip=(slip, 0, 0.9), moves=(moves, size - 1, 99))
        self.size, self.slip, self.limit = size, slip, moves
        self.span = min(moves - 1, 2 * size - 2) if moves >= size else moves  # the longest start-to-goal walk: room for a slip
        bounded(holes=(holes, 0, size * size - self.span - 1))
        self.holes = holes
        self.tools = [tool_schema("move", "Move one cell.", {"direction": {"type": "string", "enum": list(DIRECTIONS)}})]
        self.system = (
            f"You are P on a frozen lake: rows 1 to {size} from the top, columns a to {COLUMNS[size - 1]} from the left. "
            f"G is the goal, O a hole, _ ice. Reach G in {moves} moves for a reward of 1; a hole ends the game. "
            f"A move slips to one side with probability {slip:g}. " + self._format_rule()
        )

    def reset(self, seed: int) -> str:
        """Lay the map of `seed` and return the first observation."""
        rng = random.Random(f"frozenlake {seed}")  # a string seeds alike in every process
        cells = [(row, column) for row in range(self.size) for column in range(self.size)]
        while True:
            self.player, self.goal = rng.sample(cells, 2)
            if self.size - 1 <= sum(abs(a - b) for a, b in zip(self.player, self.goal, strict=True)) <= self.span:
                break
        free = set(cells) - set(self._shortest_walk(rng))
        self.hole_cells = set(rng.sample(sorted(free), self.holes))
        luck = random.Random(f"frozenlake slips {seed}")
        self.luck = [(luck.random() < self.slip, luck.randrange(2)) for _ in range(self.limit)]  # by turn: it ignores the replies
        self.distance = self._distances()
        return self._begin()

    def demonstrate(self, rng: random.Random, skill: float) -> str:
        """A turn with true facts about the board, and a move that is a best one with probability `skill`.

        A best move comes nearer to the goal along a shortest walk that avoids holes; any other move is drawn evenly from
        the rest. The move is decided in the tool call: the thought states facts, in varied words, and no plan.
        """
        after = {name: self.distance.get(self._neighbour(self.player, name), 99) for name in DIRECTIONS}
        best = [name for name in DIRECTIONS if after[name] < self.distance[self.player]]
        rest = [name for name in DIRECTIONS if name not in best]
        return write_turn(self._facts(rng), "move", {"direction": choose(rng, skill, best, rest)})

    def _facts(self, rng: random.Random) -> str:
        way = offset(self.player, self.goal)
        sides = [f"{side} is {self._name_of(self._neighbour(self.player, side))}" for side in rng.sample(list(DIRECTIONS), 4)]
        here = f"{rng.choice(['I am', 'I stand', 'P is'])} on {cell_name(self.player)}"
        there = f"{rng.choice(['G is', 'the goal is'])} on {cell_name(self.goal)}"
        far = f"{rng.choice(['The goal lies', 'G lies', 'From here G is'])} {rng.choice([' and ', ', ']).join(way)}."
        around = f"{rng.choice(['Next to me', 'Around me', 'I see'])} {', '.join(sides)}."
        return f"{here}, {there}. " + " ".join(rng.sample([far, around], 2))

    def _truths(self) -> dict[str, set[str]]:
        truths = {r"(?:I am|I stand|P is) on (\w+)": {cell_name(self.player)}, r"(?:G|goal) is on (\w+)": {cell_name(self.goal)}}
        truths[r"\b(\d (?:up|down|left|right))\b"] = set(offset(self.player, self.goal))
        return truths | {rf"\b{side} is (\w+)": {self._name_of(self._neighbour(self.player, side))} for side in DIRECTIONS}

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

    def _play(self, call: Call) -> Effect:
        wish, before = call.arguments["direction"], self.player
        slips, side = self.luck[self.limit - self.turns_left - 1]
        direction = SIDEWAYS[wish][side] if slips else wish
        self.player = self._neighbour(before, direction)
        said = f"You {'slipped' if slips else 'moved'} {direction}"
        said += "." if self.player != before else " against the edge and stayed."
        if self.player == self.goal:
            return Effect(f"{said} You reached the goal.", 1.0, finished=True, success=True)
        if self.player in self.hole_cells:
            return Effect(f"{said} You fell into a hole.", finished=True)
        return Effect(said)

    def _shortest_walk(self, rng: random.Random) -> list[tuple[int, int]]:
        """One of the shortest walks from the player to the goal over an empty board, both ends included."""
        moves = [DIRECTIONS[part.split()[1]] for part in offset(self.player, self.goal) for _ in range(int(part.split()[0]))]
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
        status = f"P {cell_name(self.player)}, G {cell_name(self.goal)}, moves left {self.turns_left}"
        return "\n".join([said] * bool(said) + draw_board(self.size, self.size, symbols) + [status])


# ---------------------------------------------------------------------------------------------------------------- sokoban
class Sokoban(World):
    """Push every box X onto a target T. Boxes cannot be pulled: a wrong push can be final.

    A level is solvable by construction: its walls and targets are drawn first, a search backwards from every solved state
    finds how many moves each state needs, and the start is drawn from those that need from 2 moves to 3 fewer than there
    are. Rewards are those of the paper's Sokoban over ten: -0.01 a move, 0.1 a box on a target (-0.1 off), 1 at the end.
    `size` counts the surrounding wall, as is usual. Raises ValueError for options out of bounds.
    """

    skill, turn_cost = 0.6, 0.01

    def __init__(self, size: int = 6, boxes: int = 1, walls: int = 1, moves: int = 8):
        bounded(size=(size, 5, 8), boxes=(boxes, 1, 3), walls=(walls, 0, size - 4), moves=(moves, 6, 40))
        self.inside, self.boxes_wanted, self.walls_wanted, self.limit = size - 2, boxes, walls, moves
        self.tools = [tool_schema("move", "Move or push one cell.", {"direction": {"type": "string", "enum": list(DIRECTIONS)}})]
        self.system = (
            f"You are P in a walled room: rows 1 to {self.inside} from the top, columns a to {COLUMNS[self.inside - 1]} from the "
            "left. _ is floor, # wall, X a box, T a target, * a box on a target, + you on a target; X and T are given with their "
            "way from you. Walk into a box to push it; you cannot pull, nor push two boxes. Push every box onto a target in "
            f"{moves} moves for a reward of 1; a box on a target is 0.1, off it -0.1, a move -0.01. " + self._format_rule()
        )

    def reset(self, seed: int) -> str:
        """Build the level of `seed` and return the first observation."""
        level = sokoban_level(seed, self.inside, self.boxes_wanted, self.walls_wanted, self.limit)
        self.free, self.targets, (self.player, self.boxes), self.distance = level
        return self._begin()

    def demonstrate(self, rng: random.Random, skill: float) -> str:
        """A turn with true facts, and with probability `skill` a move that brings the solution nearer; else one of the others."""
        best = [name for name in DIRECTIONS if self._needs(self._after(name)) < self._needs((self.player, self.boxes))]
        rest = [name for name in DIRECTIONS if name not in best]
        return write_turn(self._facts(rng), "move", {"direction": choose(rng, skill, best, rest)})

    def _facts(self, rng: random.Random) -> str:
        """Where everything is, what is around, and where a box can next be pushed towards the solution (or at all)."""
        where = f"{rng.choice(['I am', 'I stand', 'P is'])} on {cell_name(self.player)}"
        boxes = "".join(f", X is on {cell_name(box)}, X lies {self._from_player(box)}" for box in self._loose_boxes())
        targets = "".join(f", T is on {cell_name(target)}, T lies {self._from_player(target)}" for target in self._free_targets())
        sides = ", ".join(f"{side} is {self._name_of(side)}" for side in rng.sample(list(DIRECTIONS), 4))
        thought = f"{where}{boxes}{targets}. {rng.choice(['Next to me', 'Around me', 'I see'])} {sides}."
        pushes = self._pushes()
        if not pushes:
            return f"{thought} X is stuck."
        start, way = min(rng.sample(sorted(pushes), len(pushes)), key=pushes.get)
        return f"{thought} From {cell_name(start)} X goes {way}."

    def _truths(self) -> dict[str, set[str]]:
        pushes = {f"{cell_name(start)} X goes {way}" for start, way in self._pushes()}
        truths = {
            r"(?:I am|I stand|P is) on (\w+)": {cell_name(self.player)},
            r"X is on (\w+)": {cell_name(box) for box in self.boxes},
            r"T is on (\w+)": {cell_name(target) for target in self.targets},
            r"X lies ([\w ]+)": {self._from_player(box) for box in self.boxes},
            r"T lies ([\w ]+)": {self._from_player(target) for target in self.targets},
            r"From (\w+ X goes \w+)": pushes,
            r"X is (stuck)": set() if pushes else {"stuck"},
        }
        return truths | {rf"\b{side} is (\w+)": {self._name_of(side)} for side in DIRECTIONS}

    def _from_player(self, cell: tuple[int, int]) -> str:
        return " ".join(offset(self.player, cell)) or "here"

    def _needs(self, state: tuple) -> int:
        return self.distance.get(state, 99)  # 99: lost, or not to be solved in time

    def _loose_boxes(self) -> list[tuple[int, int]]:
        return [box for box in self.boxes if box not in self.targets]

    def _free_targets(self) -> list[tuple[int, int]]:
        return [target for target in self.targets if target not in self.boxes]

    def _name_of(self, side: str) -> str:
        cell = (self.player[0] + DIRECTIONS[side][0], self.player[1] + DIRECTIONS[side][1])
        if cell not in self.free:
            return "wall"
        return "box" if cell in self.boxes else "target" if cell in self.targets else "floor"

    def _pushes(self) -> dict[tuple, int]:
        """Every push that walls and boxes allow, as (cell to push from, direction): about how many moves it and the rest take."""
        pushes = {}
        for box in self.boxes:
            for way, (down, right) in DIRECTIONS.items():
                start, end = (box[0] - down, box[1] - right), (box[0] + down, box[1] + right)
                if {start, end} <= self.free - set(self.boxes):
                    walk = abs(start[0] - self.player[0]) + abs(start[1] - self.player[1])  # at least: boxes may be in the way
                    pushes[start, way] = walk + 1 + self._needs(self._after(way, start))
        return pushes

    def _after(self, direction: str, player: tuple[int, int] | None = None) -> tuple:
        """The state (player, boxes) after a move; the same state if a wall or a second box is in the way."""
        (row, column), (down, right) = player or self.player, DIRECTIONS[direction]
        there, beyond = (row + down, column + right), (row + 2 * down, column + 2 * right)
        if there not in self.free or there in self.boxes and (beyond not in self.free or beyond in self.boxes):
            return (row, column), self.boxes
        return there, tuple(sorted(beyond if box == there else box for box in self.boxes))

    def _play(self, call: Call) -> Effect:
        direction = call.arguments["direction"]
        before, boxes, loose = self.player, self.boxes, len(self._loose_boxes())
        self.player, self.boxes = self._after(direction)
        if self.player == before:
            return Effect(f"You cannot move {direction}.")
        said = f"You moved {direction}." if self.boxes == boxes else f"You pushed the box {direction}."
        gain = 0.1 * (loose - len(self._loose_boxes()))
        if self._loose_boxes():
            return Effect(said, gain)
        return Effect(f"{said} Every box is on a target.", 1 + gain, finished=True, success=True)

    def _show(self, said: str) -> str:
        cells = {(row, column) for row in range(self.inside) for column in range(self.inside)}
        symbols = dict.fromkeys(cells - self.free, "#") | dict.fromkeys(self.targets, "T")
        symbols |= {box: "*" if box in self.targets else "X" for box in self.boxes}
        symbols[self.player] = "+" if self.player in self.targets else "P"
        named = [("X", box) for box in self.boxes] + [("T", target) for target in self.targets]
        status = ", ".join(f"{name} {cell_name(cell)} {self._from_player(cell)}" for name, cell in named)
        status = f"P {cell_name(self.player)}, {status}, moves left {self.turns_left}"
        return "\n".join([said] * bool(said) + draw_board(self.inside, self.inside, symbols) + [status])


@functools.lru_cache(maxsize=1024)  # the rollouts of a group share their level
def sokoban_level(seed: int, inside: int, boxes: int, walls: int, moves: int) -> tuple:
    """(free, targets, start, distance): cells that are not wall; a state is (player, sorted boxes), and `distance` has the moves
    that each one needs, for those that can be solved in time."""
    rng = random.Random(f"sokoban {seed}")
    cells = [(row, column) for row in range(inside) for column in range(inside)]
    while True:
        drawn = rng.sample(cells, boxes + walls)
        targets, free = tuple(sorted(drawn[:boxes])), set(cells) - set(drawn[boxes:])
        distance = solution_lengths(free, targets, moves)
        starts = [state for state, left in distance.items() if 2 <= left <= moves - 3 and not set(state[1]) & set(targets)]
        if starts:
            return free, targets, rng.choice(starts), distance


def solution_lengths(free: set[tuple[int, int]], targets: tuple, most: int) -> dict[tuple, int]:
    """Moves to the nearest solved state, for every state that needs at most `most` (breadth first, moves undone)."""
    queue = [(player, targets) for player in sorted(free - set(targets))]
    distance = dict.fromkeys(queue, 0)
    for player, boxes in queue:  # grows while it is read
        left = distance[player, boxes] + 1
        for down, right in DIRECTIONS.values():
            before, ahead = (player[0] - down, player[1] - right), (player[0] + down, player[1] + right)
            if left > most or before not in free or before in boxes:
                continue
            came_from = [(before, boxes)]  # by walking, or by pushing the box that is now ahead
            if ahead in boxes:
                came_from.append((before, tuple(sorted(player if box == ahead else box for box in boxes))))
            for state in came_from:
                if state not in distance:
                    distance[state] = left
                    queue.append(state)
    return distance


# ----------------------------------------------------------------------------------------------------------------- sudoku
class Sudoku(World):
    """Fill a 4x4 board so that every row, column and 2x2 block holds 1 to 4. Each puzzle has exactly one solution.

    As in sudoku apps, a digit is only accepted in an empty cell where it is right; any other is refused, and the last allowed
    mistake ends the game. So a cell pays once: half of the reward of 1 is shared by the blanks, half is for the finished
    board. `hint` shows what the empty cell with the fewest choices sees: looking up a row, a column and a block is beyond
    the built-in model. Raises ValueError for options out of bounds.
    """

    unit, skill = "step", 0.45

    def __init__(self, blanks: int = 6, mistakes: int = 3, steps: int = 16, hint: bool = True):
        bounded(steps=(steps, 1, 64), mistakes=(mistakes, 1, 99))
        bounded(blanks=(blanks, 1, min(steps, 12)))  # it takes four clues to fix a 4x4 board
        self.blanks, self.mistakes, self.limit, self.hint = blanks, mistakes, steps, hint
        numbers, letters = {"type": "integer", "enum": [1, 2, 3, 4]}, {"type": "string", "enum": list(COLUMNS[:4])}
        properties = {"row": numbers, "column": letters, "digit": numbers}
        self.tools = [tool_schema("place", "Write a digit.", properties)]
        self.system = (
            "A 4x4 sudoku: rows 1 to 4 from the top, columns a to d from the left, _ is empty. "
            + "A cell sees the digits of its row, column and block. " * hint +
            f"Each row, column and 2x2 block must hold 1, 2, 3 and 4. A wrong digit is refused; mistake {mistakes} ends the game. "
            f"Fill it in {steps} steps for a reward of 1, half of it shared by the cells as they are filled. " + self._format_rule()
        )

    def reset(self, seed: int) -> str:
        """Make the puzzle of `seed` and return the first observation."""
        rng = random.Random(f"sudoku {seed}")
        self.solution = next(fillings({}, rng))
        while True:
            blank = rng.sample(SUDOKU_CELLS, self.blanks)
            self.board = {cell: digit for cell, digit in self.solution.items() if cell not in blank}
            if len(list(fillings(self.board, rng))) == 1:
                break
        self.given, self.mistakes_left = set(self.board), self.mistakes
        return self._begin()

    def demonstrate(self, rng: random.Random, skill: float) -> str:
        """A turn about the empty cell with the fewest choices: with probability `skill` its digit, else another."""
        cell = self._tightest()
        right, thought = self.solution[cell], self._facts(cell, rng)
        digit = choose(rng, skill, [right], [digit for digit in range(1, 5) if digit != right])
        return write_turn(thought, "place", {"row": cell[0] + 1, "column": COLUMNS[cell[1]], "digit": digit})

    def _tightest(self) -> tuple[int, int]:
        return max((cell for cell in SUDOKU_CELLS if cell not in self.board), key=lambda cell: len(self._seen(cell)))

    def _facts(self, cell: tuple[int, int], rng: random.Random) -> str:
        name, seen = cell_name(cell), self._seen(cell)
        start = f"{rng.choice(['I look at', 'Now', 'Next'])} {name}. {16 - len(self.board)} cells are empty, "
        start += f"{self.turns_left} steps are left."
        return f"{start} {name} sees {digits(seen)}. {name} {rng.choice(['can be', 'may hold'])} {digits({1, 2, 3, 4} - seen)}."

    def _truths(self) -> dict[str, set[str]]:
        truths = {r"(\d+) cells are empty": {str(16 - len(self.board))}, r"(\d+) steps are left": {str(self.turns_left)}}
        for cell in SUDOKU_CELLS:
            seen, name = self._seen(cell), cell_name(cell)
            choices = {digits({1, 2, 3, 4} - seen)} if cell not in self.board else set()
            truths[rf"\b{name} sees ([1-4 ]*[1-4]|nothing)"] = {digits(seen)}
            truths[rf"\b{name} (?:can be|may hold) ([1-4 ]*[1-4]|nothing)"] = choices
        return truths

    def _seen(self, cell: tuple[int, int]) -> set[int]:
        """The digits of the other cells of its row, column and block."""
        return {self.board[each] for line in lines_of(cell) for each in line if each in self.board and each != cell}

    def _play(self, call: Call) -> Effect:
        digit = call.arguments["digit"]
        cell = (call.arguments["row"] - 1, COLUMNS.index(call.arguments["column"]))
        name = cell_name(cell)
        if cell in self.board:
            return Effect(f"{name} is given and stays." if cell in self.given else f"{name} is filled already.")
        if digit != self.solution[cell]:
            self.mistakes_left -= 1
            why = f"{name} sees {digit}" if digit in self._seen(cell) else f"{name} is not {digit}"
            return Effect(f"{why}: a mistake.", finished=not self.mistakes_left)
        self.board[cell] = digit
        solved, gain = self.board == self.solution, 0.5 / self.blanks
        return Effect(f"You wrote {digit} on {name}." + " It is solved." * solved, gain + 0.5 * solved, solved, solved)

    def _show(self, said: str) -> str:
        lines = [said] * bool(said) + draw_board(4, 4, self.board)
        if self.hint and len(self.board) < 16:
            tightest = self._tightest()
            lines.append(f"fewest choices {cell_name(tightest)}, sees {digits(self._seen(tightest))}")
        counts = f"empty {16 - len(self.board)}, steps left {self.turns_left}, mistakes left {self.mistakes_left}"
        return "\n".join([*lines, counts])


def digits(some: set[int]) -> str:
    return " ".join(map(str, sorted(some))) or "nothing"


SUDOKU_CELLS = [(row, column) for row in range(4) for column in range(4)]


def lines_of(cell: tuple[int, int]) -> list[list[tuple[int, int]]]:
    """The cells of the row, of the column and of the block that a cell is in."""
    row, column = cell
    block = [(row // 2 * 2 + i, column // 2 * 2 + j) for i in (0, 1) for j in (0, 1)]
    return [[(row, i) for i in range(4)], [(i, column) for i in range(4)], block]


def fillings(board: dict[tuple[int, int], int], rng: random.Random) -> Iterator[dict[tuple[int, int], int]]:
    """Every way to fill a board by the rules, in random order."""
    cell = next((cell for cell in SUDOKU_CELLS if cell not in board), None)
    if cell is None:
        yield board
        return
    seen = {board.get(each) for line in lines_of(cell) for each in line}
    for digit in rng.sample(range(1, 5), 4):
        if digit not in seen:
            yield from fillings({**board, cell: digit}, rng)


# ------------------------------------------------------------------------------------------------------------------- shop
KINDS = ("shirt", "coat", "scarf", "hat", "bag", "rug")
COLOURS = ("red", "blue", "green", "black", "white")
MATERIALS = ("cotton", "wool", "linen", "silk")
SIZES = ("S", "M", "L")
RESULTS = 3  # of a search


class Item(NamedTuple):
    code: str
    title: str
    material: str
    sizes: tuple[str, ...]
    price: int


class Shop(World):
    """Find, look into and buy what an instruction asks for, in a small web shop in the spirit of WebShop.

    The catalogue is made from the seed: one item fits, two share its title (colour and kind) and mostly fail elsewhere,
    the rest have other titles. Search knows titles only; material and sizes are seen by opening an item. Any purchase ends
    the episode. It earns 1 if title, material, size and price all fit (success), else half of the share of the four that do.
    """

    unit, skill = "turn", 0.55

    def __init__(self, items: int = 30, turns: int = 8):
        bounded(items=(items, 8, 80), turns=(turns, 3, 40))
        self.items, self.limit = items, turns
        text, size = {"type": "string"}, {"type": "string", "enum": list(SIZES)}
        self.tools = [
            tool_schema("search", "List items by words of their title.", {"query": text}),
            tool_schema("open", "See material and sizes of an item.", {"item": text}),
            tool_schema("buy", "Buy an item and leave.", {"item": text, "size": size}),
        ]
        self.system = (
            f"You shop. A title is a colour and a kind. A search lists up to {RESULTS} items by code, title and price; opening an "
            f"item shows its material and sizes. Buy once, in {turns} turns: the reward is 1 if title, material, size and price "
            "all are as wanted, else half of the share of these four that are. " + self._format_rule()
        )

    def reset(self, seed: int) -> str:
        """Stock the shop of `seed` and return the first observation."""
        rng = random.Random(f"shop {seed}")
        titles = [f"{colour} {kind}" for colour in COLOURS for kind in KINDS]
        self.title, self.material, self.size = rng.choice(titles), rng.choice(MATERIALS), rng.choice(SIZES)
        self.budget = rng.randrange(30, 80, 10)
        others = [title for title in titles if title != self.title]
        names = [self.title] * RESULTS + [rng.choice(others) for _ in range(self.items - RESULTS)]
        codes = rng.sample([f"{letter}{digit}" for letter in COLUMNS for digit in range(1, 10)], self.items)
        stock = []
        for code, title in zip(codes, names, strict=True):
            sizes = tuple(size for size in SIZES if rng.random() < 0.6) or (rng.choice(SIZES),)
            stock.append(Item(code, title, rng.choice(MATERIALS), sizes, rng.randrange(10, 100, 10)))
        sizes = tuple(size for size in SIZES if size in stock[0].sizes or size == self.size)
        stock[0] = Item(codes[0], self.title, self.material, sizes, rng.randrange(10, self.budget + 10, 10))
        self.stock = {item.code: item for item in sorted(stock)}
        self.results, self.opened = [], set()
        return self._begin()

    def demonstrate(self, rng: random.Random, skill: float) -> str:
        """A turn with true facts about the list, and with probability `skill` the best act: buy what fits, else open what may,
        else search for the title. The other acts are as sloppy ones as people do: a search by one word, opening any item
        of the list, buying any with any size.
        """
        best = [("buy", {"item": item.code, "size": self.size}) for item in self.results if self._verdict(item) == "fits"]
        best = best or [("open", {"item": item.code}) for item in self.results if self._verdict(item) == "may fit"]
        best = best or [("search", {"query": self.title})]
        rest = [("search", {"query": rng.choice(self.title.split())})]
        if self.results:
            code = rng.choice(self.results).code
            rest += [("open", {"item": code}), ("buy", {"item": code, "size": rng.choice(SIZES)})]
        thought = self._facts(rng)
        return write_turn(thought, *choose(rng, skill, best, [act for act in rest if act not in best]))

    def _facts(self, rng: random.Random) -> str:
        wanted = f"{rng.choice(['I want', 'I look for'])} a {self.title} of {self.material}, size {self.size}, up to {self.budget}."
        verdicts = ", ".join(f"{item.code} {self._verdict(item)}" for item in self.results)
        return f"{wanted} {rng.choice(['Of these', 'Here'])} {verdicts}." if verdicts else f"{wanted} The list is empty."

    def _verdict(self, item: Item) -> str:
        """What is known of an item: "fits", "may fit" while it is not open, or the first thing that it "fails on"."""
        visible = {"title": item.title == self.title, "price": item.price <= self.budget}
        inside = {"material": item.material == self.material, "size": self.size in item.sizes}
        known = visible | inside if item.code in self.opened else visible
        failing = next((name for name, holds in known.items() if not holds), "")
        return f"fails on {failing}" if failing else "fits" if item.code in self.opened else "may fit"

    def _truths(self) -> dict[str, set[str]]:
        truths = {r"(?:want|look for) a (\w+ \w+)": {self.title}, r"of (\w+), size": {self.material}}
        truths |= {r"size (\w)\b": {self.size}, r"up to (\d+)": {str(self.budget)}}
        truths[r"The list is (empty)"] = set() if self.results else {"empty"}
        listed = "|".join(item.code for item in self.results) or "none"
        truths |= {rf"\b{item.code} (fits|may fit|fails on \w+)": {self._verdict(item)} for item in self.results}
        return truths | {rf"\b((?!{listed})[a-i][1-9] (?:fits|may fit|fails on \w+))": set()}  # of items that are not in the list

    def _play(self, call: Call) -> Effect:
        if call.name == "search":
            words = set(re.findall(r"[a-z]+", call.arguments["query"].lower()))
            found = {item: len(words & set(item.title.split())) for item in self.stock.values()}
            self.results = sorted((item for item in found if found[item]), key=lambda item: (-found[item], item.code))[:RESULTS]
            return Effect(f"Found {len(self.results)}.") if self.results else Effect("No title has any of these words.")
        item = self.stock.get(call.arguments["item"])
        if item not in self.results:
            return Effect("The list has no such item.")
        if call.name == "open":
            self.opened.add(item.code)
            return Effect(f"You opened {item.code}.")
        size = call.arguments["size"]
        if size not in item.sizes:
            return Effect(f"{item.code} is not to be had in size {size}.")
        met = [item.title == self.title, item.price <= self.budget, item.material == self.material, size == self.size]
        return Effect(f"You bought {item.code} in size {size}.", 1.0 if all(met) else sum(met) / 8, finished=True, success=all(met))

    def _show(self, said: str) -> str:
        inside = {code: f" {self.stock[code].material} {' '.join(self.stock[code].sizes)}" for code in self.opened}
        lines = [f"- {item.code} {item.title} ${item.price}{inside.get(item.code, '')}" for item in self.results]
        wanted = f"Wanted: {self.title}, {self.material}, size {self.size}, at most ${self.budget}. Turns left {self.turns_left}"
        return "\n".join([said] * bool(said) + lines + [wanted])


ENVIRONMENTS = {"frozenlake": FrozenLake, "sokoban": Sokoban, "sudoku": Sudoku, "shop": Shop}


def make_env(name: str, **options):
    """An environment by name, with its options: `make_env("frozenlake", size=5, slip=0.2)`."""
    if name not in ENVIRONMENTS:
        raise ValueError(f"there is no environment {name!r}: choose one of {', '.join(ENVIRONMENTS)}")
    return ENVIRONMENTS[name](**options)
