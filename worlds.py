"""More worlds: Sokoban, Sudoku, a shop, and a lake on which the thought decides; and `make_env`,
which makes any of the five.

    env = make_env("sokoban")                # or frozenlake, sudoku, shop, ...
    env = make_env("frozenlake", thoughts=0, slip=0.2)

Solving any of them earns 1 (Sokoban: up to a tenth more), so that rewards compare. Each checks the
facts that a turn's reasoning states, in the words of the demonstrations, against its state.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator
from typing import NamedTuple

from envs import (
    COLUMNS,
    DIRECTIONS,
    Call,
    Cell,
    Effect,
    FrozenLake,
    World,
    bounded,
    cell_name,
    choose,
    draw_board,
    offset,
    shortest_walk,
    tool_schema,
    write_turn,
)

# ------------------------------------------------------------------------------------------ sokoban
Boxes = tuple[Cell, ...]  # sorted
State = tuple[Cell, Boxes]  # where the player is, where the boxes are


class Sokoban(World):
    """Push every box X onto a target T. Boxes cannot be pulled: a wrong push can be final.

    A level is solvable by construction: its walls and targets are drawn first, a search backwards
    from every solved state finds how many moves each state needs, and the start is drawn from those
    that need from 2 moves to 3 fewer than there are. Rewards are those of a public implementation
    of Sokoban over ten, so that solving earns 1 as elsewhere: -0.01 a move, 0.1 a box on a target
    (-0.1 off), 1 at the end, and -0.01 for a malformed turn (the paper's -0.1 over ten). `size`
    counts the surrounding wall, as is usual. Raises ValueError for options out of bounds.
    """

    skill = 0.57
    turn_cost = 0.01
    format_penalty = World.format_penalty / 10
    sayings = """A box can be pushed, but never pulled. A box in a corner is lost. I have to stand
        behind the box to push it. Walls limit where a box can go. Before a push I think about the
        one after it. A wrong push can be final. Walking around the box takes moves too. The target
        is where the box should end. Moves that push nothing still cost a little. I must get to the
        other side of the box. The room is small and every cell matters. A box at a wall can only
        slide along it. I look for a free cell next to the box. A short plan is better than none."""

    def __init__(
        self, size: int = 6, boxes: int = 1, walls: int = 1, moves: int = 8, thoughts: int = 5
    ):
        super().__init__(limit=moves, thoughts=thoughts)
        bounded(size=(size, 5, 8), boxes=(boxes, 1, 3), walls=(walls, 0, size - 4))
        bounded(moves=(moves, max(6, boxes + 4), 40))  # fewer leave no start for so many boxes
        self.inside = size - 2
        self.boxes_wanted = boxes
        self.walls_wanted = walls
        direction = {"type": "string", "enum": list(DIRECTIONS)}
        self.tools = [tool_schema("move", "Move or push one cell.", {"direction": direction})]
        self.system = (
            f"You are P in a walled room: rows 1 to {self.inside} from the top, columns a to "
            f"{COLUMNS[self.inside - 1]} from the left. _ is floor, # wall, X a box, T a target, * "
            "a box on a target, + you on a target; X and T are given with their way from you. "
            "Walk into a box to push it; you cannot pull, nor push two boxes. Push every box onto "
            f"a target in {moves} moves for a reward of 1; a box on a target is 0.1, off it -0.1, "
            f"a move -0.01. {self.rules}"
        )

    def _lay_out(self, seed: int) -> None:
        level = sokoban_level(seed, self.inside, self.boxes_wanted, self.walls_wanted, self.limit)
        self.free, self.targets, (self.player, self.boxes), self.distance = level

    def demonstrate(self, rng: random.Random, skill: float) -> str:
        """A turn with true facts, and with probability `skill` a move that brings the solution
        nearer; else one of the others."""
        here = self._needs((self.player, self.boxes))
        best = [name for name in DIRECTIONS if self._needs(self._after(name)) < here]
        move = {"direction": choose(rng, skill, best, list(DIRECTIONS))}
        return write_turn(self._think(self._facts(rng), rng), "move", move)

    def _facts(self, rng: random.Random) -> list[str]:
        """Where everything is, what is around, and where a box can next be pushed towards the
        solution (or at all)."""
        where = f"{rng.choice(['I am', 'I stand', 'P is'])} on {cell_name(self.player)}"
        free_targets = [target for target in self.targets if target not in self.boxes]
        for name, cells in (("X", self._loose_boxes()), ("T", free_targets)):
            for cell in cells:
                where += f", {name} is on {cell_name(cell)}, {name} lies {self._from_player(cell)}"
        sides = [f"{side} is {self._name_of(side)}" for side in rng.sample(list(DIRECTIONS), 4)]
        around = f"{rng.choice(['Next to me', 'Around me', 'I see'])} {', '.join(sides)}."
        pushes = self._pushes()
        if not pushes:
            return [f"{where}.", around, "X is stuck."]
        shuffled = rng.sample(sorted(pushes), len(pushes))  # so that ties fall to any
        start, way = min(shuffled, key=pushes.get)
        return [f"{where}.", around, f"From {cell_name(start)} X goes {way}."]

    def _truths(self) -> dict[str, set[str]]:
        pushes = {f"{cell_name(start)} X goes {way}" for start, way in self._pushes()}
        sides = {rf"\b{side} is (\w+)": {self._name_of(side)} for side in DIRECTIONS}
        return sides | {
            r"(?:I am|I stand|P is) on (\w+)": {cell_name(self.player)},
            r"X is on (\w+)": set(map(cell_name, self.boxes)),
            r"T is on (\w+)": set(map(cell_name, self.targets)),
            r"X lies ([\w ]+)": set(map(self._from_player, self.boxes)),
            r"T lies ([\w ]+)": set(map(self._from_player, self.targets)),
            r"From (\w+ X goes \w+)": pushes,
            r"X is (stuck)": set() if pushes else {"stuck"},
        }

    def _from_player(self, cell: Cell) -> str:
        return " ".join(offset(self.player, cell)) or "here"

    def _needs(self, state: State) -> int:
        return self.distance.get(state, 99)  # 99: lost, or not to be solved in time

    def _loose_boxes(self) -> list[Cell]:
        return [box for box in self.boxes if box not in self.targets]

    def _name_of(self, side: str) -> str:
        cell = neighbour(self.player, side)
        if cell not in self.free:
            return "wall"
        if cell in self.boxes:
            return "box"
        return "target" if cell in self.targets else "floor"

    def _pushes(self) -> dict[tuple[Cell, str], int]:
        """Every push that walls and boxes allow, as (cell to push from, direction): about how many
        moves it and the rest take."""
        pushes = {}
        for box in self.boxes:
            for way in DIRECTIONS:
                start = neighbour(box, way, -1)
                if {start, neighbour(box, way)} <= self.free - set(self.boxes):
                    walk = len(shortest_walk(self.player, start))  # boxes may be in the way
                    pushes[start, way] = walk + 1 + self._needs(self._after(way, start))
        return pushes

    def _after(self, direction: str, player: Cell | None = None) -> State:
        """The state after a move of the player (None: from where it is); the same state if a wall
        or a second box is in the way."""
        player = player or self.player
        there, beyond = neighbour(player, direction), neighbour(player, direction, 2)
        blocked = beyond not in self.free or beyond in self.boxes
        if there not in self.free or (there in self.boxes and blocked):
            return player, self.boxes
        return there, with_box_moved(self.boxes, there, beyond)

    def _play(self, call: Call) -> Effect:
        direction = call.arguments["direction"]
        player, boxes, loose = self.player, self.boxes, len(self._loose_boxes())
        self.player, self.boxes = self._after(direction)
        if self.player == player:
            return Effect(f"You cannot move {direction}.")
        said = f"You {'moved' if self.boxes == boxes else 'pushed the box'} {direction}."
        gain = 0.1 * (loose - len(self._loose_boxes()))
        if self._loose_boxes():
            return Effect(said, gain)
        return Effect(f"{said} Every box is on a target.", 1 + gain, finished=True, success=True)

    def _show(self) -> list[str]:
        cells = {(row, column) for row in range(self.inside) for column in range(self.inside)}
        symbols = dict.fromkeys(cells - self.free, "#") | dict.fromkeys(self.targets, "T")
        symbols |= {box: "*" if box in self.targets else "X" for box in self.boxes}
        symbols[self.player] = "+" if self.player in self.targets else "P"
        status = f"P {cell_name(self.player)}"
        for name, cells in (("X", self.boxes), ("T", self.targets)):
            for cell in cells:
                status += f", {name} {cell_name(cell)} {self._from_player(cell)}"
        return [*draw_board(self.inside, symbols), f"{status}, moves left {self.turns_left}"]


def neighbour(cell: Cell, direction: str, steps: int = 1) -> Cell:
    down, right = DIRECTIONS[direction]
    return cell[0] + steps * down, cell[1] + steps * right


def with_box_moved(boxes: Boxes, start: Cell, end: Cell) -> Boxes:
    """The boxes after the one on `start`, if there is one, has moved to `end`."""
    return tuple(sorted(end if box == start else box for box in boxes))


@functools.lru_cache(maxsize=1024)  # the rollouts of a group share their level
def sokoban_level(
    seed: int, inside: int, boxes: int, walls: int, moves: int
) -> tuple[set[Cell], Boxes, State, dict[State, int]]:
    """The cells that are not wall, the targets, the start, and how many moves every state needs
    that can be solved in time."""
    rng = random.Random(f"sokoban {seed}")
    cells = [(row, column) for row in range(inside) for column in range(inside)]
    starts = []
    while not starts:
        drawn = rng.sample(cells, boxes + walls)
        targets = tuple(sorted(drawn[:boxes]))
        free = set(cells) - set(drawn[boxes:])
        distance = solution_lengths(free, targets, moves)
        fitting = [state for state, left in distance.items() if 2 <= left <= moves - 3]
        starts = [state for state in fitting if not set(state[1]) & set(targets)]
    return free, targets, rng.choice(starts), distance


def solution_lengths(free: set[Cell], targets: Boxes, most: int) -> dict[State, int]:
    """Moves to the nearest solved state, for every state that needs at most `most` (breadth first,
    moves undone)."""
    queue = [(player, targets) for player in sorted(free - set(targets))]
    distance = dict.fromkeys(queue, 0)
    for player, boxes in queue:  # grows while it is read
        left = distance[player, boxes] + 1
        if left > most:
            break
        for direction in DIRECTIONS:
            before = neighbour(player, direction, -1)
            if before not in free or before in boxes:
                continue
            came_from = [(before, boxes)]  # by walking, or by pushing the box that is now ahead
            ahead = neighbour(player, direction)
            if ahead in boxes:
                came_from.append((before, with_box_moved(boxes, ahead, player)))
            for state in came_from:
                if state not in distance:
                    distance[state] = left
                    queue.append(state)
    return distance


# ------------------------------------------------------------------------------------------- sudoku
SUDOKU_CELLS = [(row, column) for row in range(4) for column in range(4)]


class Sudoku(World):
    """Fill a 4x4 board so that every row, column and 2x2 block holds 1 to 4. Each puzzle has
    exactly one solution.

    As in sudoku apps, a digit is only accepted in an empty cell where it is right; any other is
    refused, and the last allowed mistake ends the game. So a cell pays once: half of the reward of
    1 is shared by the blanks, half is for the finished board. `hint` shows what the empty cell with
    the fewest choices sees: looking up a row, a column and a block is beyond the built-in model.
    Raises ValueError for options out of bounds.
    """

    unit = "step"
    skill = 0.45
    sayings = """Each row needs every digit once. The same holds for columns. A block has two rows
        and two columns. A digit that is seen cannot be written again. The cell with the fewest
        choices comes first. Too many mistakes end the game. A wrong digit is refused. When a single
        digit is left, it must be that one. Filling one cell helps with the others. I go through the
        digits in order. Guessing is a risk here. Given cells stay as they are. The board gets
        easier as it fills. I compare the row, the column and the block."""

    def __init__(self, blanks: int = 6, mistakes: int = 3, steps: int = 16, hint: bool = True,
                 thoughts: int = 7):  # fmt: skip
        super().__init__(limit=steps, thoughts=thoughts)
        bounded(steps=(steps, 1, 64), mistakes=(mistakes, 1, 99))
        bounded(blanks=(blanks, 1, min(steps, 12)))  # it takes four clues to fix a 4x4 board
        self.blanks = blanks
        self.mistakes = mistakes
        self.hint = hint
        number = {"type": "integer", "enum": [1, 2, 3, 4]}
        letter = {"type": "string", "enum": list(COLUMNS[:4])}
        properties = {"row": number, "column": letter, "digit": number}
        self.tools = [tool_schema("place", "Write a digit.", properties)]
        hinted = "A cell sees the digits of its row, column and block. " if hint else ""
        self.system = (
            "A 4x4 sudoku: rows 1 to 4 from the top, columns a to d from the left, _ is empty. "
            f"{hinted}Each row, column and 2x2 block must hold 1, 2, 3 and 4. A wrong digit is "
            f"refused; mistake {mistakes} ends the game. Fill it in {steps} steps for a reward of "
            f"1, half of it shared by the cells as they are filled. {self.rules}"
        )

    def _lay_out(self, seed: int) -> None:
        rng = random.Random(f"sudoku {seed}")
        self.solution = next(fillings({}, rng))
        solutions = []
        while len(solutions) != 1:
            blank = rng.sample(SUDOKU_CELLS, self.blanks)
            self.board = {cell: digit for cell, digit in self.solution.items() if cell not in blank}
            solutions = list(fillings(self.board, rng))
        self.given = set(self.board)
        self.mistakes_left = self.mistakes

    def demonstrate(self, rng: random.Random, skill: float) -> str:
        """A turn about the empty cell with the fewest choices: with probability `skill` its digit,
        else another."""
        cell = self._tightest()
        thought = self._think(self._facts(cell, rng), rng)
        digit = choose(rng, skill, [self.solution[cell]], [1, 2, 3, 4])
        place = {"row": cell[0] + 1, "column": COLUMNS[cell[1]], "digit": digit}
        return write_turn(thought, "place", place)

    def _tightest(self) -> Cell:
        """The empty cell with the fewest choices: the one that sees most digits."""
        empty = [cell for cell in SUDOKU_CELLS if cell not in self.board]
        return max(empty, key=lambda cell: len(self._seen(cell)))

    def _facts(self, cell: Cell, rng: random.Random) -> list[str]:
        name = cell_name(cell)
        seen = self._seen(cell)
        look = f"{rng.choice(['I look at', 'Now', 'Next'])} {name}."
        counts = f"{16 - len(self.board)} cells are empty, {self.turns_left} steps are left."
        may = f"{name} {rng.choice(['can be', 'may hold'])} {in_words({1, 2, 3, 4} - seen)}."
        return [look, counts, f"{name} sees {in_words(seen)}. {may}"]

    def _truths(self) -> dict[str, set[str]]:
        truths = {
            r"\b(\d+) cells are empty": {str(16 - len(self.board))},
            r"\b(\d+) steps are left": {str(self.turns_left)},
        }
        for cell in SUDOKU_CELLS:
            name = cell_name(cell)
            seen = self._seen(cell)
            choices = set() if cell in self.board else {in_words({1, 2, 3, 4} - seen)}
            truths[rf"\b{name} sees ([1-4 ]*[1-4]|nothing)"] = {in_words(seen)}
            truths[rf"\b{name} (?:can be|may hold) ([1-4 ]*[1-4]|nothing)"] = choices
        return truths

    def _seen(self, cell: Cell) -> set[int]:
        """The digits of the other cells of its row, column and block."""
        return {self.board[peer] for peer in peers_of(cell) if peer in self.board}

    def _play(self, call: Call) -> Effect:
        digit = call.arguments["digit"]
        cell = (call.arguments["row"] - 1, COLUMNS.index(call.arguments["column"]))
        name = cell_name(cell)
        if cell in self.given:
            return Effect(f"{name} is given and stays.")
        if cell in self.board:
            return Effect(f"{name} is filled already.")
        if digit != self.solution[cell]:
            self.mistakes_left -= 1
            clash = "sees" if digit in self._seen(cell) else "is not"
            return Effect(f"{name} {clash} {digit}: a mistake.", finished=not self.mistakes_left)
        self.board[cell] = digit
        said = f"You wrote {digit} on {name}."
        gain = 0.5 / self.blanks
        if self.board != self.solution:
            return Effect(said, gain)
        return Effect(f"{said} It is solved.", gain + 0.5, finished=True, success=True)

    def _show(self) -> list[str]:
        lines = draw_board(4, self.board)
        empty = 16 - len(self.board)
        if self.hint and empty:
            cell = self._tightest()
            lines.append(f"fewest choices {cell_name(cell)}, sees {in_words(self._seen(cell))}")
        left = f"steps left {self.turns_left}, mistakes left {self.mistakes_left}"
        return [*lines, f"empty {empty}, {left}"]


def in_words(digits: set[int]) -> str:
    return " ".join(map(str, sorted(digits))) or "nothing"


@functools.cache
def peers_of(cell: Cell) -> list[Cell]:
    """The other cells of the row, of the column and of the block that a cell is in."""
    row, column = cell
    peers = [(row, i) for i in range(4)] + [(i, column) for i in range(4)]
    peers += [(row // 2 * 2 + i, column // 2 * 2 + j) for i in (0, 1) for j in (0, 1)]
    return [peer for peer in peers if peer != cell]


def fillings(board: dict[Cell, int], rng: random.Random) -> Iterator[dict[Cell, int]]:
    """Every way to fill a board by the rules, in random order."""
    cell = next((cell for cell in SUDOKU_CELLS if cell not in board), None)
    if cell is None:
        yield board
        return
    seen = {board.get(peer) for peer in peers_of(cell)}
    for digit in rng.sample(range(1, 5), 4):
        if digit not in seen:
            yield from fillings({**board, cell: digit}, rng)


# --------------------------------------------------------------------------------------------- shop
KINDS = ("shirt", "coat", "scarf", "hat", "bag", "rug")
COLOURS = ("red", "blue", "green", "black", "white")
MATERIALS = ("cotton", "wool", "linen", "silk")
SIZES = ("S", "M", "L")
PLACES = ("first", "second", "third")  # of what a search found


class Item(NamedTuple):
    code: str
    title: str
    material: str
    sizes: tuple[str, ...]
    price: int


class Shop(World):
    """Find, look into and buy what an instruction asks for, in a small web shop in the spirit of
    WebShop.

    The catalogue is made from the seed: one item fits, two share its title (colour and kind) and
    mostly fail elsewhere, the rest have other titles. Search knows titles only; material and sizes
    are seen by opening an item. Any purchase ends the episode. It earns 1 if title, material, size
    and price all fit (success), else half of the share of the four that do.
    """

    unit = "turn"
    skill = 0.55
    sayings = """A title has a colour and a kind. I cannot see the material before I open an item.
        Sizes are shown only inside. A cheap item is no use if it does not fit. The price must stay
        in the budget. I can buy only once. Searching by both words gives the best list. Several
        items share a title. Opening an item costs a turn. I should not buy blindly. All wishes have
        to be met. What fails on one point is out. The list is short, so I read it all. If nothing
        fits, another search is needed."""

    def __init__(self, items: int = 30, turns: int = 8, thoughts: int = 4):
        super().__init__(limit=turns, thoughts=thoughts)
        bounded(items=(items, 8, 80), turns=(turns, 3, 40))
        self.items = items
        text = {"type": "string"}
        size = {"type": "string", "enum": list(SIZES)}
        self.tools = [
            tool_schema("search", "List items by words of their title.", {"query": text}),
            tool_schema("open", "See material and sizes of an item.", {"item": text}),
            tool_schema("buy", "Buy an item and leave.", {"item": text, "size": size}),
        ]
        self.system = (
            f"You shop. A title is a colour and a kind. A search lists at most {len(PLACES)} items "
            "by code, title and price; opening an item shows its material and sizes. Buy once, in "
            f"{turns} turns: the reward is 1 if title, material, size and price all are as wanted, "
            f"else half of the share of these four that are. {self.rules}"
        )

    def _lay_out(self, seed: int) -> None:
        rng = random.Random(f"shop {seed}")
        titles = [f"{colour} {kind}" for colour in COLOURS for kind in KINDS]
        self.title = rng.choice(titles)
        self.material = rng.choice(MATERIALS)
        self.size = rng.choice(SIZES)
        self.budget = rng.randrange(30, 80, 10)
        others = [title for title in titles if title != self.title]
        same = [self.title] * len(PLACES)
        names = same + [rng.choice(others) for _ in range(self.items - len(same))]
        codes = [f"{letter}{digit}" for letter in COLUMNS for digit in range(1, 10)]
        stock = []
        for code, title in zip(rng.sample(codes, self.items), names, strict=True):
            sizes = tuple(size for size in SIZES if rng.random() < 0.6) or (rng.choice(SIZES),)
            material = rng.choice(MATERIALS)
            stock.append(Item(code, title, material, sizes, price=rng.randrange(10, 100, 10)))
        # the first one fits
        sizes = tuple(size for size in SIZES if size in stock[0].sizes or size == self.size)
        price = rng.randrange(10, self.budget + 10, 10)
        stock[0] = stock[0]._replace(material=self.material, sizes=sizes, price=price)
        self.stock = {item.code: item for item in sorted(stock)}
        self.results: list[Item] = []  # of the last search
        self.opened: set[str] = set()

    def demonstrate(self, rng: random.Random, skill: float) -> str:
        """A turn with true facts about the list, and with probability `skill` the best act: buy
        what fits, else open what may, else search for the title. The other acts are as sloppy ones
        as people do: a search by one word, opening any item of the list, buying any with any size.
        """
        verdicts = self._verdicts().items()
        best = [("buy", {"item": code, "size": self.size}) for code, v in verdicts if v == "fits"]
        best = best or [("open", {"item": code}) for code, v in verdicts if v == "may fit"]
        best = best or [("search", {"query": self.title})]
        sloppy = [("search", {"query": rng.choice(self.title.split())})]
        if self.results:
            code = rng.choice(self.results).code
            sloppy += [("open", {"item": code}), ("buy", {"item": code, "size": rng.choice(SIZES)})]
        thought = self._think(self._facts(rng), rng)
        return write_turn(thought, *choose(rng, skill, best, sloppy))

    def _facts(self, rng: random.Random) -> list[str]:
        want = rng.choice(["I want", "I look for"])
        wish = f"{want} a {self.title} of {self.material}, size {self.size}, up to {self.budget}."
        if not self.results:
            return [wish, "The list is empty."]
        verdicts = zip(PLACES, self._verdicts().items(), strict=False)
        said = ", ".join(f"{place} {code} {verdict}" for place, (code, verdict) in verdicts)
        return [wish, f"{rng.choice(['Of these', 'Here'])} {said}."]

    def _verdicts(self) -> dict[str, str]:
        """What is known of every item of the list, by code: "fits", "may fit" while it is not open,
        or the first thing that it "fails on"."""
        verdicts = {}
        for item in self.results:
            verdict = "may fit"
            met = {"title": item.title == self.title, "price": item.price <= self.budget}
            if item.code in self.opened:
                verdict = "fits"
                met["material"] = item.material == self.material
                met["size"] = self.size in item.sizes
            failing = [f"fails on {name}" for name, holds in met.items() if not holds]
            verdicts[item.code] = failing[0] if failing else verdict
        return verdicts

    def _truths(self) -> dict[str, set[str]]:
        verdicts = self._verdicts()
        listed = "|".join(verdicts) or "none"
        known = {rf"\b{code} (fits|may fit|fails on \w+)": {verdicts[code]} for code in verdicts}
        return known | {
            r"(?:want|look for) a (\w+ \w+)": {self.title},
            r"of (\w+), size": {self.material},
            r"size (\w)\b": {self.size},
            r"up to (\d+)": {str(self.budget)},
            r"The list is (empty)": set() if self.results else {"empty"},
            # nothing is known of items that are not in the list
            rf"\b((?!{listed})[a-i][1-9] (?:fits|may fit|fails on \w+))": set(),
        }

    def _play(self, call: Call) -> Effect:
        if call.name == "search":
            return self._search(call.arguments["query"])
        item = self.stock.get(call.arguments["item"])
        if item not in self.results:
            return Effect("The list has no such item.")
        if call.name == "buy":
            return self._buy(item, call.arguments["size"])
        self.opened.add(item.code)
        return Effect(f"You opened {item.code}.")

    def _search(self, query: str) -> Effect:
        words = set(re.findall(r"[a-z]+", query.lower()))
        found = {item: len(words & set(item.title.split())) for item in self.stock.values()}
        ranked = sorted(found, key=lambda item: (-found[item], item.code))
        self.results = [item for item in ranked if found[item]][: len(PLACES)]
        if not self.results:
            return Effect("No title has any of these words.")
        return Effect(f"Found {len(self.results)}.")

    def _buy(self, item: Item, size: str) -> Effect:
        if size not in item.sizes:
            return Effect(f"{item.code} is not to be had in size {size}.")
        met = [item.title == self.title, item.price <= self.budget]
        met += [item.material == self.material, size == self.size]
        reward = 1.0 if all(met) else sum(met) / 8
        said = f"You bought {item.code} in size {size}."
        return Effect(said, reward, finished=True, success=all(met))

    def _show(self) -> list[str]:
        lines = []
        for place, item in zip(PLACES, self.results, strict=False):
            inside = f" {item.material} {' '.join(item.sizes)}" if item.code in self.opened else ""
            lines.append(f"- {place} {item.code} {item.title} ${item.price}{inside}")
        wanted = f"{self.title}, {self.material}, size {self.size}, at most ${self.budget}"
        return [*lines, f"Wanted: {wanted}. Turns left {self.turns_left}"]


# ------------------------------------------------------------------------ when the thought decides
class PlannedLake(FrozenLake):
    """FrozenLake, but a demonstrated thought ends with its decision ("So I go left."), and the call
    only repeats it. ActFocus should not help here: what can be learned is decided in reasoning
    tokens (results/evidence.md)."""

    plan = " So I go {direction}."


ENVIRONMENTS = {
    "frozenlake": FrozenLake,
    "sokoban": Sokoban,
    "sudoku": Sudoku,
    "shop": Shop,
    "frozenlake-planned": PlannedLake,
}


def make_env(name: str, **options):
    """An environment by name, with its options: `make_env("frozenlake", size=5, slip=0.2)`.

    Raises ValueError for a name that is none, or options that leave no game.
    """
    if name not in ENVIRONMENTS:
        choices = ", ".join(ENVIRONMENTS)
        raise ValueError(f"there is no environment {name!r}: choose one of {choices}")
    return ENVIRONMENTS[name](**options)
