"""What a run needs of a device's memory, by part, before anything large is allocated.

    parts = estimate(transformers.AutoConfig.from_pretrained(MODEL), "cuda", ...)
    print(describe(parts, there=80e9))

Two moments count. While updating there are weights, gradients, Adam's two moments, the reference,
the activations of a micro-batch and the loss; while playing, the key-value cache instead of
gradients, activations and loss. What a layer keeps for its backward pass is not guessed by a
formula: one of the same shape is run on a few tokens, and what autograd saves is counted.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterable

import torch
import transformers

from arms import Arm
from energy import CHUNK_ELEMENTS
from support.logs import LARGE

Parts = dict[str, dict[str, float]]  # bytes by moment and part
SPARE = {
    "updating": "lower --micro-tokens or add --gradient-checkpointing",
    "playing": "lower --play-batch",
}
ADVICE = "; ".join(SPARE.values())


def told(run: Callable) -> Callable:
    """run(config, ...), ended by a sentence that says which flags to turn if memory runs out."""

    @functools.wraps(run)
    def wrapped(config, *args, **options):
        try:
            return run(config, *args, **options)
        except RuntimeError as error:  # a processor's is no OutOfMemoryError
            full = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
            if not full:
                raise
            trains = hasattr(config, "gradient_checkpointing")
            flags = ADVICE if trains else "lower --micro-tokens or --play-batch"  # of a diagnosis
            raise SystemExit(f"out of memory on {config.device}: {flags}") from None

    return wrapped


def announce(model: str, config, arms: Iterable[Arm]) -> None:
    """Print what a run of train_grpo.py will need. model: folder or hub id; config: the flags."""
    try:
        parts = estimate(
            transformers.AutoConfig.from_pretrained(model, trust_remote_code=False),
            config.device,
            bfloat16=config.bfloat16,
            reference=any(arm.beta for arm in arms) or config.kl_coef > 0,
            critic=any(arm.critic for arm in arms),
            recompute=config.gradient_checkpointing,
            micro_tokens=config.micro_tokens,
            rollouts=min(
                config.play_batch, max(config.prompts * config.group_size, config.eval_episodes)
            ),
            max_tokens=config.max_tokens,
        )
        print(describe(parts, available(config.device)))
    except Exception as error:  # of a model of an odd shape, which may well train
        print(f"note: the memory that this takes cannot be estimated: {error}")


def estimate(
    shape: transformers.PretrainedConfig, device: str, *,
    bfloat16: bool, reference: bool, critic: bool, recompute: bool,
    micro_tokens: int, rollouts: int, max_tokens: int,
) -> Parts:  # fmt: skip
    """Bytes by part, while updating and while playing.

    shape: of the model. bfloat16: what it computes in (on CUDA it always does). reference, critic:
    is there one? recompute: gradient checkpointing. rollouts: as many play at once, to at most
    max_tokens each: the cache is what it can become.
    """
    on_cpu = torch.device(device).type == "cpu"
    bfloat16 = bfloat16 or torch.device(device).type == "cuda"
    size = 2 if bfloat16 else 4  # bytes of a number that is computed with
    network = empty_model(shape)
    parameters = sum(p.numel() for p in network.parameters())
    vocabulary, width = network.get_output_embeddings().weight.shape
    layers, heads = shape.num_hidden_layers, shape.num_attention_heads
    head_width = getattr(shape, "head_dim", None) or width // heads
    heads = getattr(shape, "num_key_value_heads", None) or heads
    start = 4 * sum(p.numel() for p in network.state_dict().values())
    always = {
        "weights": 4 * parameters,
        "Adam": 8 * parameters,
        "reference": size * parameters if reference else 0,
        "critic": 16 * parameters if critic else 0,  # weights, gradients, Adam
        "start": start if on_cpu else 0,  # else in the host's
        "bfloat16 copy": 2 * parameters if bfloat16 else 0,
    }
    layer = saved_by_layer(shape, bfloat16)
    # recomputed: of each layer what goes in, and of one all
    by_token = (4 * layers * width + layer) if recompute else layers * layer
    by_token += layer  # the gradients that pass through one
    kept = 2 if parameters <= LARGE else 0  # successive gradients, to compare them
    head = vocabulary * width * (2.5 if bfloat16 and on_cpu else 1)  # and rounded copies of it
    chunk = min(CHUNK_ELEMENTS * (2 if on_cpu else 8), micro_tokens * vocabulary)
    updating = {
        "gradients": 4 * (1 + kept) * parameters,
        "activations": by_token * max(micro_tokens, max_tokens),  # a batch has one row at least
        "loss": 4 * (2 * chunk + head),  # logits, and a gradient of the head
    }
    playing = {
        "key-value cache": 2 * layers * heads * head_width * size * rollouts * max_tokens,
        "logits": 16 * rollouts * vocabulary,
    }
    return {"updating": always | updating, "playing": always | playing}


def empty_model(shape: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """The model without its numbers."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(shape)


def saved_by_layer(shape: transformers.PretrainedConfig, bfloat16: bool) -> float:
    """Bytes that one layer keeps of each token for its backward pass, measured."""
    return saved_by_token(shape, 2, bfloat16) - saved_by_token(shape, 1, bfloat16)


def saved_by_token(shape: transformers.PretrainedConfig, layers: int, bfloat16: bool) -> float:
    """Bytes that a model of so many layers, and next to no vocabulary, keeps of each token."""
    shape = copy.deepcopy(shape)
    shape.num_hidden_layers, shape.vocab_size, shape.pad_token_id = layers, 8, None
    if kinds := getattr(shape, "layer_types", None):
        shape.layer_types = kinds[:layers]
    trunk = empty_model(shape).base_model.to_empty(device="cpu").train()
    own = {p.untyped_storage()._cdata for p in trunk.parameters()}

    def saved(tokens: int) -> int:
        found = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                found[storage._cdata] = storage
            return tensor

        watch = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with watch, torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            trunk(torch.zeros(1, tokens, dtype=torch.int64), use_cache=False)
        return sum(storage.nbytes() for storage in found.values())

    return (saved(64) - saved(32)) / 32  # without what does not grow with the tokens


def available(device: str) -> int:
    """Bytes of memory of a device; for a processor, of the machine."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe(parts: Parts, there: float) -> str:
    """A line a moment, and one of advice if a moment needs more than there is.

    >>> print(describe({"updating": {"weights": 3e9, "loss": 1e8}, "playing": {"cache": 9e9}}, 8e9))
    memory while updating: 3.1 GB (weights 3.0, loss 0.1)
    memory while playing, at most: 9.0 GB (cache 9.0)
    There are 8.0 GB: lower --play-batch.
    """
    lines, advice = [], []
    for moment, by_part in parts.items():
        total = sum(by_part.values())
        large = {part: size for part, size in by_part.items() if size >= 5e7}
        shown = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in large.items())
        bound = ", at most" if moment == "playing" else ""
        line = f"memory while {moment}{bound}: {total / 1e9:.1f} GB"
        lines.append(f"{line} ({shown})" if shown else line)
        if total > there:
            advice.append(SPARE[moment])
    if advice:
        lines.append(f"There are {there / 1e9:.1f} GB: {'; '.join(advice)}.")
    return "\n".join(lines)
