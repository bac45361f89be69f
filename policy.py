"""The policy: a causal language model and its tokenizer behind one small interface.

    policy = load_policy("starts/frozenlake")                # the built-in model of a world
    policy = load_policy("Qwen/Qwen2.5-0.5B-Instruct")       # or any chat model, folder or hub id

Text is encoded once and piece by piece: the chat template's own text with its control tokens, any
other text without, so that no text can ever turn into a control token.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jinja2
import safetensors
import tiktoken
import torch
import transformers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from segment import token_bytes

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


@dataclass
class Policy:
    """A model and what it takes to talk to it.

    Raises ValueError if the chat template cannot carry a tool-calling episode.
    """

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    encode: Callable[[str], list[int]]  # text -> ids, never a control token
    encode_framing: Callable[[str], list[int]]  # the template's text -> ids, control tokens too
    bytes_of: list[bytes]  # by token id; b"" for control tokens and for ids of no token
    bfloat16: bool = False  # compute in it; always so on CUDA. Trained weights stay float32
    end_of_turn: int = field(init=False)  # the control token that the template closes a turn with
    control_tokens: frozenset[int] = field(init=False)  # any of them ends a turn that samples it
    opening: bytes = field(init=False)  # of a turn, written by the template: b"<think>\n" or b""
    _prompts: dict = field(init=False, default_factory=dict)
    _noted: bool = field(init=False, default=False)  # that the template ignores tools
    _recomputes: bool = field(init=False, default=False)

    def __post_init__(self):
        if isinstance(self.tokenizer.chat_template, dict):
            named = ", ".join(self.tokenizer.chat_template)
            raise ValueError(f"there are several chat templates ({named}): keep the one for tools")
        if self.device.type == "cpu":
            use_packed_attention(self.model)
        self.bfloat16 |= self.device.type == "cuda"
        # Checkpoints pad their vocabulary with ids of no token.
        padding = len(self.head) - len(self.bytes_of)
        self.bytes_of = self.bytes_of + [b""] * padding
        self.control_tokens = frozenset(i for i, piece in enumerate(self.bytes_of) if not piece)
        try:
            opening, closing, after = self._turns("tool")
        except ValueError:  # Gemma's has no tool messages, Llama 3's makes a JSON string of them
            opening, closing, after = self._turns("user")
            closing, after = f"{closing}<tool_response>\n", f"\n</tool_response>{after}"
        self.end_of_turn, *self._before_result = self.encode_framing(closing or "?")
        self._after_result = self.encode_framing(after)
        if self.end_of_turn not in self.control_tokens:
            end = self.tokenizer.convert_ids_to_tokens(self.end_of_turn)
            raise ValueError(
                f"the chat template ends a turn with {end!r}, which is no control token: "
                "choose a chat checkpoint"
            )
        _, thought, rest = opening.partition("<think>")
        self.opening = (thought + rest).encode()

    def _turns(self, answering: str) -> tuple[str, str, str]:
        """What the template writes before an assistant's turn that is to come, after one that has
        been, and after a message of the role that answers it, before the next."""
        *_, opening = self._framing(["system", "user"])
        *_, past, closing, after = self._framing(["system", "user", "assistant", answering])
        header, shown = (text.partition("<think>")[0].rstrip() for text in (past, opening))
        if header != shown or not after.endswith(opening):
            raise ValueError(
                f"the chat template opens a turn with {opening!r}, and otherwise one that has been "
                f"({past!r}) or one after a {answering} message ({after!r})"
            )
        return opening, closing, after

    def _framing(self, roles: list[str], tools: list[dict] | None = None) -> list[str]:
        """The template's own text before, between and after one message per role, the last followed
        by the opening of an assistant's turn."""
        named = ", ".join(roles)
        contents = [f'@{place} "{role}"\n@' for place, role in enumerate(roles)]
        messages = [
            {"role": role, "content": text} for role, text in zip(roles, contents, strict=True)
        ]
        try:
            shown = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=True,
                date_string="26 Jul 2024",  # or Llama 3's would tell today's
            )  # fmt: skip
        except jinja2.TemplateError as error:
            raise ValueError(
                f"the chat template refuses one of the messages {named}: {error}"
            ) from None
        pattern = "(.*?)".join(["", *map(re.escape, contents), ""])
        pieces = re.fullmatch(pattern, shown, re.DOTALL)
        if pieces is None or any(text in piece for text in contents for piece in pieces.groups()):
            raise ValueError(
                f"the chat template does not show the messages {named} once, in order, as they are"
            )
        return list(pieces.groups())

    def prompt(self, system: str, tools: list[dict], observation: str) -> list[int]:
        """The ids of an episode up to its first assistant turn."""
        key = json.dumps([system, tools])
        if key not in self._prompts:  # rendering a template is slow, and episodes share it
            framing = self._framing(["system", "user"], tools)
            if tools and not shows_tools("".join(framing), tools):
                if not self._noted:
                    self._noted = True
                    why = "the chat template ignores tools, or wants calls of another form"
                    print(f"note: {why}: they are put into the system message", file=sys.stderr)
                framing = self._framing(["system", "user"])
                system += describe_tools(tools)
            before, between, after = map(self.encode_framing, framing)
            self._prompts[key] = before + self.encode(system) + between, after
        start, end = self._prompts[key]
        return start + self.encode(observation) + end

    def result(self, observation: str) -> list[int]:
        """The ids from just after an end-of-turn token, through a tool's response, up to the next
        assistant turn."""
        return self._before_result + self.encode(observation) + self._after_result

    def turn_text(self, turn: list[int]) -> str:
        """What an environment hears of a turn: its sampled tokens as text, after what the template
        has opened it with."""
        said = b"".join(self.bytes_of[token] for token in turn)
        return (self.opening + said).decode(errors="replace")

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def head(self) -> Tensor:
        """The output embedding (V, H): hidden @ head.T are the logits."""
        return self.model.get_output_embeddings().weight

    def hidden(self, ids: Tensor, cache: transformers.Cache | None = None) -> Tensor:
        """Final hidden states (B, T, H) of ids (B, T). Rows are right-padded or not at all, so
        causality is the only mask."""
        if self._recomputes:  # a layer does only while it trains, and never with a cache
            for layer in self.model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.training = torch.is_grad_enabled()  # not its parts: no dropout
        with self.autocast():
            base = self.model.base_model
            out = base(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
            return out.last_hidden_state

    def recompute(self) -> None:
        """Have each layer compute its activations again in the backward pass instead of keeping
        them (gradient checkpointing): far less memory for about a third more time."""
        old = self.model.gradient_checkpointing_enable  # its name before transformers 5.20
        getattr(self.model, "activation_checkpointing_enable", old)()
        self._recomputes = True

    def autocast(self) -> torch.autocast:
        """Around whatever is computed from the weights."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def frozen_copy(self) -> Policy:
        """The same policy with a copy of the weights that never trains: the reference. In bfloat16
        where it would be read so anyway."""
        frozen = copy.copy(self)
        frozen.model = copy.deepcopy(self.model).requires_grad_(False)
        if self.bfloat16:  # not the buffers: rounded, rotary frequencies would lose their places
            for parameter in frozen.model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        return frozen

    def save(self, folder: Path) -> None:
        """Write a checkpoint that `load_policy(folder)` and any Hugging Face tool can load."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def shows_tools(framing: str, tools: list[dict]) -> bool:
    """Does a chat template show tools as Qwen2.5's does, and ask for no calls of another form?"""
    named = all(tool["function"]["name"] in framing for tool in tools)
    asked = '{"name": <function-name>, "arguments": <args-json-object>}' in framing
    return named and "<tools>" in framing and (asked or "<tool_call>" not in framing)


def describe_tools(tools: list[dict]) -> str:
    """The tools and the form of a call, to stand at the end of a system message."""
    function = tools[0]["function"]
    properties = function["parameters"]["properties"]
    arguments = {name: schema.get("enum", ["..."])[0] for name, schema in properties.items()}
    example = json.dumps({"name": function["name"], "arguments": arguments})
    return TOOLS_PROMPT.format(schemas="\n".join(map(json.dumps, tools)), example=example)


# ------------------------------------------------------------------------------ loading checkpoints
def load_policy(model: str | Path, device: str = "cpu", bfloat16: bool = False) -> Policy:
    """The policy of a checkpoint: a folder or a hub id of a causal LM with a chat template.

    Weights come from safetensors only, as float32, and remote code is never run. Raises ValueError
    or OSError, with the reason, for a checkpoint that cannot be used.
    """
    try:
        network = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        ).to(device)
    except safetensors.SafetensorError as error:
        raise ValueError(f"the weights of {model} are damaged: {error}") from None
    if not hasattr(network.config, "num_hidden_layers"):  # of a text model inside another
        raise ValueError(f"{model} is no model of text alone ({type(network).__name__})")
    kinds = set(getattr(network.config, "layer_types", None) or [])
    if kinds := kinds - {"full_attention", "sliding_attention"}:
        named = ", ".join(sorted(kinds))
        raise ValueError(f"{model} has layers without a key-value cache ({named}): not supported")
    # NOTE: not AutoTokenizer: for a Qwen2 it puts Qwen2's own splitting rule in the place of the
    # one in tokenizer.json.
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(model)
    codec = (*encoders(tokenizer), token_bytes(tokenizer))
    policy = Policy(network.eval(), tokenizer, *codec, bfloat16)
    with torch.no_grad():
        ids = torch.arange(8, device=device)[None]
        logits = network.base_model(input_ids=ids).last_hidden_state @ policy.head.T
        if not torch.allclose(logits, network(ids).logits, rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"{model} changes its logits after the head (a bias, a scale, a cap): not supported"
            )
    return policy


def encoders(tokenizer: transformers.PreTrainedTokenizerFast) -> tuple[Callable, Callable]:
    """(encode, encode_framing): tiktoken serves tokenizers of warm_start.py, which are a splitting
    rule and byte pairs in the order of their ids; transformers serves any other."""
    splitting = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    parts = splitting.get("pretokenizers", [])
    if tokenizer.init_kwargs.get("made_by") == "actfocus" and parts:
        special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
        ranks = {piece: i for i, piece in enumerate(token_bytes(tokenizer)) if piece}
        encoding = tiktoken.Encoding(
            "actfocus",
            pat_str=parts[0]["pattern"]["Regex"],
            mergeable_ranks=ranks,
            special_tokens=special,
        )
        return encoding.encode_ordinary, partial(encoding.encode, allowed_special="all")
    plain = partial(tokenizer.encode, add_special_tokens=False)
    return partial(plain, split_special_tokens=True), plain


# ------------------------------------------------------------------------- attention on a processor
def use_packed_attention(model: transformers.PreTrainedModel) -> None:
    """Decode with `packed_sdpa` where transformers would with SDPA."""
    if model.config._attn_implementation == "sdpa":
        transformers.AttentionInterface.register("packed_sdpa", packed_sdpa)
        transformers.AttentionMaskInterface.register("packed_sdpa", sdpa_mask)
        model.set_attn_implementation("packed_sdpa")


def packed_sdpa(
    module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options
) -> tuple[Tensor, None]:
    """transformers' SDPA; but where every row feeds one token, query (B, heads, 1, D), the heads
    that share a key-value head become its query positions, so that the cache is read once, not once
    per query head. On a processor, decoding waits for little else."""
    if query.shape[2] > 1 or mask is not None:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    kv_heads, width = key.shape[1], query.shape[3]
    packed = query.reshape(len(query), kv_heads, -1, width)  # (B, kv heads, heads / kv heads, D)
    out = scaled_dot_product_attention(packed, key, value, scale=options.get("scaling"))
    return out.reshape(len(query), 1, -1, value.shape[3]), None  # (B, 1, heads, D)
