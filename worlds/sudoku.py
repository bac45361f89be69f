"""Sudoku on a board of 4 x 4: place digits one at a time."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator

from envs import (
    COLUMNS,
    Call,
    Cell,
    Effect,
    World,
    bounded,
    cell_name,
    choose,
    draw_board,
    tool_schema,
    write_turn,
)

SUDOKU_CELLS = [(row, column) for row in range(4) for column in range(4)]


class Sudoku(World):
    """Fill a 4x4 board so that every row, column and 2x2 block holds 1 to 4. Each puzzle has
    exactly one solution.

    As in sudoku apps, a digit is accepted only in an empty cell where it is right. Any other digit
    is refused, and the last allowed mistake ends the game. So each cell pays once: half of the
    reward of 1 is shared by the blank cells, and half is for the finished board. An observation
    also names the empty cell with the fewest choices and the digits that this cell sees, because
    looking these up in a row, a column and a block is beyond the built-in model. Raises ValueError
    for options out of bounds.
    """

    unit = "step"
    skill = 0.45
    filler = """Each row needs every digit once. The same holds for columns. A block has two rows
        and two columns. A digit that is seen cannot be written again. The cell with the fewest
        choices comes first. Too many mistakes end the game. A wrong digit is refused. When a single
        digit is left, it must be that one. Filling one cell helps with the others. I go through the
        digits in order. Guessing is a risk here. Given cells stay as they are. The board gets
        easier as it fills. I compare the row, the column and the block."""

    def __init__(self, blanks: int = 6, mistakes: int = 3, steps: int = 16, thoughts: int = 7):
        super().__init__(limit=steps, thoughts=thoughts)
        bounded(steps=(steps, 1, 64), mistakes=(mistakes, 1, 99))
        bounded(blanks=(blanks, 1, min(steps, 12)))  # it takes four clues to fix a 4x4 board
        self.blanks = blanks
        self.mistakes = mistakes
        number = {"type": "integer", "enum": [1, 2, 3, 4]}
        letter = {"type": "string", "enum": list(COLUMNS[:4])}
        properties = {"row": number, "column": letter, "digit": number}
        self.tools = [tool_schema("place", "Write a digit.", properties)]
        self.system = (
            "A 4x4 sudoku: rows 1 to 4 from the top, columns a to d from the left, _ is empty. "
            "A cell sees the digits of its row, column and block. Each row, column and 2x2 block "
            "must hold 1, 2, 3 and 4. A wrong digit is refused; "
            f"mistake {mistakes} ends the game. Fill it in {steps} steps for a reward of 1, half "
            f"of it shared by the cells as they are filled. {self.rules}"
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
        """A turn that fills the empty cell with the fewest choices: with probability `skill` with
        the right digit, otherwise with another."""
        cell = self._tightest()
        thought = self._think(self._facts(cell, rng), rng)
        digit = choose(rng, skill, [self.solution[cell]], [1, 2, 3, 4])
        place = {"row": cell[0] + 1, "column": COLUMNS[cell[1]], "digit": digit}
        return write_turn(thought, "place", place)

    def choices(self) -> tuple[list[Call], list[Call]]:
        """The best calls of this turn, which are the right digits of all empty cells, and all calls
        that write a digit on an empty cell."""
        options = {}
        for row, column in SUDOKU_CELLS:
            if (row, column) not in self.board:
                for digit in (1, 2, 3, 4):
                    place = {"row": row + 1, "column": COLUMNS[column], "digit": digit}
                    options[row, column, digit] = Call("place", place)
        empty = [cell for cell in SUDOKU_CELLS if cell not in self.board]
        best = [options[*cell, self.solution[cell]] for cell in empty]
        return best, list(options.values())

    def _tightest(self) -> Cell:
        """The empty cell with the fewest choices, which is the one that sees the most digits."""
        empty = [cell for cell in SUDOKU_CELLS if cell not in self.board]
        return max(empty, key=lambda cell: len(self._seen(cell)))

    def _facts(self, cell: Cell, rng: random.Random) -> list[str]:
        """Which cell the turn is about, what is left to do, and what that cell sees and can be."""
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
        message = f"You wrote {digit} on {name}."
        gain = 0.5 / self.blanks
        if self.board != self.solution:
            return Effect(message, gain)
        return Effect(f"{message} It is solved.", gain + 0.5, finished=True, success=True)

    def _show(self) -> list[str]:
        lines = draw_board(4, self.board)
        empty = 16 - len(self.board)
        if empty:
            cell = self._tightest()
            lines.append(f"fewest choices {cell_name(cell)}, sees {in_words(self._seen(cell))}")
        left = f"steps left {self.turns_left}, mistakes left {self.mistakes_left}"
        return [*lines, f"empty {empty}, {left}"]


def in_words(digits: set[int]) -> str:
    """Digits in order, as texts write them.

    >>> in_words({3, 1}), in_words(set())
    ('1 3', 'nothing')
    """
    return " ".join(map(str, sorted(digits))) or "nothing"


@functools.cache
def peers_of(cell: Cell) -> list[Cell]:
    """The other cells of the row, the column and the block of a cell; those of the block that also
    share its row or column come twice."""
    row, column = cell
    peers = [(row, i) for i in range(4)] + [(i, column) for i in range(4)]
    peers += [(row // 2 * 2 + i, column // 2 * 2 + j) for i in (0, 1) for j in (0, 1)]
    return [peer for peer in peers if peer != cell]


def fillings(board: dict[Cell, int], rng: random.Random) -> Iterator[dict[Cell, int]]:
    """Yield every way to complete a board by the rules, in random order."""
    cell = next((cell for cell in SUDOKU_CELLS if cell not in board), None)
    if cell is None:
        yield board
        return
    seen = {board.get(peer) for peer in peers_of(cell)}
    for digit in rng.sample(range(1, 5), 4):
        if digit not in seen:
            yield from fillings({**board, cell: digit}, rng)
