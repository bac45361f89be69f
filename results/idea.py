"""The picture at the top of the README: one sampled turn, token by token, with what each token weighs: python results/idea.py"""

import sys
from pathlib import Path

import matplotlib
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from envs import make_env  # noqa: E402
from policy import load_policy  # noqa: E402
from rollout import rollout, score_all  # noqa: E402
from train_actfocus import ActFocusConfig, actfocus  # noqa: E402
from train_grpo import GRPO  # noqa: E402


def main() -> None:
    policy = load_policy()
    rollouts = rollout(policy, lambda: make_env("frozenlake"), list(range(64)), temperature=0.5)
    frozen = score_all(policy, rollouts, rollouts.response, 1.0, 8192)
    first = rollouts.response[0].int().argmax().item()
    last = first + (~rollouts.response[0, first:]).int().argmax().item()  # the first turn of the first episode
    tokens = [policy.token_bytes(token).decode().replace("\n", "⏎") for token in rollouts.ids[0, first:last].tolist()]

    figure = Figure(figsize=(13, 2.7), layout="constrained")
    colors, scale = matplotlib.colormaps["YlOrRd"], Normalize(0, 1.5)
    for axes, (title, arm) in zip(figure.subplots(2, 1), (("GRPO", GRPO), ("ActFocus", actfocus(ActFocusConfig()))), strict=True):
        axes.set(xlim=(0, 132), ylim=(-1.7, 0.6), title=f"{title}: weight of each sampled token")
        axes.axis("off")
        x, y = 0.0, 0.0
        for token, weight in zip(tokens, arm.weigh(rollouts, frozen)[0, first:last].tolist(), strict=True):
            width = 1.06 * len(token) + 0.5
            if x + width > 131:
                x, y = 0.0, y - 1.1
            box = {"boxstyle": "square,pad=0.22", "facecolor": colors(scale(weight)), "edgecolor": "white"}
            axes.text(x, y, token.replace("$", r"\$"), family="monospace", fontsize=9, bbox=box, color="white" if weight > 1.1 else "black")
            x += width
    figure.colorbar(ScalarMappable(scale, colors), ax=figure.axes, label="weight in the loss", shrink=0.9)
    figure.savefig(HERE / "idea.png", dpi=120)


if __name__ == "__main__":
    main()
