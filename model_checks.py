"""What a checkpoint must be like, so that the model that is trained is the model that was given.

transformers loads many checkpoints that this project would silently train wrong: weights that are
missing are made up, a position coding may change with the length of an episode, and logits may be
changed after the head, where our losses never see it. Each function here looks for one such fault
and raises ValueError with one sentence, which names the fault and says what to do.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from torch import Tensor

# The files that transformers parses when it loads a folder.
JSON_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
# The fields with which configs bound the logits of the head: cap * tanh(logits / cap).
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")


def check_files(name: str | Path) -> None:
    """Raises ValueError for a path that is no folder of a model, an adapter, or a damaged file.

    A name such as "Qwen/Qwen2.5-0.5B-Instruct" for which there is no folder may be a hub id; it is
    left to transformers.
    """
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"{name} is a file: name the folder that it lies in")
        # A hub id is a name, or an owner and a name.
        if len(folder.parts) > 2 or str(name).startswith(("/", ".", "~")):
            raise ValueError(f"there is no folder {name}: check the path")
        return
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{name} holds an adapter (adapter_config.json): merge it into its base model first, "
            "and name the folder of the merged model"
        )
    if not (folder / "config.json").exists():
        raise ValueError(f"{name} has no config.json: it is no folder of a Hugging Face model")
    for file in JSON_FILES:
        if (folder / file).exists():
            try:
                json.loads((folder / file).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{folder / file} is damaged ({error}): fetch it again") from None


def check_config(config: transformers.PretrainedConfig, name: str | Path) -> None:
    """Raises ValueError for quantised weights, and for a model that bounds its logits: our losses
    multiply hidden states by the head and know no bound."""
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{name} holds quantised weights (quantization_config in its config.json): "
            "training needs the unquantised checkpoint"
        )
    for field in SOFT_CAPS:
        cap = getattr(config, field, None)
        if cap:
            raise ValueError(
                f"{name} changes its logits after the head (it bounds them, {field} is {cap}): "
                "not supported, choose another model"
            )


def check_layers(network: transformers.PreTrainedModel, name: str | Path) -> None:
    """Raises ValueError unless this is a text model whose layers all have a key-value cache."""
    if not hasattr(network.config, "num_hidden_layers"):  # of a text model inside another
        raise ValueError(f"{name} is no model of text alone ({type(network).__name__})")
    kinds = set(getattr(network.config, "layer_types", None) or [])
    uncached = kinds - {"full_attention", "sliding_attention"}
    if uncached:
        named = ", ".join(sorted(uncached))
        raise ValueError(f"{name} has layers without a key-value cache ({named}): not supported")


def check_weights(loading: dict, name: str | Path) -> None:
    """Raises ValueError unless the weights of the model are exactly those of the checkpoint.

    loading: what `from_pretrained(..., output_loading_info=True)` reports. transformers leaves out
    of it what is meant to be absent or superfluous, such as the head of a model that ties it to its
    embedding.
    """
    problems = []
    if loading["mismatched_keys"]:
        shapes = [f"{key} {tuple(a)} for {tuple(b)}" for key, a, b in loading["mismatched_keys"]]
        problems.append(f"of another shape than config.json says: {enumerate_few(shapes)}")
    if loading["missing_keys"]:
        problems.append(f"missing: {enumerate_few(loading['missing_keys'])}")
    if loading["unexpected_keys"]:
        problems.append(f"not of this model: {enumerate_few(loading['unexpected_keys'])}")
    if problems:
        raise ValueError(
            f"the weights of {name} do not fit its config.json, and random ones would take their "
            f"place ({'; '.join(problems)}): save the model again with save_pretrained, and a "
            "compiled one from its _orig_mod"
        )


def enumerate_few(names: list[str] | set[str]) -> str:
    """The first three names, in order, and how many more there are.

    >>> enumerate_few({"d", "c", "b", "a"})
    'a, b, c and 1 more'
    """
    first = sorted(names)[:3]
    more = len(names) - len(first)
    if more:
        return f"{', '.join(first)} and {more} more"
    return ", ".join(first)


@torch.no_grad()
def check_logits(network: transformers.PreTrainedModel, name: str | Path) -> None:
    """Raises ValueError unless the logits of a model are its hidden states times its head.

    They are looked at twice: as they are, and about a thousand in size, since a bound can hardly be
    seen while logits are small. For the second look the head is multiplied by a power of two, and
    then divided by it, which gives back the same numbers.
    """
    head = network.get_output_embeddings().weight
    ids = torch.arange(8, device=network.device)[None]
    tolerance = 1e-3 if head.dtype == torch.float32 else 2e-2

    def both() -> tuple[Tensor, Tensor]:
        """What we compute and what the model computes, (1, 8, V) each."""
        hidden = network.base_model(input_ids=ids).last_hidden_state
        return hidden @ head.T, network(ids).logits

    ours, its = both()
    same = torch.allclose(ours, its, rtol=tolerance, atol=tolerance)
    if same:
        largest = its.abs().max().item()
        scale = 2 ** max(0, round(10 - torch.tensor(max(largest, 1e-3)).log2().item()))
        head.mul_(scale)
        try:
            ours, its = both()
        finally:
            head.div_(scale)
        same = torch.allclose(ours, its, rtol=tolerance, atol=tolerance * scale)
    if not same:
        raise ValueError(
            f"{name} changes its logits after the head (a bias, a scale, a cap): not supported"
        )


def check_length(config: transformers.PretrainedConfig, max_tokens: int) -> None:
    """Raises ValueError if episodes of max_tokens tokens are more than a model can carry.

    A model that learned a vector for each position has none beyond its last. One whose rotary
    frequencies change once the text is longer than a limit ("dynamic" and "longrope") would play
    the beginning of a long episode with other frequencies than those that it is scored with.
    Other rotary models compute alike at any length but were not trained beyond their maximum:
    a note on stderr says so.
    """
    name = config.name_or_path or "this model"
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    rotary = getattr(config, "rope_parameters", None) or {}
    codings = [rotary] if "rope_type" in rotary else list(rotary.values())  # one a kind of layer
    for coding in codings:
        kind = coding.get("rope_type", "default")
        if "dynamic" not in kind and kind != "longrope":
            continue
        original = coding.get("original_max_position_embeddings") or limit
        if max_tokens > original:
            raise ValueError(
                f"{name} changes its rotary frequencies ({kind}) in texts of more than {original} "
                f"tokens, so episodes would be scored otherwise than they were played: "
                f"--max-tokens is {max_tokens}, lower it to {original}"
            )
    if limit is None or max_tokens <= limit:
        return
    if not codings:
        raise ValueError(
            f"{name} has no more than {limit} positions: --max-tokens is {max_tokens}, lower it to "
            f"{limit}"
        )
    print(
        f"note: {name} was made for texts of at most {limit} tokens, and an episode may have "
        f"{max_tokens}: --max-tokens {limit} would end it there",
        file=sys.stderr,
    )
