"""Sokoban: push every box onto a target; a wrong push can be final."""

from __future__ import annotations

import functools
import random

from envs import (
    COLUMNS,
    DIRECTIONS,
    Call,
    Cell,
    Effect,
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
