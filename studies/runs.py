"""Every training run of this folder, a row an arm, from its CSV:

python -m studies.runs               # or: python -m studies.runs sudoku shop/short-thoughts
"""

import math
import sys
from pathlib import Path

from support.logs import column, log_files

HEADS = (
    "run",
    "arm",
    "evaluation success, %",
    "training mean",
    "reasoning's true facts, %",
    "entropy, nats",
)

RESULTS = Path(__file__).parents[1] / "results"


def row(path: Path) -> str:
    """One arm of one run: evaluations in turn, mean success of all training rollouts, then first
    and last iteration."""
    success = column(path, "eval_success")[1]
    training = column(path, "train_success")[1]
    entropy = column(path, "entropy")[1]
    facts = [value for value in column(path, "reasoning_accuracy")[1] if not math.isnan(value)]
    cells = [
        str(path.parent.relative_to(RESULTS)),
        path.stem,
        ", ".join(f"{100 * value:.1f}" for value in success),
        f"{sum(training) / len(training):.1%}",
        f"{100 * facts[0]:.0f} to {100 * facts[-1]:.0f}" if facts else "not logged",
        f"{entropy[0]:.2f} to {entropy[-1]:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main(folders: list[str]) -> None:
    print(f"| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|")
    for folder in [RESULTS / name for name in folders] or [RESULTS]:
        for config in sorted(folder.rglob("config.json")):
            for path in log_files(config.parent):
                if config.parent.suffix != ".partial":  # compare.py is at it
                    print(row(path))


if __name__ == "__main__":
    main(sys.argv[1:])
