"""Which sampled token is reasoning, and which is action: bytes in, labels out.

    bytes_of = token_bytes(tokenizer)                    # once
    labels = segment_batch(ids, response, bytes_of)      # (B, T)

A turn looks like `<think> ... </think> <tool_call> {"name": ..., "arguments": {...}} </tool_call>`.
Labels come from the *bytes of the sampled tokens*, never from text that was tokenised again: a
tokenizer is free to make one token of `.</` or `"}}</`, and the gradient has to reach the tokens
that were sampled. The bytes that we label ACTION are exactly the bytes that the environment parses
as the call.

The bytes of a tag are FORMAT, but a token takes the highest class of its bytes. This matters where
a tokenizer has one token for a tag and the newline after it, as the built-in models do: in
`<think>\\n` the newline already belongs to the thought, so the whole token counts as REASONING, and
`<tool_call>\\n` counts as ACTION in the same way. They are weighed as the thought and the call are,
and the energy of `<tool_call>\\n` enters the mean and the deviation over action tokens. Where the
tag alone is a token, as `<tool_call>` is in Qwen's tokenizer, that token is FORMAT and weighs 1.
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

    OTHER = 0  # prompt, tool responses, template text and padding, which are never in the loss
    FORMAT = 1  # tags, white space and stray text around the spans, the end-of-turn token
    REASONING = 2  # the bytes after <think> and before </think> or <tool_call>
    ACTION = 3  # the bytes after the first <tool_call> and before </tool_call>


TAG = re.compile(rb"</?(?:think|tool_call)>")


def segment_batch(
    ids: Tensor, response: Tensor, bytes_of: Sequence[bytes], opening: bytes = b""
) -> Tensor:
    """The label of every token of a batch of transcripts: (B, T) int64, values of `Segment`.

    ids: (B, T) int, the tokens as the model saw and sampled them. response: (B, T) bool, True for
    those that it sampled. Each unbroken stretch of them is a turn, so tool responses between turns
    must be False. bytes_of: `token_bytes(tokenizer)`; an id beyond its end has no bytes. opening:
    as in `segment_turn`. Raises ValueError if the two shapes differ.

    >>> bytes_of = [b"<think>", b"Up.", b"</think>", b"<tool_call>", b"{}", b"</tool_call>", b""]
    >>> ids = torch.tensor([[1, 0, 1, 2, 3, 4, 5, 6, 1, 1]])  # a token of prompt, a turn, padding
    >>> response = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 0, 0]]).bool()
    >>> segment_batch(ids, response, bytes_of)
    tensor([[0, 1, 2, 1, 1, 3, 1, 1, 0, 0]])
    """
    if ids.ndim != 2 or ids.shape != response.shape:
        shapes = f"ids {tuple(ids.shape)} and response {tuple(response.shape)}"
        raise ValueError(f"{shapes} must both be (B, T)")
    labels = torch.full(ids.shape, Segment.OTHER, dtype=torch.int64)
    # A turn begins where `response` steps from 0 to 1, and ends where it steps back.
    steps = torch.nn.functional.pad(response.int().cpu(), (1, 1)).diff()  # (B, T + 1)
    begins = (steps == 1).nonzero().tolist()  # [row, position] of each turn, in order
    ends = (steps == -1).nonzero().tolist()
    for (row, begin), (_, end) in zip(begins, ends, strict=True):
        tokens = ids[row, begin:end].tolist()
        turn = [bytes_of[token] if token < len(bytes_of) else b"" for token in tokens]
        labels[row, begin:end] = torch.tensor(segment_turn(turn, opening))
    return labels.to(ids.device)


def segment_turn(tokens: Sequence[bytes], opening: bytes = b"") -> list[Segment]:
    """Label every sampled token of one assistant turn.

    tokens: the bytes of each token in the order sampled; b"" for a token without bytes, which is a
    control token such as the end of the turn, and counts as FORMAT. opening: what the chat template
    has already written of the turn. Some templates end their generation prompt with b"<think>", so
    that the turn begins inside the thought.
    Returns one label per token: FORMAT, REASONING or ACTION. Never raises, whatever the bytes.

    Tags are read from left to right (our reading of the paper's spans):

    - A `<think>` opens a thought, which `</think>` or `<tool_call>` ends. In a thought, a further
      `<think>` and a `</tool_call>` are text.
    - The first `<tool_call>` opens the call, which `</tool_call>` ends. In the call, every other
      tag is text. After the call, everything is FORMAT.
    - A span that is never closed runs to the end of the turn.

    >>> turn = b"<think>", b"Up", b".</", b"think>", b"<tool_call>", b'{"', b'"}}</', b"tool_call>"
    >>> [label.name for label in segment_turn(turn)]
    ['FORMAT', 'REASONING', 'REASONING', 'FORMAT', 'FORMAT', 'ACTION', 'ACTION', 'FORMAT']
    """
    byte_labels = _label_bytes(opening + b"".join(tokens))
    labels = []
    begin = len(opening)
    for token in tokens:
        end = begin + len(token)
        labels.append(Segment(max(byte_labels[begin:end], default=Segment.FORMAT)))
        begin = end
    return labels


def _label_bytes(text: bytes) -> bytearray:
    """One label per byte of a turn."""
    labels = bytearray([Segment.FORMAT]) * len(text)
    span = Segment.FORMAT  # the class of the bytes from `begin` on
    begin = 0
    for tag in TAG.finditer(text):
        match span, tag.group():
            case (Segment.FORMAT, b"<think>"):
                following = Segment.REASONING
            case (Segment.FORMAT | Segment.REASONING, b"<tool_call>"):
                following = Segment.ACTION
            case (Segment.REASONING, b"</think>") | (Segment.ACTION, b"</tool_call>"):
                following = Segment.FORMAT
            case _:  # this tag is text of the span that it stands in
                continue
        labels[begin : tag.start()] = bytes([span]) * (tag.start() - begin)
        if span is Segment.ACTION:
            return labels  # only the first call is executed, so the rest of the turn stays FORMAT
        span = following
        begin = tag.end()
    labels[begin:] = bytes([span]) * (len(text) - begin)
    return labels


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """The bytes of every token, by id. Control tokens (end of turn, padding) and ids that belong to
    no token have b"". The four tags have their bytes even where the tokenizer flags them as
    special, since they are text that the model writes and the environment reads. (rollout.py ends a
    turn at any token without bytes.) It knows byte-level tokenizers (GPT-2, Qwen, Llama 3),
    which write bytes as characters, and SentencePiece-like ones, which write a space as "▁"."""
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
    byte_level = "ByteLevel" in json.dumps(decoder)
    vocabulary = tokenizer.get_vocab()
    added = tokenizer.added_tokens_decoder
    table = [b""] * (1 + max(vocabulary.values()))
    for token, i in vocabulary.items():
        if i in added:
            is_control = added[i].special and not TAG.fullmatch(token.encode())
            table[i] = b"" if is_control else token.encode()
        elif byte_level:
            # A character that stands for no byte stands for itself.
            table[i] = b"".join(bytes([byte_of[c]]) if c in byte_of else c.encode() for c in token)
        elif byte := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            table[i] = bytes.fromhex(byte[1])
        else:
            table[i] = token.replace("▁", " ").encode()
    return table
