"""Transcripts to look at: every sampled token coloured by its weight in the loss.

    python -m studies.diagnose --env sokoban      # leaves tokens.html and tokens.png in its folder

    transcript = pieces(policy, rollouts, row=0)
    draw_tokens(Path("tokens.png"), "a title", transcript, weights[0].tolist())

The page opens from disk and loads nothing. What a model writes is untrusted: it is escaped, and
whatever cannot be seen is written out.
"""

from __future__ import annotations

import html
import math
import os
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure
from torch import Tensor

from energy import TokenStats
from policy import Policy
from rollout import Rollouts
from segment import Segment

COLORS = matplotlib.colormaps["YlOrRd"]
SCALE = Normalize(0, 1.6)  # of weights
DARK = 1.1  # the weight from which on text is white
COLUMNS = 128  # characters a line of a picture


class Piece(NamedTuple):
    """A sampled token, or all the text between two of them."""

    text: str
    position: int | None  # in the episode; None: not sampled


class Box(NamedTuple):
    """Where a piece, or a line of one, stands in a picture."""

    text: str
    position: int | None
    x: float  # in characters
    line: int


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


def draw_transcripts(
    out: Path, title: str, policy: Policy, rollouts: Rollouts, frozen: TokenStats, weights: Tensor
) -> None:
    """tokens.html: two transcripts that succeed and two that fail, as far as there are; tokens.png:
    the first of them. frozen, weights: (B, T)."""
    succeeded = rollouts.success.nonzero().flatten().tolist()
    failed = (~rollouts.success).nonzero().flatten().tolist()
    rows = succeeded[:2] + failed[:2]
    transcripts = [pieces(policy, rollouts, row) for row in rows]
    body = []
    for row, transcript in zip(rows, transcripts, strict=True):
        body.append(as_html(transcript, row, rollouts, frozen, weights))
    stops = ",".join(color_of(weight) for weight in np.linspace(0, SCALE.vmax, 9))
    page = PAGE.replace("TITLE", html.escape(title)).replace("STOPS", stops)
    (out / "tokens.html").write_text(page.replace("BODY", "".join(body)), encoding="utf-8")
    draw_tokens(out / "tokens.png", title, transcripts[0], weights[rows[0]].tolist())


# ----------------------------------------------------------------------------------------- the page
def as_html(
    transcript: list[Piece], row: int, rollouts: Rollouts, frozen: TokenStats, weights: Tensor
) -> str:
    """One transcript: a heading, then each sampled token with what there is to know about it."""
    verdict = "success" if rollouts.success[row] else "failure"
    reward, turns = rollouts.rewards[row].item(), rollouts.turns[row].item()
    parts = [f"<h2>{verdict}, reward {reward:.2f}, {turns} turns</h2><pre>"]
    for text, position in transcript:
        if position is None:
            parts.append(f"<s>{html.escape(text)}</s>")
            continue
        name = Segment(rollouts.labels[row, position].item()).name
        weight = weights[row, position].item()
        energy = frozen.energy[row, position].item()
        entropy = frozen.entropy[row, position].item()
        tip = f"{name} · weight {weight:.2f} · energy {energy:.2f} · entropy {entropy:.2f} nats"
        ink = "#fff" if weight > DARK else "#000"
        style = f"background:{color_of(weight)};color:{ink}"
        shown = html.escape(text).replace("\n", "<i>⏎</i>\n")
        parts.append(f'<b class="{name}" style="{style}" data-tip="{tip}">{shown}</b>')
    parts.append("</pre>")
    return "".join(parts)


def color_of(weight: float) -> str:
    return to_hex(COLORS(SCALE(weight)))


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>TITLE</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin-top: 2rem }
pre { font: 13px/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  padding-bottom: 2rem }
s { text-decoration: none; color: #777 } i { font-style: normal; opacity: .45 }
b { font-weight: normal; position: relative; padding: 1px 0; border-left: 1px solid #fff;
  border-bottom: 3px solid #999 }
b.REASONING { border-bottom-color: #1f77b4 } b.ACTION { border-bottom-color: #7a0019 }
b:hover { outline: 2px solid #222 }
b:hover::after { content: attr(data-tip); position: absolute; left: 0; top: 1.9em; z-index: 1;
  background: #222; color: #fff; padding: .2em .6em; border-radius: 4px; white-space: nowrap;
  font: 13px/1.5 system-ui, sans-serif }
.scale { display: inline-block; width: 16rem; height: 1em; vertical-align: middle;
  background: linear-gradient(to right, STOPS) }
</style>
<h1>TITLE</h1>
<p>Weight in the loss: 0 <span class="scale"></span> 1.6.
Underlined <b class="REASONING">blue</b>: reasoning, <b class="ACTION">dark red</b>: action,
<b class="FORMAT">gray</b>: format. <s>Gray text</s> was not sampled: prompts and tool responses,
never in the loss. Point at a token for its class, weight, energy and entropy under the
reference.</p>
BODY
</html>
"""


# -------------------------------------------------------------------------------------- the picture
def draw_tokens(path: Path, title: str, transcript: list[Piece], weights: list[float]) -> None:
    """One transcript as a picture: sampled tokens in boxes, the rest in gray without its line ends.
    The long instructions before the first turn are left out. weights: by position."""
    first, *rest = transcript
    if first.position is None:
        first = Piece(after_instructions(first.text), None)
    boxes = lay_out([first, *rest])
    lines = boxes[-1].line + 1
    figure = Figure(figsize=(13, 0.9 + 0.235 * lines), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    draw_boxes(axes, boxes, weights)
    add_scale(figure, shrink=min(1, 6 / (0.765 + 0.235 * lines)))
    figure.savefig(path, dpi=110)


def after_instructions(text: str) -> str:
    """From the last line on that names the user: the first observation.

    >>> after_instructions("system\\nYou are P.\\nuser\\nP b2")
    'user\\nP b2'
    """
    lines = text.strip().splitlines()
    named = [i for i, line in enumerate(lines) if "user" in line]
    return "\n".join(lines[named[-1] :] if named else lines)


def lay_out(transcript: list[Piece], columns: int = COLUMNS) -> list[Box]:
    """Sampled tokens beside each other, what stands between them on lines of its own."""
    boxes, x, line = [], 0.0, 0
    for text, position in transcript:
        if position is None:
            if x:
                line += 1
            shown = text.strip().replace("\n", "⏎")
            for part in textwrap.wrap(shown, columns, drop_whitespace=False):
                boxes.append(Box(part, None, 0.0, line))
                line += 1
            x = 0.0
            continue
        shown = text.replace("\n", "⏎")
        width = 1.06 * len(shown) + 0.7
        if x + width > columns:
            x, line = 0.0, line + 1
        boxes.append(Box(shown, position, x, line))
        x += width
    return boxes


def draw_boxes(axes: Axes, boxes: list[Box], weights: list[float], columns: int = COLUMNS) -> None:
    """Sampled tokens in boxes, coloured by weights[position]; any other text in gray."""
    axes.set(xlim=(0, columns + 1), ylim=(boxes[-1].line + 0.8, -0.8))
    axes.axis("off")
    for text, position, x, line in boxes:
        ink, frame = "dimgray", None
        if position is not None:
            weight = weights[position]
            ink = "white" if weight > DARK else "black"
            frame = {
                "boxstyle": "square,pad=0.2",
                "facecolor": COLORS(SCALE(weight)),
                "edgecolor": "white",
            }
        style = {"family": "monospace", "fontsize": 9, "va": "center", "parse_math": False}
        axes.text(x, line, text, color=ink, bbox=frame, **style)


def add_scale(figure: Figure, shrink: float) -> None:
    """The colours and what they stand for, beside the axes."""
    figure.colorbar(
        ScalarMappable(SCALE, COLORS),
        ax=figure.axes,
        label="weight in the loss",
        shrink=shrink,
        aspect=30,
    )


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
