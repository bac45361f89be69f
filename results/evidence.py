"""The pictures of evidence.md that compare.py does not draw, from the tables that it left:

python results/evidence.py
"""

import csv
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from arms import ARMS  # noqa: E402
from report import measures, t_interval  # noqa: E402

HERE = Path(__file__).parent
SHOWN = {"final": "evaluation success after the run, %", "training": "mean training success, %"}


def by_seed(folder: Path) -> dict[tuple[str, float, int], dict[str, float]]:
    """What was measured of each run of a comparison, by arm, learning rate and seed."""
    with (folder / "compare.csv").open(newline="", encoding="utf-8") as file:
        keys = {(row["arm"], float(row["lr"]), int(row["seed"])) for row in csv.DictReader(file)}
    found = {}
    for arm, lr, seed in sorted(keys):
        named = folder / "frozenlake" / f"{arm}-seed{seed}"  # at the default rate
        if not named.exists():
            named = folder / "frozenlake" / f"{arm}-lr{lr:g}-seed{seed}"
        log = named / f"{arm}.csv"
        found[arm, lr, seed] = measures(log, threshold=0.5)
    return found


def draw_rates(folder: Path) -> None:
    """rate.png: both arms at each learning rate, a dot a seed, the mean with its 95 % interval."""
    found = by_seed(folder)
    arms = sorted({arm for arm, _, _ in found}, key=list(ARMS).index)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, 2), SHOWN.items(), strict=True):
        for i, arm in enumerate(arms):
            rates = sorted({lr for each, lr, _ in found if each == arm})
            values = np.array(
                [[run[name] for key, run in found.items() if key[:2] == (arm, lr)] for lr in rates]
            )  # (rates, seeds)
            x = np.array(rates) * 1.04 ** (2 * i - len(arms) + 1)  # side by side
            half = [t_interval(seeds) for seeds in values]
            style = {"color": ARMS[arm].color, "label": ARMS[arm].label}
            axes.errorbar(x, values.mean(1), half, fmt="o-", capsize=3, **style)
            axes.plot(x, values, "_", color=ARMS[arm].color, alpha=0.7)
        axes.set(xscale="log", xlabel="learning rate (Adam)", ylabel=label)
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(
        "FrozenLake, 16 iterations of 64 rollouts: dashes are seeds, bars 95 % intervals"
    )
    figure.savefig(folder / "rate.png", dpi=110)


def draw_prediction(signal: Path, folder: Path) -> None:
    """prediction.png: each arm's signal over noise before training, and what it then gained on GRPO
    in training over the same seeds."""
    with signal.open(newline="", encoding="utf-8") as file:
        ratios = {row["name"]: row for row in csv.DictReader(file)}
    found = by_seed(folder)
    seeds = sorted({seed for _, _, seed in found})
    (rate,) = {lr for _, lr, _ in found}
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for arm in sorted({arm for arm, _, _ in found}, key=list(ARMS).index):
        x = [float(ratios[arm][f"adam_ratio{end}"]) for end in ("_low", "", "_high")]
        gains = [
            found[arm, rate, seed]["training"] - found["grpo", rate, seed]["training"]
            for seed in seeds
        ]
        axes.errorbar(
            x[1], np.mean(gains), yerr=t_interval(gains), xerr=[[x[1] - x[0]], [x[2] - x[1]]],
            fmt="o", capsize=3, color=ARMS[arm].color, label=ARMS[arm].label,
        )  # fmt: skip
    axes.set(
        xlabel="signal / noise of the gradient before training (32 rollouts, as Adam sees it)",
        ylabel="mean training success less GRPO's, points",
        title=f"FrozenLake, {len(seeds)} seeds: bars are 95 % intervals",
    )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "prediction.png", dpi=110)


if __name__ == "__main__":
    draw_rates(HERE / "rate")
    draw_prediction(HERE / "signal" / "frozenlake" / "signal.csv", HERE / "ablations")
