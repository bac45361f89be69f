"""What a turn of tool calling is, and a first world. Standard library only.

    env = FrozenLake()                       # or make_env("sokoban") of worlds.py
    observation = env.reset(seed=7)          # the first user message
    step = env.step(reply)                   # reply: the whole assistant turn, as text

An environment has `tools` (JSON schemas in the OpenAI form, for chat templates), `system` (the
instructions, with what each symbol means and each mistake costs), `reset(seed) -> str`,
`step(reply) -> Step`: an episode is a pure function of the seed and the replies. For the warm start
alone: `demonstrate(rng, skill)`, a scripted player's turn, its usual `skill`, `done`, `malformed`.

The call is what `segment.py` labels ACTION: the text between the first `<tool_call>` and the next
`</tool_call>`, or the end of the turn. A reply is untrusted: nothing in it raises, and none of it
is repeated in an observation, so that a model cannot write its own tool response.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from typing import NamedTuple

DIRECTIONS = {"left": (0, -1), "down": (1, 0), "right": (0, 1), "up": (-1, 0)}
COLUMNS = "abcdefghi"
TYPES = {"string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,)}
Cell = tuple[int, int]  # (row, column), from 0


class Step(NamedTuple):
    """What one turn led to. `success` implies `finished`, which implies `done`."""

    observation: str
    reward: float
    done: bool
    success: bool
    finished: bool  # the game itself ended (goal, hole, any purchase), not the limit of turns
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


# --------------------------------------------------------------------------- the protocol of a turn
def tool_schema(name: str, description: str, properties: dict[str, dict]) -> dict:
    """A tool in the OpenAI form; every property is required and no other is allowed."""
    if unknown := [each for each in properties.values() if each.get("type") not in TYPES]:
        raise ValueError(f"{name} takes {unknown}: a type is one of {', '.join(TYPES)}")
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def write_turn(thought: str, name: str, arguments: dict) -> str:
    """An assistant turn with a valid structure, as demonstrations write it."""
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<think>\n{thought}\n</think>\n<tool_call>\n{call}\n</tool_call>"


def read_call(reply: str, tools: list[dict]) -> tuple[Call | None, str]:
    """The call to execute, or None, and one sentence on what is wrong with the turn, or "".

    A call is executed whenever the ACTION text is valid, for that is what training credits; a turn
    that lacks its `<think>` block or closing tag is still malformed and pays (our decision).

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
        keys = 'exactly the keys "name" and "arguments"'
        return None, f"The tool call must be a JSON object with {keys}."
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    if not isinstance(call["name"], str) or call["name"] not in schemas:
        return None, f"There is no such tool: the tools are {', '.join(schemas)}."
    if problem := check_arguments(call["arguments"], schemas[call["name"]]):
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
        wanted = properties[name]["type"]
        if type(value) not in TYPES[wanted]:  # not isinstance: True is an int, but no JSON integer
            return f"The argument {name} must be of type {wanted}."
        choices = properties[name].get("enum", [value])
        if value not in choices:
            return f"The argument {name} must be one of {', '.join(map(str, choices))}."
    return ""


def check_facts(reply: str, truths: dict[str, set[str]]) -> tuple[int, int]:
    """How many facts the (first) thought of a turn states, and how many of them are true. `truths`
    maps a regular expression with one group to what the group may say.

    >>> truths = {r"P is on (\\w+)": {"b2"}, r"G is on (\\w+)": {"c3"}}
    >>> check_facts("<think>P is on b2, G is on c2</think>", truths)
    (2, 1)
    """
    thought = reply.partition("<tool_call>")[0].partition("<think>")[2].partition("</think>")[0]
    thought = thought[:10_000]  # none is that long: a bound on untrusted text
    verdicts = [said in truths[each] for each in truths for said in re.findall(each, thought)]
    return len(verdicts), sum(verdicts)


# ---------------------------------------------------------------------------- what the worlds share
# What a thought of any world may say: as in real thoughts, most words are not about this board.
SAYINGS = """Let me think about this step by step. I should not hurry. One thing after another. I
    read the last message again. That tells me where things are. Each turn counts, so I want to be
    careful. It is easy to make a mistake here. I check this once more. The rules are simple, but
    the details matter. So far I understand the situation. There may be more than one good way. I
    keep the task in mind. A tool call comes after this. I only get a few turns. Now I have what I
    need to decide. It helps to say what I see."""


class World:
    """A turn is checked, played and paid alike in all worlds. A world sets `tools` and `system`,
    and has `_lay_out` (make the game of a seed), `_play` (do what a call says), `_truths` (for
    `check_facts`) and `_show` (the lines of an observation)."""

    unit = "move"  # what a turn is called
    turn_cost = 0.0
    format_penalty = -0.1  # for a turn without a valid structure (the paper's value)
    sayings = ""  # what else a thought may say in this world
    done = True  # until the first reset

    def __init__(self, limit: int, thoughts: int):
        self.limit = limit  # turns an episode
        self.thoughts = thoughts  # free sentences in a demonstrated thought, beside its facts
        self.free_sentences = re.findall(r"\w[^.]*\.", " ".join((SAYINGS + self.sayings).split()))
        bounded(thoughts=(thoughts, 0, len(self.free_sentences)))
        self.costs = f"costs a {self.unit} and {-self.format_penalty:g}."
        self.rules = f"Think in <think> </think>, then call one tool. A malformed turn {self.costs}"

    def reset(self, seed: int) -> str:
        """Start the episode of `seed` and return the first observation."""
        self.seed = seed
        self.turns_left, self.malformed, self.done = self.limit, 0, False
        self.heard = ""  # all replies of the episode
        self._lay_out(seed)
        return "\n".join(self._show())

    def step(self, reply: str) -> Step:
        """Play one assistant turn. Raises RuntimeError if the episode is over, or none begun."""
        if self.done:
            raise RuntimeError("this episode is over: call reset(seed) before another step")
        self.heard += reply
        facts = check_facts(reply, self._truths())
        call, problem = read_call(reply, self.tools)
        self.turns_left -= 1
        effect = self._play(call) if call else Effect("")
        self.done = effect.finished or not self.turns_left
        said, reward = effect.said, effect.reward - self.turn_cost
        if problem:
            self.malformed += 1
            said = f"{problem} That {self.costs} {said}".rstrip()
            reward += self.format_penalty
        if self.done and not effect.finished:
            said += f" You have no {self.unit}s left."
        shown = "\n".join([said, *self._show()])
        return Step(shown, reward, self.done, effect.success, effect.finished, *facts)

    def _think(self, facts: list[str], rng: random.Random) -> str:
        """A thought: the facts in their order, and free sentences anywhere between them."""
        free = rng.sample(self.free_sentences, self.thoughts)
        sources = [facts] * len(facts) + [free] * len(free)
        rng.shuffle(sources)
        return " ".join(source.pop(0) for source in sources)


def choose(rng: random.Random, skill: float, best: list, options: list):
    """One of the best with probability `skill`, else of the other options, where there are both."""
    rest = [option for option in options if option not in best]
    good = rng.random() < skill
    return rng.choice(best if best and (good or not rest) else rest)


def bounded(**options: tuple[float, float, float]) -> None:
    """Raise ValueError for an option (value, lowest, highest) out of its bounds."""
    for name, (value, low, high) in options.items():
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}: choose {low} to {high}")


def cell_name(cell: Cell) -> str:
    return f"{COLUMNS[cell[1]]}{cell[0] + 1}"


def shortest_walk(start: Cell, end: Cell) -> list[str]:
    """The moves from one cell to another, rows first: ["down", "down", "left"]."""
    down, right = end[0] - start[0], end[1] - start[1]
    rows = ["down" if down > 0 else "up"] * abs(down)
    return rows + ["right" if right > 0 else "left"] * abs(right)


def offset(start: Cell, end: Cell) -> list[str]:
    """The same as words: ["2 down", "1 left"]."""
    walk = shortest_walk(start, end)
    return [f"{walk.count(direction)} {direction}" for direction in dict.fromkeys(walk)]


def draw_board(size: int, symbols: dict[Cell, object]) -> list[str]:
    """A line per row, named by its number; a cell without a symbol is "_"."""
    rows = [[symbols.get((row, column), "_") for column in range(size)] for row in range(size)]
    return [" ".join(map(str, [number, *cells])) for number, cells in enumerate(rows, start=1)]


# -------------------------------------------------------------------------------------- frozen lake
class FrozenLake(World):
    """Walk from P to G over slippery ice without falling into a hole O. Holes lie anywhere but on
    one shortest walk, so that every map can be solved. A move slips to one of its two sides with
    probability `slip`, drawn from seed and turn, so that a group shares its slips, and with
    shared_slips=False also from what was said. ValueError: options that leave no playable map."""

    skill, plan = 0.55, ""  # a thought says nothing of the move: the tool call decides it
    sayings = """The ice is slippery, so a move may go to one side. A hole would end the game at
        once. I do not want to fall into the water. The shortest way is not always the safest. A
        longer way around a hole can be worth it. The edge of the lake stops me, but it costs a
        move. I compare where I stand with where I want to be. Slipping could bring me next to a
        hole. With some luck I get there in time. The lake is small, so I can see all of it. Rows
        are counted from the top. Columns go from left to right. I have to watch how many moves
        remain. Each step should bring me nearer."""

    def __init__(self, size: int = 4, holes: int = 3, slip: float = 0.1, moves: int = 6,
                 thoughts: int = 6, shared_slips: bool = True):  # fmt: skip
        super().__init__(limit=moves, thoughts=thoughts)
        bounded(size=(size, 2, 9), slip=(slip, 0, 0.9), moves=(moves, size - 1, 99))
        self.longest_walk = max(size - 1, min(moves - 1, 2 * size - 2))  # leaves room for a slip
        bounded(holes=(holes, 0, size * size - self.longest_walk - 1))
        self.size, self.holes, self.slip, self.shared_slips = size, holes, slip, shared_slips
        direction = {"type": "string", "enum": list(DIRECTIONS)}
        self.tools = [tool_schema("move", "Move one cell.", {"direction": direction})]
        self.system = (
            f"You are P on a frozen lake: rows 1 to {size} from the top, columns a to "
            f"{COLUMNS[size - 1]} from the left. G is the goal, O a hole, _ ice. Reach G in "
            f"{moves} moves for a reward of 1; a hole ends the game. A move slips to one side with "
            f"probability {slip:g}. {self.rules}"
        )

    def _lay_out(self, seed: int) -> None:
        rng = random.Random(f"frozenlake {seed}")  # a string seeds alike in every process
        cells = [(row, column) for row in range(self.size) for column in range(self.size)]
        walk = []
        while not self.size - 1 <= len(walk) <= self.longest_walk:
            self.player, self.goal = rng.sample(cells, 2)
            walk = shortest_walk(self.player, self.goal)
        rng.shuffle(walk)
        kept = set(itertools.accumulate(walk, self._neighbour, initial=self.player))
        self.hole_cells = set(rng.sample(sorted(set(cells) - kept), self.holes))
        self.distance = {self.goal: 0}  # from each cell that can reach the goal without a hole
        queue = [self.goal]
        for cell in queue:  # breadth first: it grows while it is read
            sides = {self._neighbour(cell, direction) for direction in DIRECTIONS}
            for there in sides - self.hole_cells - set(self.distance):
                self.distance[there] = self.distance[cell] + 1
                queue.append(there)

    def demonstrate(self, rng: random.Random, skill: float) -> str:
        """True facts, and with probability `skill` a move on a shortest walk around the holes."""
        nearer = {cell for cell, left in self.distance.items() if left < self.distance[self.player]}
        best = [name for name in DIRECTIONS if self._neighbour(self.player, name) in nearer]
        move = {"direction": choose(rng, skill, best, list(DIRECTIONS))}
        plan = self.plan.format(**move)
        return write_turn(self._think(self._facts(rng), rng) + plan, "move", move)

    def _facts(self, rng: random.Random) -> list[str]:
        sides = [f"{side} is {what}" for side, what in rng.sample(list(self._sides().items()), 4)]
        here = f"{rng.choice(['I am', 'I stand', 'P is'])} on {cell_name(self.player)}"
        there = f"{rng.choice(['G is', 'the goal is'])} on {cell_name(self.goal)}"
        lies = rng.choice(["The goal lies", "G lies", "From here G is"])
        far = f"{lies} {rng.choice([' and ', ', ']).join(offset(self.player, self.goal))}."
        around = f"{rng.choice(['Next to me', 'Around me', 'I see'])} {', '.join(sides)}."
        return [f"{here}, {there}.", *rng.sample([far, around], 2)]

    def _truths(self) -> dict[str, set[str]]:
        truths = {rf"\b{side} is (\w+)": {name} for side, name in self._sides().items()}
        return truths | {
            r"(?:I am|I stand|P is) on (\w+)": {cell_name(self.player)},
            r"(?:G|goal) is on (\w+)": {cell_name(self.goal)},
            r"\b(\d (?:up|down|left|right))\b": set(offset(self.player, self.goal)),
        }

    def _sides(self) -> dict[str, str]:
        """What is next to the player in each direction; `_neighbour` stays in place at an edge."""
        names = dict.fromkeys(self.hole_cells, "hole") | {self.goal: "goal", self.player: "edge"}
        return {side: names.get(self._neighbour(self.player, side), "ice") for side in DIRECTIONS}

    def _neighbour(self, cell: Cell, direction: str) -> Cell:
        """The next cell in a direction, or the same one at an edge."""
        down, right = DIRECTIONS[direction]
        there = (cell[0] + down, cell[1] + right)
        return there if min(there) >= 0 and max(there) < self.size else cell

    def _play(self, call: Call) -> Effect:
        wish, before = call.arguments["direction"], self.player
        direction = self._slip(wish)
        self.player = self._neighbour(before, direction)
        said = f"You {'moved' if direction == wish else 'slipped'} {direction}"
        said += "." if self.player != before else " against the edge and stayed."
        if self.player == self.goal:
            return Effect(f"{said} You reached the goal.", 1.0, finished=True, success=True)
        if self.player in self.hole_cells:
            return Effect(f"{said} You fell into a hole.", finished=True)
        return Effect(said)

    def _slip(self, wish: str) -> str:
        """The direction that a move takes: to a side of the wished one if it slips."""
        told = f"frozenlake slips {self.seed} {self.turns_left}"
        told += "" if self.shared_slips else f" {self.heard}"
        rng = random.Random(told.encode(errors="replace"))  # a reply may not be valid Unicode
        sides = ("up", "down") if wish in ("left", "right") else ("left", "right")
        return rng.choice(sides) if rng.random() < self.slip else wish

    def _show(self) -> list[str]:
        symbols = dict.fromkeys(self.hole_cells, "O") | {self.goal: "G", self.player: "P"}
        ends = f"P {cell_name(self.player)}, G {cell_name(self.goal)}"
        return [*draw_board(self.size, symbols), f"{ends}, moves left {self.turns_left}"]
