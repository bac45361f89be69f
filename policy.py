"""The policy: a causal language model and its tokenizer behind one small interface.

    policy = load_policy("starts/frozenlake")                # the built-in model of a world
    policy = load_policy("Qwen/Qwen2.5-0.5B-Instruct")       # or any chat model, folder or hub id
    ids = policy.prompt(system, tools, observation)          # token ids, see chat.py
    logits = policy.hidden(torch.tensor([ids])) @ policy.head.T

chat.py turns text into token ids, and kv_cache.py makes decoding fast; this file joins them to the
model.
"""

from __future__ import annotations

import copy
from pathlib import Path

import safetensors
import torch
import transformers
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from chat import ChatTemplate
from kv_cache import use_packed_attention
from model_checks import check_config, check_files, check_layers, check_logits, check_weights


class Policy:
    """A model and what it takes to talk to it.

    bfloat16: compute in bfloat16, which is always done on CUDA. The weights that are trained stay
    float32. Raises ValueError if the chat template cannot carry a tool-calling episode.
    """

    end_of_turn: int  # the control token that the template closes a turn with
    opening: bytes  # what the template writes of a turn itself: b"<think>\n", or b""
    bytes_of: list[bytes]  # by token id; b"" for control tokens and for ids of no token
    control_tokens: frozenset[int]  # a turn that samples one of them ends with it

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerFast,
        bfloat16: bool = False,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.bfloat16 = bfloat16 or self.device.type == "cuda"
        self.chat = ChatTemplate(tokenizer)
        self.end_of_turn = self.chat.end_of_turn
        self.opening = self.chat.opening
        padding = len(self.head) - len(self.chat.bytes_of)  # checkpoints have ids of no token
        if padding < 0:
            raise ValueError(
                f"the tokenizer has {len(self.chat.bytes_of)} tokens and the model's embedding "
                f"only {len(self.head)} rows: resize it with model.resize_token_embeddings, and "
                "save the model again"
            )
        self.bytes_of = self.chat.bytes_of + [b""] * padding
        self.control_tokens = frozenset(i for i, piece in enumerate(self.bytes_of) if not piece)
        self._recomputes = False
        if self.device.type == "cpu":
            use_packed_attention(model)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, none of them a control token."""
        return self.chat.encode(text)

    def prompt(self, system: str, tools: list[dict], observation: str) -> list[int]:
        """The ids of an episode up to its first assistant turn."""
        return self.chat.prompt(system, tools, observation)

    def result(self, observation: str) -> list[int]:
        """The ids from just after an end-of-turn token, through a tool's response, up to the next
        assistant turn."""
        return self.chat.result(observation)

    def turn_text(self, turn: list[int]) -> str:
        """A turn as the environment reads it: what the template has opened it with, followed by the
        text of its sampled tokens."""
        sampled = b"".join(self.bytes_of[token] for token in turn)
        return (self.opening + sampled).decode(errors="replace")

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def head(self) -> Tensor:
        """The output embedding (V, H): hidden @ head.T are the logits."""
        return self.model.get_output_embeddings().weight

    def hidden(self, ids: Tensor, cache: transformers.Cache | None = None) -> Tensor:
        """Final hidden states (B, T, H) of ids (B, T).

        There is no padding mask. Padding may only stand after the last token of an episode, where
        no token before it can see it.
        """
        with self.autocast():
            return self._hidden(ids, cache)

    def _hidden(self, ids: Tensor, cache: transformers.Cache | None) -> Tensor:
        if self._recomputes:
            # transformers recomputes a layer only if the layer is in training mode, and such a
            # layer cannot use a cache. So the mode follows whether there is a gradient. Modules
            # inside the layer keep theirs, so their dropout stays off. A layer that itself calls
            # dropout(training=self.training), as OPT's does, is refused by `recompute`.
            for module in self.model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = torch.is_grad_enabled()
        base = self.model.base_model
        out = base(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
        return out.last_hidden_state

    def recompute(self) -> None:
        """Let each layer compute its activations a second time in the backward pass, and not keep
        them (gradient checkpointing). This takes far less memory and about a third more time.

        Raises ValueError for a model that then computes something else with a gradient than
        without one: it would be trained under another distribution than it is played with.
        """
        if hasattr(self.model, "activation_checkpointing_enable"):
            self.model.activation_checkpointing_enable()
        else:  # before transformers 5.20
            self.model.gradient_checkpointing_enable()
        self._recomputes = True
        ids = torch.arange(8, device=self.device)[None]
        with torch.no_grad():
            played = self._hidden(ids, cache=None)
        with torch.enable_grad():
            trained = self._hidden(ids, cache=None).detach()
        if not torch.allclose(trained, played, rtol=1e-3, atol=1e-3 * played.abs().max().item()):
            raise ValueError(
                f"{self.model.config.name_or_path} cannot be trained with gradient checkpointing: "
                "its layers compute something else in training mode (dropout, for example); leave "
                "out --gradient-checkpointing, or set its dropout to 0 in config.json"
            )

    def autocast(self) -> torch.autocast:
        """The context in which everything is computed from the weights."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def frozen_copy(self) -> Policy:
        """The reference: the same policy with a copy of the weights that is never trained. It says
        exactly what the policy says as long as that is not trained, in bfloat16 too: there the copy
        keeps in bfloat16 only what is rounded in each pass anyway."""
        frozen = copy.copy(self)
        frozen.model = copy.deepcopy(self.model).requires_grad_(False)
        if self.bfloat16:
            for parameter in weights_that_autocast_rounds(frozen.model):
                parameter.data = parameter.data.to(torch.bfloat16)
        return frozen

    def state_dict(self) -> dict[str, Tensor]:
        """The weights that training changes, by name: all of them here."""
        return self.model.state_dict()

    def load_state_dict(self, weights: dict[str, Tensor]) -> None:
        """Put weights of `state_dict` in the place of the present ones."""
        self.model.load_state_dict(weights)

    def save(self, folder: Path) -> None:
        """Write a checkpoint that `load_policy(folder)` and any Hugging Face tool can load."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def weights_that_autocast_rounds(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The weights of the linear layers: of them autocast makes a bfloat16 copy in each pass.

    Norms and the embedding stay as they are, and with them the residual stream: rounded, they would
    make another function of the model. A head that is tied to the embedding is not among the
    weights, therefore.
    """
    embedding = model.get_input_embeddings().weight
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    return [each for layer in layers for each in layer.parameters() if each is not embedding]


def load_policy(
    model: str | Path,
    device: str = "cpu",
    bfloat16: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Policy:
    """The policy of a checkpoint: a folder or a hub id of a causal LM with a chat template.

    dtype: of the weights. Those that are trained must be float32, since bfloat16 would round small
    steps away; the frozen ones of LoRA may be bfloat16. The weights come from safetensors only, and
    no code of a checkpoint is ever run.
    Raises ValueError or OSError, with the reason, for a checkpoint that cannot be used, or that
    would not be trained as the model that it is (model_checks.py).
    """
    check_files(model)
    config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
    check_config(config, model)
    try:
        network, loading = transformers.AutoModelForCausalLM.from_pretrained(
            model,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # check_weights names and refuses them
            output_loading_info=True,
        )
    except safetensors.SafetensorError as error:
        raise ValueError(f"the weights of {model} are damaged: {error}") from None
    check_weights(loading, model)
    check_layers(network, model)
    network.eval().to(device)
    check_logits(network, model)
    return Policy(network, load_tokenizer(model), bfloat16)


def load_tokenizer(model: str | Path) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint. Raises ValueError or OSError, with the file that is at fault.

    NOTE: not AutoTokenizer: for a Qwen2 it puts Qwen2's own splitting rule in the place of the one
    in tokenizer.json.
    """
    try:
        return transformers.PreTrainedTokenizerFast.from_pretrained(model)
    except OSError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"the tokenizer.json of {model} cannot be read: {error}") from None
