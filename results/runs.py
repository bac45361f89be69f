"""Every training run of this folder, a row an arm, from its CSV: python results/runs.py [folder ...]"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from train_grpo import column, logs  # noqa: E402

HERE = Path(__file__).parent
HEAD = "run | arm | evaluation success, % | training mean | reasoning's true facts, % | entropy, nats"


def row(path: Path) -> str:
    """One arm of one run: evaluations in turn, mean success of all training rollouts, then first and last iteration."""
    names = ("eval_success", "train_success", "reasoning_accuracy", "entropy")
    success, training, facts, entropy = (column(path, name)[1] for name in names)
    evaluations = ", ".join(f"{100 * value:.1f}" for value in success)
    facts = [100 * value for value in facts if not math.isnan(value)]
    true = f"{facts[0]:.0f} to {facts[-1]:.0f}" if facts else "not logged"
    mean, spread = sum(training) / len(training), f"{entropy[0]:.2f} to {entropy[-1]:.2f}"
    return f"| {path.parent.relative_to(HERE)} | {path.stem} | {evaluations} | {mean:.1%} | {true} | {spread} |"


def main(folders: list[str]) -> None:
    print(f"| {HEAD} |\n{'|---' * 6}|")
    for folder in [HERE / name for name in folders] or sorted(HERE.iterdir()):
        for run in sorted(path.parent for path in folder.rglob("config.json")):
            for path in logs(run):
                print(row(path))


if __name__ == "__main__":
    main(sys.argv[1:])
