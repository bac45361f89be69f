"""A chat template taken apart, so that text can be encoded once and piece by piece.

A chat template writes a list of messages as one text, with control tokens around each message. A
rollout cannot use it as it is: rendering and encoding the whole conversation after every turn might
cut the model's own text into other tokens than the ones that it sampled. `ChatTemplate` therefore
finds out once what the template writes around the messages, and encodes only what is new.

This is what Qwen2.5's template makes of the first turn of an episode. The right column says who
wrote each line; "Env" are texts of the environment, and the tools are its too.

    <|im_start|>system                               template   prompt(system, tools, observation)
    You walk on a frozen lake.                       Env           |
    # Tools ... <tools> {"type": ... } </tools>      template      |
    <|im_end|>                                       template      |
    <|im_start|>user                                 template      |
    You are on a1. The goal is d4.                   Env           |
    <|im_end|>                                       template      |
    <|im_start|>assistant                            template      |
    <think>                                          model      the turn: every token is sampled
    I go down. </think>                              model         |
    <tool_call> {"name": "move", ... } </tool_call>  model         |
    <|im_end|>                                       model         |  the end-of-turn token
    <|im_start|>user                                 template   result(observation)
    <tool_response>                                  template      |
    You moved. You are on a2.                        Env           |
    </tool_response> <|im_end|>                      template      |
    <|im_start|>assistant                            template      |
    ...                                              model      the next turn

A turn begins after `<|im_start|>assistant` and ends with `<|im_end|>`. Some templates already write
the `<think>` that a turn opens with; that is the `opening`.

Control tokens come from the template alone: any other text is encoded without them, so that no text
of a model, an observation or a system message can turn into a control token. (The descriptions of
the tools are trusted: the template writes them.)
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from datetime import datetime
from functools import partial

import jinja2
import tiktoken
import transformers

from segment import token_bytes

# Some templates write today's date into the system message. They get this one, since the same seed
# on another day would otherwise be another run. Llama 3's own template falls back on it as well.
# DIRECTIVES are all that a format of strftime may ask for.
TODAY = datetime(2024, 7, 26)
DIRECTIVES = [f"%{letter}" for letter in "aAbBcdHIjmMpSUwWxXyY"] + ["%-d", "%-m"]

# Texts of the kinds that an episode is made of, which `check_encoding` encodes.
TYPICAL_TEXTS = (
    "<think>",
    "<think>\nUp is ice. </think>\n<tool_call>\n",
    '{"name": "move", "arguments": {"direction": "up"}}\n</tool_call>',
    " a space before,  two between and one after ",
    "1234567890, 3.14 and -7",
    "caf\u00e9, na\u00efve, \u4f60\u597d \u20ac \U0001f600",
    "1 G O _ O\n2 _ _ _ _\n\n\tP c4",
    "low. High.</think>",
)

# Qwen2.5's words, for chat templates that do not say them.
TOOLS_PROMPT = """

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{schemas}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>
For example:
<tool_call>
{example}
</tool_call>"""


class ChatTemplate:
    """What a tokenizer's chat template writes around messages, as token ids.

    Raises ValueError if the template cannot carry a tool-calling episode.
    """

    encode: Callable[[str], list[int]]  # text -> ids, never a control token
    encode_framing: Callable[[str], list[int]]  # the template's text -> ids, control tokens too
    bytes_of: list[bytes]  # by token id; b"" for control tokens
    end_of_turn: int  # the control token that closes a turn
    opening: bytes  # what the template writes of a turn itself: b"<think>\n", or b""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerFast):
        if isinstance(tokenizer.chat_template, dict):
            named = ", ".join(tokenizer.chat_template)
            raise ValueError(f"there are several chat templates ({named}): keep the one for tools")
        self.tokenizer = tokenizer
        self.bytes_of = token_bytes(tokenizer)
        self.encode, self.encode_framing = encoders(tokenizer)
        check_encoding(self.encode, self.bytes_of)
        self._prompt_framing: dict[str, tuple[list[int], list[int]]] = {}  # by system and tools
        self._has_noted_tools = False
        try:
            opening, closing, after = self._around_turns("tool")
        except ValueError:  # Gemma's has no tool messages, Llama 3's makes a JSON string of them
            opening, closing, after = self._around_turns("user")
            closing = f"{closing}<tool_response>\n"
            after = f"\n</tool_response>{after}"
        self.end_of_turn, *self._before_result = self.encode_framing(closing or "?")
        self._after_result = self.encode_framing(after)
        if self.bytes_of[self.end_of_turn]:
            end = tokenizer.convert_ids_to_tokens(self.end_of_turn)
            raise ValueError(
                f"the chat template ends a turn with {end!r}, which is no control token: "
                "choose a chat checkpoint"
            )
        _, thought, rest = opening.partition("<think>")
        self.opening = (thought + rest).encode()

    def prompt(self, system: str, tools: list[dict], observation: str) -> list[int]:
        """The ids of an episode up to its first assistant turn."""
        key = json.dumps([system, tools])
        if key not in self._prompt_framing:  # rendering a template is slow, and episodes share it
            self._prompt_framing[key] = self._frame_prompt(system, tools)
        before, after = self._prompt_framing[key]
        return before + self.encode(readable(observation)) + after

    def result(self, observation: str) -> list[int]:
        """The ids from just after an end-of-turn token, through a tool's response, up to the next
        assistant turn."""
        return self._before_result + self.encode(readable(observation)) + self._after_result

    def _frame_prompt(self, system: str, tools: list[dict]) -> tuple[list[int], list[int]]:
        """The ids of a prompt before and after its observation. A template that does not show the
        tools gets them in the system message."""
        try:
            framing = self._framing(["system", "user"], tools)
            shown = not tools or shows_tools("".join(framing), tools)
        except ValueError:  # it refuses tools; whatever else is wrong comes again without them
            shown = False
        if not shown:
            if not self._has_noted_tools:
                self._has_noted_tools = True
                why = "the chat template takes no tools, or wants calls of another form"
                print(f"note: {why}: they are put into the system message", file=sys.stderr)
            framing = self._framing(["system", "user"])
            system += describe_tools(tools)
        before, between, after = map(self.encode_framing, framing)
        return before + self.encode(system) + between, after

    def _around_turns(self, answering: str) -> tuple[str, str, str]:
        """Three texts of the template: the one before a turn that is still to come, the one after a
        turn that has been, and the one from a message of the role that answers it (`answering`) to
        the next turn."""
        *_, opening = self._framing(["system", "user"])
        *_, past, closing, after = self._framing(["system", "user", "assistant", answering])
        # A template may open the next turn with <think>, and leave it out of those that have been.
        next_header = opening.partition("<think>")[0].rstrip()
        past_header = past.partition("<think>")[0].rstrip()
        if past_header != next_header or not after.endswith(opening):
            raise ValueError(
                f"the chat template begins turns in different ways: {opening!r} the first, "
                f"{past!r} one that has been, {after!r} one after a {answering} message"
            )
        return opening, closing, after

    def _framing(self, roles: list[str], tools: list[dict] | None = None) -> list[str]:
        """The template's own text before, between and after one message per role. The last piece
        includes the opening of an assistant's turn."""
        named = ", ".join(roles)
        contents = [f'@{place} "{role}"\n@' for place, role in enumerate(roles)]
        messages = [
            {"role": role, "content": text} for role, text in zip(roles, contents, strict=True)
        ]
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=True,
                date_string=TODAY.strftime("%d %b %Y"),  # what Llama 3's looks for
                chat_template=with_fixed_date(self.tokenizer.chat_template),
            )  # fmt: skip
        except jinja2.TemplateError as error:
            raise ValueError(
                f"the chat template refuses one of the messages {named}: {error}"
            ) from None
        except Exception as error:  # a template is a program, and may fail in any way
            raise ValueError(
                f"the chat template fails at the messages {named} "
                f"({type(error).__name__}: {error}): mend chat_template.jinja"
            ) from None
        pattern = "(.*?)".join(["", *map(re.escape, contents), ""])
        pieces = re.fullmatch(pattern, rendered, re.DOTALL)
        if pieces is None or any(text in piece for text in contents for piece in pieces.groups()):
            raise ValueError(
                f"the chat template does not show the messages {named} once, in order, as they are"
            )
        return list(pieces.groups())


def readable(text: str) -> str:
    """The same text, with a "?" for each half of a character that has no other half. A model can
    write one in a call (JSON's "\\ud83d"), a world may repeat it, and few tokenizers take it.

    >>> readable("caf\\u00e9 \\ud83d")
    'café ?'
    """
    return text.encode(errors="replace").decode()


def with_fixed_date(template: str | None) -> str | None:
    """A template whose `strftime_now`, which transformers gives to every template, says TODAY.

    transformers lets nobody pass a function to a template, so a macro of that name is put before
    it. Jinja drops a line break after a block, so one that the template begins with is doubled.
    """
    if template is None or "strftime_now" not in template:
        return template
    replaced = "".join(f"|replace('{each}', '{TODAY.strftime(each)}')" for each in DIRECTIVES)
    macro = "{% macro strftime_now(format) %}{{ format" + replaced + " }}{% endmacro %}"
    if template.startswith("\n"):
        macro += "\n"
    return macro + template


def check_encoding(encode: Callable[[str], list[int]], bytes_of: list[bytes]) -> None:
    """Raises ValueError unless the bytes of an encoded text are the text.

    Tokenizers in Llama 2's manner put a space before every text. A turn would then be decoded with
    spaces that nobody wrote, and one more would stand wherever a template and a message meet.
    """
    for text in TYPICAL_TEXTS:
        decoded = b"".join(bytes_of[token] for token in encode(text))
        if decoded != text.encode():
            shown = decoded.decode(errors="replace")
            raise ValueError(
                f"the tokenizer makes {shown!r} of {text!r}: what a turn says must be what "
                "its tokens say, so choose a checkpoint whose tokenizer adds and changes nothing"
            )


def shows_tools(framing: str, tools: list[dict]) -> bool:
    """Does a chat template show tools as Qwen2.5's does, and ask for no calls of another form?"""
    names_them = all(tool["function"]["name"] in framing for tool in tools)
    asks_for_our_form = '{"name": <function-name>, "arguments": <args-json-object>}' in framing
    asks_for_no_form = "<tool_call>" not in framing
    return names_them and "<tools>" in framing and (asks_for_our_form or asks_for_no_form)


def describe_tools(tools: list[dict]) -> str:
    """The tools and the form of a call, to stand at the end of a system message."""
    function = tools[0]["function"]
    properties = function["parameters"]["properties"]
    arguments = {name: schema.get("enum", ["..."])[0] for name, schema in properties.items()}
    example = json.dumps({"name": function["name"], "arguments": arguments})
    return TOOLS_PROMPT.format(schemas="\n".join(map(json.dumps, tools)), example=example)


def encoders(tokenizer: transformers.PreTrainedTokenizerFast) -> tuple[Callable, Callable]:
    """(encode, encode_framing): from text to ids without control tokens, and with them.

    transformers encodes for any tokenizer. tiktoken is faster, and serves the tokenizers of
    support/warm_start.py, which are nothing but a splitting rule and byte pairs in the order of
    their ids.
    """
    splitting = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    rules = splitting.get("pretokenizers", [])
    if tokenizer.init_kwargs.get("made_by") == "actfocus" and rules:
        special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
        ranks = {piece: i for i, piece in enumerate(token_bytes(tokenizer)) if piece}
        encoding = tiktoken.Encoding(
            "actfocus",
            pat_str=rules[0]["pattern"]["Regex"],
            mergeable_ranks=ranks,
            special_tokens=special,
        )
        return encoding.encode_ordinary, partial(encoding.encode, allowed_special="all")
    plain = partial(tokenizer.encode, add_special_tokens=False)
    return partial(plain, split_special_tokens=True), plain
