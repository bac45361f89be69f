"""Which sampled token is reasoning, which is action: bytes in, labels out.

    bytes_of = token_bytes(tokenizer)                    # once
    labels = segment_batch(ids, response, bytes_of)      # (B, T)

A turn looks like `<think> ... </think> <tool_call> {"name": ..., "arguments": {...}} </tool_call>`.
Labels are read off the *bytes of the sampled tokens*, never off text that was tokenised again: a
tokenizer is free to cut `.</` or `"}}</` into one token, and the gradient has to land on the tokens
that were sampled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode


class Segment(IntEnum):
    """The class of a token. A token that holds bytes of several classes takes the highest."""

    OTHER = 0  # prompt, tool responses, template text, padding: never in the loss
    FORMAT = 1  # tags, white space and stray text around the spans, the end-of-turn token
    REASONING = 2  # from after <think> up to </think> or <tool_call>
    ACTION = 3  # from after the first <tool_call> up to </tool_call>: what is read as the call


TAG = re.compile(rb"</?(?:think|tool_call)>")


def segment_batch(
    ids: Tensor, response: Tensor, bytes_of: Sequence[bytes], opening: bytes = b""
) -> Tensor:
    """The label of every token of a batch of transcripts: (B, T) int64, values of `Segment`.

    ids: (B, T) int, the tokens as the model saw and sampled them. response: (B, T) bool, the ones
    that it sampled; each run of them is a turn, so tool responses in between must be False.
    bytes_of: `token_bytes(tokenizer)`. opening: as in `segment_turn`.
    Raises ValueError for shapes that differ.

    >>> bytes_of = [b"<think>", b"Up.", b"</think>", b"<tool_call>", b"{}", b"</tool_call>", b""]
    >>> ids = torch.tensor([[1, 0, 1, 2, 3, 4, 5, 6, 1, 1]])  # one token of prompt, a turn
    >>> response = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 0, 0]]).bool()
    >>> segment_batch(ids, response, bytes_of)
    tensor([[0, 1, 2, 1, 1, 3, 1, 1, 0, 0]])
    """
    if ids.ndim != 2 or ids.shape != response.shape:
        shapes = f"ids {tuple(ids.shape)} and response {tuple(response.shape)}"
        raise ValueError(f"{shapes} must both be (B, T)")
    labels = torch.zeros(ids.shape, dtype=torch.int64)
    edges = torch.nn.functional.pad(response.int().cpu(), (1, 1)).diff()  # (B, T + 1)
    starts, stops = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    for (row, start), (_, stop) in zip(starts, stops, strict=True):
        tokens = ids[row, start:stop].tolist()
        turn = [bytes_of[token] if token < len(bytes_of) else b"" for token in tokens]
        labels[row, start:stop] = torch.tensor(segment_turn(turn, opening=opening))
    return labels.to(ids.device)


def segment_turn(
    tokens: Sequence[bytes], end_of_turn: bytes = b"<|im_end|>", opening: bytes = b""
) -> list[Segment]:
    """Label every sampled token of one assistant turn.

    tokens: the bytes of each token in the order sampled; b"" for a token without bytes (a control
    token). opening: what the chat template has written of the turn already: some end their
    generation prompt with b"<think>", so that the turn starts inside the thought.
    Returns one label per token: FORMAT, REASONING or ACTION. Never raises, whatever the bytes.

    Tags are read left to right (our reading of the paper's spans). `<tool_call>` ends an open
    `<think>`; in a call every other tag is text of the call, in a thought `<think>` and
    `</tool_call>` are; after the call all is FORMAT. An unclosed span runs to the end of the turn.

    >>> turn = b"<think>", b"Up", b".</", b"think>", b"<tool_call>", b'{"', b'"}}</', b"tool_call>"
    >>> [label.name for label in segment_turn(turn)]
    ['FORMAT', 'REASONING', 'REASONING', 'FORMAT', 'FORMAT', 'ACTION', 'ACTION', 'FORMAT']
    """
    ended = bool(tokens) and tokens[-1] == end_of_turn  # where it has bytes
    spoken = tokens[:-1] if ended else tokens
    byte_labels = _label_bytes(opening + b"".join(spoken))
    labels, start = [], len(opening)
    for token in spoken:
        stop = start + len(token)
        labels.append(Segment(max(byte_labels[start:stop], default=Segment.FORMAT)))
        start = stop
    return [*labels, Segment.FORMAT] if ended else labels


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


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """The bytes of every token, by id; b"" for control tokens (end of turn, padding) and for ids of
    no token. For byte-level tokenizers (GPT-2, Qwen, Llama 3) and SentencePiece-like ones."""
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
    byte_level = "ByteLevel" in json.dumps(decoder)  # bytes written as characters, GPT-2's way
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    table = [b""] * (1 + max(vocabulary.values()))
    for token, i in vocabulary.items():
        if i in added:
            table[i] = b"" if added[i].special else token.encode()
        elif byte_level:
            table[i] = b"".join(bytes([byte_of[c]]) if c in byte_of else c.encode() for c in token)
        elif byte := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            table[i] = bytes.fromhex(byte[1])
        else:
            table[i] = token.replace("▁", " ").encode()
    return table
