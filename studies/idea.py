"""The picture at the top of the README: one sampled turn, token by token, with what each token
weighs: python -m studies.idea"""

from matplotlib.figure import Figure

from actfocus import actfocus_weights
from policy import load_policy
from rollout import rollout, score_all
from studies.data import FIGURES
from support.transcripts import add_scale, draw_boxes, lay_out, pieces
from support.warm_start import start_folder
from worlds import make_env


def main() -> None:
    policy = load_policy(start_folder("frozenlake"))
    rollouts = rollout(policy, lambda: make_env("frozenlake"), range(64), temperature=0.5)
    response = rollouts.response
    reasoning = rollouts.reasoning
    action = rollouts.action
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
    figure.savefig(FIGURES / "idea.png", dpi=120)


if __name__ == "__main__":
    main()
