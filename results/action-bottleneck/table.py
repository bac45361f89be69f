"""The README's table of diagnoses, from the CSVs beside this file: python results/action-bottleneck/table.py"""

import csv
from pathlib import Path


def main() -> None:
    correlations = "action | decision | reasoning | all | ρ(entropy of the decision, variance) | ρ(success, variance) | ρ(decision, success)"
    print(f"| run | success | {correlations} |\n" + "|---" * 9 + "|")
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
        print(f"| {folder.name} | {success:.0%} | {' | '.join(cells)} | {entropy:+.2f} | {control:+.2f} | {mixed:+.2f} |")


if __name__ == "__main__":
    main()
