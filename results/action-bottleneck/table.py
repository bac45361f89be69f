"""All diagnoses of this folder, a row each, from their CSVs: python results/action-bottleneck/table.py"""

import csv
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from diagnose import spearman  # noqa: E402


def main() -> None:
    correlations = "action | decision | reasoning | all | ρ(entropy of the decision, variance) | ρ(success, variance) | ρ(decision, success) | ρ(energy, entropy) of the decision"
    print(f"| run | success | {correlations} |\n" + "|---" * 10 + "|")
    for folder in sorted(path.parent for path in Path(__file__).parent.glob("*/correlations.csv")):
        with (folder / "groups.csv").open() as file:
            groups = list(csv.DictReader(file))
        with (folder / "correlations.csv").open() as file:
            table = {(row["signal"], row["tokens"]): row for row in csv.DictReader(file)}
        success = sum(float(row["success"]) for row in groups) / len(groups)
        cells = []
        for tokens in ("action", "decision", "reasoning", "all"):
            row = table["energy", tokens]
            cells.append(f"{float(row['rho']):+.2f} [{float(row['low']):+.2f}, {float(row['high']):+.2f}]")
        entropy, control = float(table["entropy", "decision"]["rho"]), float(table["success", ""]["rho"])
        mixed = float(table["energy", "decision"]["rho_success"])
        twins = spearman(*(np.array([float(row[f"{signal}_decision"]) for row in groups]) for signal in ("energy", "entropy")))
        print(f"| {folder.name} | {success:.0%} | {' | '.join(cells)} | {entropy:+.2f} | {control:+.2f} | {mixed:+.2f} | {twins:+.2f} |")


if __name__ == "__main__":
    main()
