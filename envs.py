"""What a turn of tool calling is, and a first world. It needs the standard library alone.

    env = FrozenLake()                       # or make_env("sokoban") of worlds/
    observation = env.reset(seed=7)          # the first user message
    step = env.step(reply)                   # reply: the whole assistant turn, as text

An environment has four things:

- `tools`: a list of JSON schemas in the OpenAI form, as chat templates take them.
- `system`: the instructions, which say what each symbol means and what each mistake costs.
- `reset(seed) -> str`: begin an episode.
- `step(reply) -> Step`: play one turn. An episode is a pure function of its seed and the replies.

Whatever has these four can be trained in, by its file: `--env FILE.py:NAME` (worlds/imported.py).

The worlds of this project have five more, for the warm start alone: `demonstrate(rng, skill)`
writes the turn of a scripted player, `skill` is how often that player usually picks a best move,
`choices()` lists the best calls of the turn and all calls that make sense, `done` says that the
episode is over, and `malformed` counts the malformed turns.

The bytes that we label ACTION (segment.py) are exactly the bytes that the environment parses as
the call: those between the first `<tool_call>` and the next `</tool_call>`, or the end of the turn.
A reply is untrusted text. Nothing in it makes an environment raise, and no observation repeats any
of it, so that a model cannot write its own tool response.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from typing import NamedTuple

DIRECTIONS = {"left": (0, -1), "down": (1, 0), "right": (0, 1), "up": (-1, 0)}
COLUMNS = "abcdefghi"
TYPES = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,),
    "array": (list,), "object": (dict,),
}  # fmt: skip
Cell = tuple[int, int]  # (row, column), both counted from 0


class Step(NamedTuple):
    """What one turn led to. `success` implies `finished`, which implies `done`."""

    observation: str  # what the model reads next
    reward: float
    done: bool  # the episode is over
    success: bool = False  # the task is solved
    finished: bool = False  # the game itself ended (goal, hole, purchase), not the limit of turns
    facts: int = 0  # how many facts about the board the turn's reasoning states
    true_facts: int = 0  # how many of these are true


class Call(NamedTuple):
    """A tool call whose name and arguments have passed the tool's schema."""

    name: str
    arguments: dict


class Effect(NamedTuple):
    """What a call did to a world, and the message that describes it."""

    message: str
    reward: float = 0.0
    finished: bool = False
    success: bool = False


# --------------------------------------------------------------------------- the protocol of a turn
def tool_schema(name: str, description: str, properties: dict[str, dict]) -> dict:
    """A tool in the OpenAI form. Every property is required, and no other is allowed.

    Raises ValueError for a property whose type `check_arguments` does not know.
    """
    unknown = [schema for schema in properties.values() if schema.get("type") not in TYPES]
    if unknown:
        raise ValueError(f"{name} takes {unknown}: a type is one of {', '.join(TYPES)}")
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def write_turn(thought: str, name: str, arguments: dict) -> str:
    """An assistant turn with a valid structure, in the form that demonstrations have."""
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<think>\n{thought}\n</think>\n<tool_call>\n{call}\n</tool_call>"


def read_call(reply: str, tools: list[dict]) -> tuple[Call | None, str]:
    """Parse a turn into the call to execute and a sentence on what is wrong with the turn.

    The call is None if there is none that can be executed. The sentence is "" if the turn is
    well-formed. Both may be there: a call whose ACTION text is valid is executed, because training
    credits that text, while a turn that lacks its `<think>` block or its closing tag counts as
    malformed all the same, and pays the penalty (our decision; the paper does not say).

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
    except (ValueError, RecursionError):  # RecursionError: brackets nested a thousand deep
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
    """One sentence on how `arguments` break a tool's schema, or "" if they fit it. What an array or
    an object contains is left to the world to check."""
    properties = schema["properties"]
    required = schema.get("required", [])
    if not isinstance(arguments, dict) or not set(required) <= set(arguments) <= set(properties):
        if len(required) == len(properties):
            return f"The arguments must be a JSON object with exactly: {', '.join(required)}."
        optional = [name for name in properties if name not in required]
        return (
            f"The arguments must be a JSON object with: {', '.join(required)}; "
            f"optional are: {', '.join(optional)}."
        )
    for name, value in arguments.items():
        wanted = properties[name]["type"]
        if type(value) not in TYPES[wanted]:  # isinstance would take True for an integer
            return f"The argument {name} must be of type {wanted}."
        choices = properties[name].get("enum", [value])
        if value not in choices:
            return f"The argument {name} must be one of {', '.join(map(str, choices))}."
    return ""


def check_tools(tools: object) -> str:
    """What keeps `tools` from being schemas that `read_call` can use, as the end of a sentence, or
    "" if they are. Tools that `tool_schema` made are."""
    if not isinstance(tools, list) or not tools:
        return "its tools are no list with at least one schema"
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") != "function":
            return f'tools[{number}] is not of the form {{"type": "function", "function": {{...}}}}'
        name = function.get("name")
        if not isinstance(name, str) or not name:
            return f"tools[{number}] has no name"
        if problem := check_parameters(function.get("parameters")):
            return f"the tool {name} {problem}"
    return ""


def check_parameters(parameters: object) -> str:
    """What keeps a schema of parameters from being one that `check_arguments` can use, or ""."""
    if not isinstance(parameters, dict) or parameters.get("type") != "object":
        return "has parameters that are not of the type object"
    properties = parameters.get("properties")
    if not isinstance(properties, dict):
        return "has parameters without properties"
    for name, schema in properties.items():
        kind = schema.get("type") if isinstance(schema, dict) else None
        if kind not in list(TYPES):
            return f"takes {name} of the type {kind}: choose one of {', '.join(TYPES)}"
        choices = schema.get("enum", ["any"])
        if not isinstance(choices, list) or not choices:
            return f"takes {name} with an enum that is no list of choices"
    required = parameters.get("required", [])
    if not isinstance(required, list) or any(name not in list(properties) for name in required):
        return f"requires {required}, which is no list of its properties"
    return ""


def check_facts(reply: str, truths: dict[str, set[str]]) -> tuple[int, int]:
    """How many facts the thought of a turn states, and how many of them are true.

    The thought is the text in the first `<think>` block. `truths` maps a regular expression with
    one group to the set of what that group may match in a true statement.

    >>> truths = {r"P is on (\\w+)": {"b2"}, r"G is on (\\w+)": {"c3"}}
    >>> check_facts("<think>P is on b2, G is on c2</think>", truths)
    (2, 1)
    """
    thought = reply.partition("<tool_call>")[0].partition("<think>")[2].partition("</think>")[0]
    thought = thought[:10_000]  # real thoughts are shorter; untrusted text may not be
    stated = 0
    true = 0
    for pattern, allowed in truths.items():
        for statement in re.findall(pattern, thought):
            stated += 1
            if statement in allowed:
                true += 1
    return stated, true


# ---------------------------------------------------------------------------- what the worlds share
# Filler sentences for the demonstrated thoughts of every world. As in real thoughts, most words say
# nothing about the board at hand.
COMMON_FILLER = """Let me think about this step by step. I should not hurry. One thing after
    another. I read the last message again. That tells me where things are. Each turn counts, so I
    want to be careful. It is easy to make a mistake here. I check this once more. The rules are
    simple, but the details matter. So far I understand the situation. There may be more than one
    good way. I keep the task in mind. A tool call comes after this. I only get a few turns. Now I
    have what I need to decide. It helps to say what I see."""


class World:
    """What all worlds share: a turn is checked, played and paid in the same way.

    A world sets `tools` and `system`, and defines four methods: `_lay_out` makes the game of a
    seed, `_play` does what a call asks for, `_truths` gives `check_facts` what is true now, and
    `_show` returns the lines of an observation.
    """

    unit = "move"  # how the texts of this world call a turn
    turn_cost = 0.0  # taken off the reward of every turn
    format_penalty = -0.1  # added to the reward of a malformed turn (the paper's value)
    filler = ""  # this world's own filler sentences
    done = True  # there is no episode before the first reset

    def __init__(self, limit: int, thoughts: int):
        """limit: how many turns an episode has. thoughts: how many filler sentences each
        demonstrated thought contains, beside its facts. Raises ValueError if there are not so many.
        """
        self.limit = limit
        self.thoughts = thoughts
        all_filler = " ".join((COMMON_FILLER + self.filler).split())
        self.filler_sentences = re.findall(r"\w[^.]*\.", all_filler)
        bounded(thoughts=(thoughts, 0, len(self.filler_sentences)))
        self.penalty_text = f"costs a {self.unit} and {-self.format_penalty:g}."
        self.rules = (
            f"Think in <think> </think>, then call one tool. A malformed turn {self.penalty_text}"
        )

    def reset(self, seed: int) -> str:
        """Begin the episode of `seed` and return the first observation."""
        self.seed = seed
        self.turns_left = self.limit
        self.malformed = 0
        self.done = False
        self._lay_out(seed)
        return "\n".join(self._show())

    def step(self, reply: str) -> Step:
        """Play one assistant turn. Raises RuntimeError if no episode has begun, or it is over."""
        if self.done:
            raise RuntimeError("this episode is over: call reset(seed) before another step")
        facts, true_facts = check_facts(reply, self._truths())
        call, problem = read_call(reply, self.tools)
        self.turns_left -= 1
        effect = self._play(call) if call else Effect("")
        self.done = effect.finished or self.turns_left == 0
        message = effect.message
        reward = effect.reward - self.turn_cost
        if problem:
            self.malformed += 1
            message = f"{problem} That {self.penalty_text} {message}".rstrip()
            reward += self.format_penalty
        if self.done and not effect.finished:
            message += f" You have no {self.unit}s left."
        return Step(
            observation="\n".join([message, *self._show()]),
            reward=reward,
            done=self.done,
            success=effect.success,
            finished=effect.finished,
            facts=facts,
            true_facts=true_facts,
        )

    def _think(self, facts: list[str], rng: random.Random) -> str:
        """A demonstrated thought: the facts in their order, with filler sentences that are drawn at
        random and stand anywhere before, between and after them."""
        filler = rng.sample(self.filler_sentences, self.thoughts)
        is_fact = [True] * len(facts) + [False] * len(filler)  # by place in the thought
        rng.shuffle(is_fact)
        next_fact = iter(facts)
        next_filler = iter(filler)
        return " ".join(next(next_fact if here else next_filler) for here in is_fact)


def choose(rng: random.Random, skill: float, best: list, options: list):
    """One of the best options with probability `skill`, else one of the others. If there are only
    best options, or only others, it is one of those."""
    others = [option for option in options if option not in best]
    wants_best = rng.random() < skill
    if best and (wants_best or not others):
        return rng.choice(best)
    return rng.choice(others)


def bounded(**options: tuple[float, float, float]) -> None:
    """Raise ValueError for an option (value, lowest, highest) that is out of its bounds."""
    for name, (value, low, high) in options.items():
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}: choose {low} to {high}")


def cell_name(cell: Cell) -> str:
    """The name of a cell in all texts: column a to i, then row from 1.

    >>> cell_name((0, 2))
    'c1'
    """
    return f"{COLUMNS[cell[1]]}{cell[0] + 1}"


def shortest_walk(start: Cell, end: Cell) -> list[str]:
    """The moves from one cell to another, rows first.

    >>> shortest_walk((0, 1), (2, 0))
    ['down', 'down', 'left']
    """
    down = end[0] - start[0]
    right = end[1] - start[1]
    vertical = ["down" if down > 0 else "up"] * abs(down)
    horizontal = ["right" if right > 0 else "left"] * abs(right)
    return vertical + horizontal


def offset(start: Cell, end: Cell) -> list[str]:
    """The shortest walk in words, one direction each.

    >>> offset((0, 1), (2, 0))
    ['2 down', '1 left']
    """
    walk = shortest_walk(start, end)
    return [f"{walk.count(direction)} {direction}" for direction in dict.fromkeys(walk)]


def draw_board(size: int, symbols: dict[Cell, object]) -> list[str]:
    """One line per row, which begins with the row's number. A cell without a symbol is "_".

    >>> draw_board(2, {(0, 1): "P"})
    ['1 _ P', '2 _ _']
    """
    lines = []
    for row in range(size):
        symbols_of_row = [symbols.get((row, column), "_") for column in range(size)]
        lines.append(" ".join(map(str, [row + 1, *symbols_of_row])))
    return lines


# -------------------------------------------------------------------------------------- frozen lake
class FrozenLake(World):
    """Walk from P to G over slippery ice without falling into a hole O.

    Holes lie anywhere but on one shortest walk from P to G, so that every map can be solved. A move
    slips to one of its two sides with probability `slip`. Whether it slips depends on the seed and
    the turn alone, so all rollouts of a group slip in the same turns. Raises ValueError for options
    that leave no playable map.
    """

    skill = 0.55
    plan = ""  # a thought does not say which move follows: the tool call alone decides it
    filler = """The ice is slippery, so a move may go to one side. A hole would end the game at
        once. I do not want to fall into the water. The shortest way is not always the safest. A
        longer way around a hole can be worth it. The edge of the lake stops me, but it costs a
        move. I compare where I stand with where I want to be. Slipping could bring me next to a
        hole. With some luck I get there in time. The lake is small, so I can see all of it. Rows
        are counted from the top. Columns go from left to right. I have to watch how many moves
        remain. Each step should bring me nearer."""

    def __init__(self, size: int = 4, holes: int = 3, slip: float = 0.1, moves: int = 6,
                 thoughts: int = 6):  # fmt: skip
        super().__init__(limit=moves, thoughts=thoughts)
        bounded(size=(size, 2, 9), slip=(slip, 0, 0.9), moves=(moves, size - 1, 99))
        # One move less than there are, where the map allows it, which leaves room for a slip.
        self.longest_walk = max(size - 1, min(moves - 1, 2 * size - 2))
        bounded(holes=(holes, 0, size * size - self.longest_walk - 1))
        self.size = size
        self.holes = holes
        self.slip = slip
        direction = {"type": "string", "enum": list(DIRECTIONS)}
        self.tools = [tool_schema("move", "Move one cell.", {"direction": direction})]
        self.system = (
            f"You are P on a frozen lake: rows 1 to {size} from the top, columns a to "
            f"{COLUMNS[size - 1]} from the left. G is the goal, O a hole, _ ice. Reach G in "
            f"{moves} moves for a reward of 1; a hole ends the game. A move slips to one side with "
            f"probability {slip:g}. {self.rules}"
        )

    def _lay_out(self, seed: int) -> None:
        rng = random.Random(f"frozenlake {seed}")  # a string gives the same draws in any process
        cells = [(row, column) for row in range(self.size) for column in range(self.size)]
        walk = []
        while not self.size - 1 <= len(walk) <= self.longest_walk:
            self.player, self.goal = rng.sample(cells, 2)
            walk = shortest_walk(self.player, self.goal)
        rng.shuffle(walk)
        on_the_walk = set(itertools.accumulate(walk, self._neighbour, initial=self.player))
        self.hole_cells = set(rng.sample(sorted(set(cells) - on_the_walk), self.holes))
        self.distance = {self.goal: 0}  # moves to the goal around the holes, where there is a way
        queue = [self.goal]
        for cell in queue:  # breadth first: the queue grows while it is read
            sides = {self._neighbour(cell, direction) for direction in DIRECTIONS}
            for there in sides - self.hole_cells - set(self.distance):
                self.distance[there] = self.distance[cell] + 1
                queue.append(there)

    def demonstrate(self, rng: random.Random, skill: float) -> str:
        """A turn that states true facts, and with probability `skill` makes a move of a shortest
        walk around the holes; otherwise another move."""
        _, move = choose(rng, skill, *self.choices())
        plan = self.plan.format(**move)
        return write_turn(self._think(self._facts(rng), rng) + plan, "move", move)

    def choices(self) -> tuple[list[Call], list[Call]]:
        """The best calls of this turn, which are the moves of a shortest walk, and all calls."""
        nearer = {cell for cell, left in self.distance.items() if left < self.distance[self.player]}
        options = [Call("move", {"direction": name}) for name in DIRECTIONS]
        best = [
            call
            for call in options
            if self._neighbour(self.player, call.arguments["direction"]) in nearer
        ]
        return best, options

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
        wish = call.arguments["direction"]
        before = self.player
        direction = self._slip(wish)
        self.player = self._neighbour(before, direction)
        message = f"You {'moved' if direction == wish else 'slipped'} {direction}"
        message += "." if self.player != before else " against the edge and stayed."
        if self.player == self.goal:
            return Effect(f"{message} You reached the goal.", 1.0, finished=True, success=True)
        if self.player in self.hole_cells:
            return Effect(f"{message} You fell into a hole.", finished=True)
        return Effect(message)

    def _slip(self, wish: str) -> str:
        """The direction that a move takes: the wished one, or one of its sides if it slips."""
        rng = random.Random(f"frozenlake slips {self.seed} {self.turns_left}")
        sides = ("up", "down") if wish in ("left", "right") else ("left", "right")
        slips = rng.random() < self.slip
        return rng.choice(sides) if slips else wish

    def _show(self) -> list[str]:
        symbols = dict.fromkeys(self.hole_cells, "O") | {self.goal: "G", self.player: "P"}
        ends = f"P {cell_name(self.player)}, G {cell_name(self.goal)}"
        return [*draw_board(self.size, symbols), f"{ends}, moves left {self.turns_left}"]
