"""The README's table of diagnoses, from the CSVs beside this file: python results/bottleneck/table.py"""

import csv
from pathlib import Path

print("| run | success | action tokens | action | decision | reasoning | all | success rate itself | ρ(action, success) |")
print("|---|---|---|---|---|---|---|---|---|")
for folder in sorted(path.parent for path in Path(__file__).parent.glob("*/correlations.csv")):
    with (folder / "groups.csv").open() as file:
        groups = list(csv.DictReader(file))
    with (folder / "correlations.csv").open() as file:
        table = {(row["signal"], row["tokens"]): row for row in csv.DictReader(file)}
    success, share = (sum(float(row[name]) for row in groups) / len(groups) for name in ("success", "action_fraction"))
    cells = []
    for tokens in ("action", "decision", "reasoning", "all"):
        row = table["energy", tokens]
        cells.append(f"{float(row['rho']):+.2f} [{float(row['low']):+.2f}, {float(row['high']):+.2f}]")
    control, mixed = float(table["success", ""]["rho"]), float(table["energy", "action"]["rho_success"])
    print(f"| {folder.name} | {success:.0%} | {share:.0%} | {' | '.join(cells)} | {control:+.2f} | {mixed:+.2f} |")
