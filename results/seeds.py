"""Both arms over several seeds, each seed a thin line and their mean a thick one: python results/seeds.py frozenlake seed0 seed1 seed2

The folders are runs of this folder's world that share their settings; the picture is results/<world>/seeds.png.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from train_grpo import ARMS, column  # noqa: E402

PANELS = {
    "eval_success": ("128 fixed episodes, temperature 0.5", "success rate"),
    "train_success": ("Training rollouts, temperature 1", "success rate"),
    "reasoning_accuracy": ("Facts stated in reasoning", "share that is true"),
}


def main(world: str, *seeds: str) -> None:
    folder, figure = Path(__file__).parent / world, Figure(figsize=(13, 3.8), layout="constrained")
    for axes, (name, (title, label)) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for arm, (shown, color) in ARMS.items():
            runs = [column(folder / seed / f"{arm}.csv", name) for seed in seeds]
            for iterations, values in runs:
                axes.plot(iterations, values, color=color, linewidth=0.8, alpha=0.45)
            means = [sum(values) / len(values) for values in zip(*(values for _, values in runs), strict=True)]
            axes.plot(runs[0][0], means, "o-" if name == "eval_success" else "-", color=color, linewidth=2.2, label=shown)
        axes.set(title=title, xlabel="training iterations", ylabel=label, ylim=(0, 1.1 * axes.dataLim.y1))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(folder / "seeds.png", dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
