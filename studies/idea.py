"""The picture at the top of the README: the turn that stands above it, token by token, with what
each token weighs: python -m studies.idea"""

from actfocus import actfocus_weights
from policy import load_policy
from rollout import rollout, score_all
from studies.data import FIGURES
from support.transcripts import after_instructions, draw_panels, first_turn, lay_out, pieces
from support.warm_start import start_folder
from worlds import make_env

ROW = 1  # the first episode whose thought is true and whose move is bad


def main() -> None:
    policy = load_policy(start_folder("frozenlake"))
    rollouts = rollout(policy, lambda: make_env("frozenlake"), range(64), temperature=0.5)
    response = rollouts.response
    reasoning = rollouts.reasoning
    action = rollouts.action
    energy = score_all(policy, rollouts, response, temperature=1.0, micro_tokens=8192).energy
    weights = {
        "GRPO": response[ROW].float(),
        "ActFocus": actfocus_weights(energy, reasoning, action, response)[ROW],
    }
    prompt, turn, _ = first_turn(pieces(policy, rollouts, ROW))
    print(after_instructions(prompt) + "".join(piece.text for piece in turn))
    panels = {f"{arm}: weight of each sampled token": row.tolist() for arm, row in weights.items()}
    draw_panels(FIGURES / "idea.png", lay_out(turn), panels)


if __name__ == "__main__":
    main()
