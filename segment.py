"""Which sampled token is reasoning, which is action. No torch, no tokenizer: bytes in, labels out.

A turn that the model writes looks like

    <think> ... </think> <tool_call> {"name": ..., "arguments": {...}} </tool_call> <|im_end|>

and the labels are read off the *bytes of the sampled tokens*, never off text that was tokenised again: a tokenizer is free
to cut `.</` or `"}}</` into one token, and the gradient has to land on the tokens that were sampled.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import IntEnum


class Segment(IntEnum):
    """The class of a token. A token that holds bytes of several classes takes the highest."""

    OTHER = 0  # prompt, tool responses, template text, padding: never in the loss
    FORMAT = 1  # tags, white space and stray text around the spans, the end-of-turn token
    REASONING = 2  # from after <think> up to </think> or <tool_call>
    ACTION = 3  # from after the first <tool_call> up to </tool_call>: exactly what the environment executes


TAG = re.compile(rb"</?(?:think|tool_call)>")


def segment_turn(tokens: Sequence[bytes], end_of_turn: bytes = b"<|im_end|>") -> list[Segment]:
    """Label every sampled token of one assistant turn.

    tokens: the bytes of each token in the order sampled; b"" for a token without bytes (a control token).
    Returns one label per token: FORMAT, REASONING or ACTION. Never raises, whatever the bytes.

    Tags are read left to right in one pass. `<tool_call>` ends an open `<think>`; inside a call every other tag is text of
    the call, inside a thought `<think>` and `</tool_call>` are text of the thought; after the call everything is FORMAT. An
    unclosed span runs to the end of the turn. (Our reading of the paper's spans.)

    >>> turn = [b"<think>", b"Go up", b".</", b"think>", b"<tool_call>", b'{"', b'"}}</', b"tool_call>", b"<|im_end|>"]
    >>> [label.name for label in segment_turn(turn)]
    ['FORMAT', 'REASONING', 'REASONING', 'FORMAT', 'FORMAT', 'ACTION', 'ACTION', 'FORMAT', 'FORMAT']
    """
    ended = bool(tokens) and tokens[-1] == end_of_turn
    spoken = tokens[: len(tokens) - ended]
    byte_labels = _label_bytes(b"".join(spoken))
    labels, start = [], 0
    for token in spoken:
        stop = start + len(token)
        labels.append(Segment(max(byte_labels[start:stop], default=Segment.FORMAT)))
        start = stop
    return labels + [Segment.FORMAT] * ended


def _label_bytes(text: bytes) -> bytearray:
    """One label per byte of a turn."""
    labels = bytearray([Segment.FORMAT]) * len(text)
    span, start = Segment.FORMAT, 0  # the class of the bytes from `start` on
    for tag in TAG.finditer(text):
        match span, tag.group():
            case (Segment.FORMAT, b"<think>"):
                following = Segment.REASONING
            case (Segment.FORMAT | Segment.REASONING, b"<tool_call>"):
                following = Segment.ACTION
            case (Segment.REASONING, b"</think>") | (Segment.ACTION, b"</tool_call>"):
                following = Segment.FORMAT
            case _:  # text of the span that it stands in
                continue
        labels[start : tag.start()] = bytes([span]) * (tag.start() - start)
        if span is Segment.ACTION:
            return labels  # the first call is the call: the rest of the turn stays FORMAT
        span, start = following, tag.end()
    labels[start:] = bytes([span]) * (len(text) - start)
    return labels
