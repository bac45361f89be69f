"""Transcripts to look at: every sampled token coloured by its weight in the loss.

    save_episodes(out, "grpo", 0, policy, episodes, stats, weights)   # before training
    save_episodes(out, "grpo", 6, policy, episodes, stats, weights)   # after six iterations
    write_episodes_page(out)                                           # episodes.html, for all arms

    python -m studies.diagnose --env sokoban      # leaves tokens.html and tokens.png in its folder

The pages open from disk, load nothing and run nothing. What a model writes is untrusted: it is
escaped, and whatever cannot be seen is written out.
"""

from __future__ import annotations

import functools
import html
import json
import math
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from arms import ARMS
from energy import TokenStats
from policy import Policy
from rollout import Rollouts
from segment import Segment
from support.folder import writing
from support.logs import arm_file, arm_names, column, title_of, whole_file

COLORS = matplotlib.colormaps["YlOrRd"]
SCALE = Normalize(0, 2)  # of weights
DARK = 1.4  # the weight from which on text is white
LINE_LENGTH = 100  # of a picture, in characters
FONT_SIZE = 9  # points
CHARACTER_WIDTH = 0.602 * FONT_SIZE / 72  # inches; 0.602 em in matplotlib's DejaVu Sans Mono
LINE_HEIGHT = 0.22  # inches
SHOWN_EPISODES = 4  # of an evaluation, on episodes.html


class Piece(NamedTuple):
    """A sampled token, or all the text between two of them."""

    text: str
    position: int | None  # in the episode; None: not sampled


class Box(NamedTuple):
    """Where a piece, or a line of one, stands in a picture."""

    text: str
    position: int | None
    x: int  # in characters
    line: int


class Token(NamedTuple):
    """A sampled token and what a page says of it."""

    text: str
    kind: str  # the name of its Segment
    weight: float  # in the loss
    energy: float  # of the frozen model at the position that predicts the token, as is the entropy
    entropy: float  # in nats
    logprob: float  # of the policy that sampled it, at the sampling temperature
    frozen_logprob: float  # of the frozen model, at the same temperature


class Episode(NamedTuple):
    """A transcript as a page shows it: plain values, so that it can be kept in a JSON file."""

    success: bool
    reward: float
    turns: int
    pieces: list[Token | str]  # a str is text that was not sampled


def printable(text: str) -> str:
    """The text with anything invisible (control characters, changes of direction) written as an
    escape; line ends stay.

    >>> print(printable("a\\x00b\\u202ec\\nd"))
    a\\x00b\\u202ec
    d
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def pieces(policy: Policy, rollouts: Rollouts, row: int) -> list[Piece]:
    """An episode as text: a piece per sampled token, and one for the text in between."""
    ids = rollouts.ids[row, : rollouts.lengths[row]].tolist()
    response = rollouts.response[row].tolist()
    found, between = [], []
    for position, token in enumerate(ids):
        if not response[position]:
            between.append(token)
            continue
        if between:
            found.append(Piece(printable(policy.tokenizer.decode(between)), None))
            between = []
        text = policy.bytes_of[token].decode(errors="replace")
        if not text:  # a control token: by its name
            text = policy.tokenizer.convert_ids_to_tokens(token) or f"<{token}>"
        found.append(Piece(printable(text), position))
    if between:
        found.append(Piece(printable(policy.tokenizer.decode(between)), None))
    return found


def described(
    policy: Policy, rollouts: Rollouts, row: int, stats: TokenStats, weights: Tensor
) -> Episode:
    """An episode with all that a page says of its tokens. stats: of the frozen model; they and
    the weights are (B, T)."""
    of_tokens = (weights, stats.energy, stats.entropy, rollouts.old_logprob, stats.logprob)
    numbers = torch.stack([values[row].float() for values in of_tokens], dim=1).tolist()  # (T, 5)
    labels = rollouts.labels[row].tolist()
    shown = []
    for text, position in pieces(policy, rollouts, row):
        if position is None:
            shown.append(text)
            continue
        kind = Segment(labels[position]).name
        shown.append(Token(text, kind, *(round(number, 4) for number in numbers[position])))
    return Episode(
        success=rollouts.success[row].item(),
        reward=rollouts.rewards[row].item(),
        turns=rollouts.turns[row].item(),
        pieces=shown,
    )


# -------------------------------------------------------------------------------- episodes.html
def shown_episodes(rollouts: Rollouts, group_size: int) -> Rollouts:
    """The episodes of an evaluation that episodes.html shows: the first rollout of each of the
    first prompts. This rule looks neither at the arm nor at how an episode ended, so that every
    arm shows the same episodes, before training and after.

    rollouts: the whole evaluation, in consecutive groups of `group_size` rollouts of one prompt.
    """
    first_of_each_prompt = torch.arange(0, len(rollouts.ids), group_size)
    return rollouts.take(first_of_each_prompt[:SHOWN_EPISODES])


def save_episodes(
    out: Path, arm_name: str, iteration: int, policy: Policy, rollouts: Rollouts,
    stats: TokenStats, weights: Tensor,
) -> None:  # fmt: skip
    """Keep a few evaluation episodes for episodes.html, as JSON in out/episodes: those before
    training (iteration 0) in <arm>-before.json, any later ones in <arm>-after.json, in place of
    earlier ones. A run that is stopped and resumed so has those of before training, too.

    policy: its tokenizer alone is used. rollouts: from `shown_episodes`. stats: (B, T) statistics
    of the frozen model that training started from, for every sampled token; its log-probability at
    the temperature that the rollouts were sampled at. weights: (B, T), those that the arm gives
    these tokens in its loss. Raises OSError.
    """
    rows = range(len(rollouts.ids))
    episodes = [described(policy, rollouts, row, stats, weights) for row in rows]
    kept = {"iteration": iteration, "episodes": episodes}
    when = "before" if iteration == 0 else "after"
    folder = out / "episodes"
    with writing(folder):
        folder.mkdir(exist_ok=True)
    with whole_file(folder / f"{arm_name}-{when}.json") as aside:
        aside.write_text(json.dumps(kept), encoding="utf-8")


def load_episodes(path: Path) -> tuple[int, list[Episode]]:
    """The iteration and the episodes of a file that `save_episodes` has written."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    episodes = []
    for success, reward, turns, shown in kept["episodes"]:
        tokens = [piece if isinstance(piece, str) else Token(*piece) for piece in shown]
        episodes.append(Episode(success, reward, turns, tokens))
    return kept["iteration"], episodes


def write_episodes_page(out: Path) -> Path | None:
    """Write episodes.html from whatever `save_episodes` has kept so far; returns its path, or None
    if nothing has been kept. It reads files alone, no model. Raises OSError."""
    saved = {}  # arm, "before" or "after" -> iteration, episodes
    for arm_name in arm_names(out):
        for when in ("before", "after"):
            path = arm_file(out, arm_name, f"episodes/{arm_name}-{when}.json")
            if path.exists():
                saved[arm_name, when] = load_episodes(path)
    if not saved:
        return None
    number = max(len(episodes) for _, episodes in saved.values())
    body = [overview(out, saved, number)]
    for index in range(number):
        body.append(f'<h2 id="episode{index + 1}">Episode {index + 1}</h2>')
        for arm_name in arms_of(saved):
            body.append(before_and_after(saved, arm_name, index))
    page = page_of(f"Episodes before and after training: {title_of(out)}", "".join(body))
    with whole_file(out / "episodes.html") as aside:
        aside.write_text(page, encoding="utf-8")
    return out / "episodes.html"


Saved = dict[tuple[str, str], tuple[int, list[Episode]]]


def arms_of(saved: Saved) -> list[str]:
    """The arms that have saved something, in the order of the run."""
    return list(dict.fromkeys(arm_name for arm_name, _ in saved))


def overview(out: Path, saved: Saved, number: int) -> str:
    """A table with a line for each arm: how each episode ended before and after, and the success
    rate of the whole evaluation, to which the few episodes on the page belong."""
    heads = [f'<th><a href="#episode{i + 1}">episode {i + 1}</a></th>' for i in range(number)]
    lines = [f"<tr><th></th><th></th>{''.join(heads)}<th>all evaluation episodes</th></tr>"]
    for (arm_name, _), (iteration, episodes) in saved.items():
        cells = [f"<td>{badge(episode)}</td>" for episode in episodes]
        cells += ["<td></td>"] * (number - len(episodes))
        rate = success_rate(arm_file(out, arm_name, f"{arm_name}.csv"), iteration)
        arm = html.escape(ARMS[arm_name].label)
        line = f"<th>{arm}</th><td>{moment(iteration)}</td>{''.join(cells)}<td>{rate}</td>"
        lines.append(f"<tr>{line}</tr>")
    return f"{RULE}<table>{''.join(lines)}</table>"


def success_rate(log: Path, iteration: int) -> str:
    """The success rate of the evaluation at an iteration, from the log of an arm."""
    if not log.exists():
        return ""
    rates = dict(zip(*column(log, "eval_success"), strict=True))
    return f"{rates[iteration]:.0%} succeed" if iteration in rates else ""


def moment(iteration: int) -> str:
    """When an evaluation took place, in words."""
    if iteration == 0:
        return "before training"
    return f"after {iteration} iteration{'s' if iteration > 1 else ''}"


def before_and_after(saved: Saved, arm_name: str, index: int) -> str:
    """One episode of one arm in two columns."""
    columns = []
    for when in ("before", "after"):
        iteration, episodes = saved.get((arm_name, when), (0, []))
        if index >= len(episodes):
            columns.append(f'<div class="{when}"><p class="gray">not played yet</p></div>')
            continue
        arm = html.escape(ARMS[arm_name].label)
        heading = f"<h3>{arm}, {moment(iteration)}</h3>"
        columns.append(f'<div class="{when}">{heading}{as_html(episodes[index])}</div>')
    return f'<div class="pair">{"".join(columns)}</div>'


# ---------------------------------------------------------------------------------- any page
def draw_transcripts(
    out: Path, title: str, policy: Policy, rollouts: Rollouts, stats: TokenStats, weights: Tensor
) -> None:
    """Write tokens.html, with two transcripts that succeed and two that fail as far as there are
    such, and tokens.png, with the first of them. stats, weights: (B, T)."""
    succeeded = rollouts.success.nonzero().flatten().tolist()
    failed = (~rollouts.success).nonzero().flatten().tolist()
    rows = succeeded[:2] + failed[:2]
    episodes = [described(policy, rollouts, row, stats, weights) for row in rows]
    page = page_of(title, "".join(as_html(episode) for episode in episodes))
    with whole_file(out / "tokens.html") as aside:
        aside.write_text(page, encoding="utf-8")
    transcript = pieces(policy, rollouts, rows[0])
    draw_tokens(out / "tokens.png", title, transcript, weights[rows[0]].tolist())


def as_html(episode: Episode) -> str:
    """One transcript: how it ended, then its text, each sampled token with what there is to know
    about it. The instructions before the first observation are folded."""
    first, *rest = episode.pieces
    folded = ""
    if isinstance(first, str):
        observation = after_instructions(first)
        instructions = html.escape(first[: len(first.rstrip()) - len(observation)])
        folded = f"<details><summary>instructions</summary><pre>{instructions}</pre></details>"
        rest = [observation, *rest]
    else:
        rest = episode.pieces
    summary = f"{badge(episode)} reward {episode.reward:.2f}, {episode.turns} turns"
    text = "".join(map(piece_as_html, rest))
    return f'<p>{summary}</p>{folded}<pre class="transcript">{text}</pre>'


def piece_as_html(piece: Token | str) -> str:
    """A token as a coloured box that explains itself when it is pointed at; other text as it is."""
    if isinstance(piece, str):
        return f"<s>{html.escape(piece.strip())}</s>"
    tip = (
        f"{piece.kind} token\n"
        f"weight in the loss {piece.weight:.2f}\n"
        f"energy {piece.energy:.2f}\n"
        f"entropy {piece.entropy:z.2f} nats\n"
        f"log-probability {piece.logprob:z.2f} (frozen model: {piece.frozen_logprob:z.2f})"
    )  # z: no minus before a zero
    ink = "#fff" if piece.weight > DARK else "#000"
    style = f"background:{color_of(round(piece.weight, 2))};color:{ink}"
    text = html.escape(piece.text).replace("\n", "<i>⏎</i>\n")
    kind = html.escape(piece.kind)
    return f'<b class="{kind}" style="{style}" data-tip="{html.escape(tip)}">{text}</b>'


def badge(episode: Episode) -> str:
    """Success or failure, told apart by word, sign and colour."""
    if episode.success:
        return '<em class="success">✓ success</em>'
    return '<em class="failure">✗ failure</em>'


@functools.cache  # most tokens of a page have one of few weights
def color_of(weight: float) -> str:
    """The colour of a weight, as #rrggbb."""
    return to_hex(COLORS(SCALE(weight)))


def page_of(title: str, body: str) -> str:
    """A whole page: title is text, body is HTML."""
    stops = ",".join(color_of(weight) for weight in np.linspace(0, SCALE.vmax, 9))
    values = {"TITLE": html.escape(title), "STOPS": stops, "BODY": body}
    return re.sub("TITLE|STOPS|BODY", lambda name: values[name[0]], PAGE)  # in one pass


RULE = """<p>The episodes are the first rollout of each of the first evaluation prompts, however
they ended. Before training all arms are the same model and play alike; only the weights differ.
Energies are compared within these few episodes, and in training within all of an iteration.</p>"""

# A browser that keeps to this policy runs no script and loads nothing, whatever the page holds.
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>TITLE</title>
<style>
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --gray: #6a6a6a; --rule: #ddd;
  --reasoning: #1f77b4; --action: #a3001f; --format: #aaa; --good: #1a7f37; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e4; --paper: #17181a; --gray: #9b9b9b;
  --rule: #3a3b3d; --reasoning: #5ab0ee; --action: #ff5d76; --format: #888; --good: #4cc36a;
  --bad: #ff7b72 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 96rem; margin: 2rem auto; padding: 0 1.5rem;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.35rem; margin-bottom: .4rem } h3 { font-size: .95rem; margin: .8rem 0 0 }
h2 { font-size: 1.15rem; margin-top: 2.5rem; border-top: 1px solid var(--rule); padding-top: .8rem }
p { margin: .4rem 0; max-width: 62rem } a { color: inherit }
table { border-collapse: collapse; margin: 1.2rem 0; display: block; overflow-x: auto }
th, td { padding: .15rem .9rem .15rem 0; text-align: left; font-weight: normal }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 2rem }
.pair > div { min-width: 0 }
@media (max-width: 60rem) { .pair { grid-template-columns: 1fr } }
pre { font: 12.5px/1.8 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  margin: .4rem 0 }
details, .gray { color: var(--gray) } details { font-size: .85rem }
s { text-decoration: none; color: var(--gray); display: block; line-height: 1.35; margin: .35rem 0;
  padding-left: .7rem; border-left: 3px solid var(--rule) }
i { font-style: normal; opacity: .45 } em { font-style: normal; font-weight: 600 }
.success { color: var(--good) } .failure { color: var(--bad) }
b { font-weight: normal; position: relative; padding: 1px 0; border-left: 1px solid var(--paper);
  border-bottom: 3px solid var(--format) }
b.REASONING { border-bottom-color: var(--reasoning) }
b.ACTION { border-bottom-color: var(--action) }
b:hover { outline: 2px solid var(--ink) }
b:hover::after { content: attr(data-tip); position: absolute; left: 0; top: 1.9em; z-index: 1;
  background: #222; color: #fff; padding: .4em .8em; border-radius: 4px; white-space: pre;
  font: 13px/1.5 system-ui, sans-serif; box-shadow: 0 2px 8px #0006 }
.after b:hover::after { left: auto; right: 0 }
.scale { display: inline-block; width: 12rem; height: 1em; vertical-align: middle;
  background: linear-gradient(to right, STOPS) }
</style>
<h1>TITLE</h1>
<p>Each box is a token that the model wrote. Its colour is its weight in the loss, from
0 <span class="scale"></span> 2: the darker a token is, the more it counts when the policy is
updated. Point at a token for its numbers.</p>
<p>The line below a token names its class: <b class="REASONING">reasoning</b>,
<b class="ACTION">action</b> (the tool call), or <b class="FORMAT">format</b> (tags, white space,
the end of a turn). <span class="gray">Gray text</span> was not written by the model: prompts
and tool responses, which are never in the loss. Energy and entropy are those of the frozen model
that training started from.</p>
BODY
</html>
"""


# -------------------------------------------------------------------------------------- the picture
def draw_tokens(path: Path, title: str, transcript: list[Piece], weights: list[float]) -> None:
    """One transcript as a picture. The long instructions before the first turn are left out.
    weights: by position."""
    first, *rest = transcript
    if first.position is None:
        first = Piece(after_instructions(first.text), None)
    draw_panels(path, lay_out([first, *rest]), {title: weights})


def after_instructions(text: str) -> str:
    """From the last line on that names the user: the first observation.

    >>> after_instructions("system\\nYou are P.\\nuser\\nP b2")
    'user\\nP b2'
    """
    lines = text.strip().splitlines()
    named = [i for i, line in enumerate(lines) if "user" in line]
    return "\n".join(lines[named[-1] :] if named else lines)


def lay_out(transcript: list[Piece]) -> list[Box]:
    """Sampled tokens side by side, what stands between them on lines of its own. A token that is
    longer than a line goes on in the next.

    >>> lay_out([Piece("P b2", None), Piece("I", 5), Piece(" go", 6)])
    [Box(text='P b2', position=None, x=0, line=0), Box(text='I', position=5, x=0, line=1), \
Box(text=' go', position=6, x=1, line=1)]
    """
    boxes, x, line = [], 0, 0
    for text, position in transcript:
        shown = text.replace("\n", "⏎")
        if position is None:
            shown = text.strip().replace("\n", "⏎")
            parts = textwrap.wrap(shown, LINE_LENGTH, drop_whitespace=False)
        else:
            parts = [shown[i : i + LINE_LENGTH] for i in range(0, len(shown), LINE_LENGTH)]
        for part in parts:
            if x and (position is None or x + len(part) > LINE_LENGTH):
                x, line = 0, line + 1
            boxes.append(Box(part, position, x, line))
            x += len(part)
        if position is None and parts:
            x, line = 0, line + 1
    return boxes


def draw_panels(path: Path, boxes: list[Box], panels: dict[str, list[float]]) -> None:
    """The same tokens once for each entry of `panels`, whose key is its title: sampled tokens
    coloured by its weights (by position), any other text in gray. The scale stands beside them.

    All sizes are in inches, so that a character is as wide as the layout takes it to be."""
    lines = boxes[-1].line + 1
    panel = 0.4 + lines * LINE_HEIGHT
    width, height = LINE_LENGTH * CHARACTER_WIDTH, len(panels) * panel
    figure = Figure(figsize=(width + 1.1, height + 0.1))

    def place(left: float, top: float, size: tuple[float, float]) -> Axes:
        """Axes by their upper left corner and size, in inches."""
        box = (0.1 + left, figure.get_figheight() - top - size[1], *size)
        return figure.add_axes(tuple(np.array(box) / np.tile(figure.get_size_inches(), 2)))

    for index, (title, weights) in enumerate(panels.items()):
        axes = place(0, index * panel + 0.35, (width, lines * LINE_HEIGHT))
        axes.set_title(title, loc="left", fontsize=11)
        axes.set(xlim=(0, LINE_LENGTH), ylim=(lines - 0.5, -0.5))
        axes.axis("off")
        for box in boxes:
            draw_box(axes, box, None if box.position is None else weights[box.position])
    scale_height = min(3.0, height - 0.5)
    scale = place(width + 0.3, (height - scale_height) / 2, (0.12, scale_height))
    figure.colorbar(ScalarMappable(SCALE, COLORS), cax=scale, label="weight in the loss")
    scale.tick_params(labelsize=8)
    figure.savefig(path, dpi=150)


def draw_box(axes: Axes, box: Box, weight: float | None) -> None:
    """A sampled token on the colour of its weight; other text, which has no weight, in gray."""
    ink = "dimgray"
    if weight is not None:
        ink = "white" if weight > DARK else "black"
        corner = (box.x + 0.06, box.line - 0.4)
        color = COLORS(SCALE(weight))
        axes.add_patch(Rectangle(corner, len(box.text) - 0.12, 0.8, facecolor=color, linewidth=0))
    style = {"family": "monospace", "fontsize": FONT_SIZE, "va": "center", "parse_math": False}
    axes.text(box.x, box.line, box.text, color=ink, **style)


# --------------------------------------------------------------- tokens in colour, for the terminal
TERMINAL_WIDTH = 80
TERMINAL_COLORS = {"FORMAT": "\x1b[32m", "REASONING": "\x1b[34m", "ACTION": "\x1b[1;31m"}


class Run(NamedTuple):
    """Neighbouring tokens of one class."""

    label: Segment
    tokens: list[Piece]


def first_turn(transcript: list[Piece]) -> tuple[str, list[Piece], str]:
    """The prompt, the tokens of the first turn, and what the model was shown after it ("" if the
    episode ended). transcript: of `pieces`, which begins with a prompt."""
    prompt, *rest = transcript
    stop = 0
    while stop < len(rest) and rest[stop].position is not None:
        stop += 1
    answer = rest[stop].text if stop < len(rest) else ""
    return prompt.text, rest[:stop], answer


def split_by_class(tokens: list[Piece], labels: Tensor) -> list[Run]:
    """Cut a turn wherever the class of its tokens changes. labels: (T,), of the whole episode.

    >>> turn = [Piece("<think>", 2), Piece("Go", 3), Piece(" up", 4), Piece("</think>", 5)]
    >>> for run in split_by_class(turn, Tensor([0, 0, 1, 2, 2, 1])):
    ...     print(run.label.name, [piece.text for piece in run.tokens])
    FORMAT ['<think>']
    REASONING ['Go', ' up']
    FORMAT ['</think>']
    """
    runs: list[Run] = []
    for piece in tokens:
        label = Segment(int(labels[piece.position]))
        if not runs or runs[-1].label != label:
            runs.append(Run(label, []))
        runs[-1].tokens.append(piece)
    return runs


def encodable(text: str) -> str:
    """The text with every character that standard output cannot write as an escape."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, errors="backslashreplace").decode(encoding)


def on_one_line(tokens: list[Piece]) -> str:
    """The text of tokens with each line end written as a backslash and an n."""
    return encodable("".join(piece.text for piece in tokens)).replace("\n", "\\n")


def in_color(text: str, label: Segment) -> str:
    """The text in the colour of a class, or as it is where standard output is no terminal, or where
    the environment variable NO_COLOR is set."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"{TERMINAL_COLORS[label.name]}{text}\x1b[0m"


def print_tokens(tokens: list[Piece], labels: Tensor) -> None:
    """Print every token of a turn, with a vertical bar between two of them: for each run of one
    class a paragraph, with the class and the number of tokens before it. labels: (T,)."""
    for run in split_by_class(tokens, labels):
        margin = f"{run.label.name.lower():9}{len(run.tokens):4}  "
        line = ""
        for piece in run.tokens:
            text = on_one_line([piece]) + ("" if piece is run.tokens[-1] else "|")
            if line and len(margin) + len(line) + len(text) > TERMINAL_WIDTH:
                print(margin + in_color(line, run.label))
                margin, line = " " * len(margin), ""
            line += text
        print(margin + in_color(line, run.label))


def print_token_table(
    tokens: list[Piece], labels: Tensor, columns: dict[str, Tensor], *, only_action: bool = False
) -> None:
    """Print numbers beside the tokens of a turn: a line for each action token, and a line for each
    run of other tokens, which shows their means. only_action leaves the other tokens out.

    labels: (T,), of the whole episode. columns: a name and (T,) values each; nan is shown as "-".
    """
    widths = {name: max(6, len(name)) + 3 for name in columns}
    print("class".ljust(9) + "".join(name.rjust(widths[name]) for name in columns) + "   token")
    for run in split_by_class(tokens, labels):
        if run.label == Segment.ACTION:
            lines = [[piece] for piece in run.tokens]
        elif only_action:
            lines = []
        else:
            lines = [run.tokens]
        for tokens_of_line in lines:
            positions = [piece.position for piece in tokens_of_line]
            line = run.label.name.lower().ljust(9)
            for name, values in columns.items():
                mean = values[positions].mean().item()
                shown = "-" if math.isnan(mean) else f"{mean:.2f}"
                line += shown.rjust(widths[name])
            text = on_one_line(tokens_of_line)
            if len(positions) > 1:
                text = f"{len(positions)} tokens: {text}"
            room = max(20, TERMINAL_WIDTH - len(line) - 3)
            if len(text) > room:
                text = f"{text[: room - 4]} ..."
            print(f"{line}   {in_color(text, run.label)}")


def print_weight_shares(labels: Tensor, weights: dict[str, Tensor]) -> None:
    """Print which share of the total weight lies on the tokens of each class, for each way of
    weighing them. labels, and each of weights: (B, T)."""
    widths = {name: max(6, len(name)) + 3 for name in weights}
    print("class      tokens" + "".join(name.rjust(widths[name]) for name in weights))
    for label in (Segment.FORMAT, Segment.REASONING, Segment.ACTION):
        tokens = labels == label  # (B, T)
        line = f"{label.name.lower():9}{int(tokens.sum()):8}"
        for name, values in weights.items():
            share = (values[tokens].sum() / values.sum().clamp(min=1e-9)).item()
            line += f"{share:.1%}".rjust(widths[name])
        print(line)
