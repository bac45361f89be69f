"""LoRA: training two thin matrices beside each of some layers, in place of the model's weights.

    policy = load_with_adapters(folder, config)    # config.lora is the rank

A layer that multiplies by W then multiplies by W + (alpha / rank) B A, where A has `rank` rows and
B as many columns. Together A and B are an *adapter*. W is frozen; A and B are trained. This saves
most of the memory of training: frozen weights have no gradients and no optimizer, and they may be
in bfloat16. B begins at 0, so the policy begins as the model that was loaded, and that model is the
reference of ActFocus. It is still there whenever the adapters are off, so no second one is held.

This is the only file that imports peft, which is not among the requirements: pip install peft.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import Cache

from policy import Policy, load_policy
from support.config import Config

NAME = "default"  # what peft calls an adapter that was given no name


class LoraPolicy(Policy):
    """A policy whose adapters are trained and whose other weights stay as they are.

    policy: the model to adapt, in place. rank, alpha: as above. seed: of the random numbers that A
    begins with.
    """

    adapters_are_on = True

    def __init__(self, policy: Policy, rank: int, alpha: float, seed: int):
        super().__init__(policy.model, policy.tokenizer, policy.bfloat16)
        add_adapters(self.model, rank, alpha, seed)

    def hidden(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Final hidden states (B, T, H) of ids (B, T), as in `Policy`."""
        if self.adapters_are_on:
            return super().hidden(ids, cache)
        self.model.disable_adapters()
        try:
            return super().hidden(ids, cache)
        finally:
            self.model.enable_adapters()

    def frozen_copy(self) -> LoraPolicy:
        """The reference: the same model, which switches its adapters off while it reads."""
        frozen = copy.copy(self)
        frozen.adapters_are_on = False
        return frozen

    def state_dict(self) -> dict[str, Tensor]:
        """The weights that training changes, by name: those of the adapters."""
        weights = self.model.state_dict()
        return {name: value for name, value in weights.items() if is_adapter(name)}

    def load_state_dict(self, weights: dict[str, Tensor]) -> None:
        """Put weights of `state_dict` in the place of the present ones."""
        self.model.load_state_dict(weights, strict=False)  # the frozen ones are not among them

    def save(self, folder: Path) -> None:
        """Write a checkpoint that `load_policy(folder)` and any Hugging Face tool can load: a model
        without adapters, whose weights are W + (alpha / rank) B A."""
        merged(self.model).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_with_adapters(folder: str | Path, config: Config) -> LoraPolicy:
    """The policy of a checkpoint with new adapters of the rank config.lora, which are float32. The
    frozen weights are in bfloat16 if the policy computes in it, which halves their memory; the
    reference is the same model, and so is rounded alike.

    Raises ValueError or OSError for a checkpoint that cannot be used.
    """
    bfloat16 = config.bfloat16 or torch.device(config.device).type == "cuda"
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    policy = load_policy(folder, config.device, config.bfloat16, dtype)
    return LoraPolicy(policy, config.lora, config.lora_alpha, config.seed)


def add_adapters(
    model: transformers.PreTrainedModel, rank: int, alpha: float = 1.0, seed: int = 0
) -> None:
    """Freeze a model and give adapters to the layers that peft adapts by default in models of this
    type, for Qwen and Llama the projections to queries and values. In a type that peft does not
    know, all linear layers but the head get one."""
    import peft
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN_TYPES

    layers = None if model.config.model_type in KNOWN_TYPES else "all-linear"
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=layers)
    with torch.random.fork_rng(devices=[]):  # A is drawn on the processor
        torch.manual_seed(seed)
        model.add_adapter(settings, NAME)
    for name, parameter in model.named_parameters():
        if is_adapter(name):  # peft has given it the dtype of W
            parameter.data = parameter.data.float()


def is_adapter(name: str) -> bool:
    """Is a weight of this name part of an adapter?

    >>> is_adapter("q_proj.lora_A.default.weight"), is_adapter("q_proj.base_layer.weight")
    (True, False)
    """
    return ".lora_A." in name or ".lora_B." in name


def merged(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """A model without adapters that computes the same, on the processor.

    It is in float32: bfloat16 would round away most of what the adapters add.
    """
    from peft.tuners.lora import LoraLayer

    weights = {}
    for name, value in model.state_dict().items():
        if not is_adapter(name):
            weights[name.replace(".base_layer.", ".")] = value.to("cpu", torch.float32)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            added = layer.get_delta_weight(NAME).detach().cpu()  # (alpha / rank) B A
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + added
    with torch.device("meta"):  # no memory for weights that are replaced at once
        plain = type(model)(copy.deepcopy(model.config))
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain
