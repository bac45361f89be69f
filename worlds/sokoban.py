"""Sokoban: push every box onto a target. A wrong push can make a level unsolvable."""

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

Boxes = tuple[Cell, ...]  # the cells of the boxes, sorted
State = tuple[Cell, Boxes]  # the cell of the player, and the boxes
UNSOLVABLE = 99  # stands for the moves that a state needs which cannot be solved in time


class Sokoban(World):
    """Push every box X onto a target T. Boxes cannot be pulled, so a wrong push can be final.

    A level is solvable by construction. Its walls and targets are drawn first. A search backwards
    from every solved state then finds how many moves each state needs, and the level begins in one
    that needs at least 2 moves and at most 3 fewer than the episode has.

    The rewards are those of a public implementation of Sokoban divided by ten, so that solving
    earns 1 as in the other worlds: -0.01 for a move, 0.1 for a box on a target (-0.1 if it is
    pushed off again), 1 at the end, and -0.01 for a malformed turn (the paper's -0.1 over ten).
    `size` counts the surrounding wall, as is usual. Raises ValueError for options out of bounds.
    """

    skill = 0.57
    turn_cost = 0.01
    format_penalty = World.format_penalty / 10
    filler = """A box can be pushed, but never pulled. A box in a corner is lost. I have to stand
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
        self.floor, self.targets, (self.player, self.boxes), self.distance = level

    def demonstrate(self, rng: random.Random, skill: float) -> str:
        """A turn that states true facts, and with probability `skill` makes a move that brings the
        solution nearer; otherwise another move."""
        _, move = choose(rng, skill, *self.choices())
        return write_turn(self._think(self._facts(rng), rng), "move", move)

    def choices(self) -> tuple[list[Call], list[Call]]:
        """The best calls of this turn, which bring the solution nearer (none do if the level is
        lost), and all calls."""
        here = self._moves_needed((self.player, self.boxes))
        options = [Call("move", {"direction": name}) for name in DIRECTIONS]
        best = [
            call
            for call in options
            if self._moves_needed(self._after(call.arguments["direction"])) < here
        ]
        return best, options

    def _facts(self, rng: random.Random) -> list[str]:
        """Where everything is, what is around the player, and the push that leads to the solution
        in the fewest moves."""
        where = f"{rng.choice(['I am', 'I stand', 'P is'])} on {cell_name(self.player)}"
        open_targets = [target for target in self.targets if target not in self.boxes]
        for name, cells in (("X", self._boxes_off_target()), ("T", open_targets)):
            for cell in cells:
                where += f", {name} is on {cell_name(cell)}, {name} lies {self._from_player(cell)}"
        sides = [f"{side} is {self._name_of(side)}" for side in rng.sample(list(DIRECTIONS), 4)]
        around = f"{rng.choice(['Next to me', 'Around me', 'I see'])} {', '.join(sides)}."
        pushes = self._pushes()
        if not pushes:
            return [f"{where}.", around, "X is stuck."]
        shuffled = rng.sample(sorted(pushes), len(pushes))  # any of several that are equally good
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

    def _moves_needed(self, state: State) -> int:
        return self.distance.get(state, UNSOLVABLE)

    def _boxes_off_target(self) -> list[Cell]:
        return [box for box in self.boxes if box not in self.targets]

    def _name_of(self, side: str) -> str:
        cell = neighbour(self.player, side)
        if cell not in self.floor:
            return "wall"
        if cell in self.boxes:
            return "box"
        return "target" if cell in self.targets else "floor"

    def _pushes(self) -> dict[tuple[Cell, str], int]:
        """Every push that walls and boxes allow, by the cell to push from and the direction; the
        value is about how many moves walking there, the push and the rest of the level take."""
        pushes = {}
        for box in self.boxes:
            for way in DIRECTIONS:
                start = neighbour(box, way, -1)
                if {start, neighbour(box, way)} <= self.floor - set(self.boxes):
                    walk = len(shortest_walk(self.player, start))  # more if a box is in the way
                    rest = self._moves_needed(self._after(way, start))
                    pushes[start, way] = walk + 1 + rest
        return pushes

    def _after(self, direction: str, player: Cell | None = None) -> State:
        """The state after a move. It is the same state if a wall or a second box is in the way.
        player: the cell to move from; None means where the player stands."""
        if player is None:
            player = self.player
        there = neighbour(player, direction)
        beyond = neighbour(player, direction, 2)
        box_is_blocked = beyond not in self.floor or beyond in self.boxes
        if there not in self.floor or (there in self.boxes and box_is_blocked):
            return player, self.boxes
        return there, with_box_moved(self.boxes, there, beyond)

    def _play(self, call: Call) -> Effect:
        direction = call.arguments["direction"]
        player = self.player
        boxes = self.boxes
        off_target = len(self._boxes_off_target())
        self.player, self.boxes = self._after(direction)
        if self.player == player:
            return Effect(f"You cannot move {direction}.")
        message = f"You {'moved' if self.boxes == boxes else 'pushed the box'} {direction}."
        gain = 0.1 * (off_target - len(self._boxes_off_target()))
        if self._boxes_off_target():
            return Effect(message, gain)
        message += " Every box is on a target."
        return Effect(message, 1 + gain, finished=True, success=True)

    def _show(self) -> list[str]:
        cells = {(row, column) for row in range(self.inside) for column in range(self.inside)}
        symbols = dict.fromkeys(cells - self.floor, "#") | dict.fromkeys(self.targets, "T")
        symbols |= {box: "*" if box in self.targets else "X" for box in self.boxes}
        symbols[self.player] = "+" if self.player in self.targets else "P"
        status = f"P {cell_name(self.player)}"
        for name, cells in (("X", self.boxes), ("T", self.targets)):
            for cell in cells:
                status += f", {name} {cell_name(cell)} {self._from_player(cell)}"
        return [*draw_board(self.inside, symbols), f"{status}, moves left {self.turns_left}"]


def neighbour(cell: Cell, direction: str, steps: int = 1) -> Cell:
    """The cell so many steps in a direction; it may be outside the room."""
    down, right = DIRECTIONS[direction]
    return cell[0] + steps * down, cell[1] + steps * right


def with_box_moved(boxes: Boxes, start: Cell, end: Cell) -> Boxes:
    """The boxes after the one on `start` has moved to `end`; the same if there is none there."""
    return tuple(sorted(end if box == start else box for box in boxes))


@functools.lru_cache(maxsize=1024)  # all rollouts of a group play the same level
def sokoban_level(
    seed: int, inside: int, boxes: int, walls: int, moves: int
) -> tuple[set[Cell], Boxes, State, dict[State, int]]:
    """The level of a seed: the cells that are not wall, the targets, the state that it begins in,
    and the number of moves to the solution, for every state that can be solved in time."""
    rng = random.Random(f"sokoban {seed}")
    cells = [(row, column) for row in range(inside) for column in range(inside)]
    starts = []
    while not starts:
        drawn = rng.sample(cells, boxes + walls)
        targets = tuple(sorted(drawn[:boxes]))
        floor = set(cells) - set(drawn[boxes:])
        distance = solution_lengths(floor, targets, moves)
        fitting = [state for state, left in distance.items() if 2 <= left <= moves - 3]
        starts = [state for state in fitting if not set(state[1]) & set(targets)]
    return floor, targets, rng.choice(starts), distance


def solution_lengths(floor: set[Cell], targets: Boxes, most: int) -> dict[State, int]:
    """The number of moves to the nearest solved state, for every state that needs at most `most`.
    The search is breadth first, begins at the solved states and undoes one move at a time."""
    queue = [(player, targets) for player in sorted(floor - set(targets))]
    distance = dict.fromkeys(queue, 0)
    for player, boxes in queue:  # the queue grows while it is read
        left = distance[player, boxes] + 1
        if left > most:
            break
        for direction in DIRECTIONS:
            before = neighbour(player, direction, -1)
            if before not in floor or before in boxes:
                continue
            # The player walked here, or pushed the box that is now ahead.
            came_from = [(before, boxes)]
            ahead = neighbour(player, direction)
            if ahead in boxes:
                came_from.append((before, with_box_moved(boxes, ahead, player)))
            for state in came_from:
                if state not in distance:
                    distance[state] = left
                    queue.append(state)
    return distance
