"""Both arms over several seeds, each seed a thin line and their mean a thick one:

    python results/seeds.py frozenlake seed0 seed1 seed2

The folders are runs in results/frozenlake that share their settings; the picture is seeds.png
beside them.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from arms import ARMS  # noqa: E402
from report import PANELS, column  # noqa: E402

SHOWN = ("eval_success", "train_success", "reasoning_accuracy")


def main(world: str, *seeds: str) -> None:
    folder = Path(__file__).parent / world
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(SHOWN)), SHOWN, strict=True):
        for arm in ("grpo", "actfocus"):
            label, color = ARMS[arm].label, ARMS[arm].color
            runs = [column(folder / seed / f"{arm}.csv", name) for seed in seeds]
            for iterations, values in runs:
                axes.plot(iterations, values, color=color, linewidth=0.8, alpha=0.45)
            by_iteration = zip(*(values for _, values in runs), strict=True)
            means = [sum(values) / len(values) for values in by_iteration]
            style = "o-" if name == "eval_success" else "-"
            axes.plot(runs[0][0], means, style, color=color, linewidth=2.2, ms=4, label=label)
        title, label = PANELS[name]
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="training iterations", ylabel=label, ylim=(0, 1.1 * axes.dataLim.y1))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    figure.savefig(folder / "seeds.png", dpi=200)


if __name__ == "__main__":
    main(*sys.argv[1:])
