"""The picture at the top of the README: one sampled turn, token by token, with what each token
weighs: python results/idea.py"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from actfocus import actfocus_weights  # noqa: E402
from policy import load_policy  # noqa: E402
from rollout import rollout, score_all  # noqa: E402
from segment import Segment  # noqa: E402
from transcripts import add_scale, draw_boxes, lay_out, pieces  # noqa: E402
from warm_start import start_folder  # noqa: E402
from worlds import make_env  # noqa: E402


def main() -> None:
    policy = load_policy(start_folder("frozenlake"))
    rollouts = rollout(policy, lambda: make_env("frozenlake"), range(64), temperature=0.5)
    response = rollouts.response
    reasoning = rollouts.labels == Segment.REASONING
    action = rollouts.labels == Segment.ACTION
    energy = score_all(policy, rollouts, response, temperature=1.0, micro_tokens=8192).energy
    weights = {
        "GRPO": response.float(),
        "ActFocus": actfocus_weights(energy, reasoning, action, response),
    }
    prompt, *rest = pieces(policy, rollouts, row=0)
    turn = []  # the first one
    for piece in rest:
        if piece.position is None:
            break
        turn.append(piece)
    boxes = lay_out(turn)
    lines = boxes[-1].line + 1
    figure = Figure(figsize=(13, 0.8 + 0.55 * lines), layout="constrained")
    for axes, (arm, values) in zip(figure.subplots(2, 1), weights.items(), strict=True):
        axes.set_title(f"{arm}: weight of each sampled token")
        draw_boxes(axes, boxes, values[0].tolist())
    add_scale(figure, shrink=0.9)
    figure.savefig(HERE / "idea.png", dpi=120)


if __name__ == "__main__":
    main()
