"""segment.py: every rule of "which token is what", straddling tokens, and a byte-by-byte reference
on random turns."""

import random

import pytest
import torch

from segment import Segment, segment_batch, segment_turn, token_bytes

F, R, A = Segment.FORMAT, Segment.REASONING, Segment.ACTION
END = b""  # the end of a turn is a control token, and these have no bytes

CASES = {
    "a whole turn": (
        [b"<think>", b"a", b"</think>", b"\n", b"<tool_call>", b"{}", b"</tool_call>", END],
        [F, R, F, F, F, A, F, F],
    ),
    "tags cut into pieces": (
        [
            b"<",
            b"think",
            b">",
            b"a",
            b"</",
            b"think",
            b">",
            b"<tool",
            b"_call>",
            b"{",
            b"}",
            b"</tool_",
            b"call",
            b">",
        ],
        [F, F, F, R, F, F, F, F, F, A, A, F, F, F],
    ),
    "a token straddles the end of a thought": (
        [b"<think>", b"ok", b".</", b"think>"],
        [F, R, R, F],
    ),
    "a token straddles the end of a call": (
        [b"<tool_call>", b'{"a": "b', b'"}}</', b"tool_call>", END],
        [F, A, A, F, F],
    ),
    "one token holds thought, tags and call": (
        [b"<think>a</think><tool_call>{", b"}</tool_call>x"],
        [A, A],
    ),
    "a token straddles the start of a thought": ([b"<think>a", b"</think>"], [R, F]),
    "a thought ends at a call": (
        [b"<think>", b"a", b"<tool_call>", b"{}", b"</tool_call>"],
        [F, R, F, A, F],
    ),
    "an open thought runs to the end": ([b"<think>", b"a", b" b"], [F, R, R]),
    "an open thought stops before the end-of-turn token": ([b"<think>", b"a", END], [F, R, F]),
    "an open call runs to the end": ([b"<tool_call>", b"{", b"}"], [F, A, A]),
    "an open call stops before the end-of-turn token": ([b"<tool_call>", b"{", END], [F, A, F]),
    "two thoughts": (
        [b"<think>", b"a", b"</think>", b" ", b"<think>", b"b", b"</think>"],
        [F, R, F, F, F, R, F],
    ),
    "a thought tag in a thought is text": (
        [b"<think>", b"a", b"<think>", b"b", b"</think>", b"c"],
        [F, R, R, R, F, F],
    ),
    "a closing call tag in a thought is text": (
        [b"<think>", b"</tool_call>", b"a", b"</think>"],
        [F, R, R, F],
    ),
    "tags in a call are its text": (
        [b"<tool_call>", b"<think>", b"x", b"</think>", b"<tool_call>", b"</tool_call>", b"y"],
        [F, A, A, A, A, F, F],
    ),
    "everything after the first call is format": (
        [
            b"<tool_call>",
            b"1",
            b"</tool_call>",
            b"<tool_call>",
            b"2",
            b"</tool_call>",
            b"<think>",
            b"3",
        ],
        [F, A, F, F, F, F, F, F],
    ),
    "stray text and stray closing tags": (
        [b"hi ", b"</think>", b"</tool_call>", b" there"],
        [F, F, F, F],
    ),
    "almost a tag": ([b"<think", b"a", b"<thinks>", b"< think>", b"<THINK>"], [F, F, F, F, F]),
    "a false start before a tag": ([b"<<think>", b"a"], [F, R]),
    "white space in a span counts as the span": (
        [b"<think>", b"\n", b"a", b"\n", b"</think>"],
        [F, R, R, R, F],
    ),
    "fractions of a character": (
        [b"<think>", b"\xe2\x82", b"\xac", b"</think>", b"\xe2"],
        [F, R, R, F, F],
    ),
    "tokens without bytes": (
        [b"<think>", b"", b"a", b"", b"<tool_call>", b"", b"{"],
        [F, F, R, F, F, F, A],
    ),
    "an end of turn that is written as text is text": (
        [b"<think>", b"<|im_end|>", b"a", b"<|im_end|>", END],
        [F, R, R, R, F],
    ),
    "nothing": ([], []),
    "one token": ([END], [F]),
    "one stray token": ([b"x"], [F]),
}


@pytest.mark.parametrize("tokens, labels", CASES.values(), ids=CASES.keys())
def test_rule(tokens, labels):
    assert segment_turn(tokens) == labels
    assert segment_turn(tuple(tokens)) == labels


def reference(text: bytes) -> list[int]:
    """The rules once more, one byte at a time, as a slow state machine."""
    labels, state, i = [], "outside", 0
    moves = {
        "outside": {b"<think>": "thought", b"<tool_call>": "call"},
        "thought": {b"</think>": "outside", b"<tool_call>": "call"},
        "call": {b"</tool_call>": "after"},
        "after": {},
    }
    label = {"outside": F, "thought": R, "call": A, "after": F}
    while i < len(text):
        tag = next((tag for tag in moves[state] if text.startswith(tag, i)), None)
        if tag:
            labels += [F] * len(tag)
            state, i = moves[state][tag], i + len(tag)
        else:
            labels.append(label[state])
            i += 1
    return labels


def random_turn(rng: random.Random) -> list[bytes]:
    pieces = [
        b"<think>",
        b"</think>",
        b"<tool_call>",
        b"</tool_call>",
        b"<",
        b">",
        b"/",
        b"ab ",
        b"{",
        b"\xff",
        b"\xe2\x82\xac",
    ]
    text = b"".join(rng.choices(pieces, k=rng.randrange(12)))
    cuts = sorted(
        rng.choices(range(len(text) + 1), k=rng.randrange(9))
    )  # equal cuts make empty tokens
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def test_random_turns_match_the_reference():
    rng = random.Random(0)
    for _ in range(3000):
        tokens = random_turn(rng)
        by_byte, start = reference(b"".join(tokens)), 0
        for token, label in zip(tokens, segment_turn(tokens), strict=True):
            assert label == max(by_byte[start : start + len(token)], default=F), tokens
            start += len(token)


def test_labels_never_depend_on_later_bytes_except_inside_a_tag():
    rng = random.Random(1)
    for _ in range(1000):
        text = b"".join(random_turn(rng))
        whole = segment_turn([bytes([byte]) for byte in text])
        for stop in range(len(text)):
            cut = segment_turn([bytes([byte]) for byte in text[:stop]])
            pending = (
                text[:stop].rfind(b"<") if b"<" in text[:stop] else stop
            )  # the bytes of a tag may be unfinished
            assert cut[:pending] == whole[:pending]


def test_any_bytes():
    rng = random.Random(2)
    for _ in range(500):
        tokens = [rng.randbytes(rng.randrange(6)) for _ in range(rng.randrange(20))]
        labels = segment_turn(tokens)
        assert len(labels) == len(tokens) and all(isinstance(label, Segment) for label in labels)


# --------------------------------------------------------------------- turns opened by the template
@pytest.mark.parametrize("opening", [b"<think>", b"<think>\n"])
def test_a_turn_that_the_template_opened_starts_inside_the_thought(opening):
    turn = [b"a", b"</think>", b"\n", b"<tool_call>", b"{}", b"</tool_call>", END]
    assert segment_turn(turn, opening=opening) == [R, F, F, F, A, F, F]
    assert segment_turn([b"a", b"<think>", b"b"], opening=opening) == [R, R, R]
    assert segment_turn([b"a", b"<tool_call>", b"{"], opening=opening) == [R, F, A]
    assert segment_turn([], opening=opening) == []


def test_a_thought_that_the_template_opened_and_closed_leaves_format():
    assert segment_turn([b"a", b"<tool_call>", b"{"], opening=b"<think>\n\n</think>\n") == [F, F, A]


def test_an_opening_is_as_if_it_had_been_sampled():
    rng = random.Random(3)
    for _ in range(1000):
        tokens = random_turn(rng)
        opened = segment_turn(tokens, opening=b"<think>\n")
        assert opened == segment_turn([b"<think>\n", *tokens])[1:]


# ------------------------------------------------------------------------------------ whole batches
def test_a_batch_is_labelled_turn_by_turn():
    """Random transcripts of several turns, with an id beyond the table and padding in between."""
    rng = random.Random(4)
    for opening in (b"", b"<think>"):
        ids, response, expected, bytes_of = [], [], [], []
        for _ in range(20):
            row, mask, labels = [], [], []
            for _ in range(rng.randrange(4)):
                gap, turn = rng.randrange(1, 4), random_turn(rng)
                row += [0] * gap + list(range(len(bytes_of), len(bytes_of) + len(turn)))
                bytes_of += turn
                mask += [False] * gap + [True] * len(turn)
                labels += [Segment.OTHER] * gap + segment_turn(turn, opening=opening)
            ids.append(row), response.append(mask), expected.append(labels)
        longest = max(map(len, ids)) + 1
        for row, mask, labels in zip(ids, response, expected, strict=True):
            padding = longest - len(row)
            row += [10**6] * padding
            mask += [False] * padding
            labels += [Segment.OTHER] * padding
        found = segment_batch(torch.tensor(ids), torch.tensor(response), bytes_of, opening)
        assert found.tolist() == expected and found.dtype == torch.int64


def test_a_batch_may_sample_ids_of_no_token_and_nothing_at_all():
    ids = torch.tensor([[0, 5, 0], [0, 0, 0]])
    response = torch.tensor([[True, True, True], [False, False, False]])
    assert segment_batch(ids, response, [b"x"]).tolist() == [[F, F, F], [0, 0, 0]]
    assert segment_batch(ids[:, :0], response[:, :0], [b"x"]).shape == (2, 0)


def test_a_batch_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"ids \(2, 3\) and response \(2, 2\) must both be"):
        segment_batch(torch.zeros(2, 3).long(), torch.zeros(2, 2).bool(), [b""])


def test_bytes_of_the_built_in_tokenizer(tiny):
    table = token_bytes(tiny.tokenizer)
    text = 'I stand on b2. \u00e9\u20ac <think>\n{"name": 1}'
    assert b"".join(table[i] for i in tiny.encode(text)).decode() == text
    assert table[tiny.end_of_turn] == b""


def test_a_token_of_a_tag_and_its_newline_belongs_to_the_span(built_in):
    """As the docstring of segment.py says of the built-in tokens."""
    text = '<think>\nUp.\n</think>\n<tool_call>\n{"name": "move"}\n</tool_call>'
    table = token_bytes(built_in.tokenizer)
    turn = [table[i] for i in built_in.encode(text)] + [table[built_in.end_of_turn]]
    labels = dict(zip(turn, segment_turn(turn), strict=True))
    assert labels[b"<think>\n"] == R and labels[b"<tool_call>\n"] == A
    assert labels[b"}\n"] == A and labels[b"</think>\n"] == labels[b""] == F
