"""Every training run of this folder, a row an arm, from its CSV: python results/runs.py [folder ...]"""

import csv
import math
import sys
from pathlib import Path

HERE = Path(__file__).parent
HEAD = "run | arm | evaluation success, % | training mean | reasoning's true facts, % | entropy, nats"


def row(path: Path) -> str:
    """One arm of one run: evaluations in turn, mean success of all training rollouts, then first and last iteration."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    values = {name: [float(each[name]) for each in rows if each.get(name)] for name in rows[0]}
    evaluations = ", ".join(f"{100 * value:.1f}" for value in values["eval_success"])
    facts = [100 * value for value in values.get("reasoning_accuracy", []) if not math.isnan(value)]
    true = f"{facts[0]:.0f} to {facts[-1]:.0f}" if facts else "not logged"
    training = sum(values["train_success"]) / len(values["train_success"])
    entropy = f"{values['entropy'][0]:.2f} to {values['entropy'][-1]:.2f}"
    return f"| {path.parent.relative_to(HERE)} | {path.stem} | {evaluations} | {training:.1%} | {true} | {entropy} |"


def main(folders: list[str]) -> None:
    print(f"| {HEAD} |\n{'|---' * 6}|")
    for folder in [HERE / name for name in folders] or sorted(HERE.iterdir()):
        for path in sorted(folder.rglob("*.csv"), key=lambda path: (path.parent, path.stem != "grpo")):
            if path.stem in ("grpo", "actfocus"):
                print(row(path))


if __name__ == "__main__":
    main(sys.argv[1:])
