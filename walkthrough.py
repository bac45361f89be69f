"""One training step, stage by stage, on real data: what ActFocus changes in it, and what that does.

    python walkthrough.py                          # 20 seconds on a laptop
    python walkthrough.py --env sudoku --seed 1

The stages have the numbers and the names that they have in the README and in train_grpo.py. Four
rollouts of one prompt are played. Then GRPO and ActFocus each make one update from the same model,
so that the two can be compared. A real iteration plays eight prompts in groups of eight, makes an
update for each of several mini-batches, and has an entropy bonus in its loss.
"""

from __future__ import annotations

import argparse
import textwrap

import torch
from torch.nn.functional import pad
from transformers.utils import logging as transformers_logging

from actfocus import actfocus_weights, clipped_loss, group_advantages
from fused_loss import fused_policy_loss
from policy import load_policy
from rollout import rollout, score_all, scored_hidden
from support import logs
from support.transcripts import TERMINAL_WIDTH as WIDTH
from support.transcripts import (
    encodable,
    first_turn,
    on_one_line,
    pieces,
    print_token_table,
    print_tokens,
    print_weight_shares,
)
from support.warm_start import start_folder
from worlds import ENVIRONMENTS, make_env

GROUP_SIZE = 4
LEARNING_RATE = 3e-4  # the default of train_actfocus.py for the built-in models (but the shop's)


def stage(number: str, name: str, explanation: str) -> None:
    print("\n" + f"== {number} {name} ".ljust(WIDTH, "="))
    print(paragraph(explanation) + "\n")


def paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH)


def say(text: str) -> None:
    print("\n" + paragraph(text))


def quote(text: str) -> None:
    for line in encodable(text).strip().splitlines():
        print(textwrap.fill(line, WIDTH, initial_indent="  | ", subsequent_indent="  |   "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--env",
        default="frozenlake",
        choices=ENVIRONMENTS,
        help="The world: one of those that have a built-in model.",
    )
    parser.add_argument("--seed", type=int, default=0, help="The seed of the sampling, from 0 on.")
    args = parser.parse_args()
    if args.seed < 0:
        parser.error(f"--seed is {args.seed}: it must not be negative")
    torch.set_num_threads(1)  # so that the same machine prints the same digits every time
    transformers_logging.disable_progress_bar()

    stage("1", "Load the policy", f"""
        The policy is a small language model that has learned to play {args.env} badly, by
        imitation. A copy of it, the reference, stays as it is for the whole training.
        """)  # fmt: skip
    policy = load_policy(start_folder(args.env))
    reference = policy.frozen_copy()
    parameters = sum(parameter.numel() for parameter in policy.model.parameters())
    print(f"{parameters:,} parameters, a vocabulary of {len(policy.head)} tokens")

    stage("2", "Evaluate", """
        Skipped here. Every few iterations, a training run plays fixed episodes that it does not
        train on, and counts how many succeed.
        """)  # fmt: skip

    stage("3", "Play groups", f"""
        The policy plays one prompt {GROUP_SIZE} times, at temperature 1: these rollouts are a
        group. A group whose rewards are all equal teaches nothing, so we take the first prompt
        (number 0, 1, 2, ...) whose rewards differ.
        """)  # fmt: skip
    for prompt_seed in range(1000):
        seeds = [prompt_seed] * GROUP_SIZE
        rollouts = rollout(policy, lambda: make_env(args.env), seeds, sampling_seed=args.seed)
        if rollouts.rewards.min() < rollouts.rewards.max():
            break
    best = int(rollouts.rewards.argmax())
    prompt, turn, answer = first_turn(pieces(policy, rollouts, best))
    print(f"Prompt {prompt_seed}, as the model reads it:\n")
    quote(prompt)
    print(
        f"\nThe first turn of rollout {best} (it has the highest reward), as the model wrote it:\n"
    )
    quote("".join(piece.text for piece in turn))
    if answer:
        print("\nWhat the model reads next, the answer of the world:\n")
        quote(answer)

    stage("4", "Segment", """
        Each token that the model wrote has a class: reasoning between the think tags, action
        between the tool_call tags, and format for the tags and all else. A token that belongs to
        two classes, such as a tag with the line end after it, gets one of them: action takes
        precedence over reasoning, and reasoning over format. Here is the turn again, with the
        number of tokens of each part.
        """)  # fmt: skip
    response = rollouts.response  # (4, T) bool: what the model wrote
    reasoning = rollouts.reasoning  # (4, T) bool
    action = rollouts.action  # (4, T) bool
    print_tokens(turn, rollouts.labels[best])

    stage("5", "Advantages", """
        The advantage of a rollout is its reward less the mean of its group, divided by the group's
        standard deviation. All tokens of a rollout share it, because nobody knows which of them
        earned the reward.
        """)  # fmt: skip
    advantages = group_advantages(rollouts.rewards, GROUP_SIZE)  # (4,)
    print("rollout   turns   tokens   reward   advantage")
    for i in range(GROUP_SIZE):
        turns, tokens = rollouts.turns[i].item(), response[i].sum().item()
        reward, advantage = rollouts.rewards[i].item(), advantages[i].item()
        print(f"{i:7}{turns:8}{tokens:9}{reward:9.2f}{advantage:+12.2f}")

    stage("6a", "The reference reads the rollouts", """
        Its energy at a token is minus the logsumexp of the logits that predict the token: the
        higher, the less sure the reference is of what comes. The next column is the probability
        that the reference gave to the token that was then written. Before training, reference and
        policy are the same model.
        """)  # fmt: skip
    reference_stats = score_all(reference, rollouts, action, temperature=1.0, micro_tokens=8192)
    energy = reference_stats.energy  # (4, T), of the action tokens; nothing else is needed
    columns = {"energy": energy[best], "probability": reference_stats.logprob[best].exp()}
    print_token_table(turn, rollouts.labels[best], columns, only_action=True)
    in_call = [piece for piece in turn if action[best, piece.position]]
    if in_call:
        unsure = max(in_call, key=lambda piece: energy[best, piece.position])
        say(f"""
            The reference was least sure where it had to predict "{on_one_line([unsure]).strip()}".
            """)

    stage("6b", "Token weights", """
        In the update, the weights are all that ActFocus changes. Under GRPO every token weighs 1.
        Under ActFocus a reasoning token weighs alpha = 0.1, an action token
        1 + 0.5 * sigmoid((E - mu) / sigma) with its energy E, and a format token 1; mu and sigma
        are the mean and the standard deviation of the energies of all action tokens of the batch.
        """)  # fmt: skip
    mu, sigma = energy[action].mean(), energy[action].std(correction=0)
    print(f"mu = {mu:.2f}, sigma = {sigma:.2f}\n")
    weights = {
        "GRPO": actfocus_weights(energy, reasoning, action, response, alpha=1.0, beta=0.0),
        "ActFocus": actfocus_weights(energy, reasoning, action, response, alpha=0.1, beta=0.5),
    }  # (4, T) each
    columns = {"energy": energy[best].masked_fill(~action[best], torch.nan)}
    columns |= {name: w[best] for name, w in weights.items()}
    print_token_table(turn, rollouts.labels[best], columns)
    say("""
        The loss divides by the sum of all weights, so what counts is each class's share of that
        sum. Over the four rollouts these are the shares:
        """)
    print()
    print_weight_shares(rollouts.labels, weights)
    mean_weight = weights["ActFocus"][response].mean()
    reasoning_factor = weights["ActFocus"][reasoning].mean() / mean_weight
    action_factor = weights["ActFocus"][action].mean() / mean_weight
    say(f"""
        So under ActFocus a reasoning token counts {reasoning_factor:.2f} times as much as under
        GRPO, and an action token {action_factor:.2f} times as much.
        """)

    stage("7", "Mini-batch updates", """
        The loss is L = -sum(w * min(rho * A, clip(rho, 0.8, 1.28) * A)) / sum(w), over all tokens
        that the model wrote: w is the weight, A the advantage, and rho the probability of the token
        now, divided by its probability when it was played. We compute it by this formula, by
        clipped_loss of actfocus.py, and by the fused loss of training, which never holds all logits
        at once.
        """)  # fmt: skip
    A = advantages[:, None].expand(response.shape)  # (4, T)
    old_logprob = rollouts.old_logprob  # (4, T)
    with torch.no_grad():
        logits = policy.model(rollouts.ids).logits  # (4, T, V): those at t - 1 predict the token t
    logprob = logits[:, :-1].log_softmax(-1).gather(-1, rollouts.ids[:, 1:, None]).squeeze(-1)
    logprob = pad(logprob, (1, 0))  # (4, T)
    rho = (logprob - old_logprob).exp()
    gain = torch.minimum(rho * A, rho.clamp(0.8, 1.28) * A)
    print("            by formula   clipped_loss   fused_policy_loss")
    change, log = {}, {}
    for name, w in weights.items():
        by_formula = -(w * gain).sum() / w.sum()
        by_function = clipped_loss(logprob, old_logprob, A, w)
        # One update, which begins at the weights that the policy was loaded with.
        policy.model.load_state_dict(reference.model.state_dict())
        optimizer = torch.optim.Adam(policy.model.parameters(), lr=LEARNING_RATE)
        hidden, targets = scored_hidden(policy, rollouts, torch.arange(GROUP_SIZE), response)
        fused = fused_policy_loss(
            hidden, policy.head, targets, old_logprob[response], A[response], w[response]
        )
        fused.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"{name:9}{by_formula:+13.6f}{by_function:+15.6f}{fused.loss.item():+20.6f}")
        after = score_all(policy, rollouts, response, temperature=1.0, micro_tokens=8192)
        change[name] = after.logprob - logprob  # (4, T)
        log[name] = {"loss": fused.loss.item(), "grad_norm": norm.item()}
    furthest = (rho[response] - 1).abs().max().item()
    say(f"""
        Before its first update the policy is still the one that played, so rho is 1 everywhere (but
        for {furthest:.0e} of rounding), nothing is clipped, and the loss is minus the weighted mean
        of the advantages. Its value says little; it is its gradient that makes tokens of rollouts
        with a positive advantage more probable, and those of the others less.
        """)
    say("""
        Then each method made one update with Adam, from the same weights. This is how much it
        changed the log-probability of a call, and that of a thought, on average over the turns of
        the rollouts that won, which means that they did better than the mean of their group, and of
        those that lost. A change of +0.01 makes a call 1 % more probable. Compare the two methods
        in a row, and not calls with thoughts: most tokens of a call are certain already and cannot
        become more probable, while those of a thought can.
        """)
    print()
    won = (advantages > 0)[:, None]  # (4, 1) bool
    print("                    turns      GRPO   ActFocus")
    for kind, tokens in {"calls": action, "thoughts": reasoning}.items():
        for outcome, of_these in {"won": won, "lost": ~won}.items():
            turns = rollouts.turns[of_these[:, 0]].sum().item()
            grpo, actfocus = (change[name][tokens & of_these].sum() / turns for name in weights)
            print(f"{kind} that {outcome}".ljust(19) + f"{turns:6}{grpo:+10.3f}{actfocus:+11.3f}")

    stage("8", "Log", """
        A training run adds a row to a table after each iteration. These are the main columns, for
        this group and the update of ActFocus. The one to watch is train_success.
        """)  # fmt: skip
    row = logs.outcomes(rollouts, "train") | log["ActFocus"]
    row |= logs.batch_statistics(rollouts, weights["ActFocus"], A, policy.end_of_turn)
    for name, value in row.items():
        text = f"{name:23}{value:9.3f}  {logs.COLUMNS[name]}"
        print(textwrap.fill(text, WIDTH, subsequent_indent=" " * 34))

    stage("9", "Draw", """
        Skipped here, because a curve takes many such steps. `python train_actfocus.py` makes them
        with both methods, and draws curves.png. What you have seen is one step: the same rollouts
        and the same advantages, with other weights. Whether that helps is told in the README, under
        "Does it help?".
        """)  # fmt: skip


if __name__ == "__main__":
    main()
