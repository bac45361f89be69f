"""All diagnoses of this folder, a row each, from their CSVs:

python -m studies.table
"""

import csv
from pathlib import Path

import numpy as np

from studies.diagnose import spearman

RESULTS = Path(__file__).parents[1] / "results"

HEADS = (
    "run",
    "success",
    "action",
    "decision",
    "reasoning",
    "all",
    "ρ(entropy of the decision, variance)",
    "ρ(success, variance)",
    "ρ(decision, success)",
    "ρ(energy, entropy) of the decision",
)


def row(folder: Path) -> str:
    """One diagnosis: success, the energy's correlation over four choices of tokens, and others."""
    with (folder / "groups.csv").open() as file:
        groups = list(csv.DictReader(file))
    with (folder / "correlations.csv").open() as file:
        table = {(each["signal"], each["tokens"]): each for each in csv.DictReader(file)}
    column = {name: np.array([float(group[name]) for group in groups]) for name in groups[0]}
    cells = [folder.name, f"{column['success'].mean():.0%}"]
    for tokens in ("action", "decision", "reasoning", "all"):
        found = table["energy", tokens]
        rho, low, high = float(found["rho"]), float(found["low"]), float(found["high"])
        cells.append(f"{rho:+.2f} [{low:+.2f}, {high:+.2f}]")
    cells.append(f"{float(table['entropy', 'decision']['rho']):+.2f}")
    cells.append(f"{float(table['success', '']['rho']):+.2f}")
    cells.append(f"{float(table['energy', 'decision']['rho_success']):+.2f}")
    cells.append(f"{spearman(column['energy_decision'], column['entropy_decision']):+.2f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    print(f"| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|")
    for path in sorted((RESULTS / "action-bottleneck").glob("*/correlations.csv")):
        print(row(path.parent))


if __name__ == "__main__":
    main()
