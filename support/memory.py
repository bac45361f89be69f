"""How much memory a training run needs, estimated before anything large is allocated.

    python -m support.memory --model FOLDER [training flags]    # will it fit?

A run needs most memory at one of two moments. While it updates, there are the weights, gradients,
Adam's two moments, the reference, the activations of a micro-batch, and the loss. While it plays,
the key-value cache takes the place of gradients, activations and loss.

The activations that a layer keeps for its backward pass are not guessed by a formula. A layer of
the same shape is run on a few tokens, and what autograd saves is counted.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import transformers

from arms import Arm
from energy import CHUNK_ELEMENTS
from policy import weights_that_autocast_rounds
from support.config import ActFocusConfig, Config, parse
from support.logs import LARGE
from support.lora import add_adapters
from support.warm_start import start_folder

Estimate = dict[str, dict[str, float]]  # bytes, by moment and by what takes them
WHAT_SAVES_MEMORY = {  # by moment
    "updating": "lower --micro-tokens or add --gradient-checkpointing",
    "playing": "lower --play-batch",
}
TRAINING_ADVICE = "; ".join(WHAT_SAVES_MEMORY.values())


@contextlib.contextmanager
def explain_out_of_memory(device: str, advice: str = TRAINING_ADVICE) -> Iterator[None]:
    """End the process with a sentence of advice, and no traceback, if memory runs out.

        with explain_out_of_memory(config.device):
            train(config)

    Any other error passes through.
    """
    try:
        yield
    except RuntimeError as error:
        on_cuda = isinstance(error, torch.OutOfMemoryError)
        elsewhere = "allocate memory" in str(error) or "out of memory" in str(error)
        if not (on_cuda or elsewhere):
            raise
        raise SystemExit(f"out of memory on {device}: {advice}") from None


def give_back() -> None:
    """Hand what was freed back to the system.

    The C library of Linux keeps freed blocks of up to 32 MB for itself. So what an update has taken
    would stay taken while the next episodes are played, and no other run could have it. Where the C
    library is another one, nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no such function, or library
        ctypes.CDLL(None).malloc_trim(0)


def print_estimate(model: str | Path, config: Config, arms: Iterable[Arm]) -> None:
    """Print what a run will need, and advice if the device has less.

    model: a folder or a Hugging Face id, of which only the config is read. config: the settings,
    after `resolve`. Never raises: a model of an unusual shape may train although it cannot be
    estimated, so a note is printed instead.
    """
    try:
        needed = estimate_run(model, config, list(arms))
        print(describe(needed, available(config.device)))
    except Exception as error:
        print(f"note: the memory that this run needs cannot be estimated: {error}")


def how_many_fit(model: str | Path, config: Config, arms: Iterable[Arm]) -> int:
    """How many runs as this one fit into the memory at the same time, at least 1; arguments as in
    `print_estimate`. It is 1 if nothing is known of it."""
    try:
        needed = estimate_run(model, config, list(arms))
    except Exception:  # `print_estimate` has said so
        return 1
    there = available(config.device)
    if there is None:
        return 1
    return max(1, int(there / max(sum(sizes.values()) for sizes in needed.values())))


def estimate_run(model: str | Path, config: Config, arms: list[Arm]) -> Estimate:
    """The estimate for the settings of a training run; arguments as in `print_estimate`."""
    evaluated = config.final_eval_episodes or config.eval_episodes
    at_once = max(config.prompts * config.group_size, evaluated)
    return estimate(
        transformers.AutoConfig.from_pretrained(model, trust_remote_code=False),
        config.device,
        bfloat16=config.bfloat16,
        reference=any(arm.needs_reference for arm in arms) or config.kl_coef > 0,
        critic=any(arm.critic for arm in arms),
        lora=config.lora,
        recompute=config.gradient_checkpointing,
        micro_tokens=config.micro_tokens,
        rollouts=min(config.play_batch, at_once),
        max_tokens=config.max_tokens,
    )


def estimate(
    shape: transformers.PretrainedConfig, device: str, *,
    bfloat16: bool, reference: bool, critic: bool, recompute: bool,
    micro_tokens: int, rollouts: int, max_tokens: int, lora: int | None = None,
) -> Estimate:  # fmt: skip
    """The bytes that each part of a run takes while it updates and while it plays.

    shape: the config of the model. bfloat16: does it compute in bfloat16? (On CUDA it always does.)
    reference, critic: is there one? recompute: is gradient checkpointing on? rollouts: how many are
    played at once. max_tokens: how long each of them may become; the cache is estimated for
    rollouts that all become that long. lora: the rank of adapters, if only they are trained.
    """
    on_cpu = torch.device(device).type == "cpu"
    bfloat16 = bfloat16 or torch.device(device).type == "cuda"
    size = 2 if bfloat16 else 4  # bytes of a number in the computation
    network = empty_model(shape)
    if lora:
        add_adapters(network, lora)
    parameters = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    frozen = parameters - trained
    rounded = sum(p.numel() for p in weights_that_autocast_rounds(network))
    vocabulary, width = network.get_output_embeddings().weight.shape
    layers, heads = shape.num_hidden_layers, shape.num_attention_heads
    head_width = getattr(shape, "head_dim", None) or width // heads
    heads = getattr(shape, "num_key_value_heads", None) or heads
    initial_weights = 4 * sum(tensor.numel() for tensor in network.state_dict().values())
    if lora:
        reference = False  # it is the policy with its adapters off
        initial_weights = 4 * trained
    always = {
        "weights": 4 * trained + size * frozen,
        "Adam": 8 * trained,
        "reference": 4 * parameters - (4 - size) * rounded if reference else 0,
        "critic": 16 * parameters if critic else 0,  # weights, gradients, Adam
        # each arm begins from them; they are kept in the memory of the machine, not of a GPU
        "initial weights": initial_weights if on_cpu else 0,
        "bfloat16 copy": 2 * trained if bfloat16 else 0,
    }
    layer = saved_by_layer(shape, bfloat16, lora)
    kept_by_token = layers * layer
    if recompute:  # the input of every layer is kept, and all of the one that is recomputed
        kept_by_token = (size if lora else 4) * layers * width + layer
    kept_by_token += layer  # the gradients that pass through one layer
    compared = 2 if parameters <= LARGE else 0  # copies of gradients, for `gradient_agreement`
    head = 4 * vocabulary * width
    if lora:
        head_while_updating = head if bfloat16 and on_cpu else 0  # as float32, for a product
        head_while_playing = head if bfloat16 else 0
    else:
        head_while_updating = head * (2.5 if bfloat16 and on_cpu else 1)  # gradient, rounded copies
        head_while_playing = 0
    chunk = min(CHUNK_ELEMENTS * (2 if on_cpu else 8), micro_tokens * vocabulary)
    updating = {
        "gradients": 4 * (1 + compared) * trained,
        # a micro-batch holds at least one whole rollout
        "activations": kept_by_token * max(micro_tokens, max_tokens),
        "loss": 8 * chunk + head_while_updating,  # logits, and what the head takes
    }
    playing = {
        "key-value cache": 2 * layers * heads * head_width * size * rollouts * max_tokens,
        "logits": 16 * rollouts * vocabulary + head_while_playing,
    }
    return {"updating": always | updating, "playing": always | playing}


def empty_model(shape: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """A model of this shape on the meta device: shapes of weights, and no memory for them."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(shape)


def saved_by_layer(
    shape: transformers.PretrainedConfig, bfloat16: bool, lora: int | None = None
) -> float:
    """The bytes that one layer keeps of each token for its backward pass, as measured."""
    # The second layer: its input has a gradient, also where only adapters are trained.
    return saved_by_token(shape, 2, bfloat16, lora) - saved_by_token(shape, 1, bfloat16, lora)


def saved_by_token(
    shape: transformers.PretrainedConfig, layers: int, bfloat16: bool, lora: int | None = None
) -> float:
    """The bytes that a trunk of so many layers keeps of each token for its backward pass.

    Its vocabulary is made tiny, so that only the layers count.
    """
    shape = copy.deepcopy(shape)
    shape.num_hidden_layers, shape.vocab_size, shape.pad_token_id = layers, 8, None
    if kinds := getattr(shape, "layer_types", None):
        shape.layer_types = kinds[:layers]
    trunk = empty_model(shape).base_model.to_empty(device="cpu").train()
    if lora:
        add_adapters(trunk, lora)
    for parameter in trunk.parameters():
        if bfloat16 and not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    weights = {p.untyped_storage()._cdata for p in trunk.parameters()}  # no activations

    def saved_bytes(tokens: int) -> int:
        storages = {}  # by identity: several saved tensors may share one

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                storages[storage._cdata] = storage
            return tensor

        watch = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with watch, torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            trunk(torch.zeros(1, tokens, dtype=torch.int64), use_cache=False)
        return sum(storage.nbytes() for storage in storages.values())

    return (saved_bytes(64) - saved_bytes(32)) / 32  # the part that grows with the tokens


def available(device: str) -> int | None:
    """The bytes of memory that a device has; None if the system does not say.

    A GPU's are its own; a processor's, and those of Apple's GPU, are the machine's.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, others lack a name
        return None


def moments_too_large(needed: Estimate, there: float | None) -> list[str]:
    """The moments at which a run needs more than the bytes that are there; [] if unknown."""
    if there is None:
        return []
    return [moment for moment, sizes in needed.items() if sum(sizes.values()) > there]


def describe(needed: Estimate, there: float | None) -> str:
    """One line for each moment, and one of advice if a moment needs more bytes than are there.

    >>> print(describe({"updating": {"weights": 3e9, "loss": 1e8}, "playing": {"cache": 9e9}}, 8e9))
    memory while updating: 3.1 GB (weights 3.0, loss 0.1)
    memory while playing, at most: 9.0 GB (cache 9.0)
    There are 8.0 GB: lower --play-batch.
    """
    lines = []
    for moment, sizes in needed.items():
        line = f"memory while {moment}"
        if moment == "playing":
            line += ", at most"
        line += f": {sum(sizes.values()) / 1e9:.1f} GB"
        large = [f"{name} {size / 1e9:.1f}" for name, size in sizes.items() if size >= 5e7]
        if large:
            line += f" ({', '.join(large)})"
        lines.append(line)
    advice = [WHAT_SAVES_MEMORY[moment] for moment in moments_too_large(needed, there)]
    if advice:
        lines.append(f"There are {there / 1e9:.1f} GB: {'; '.join(advice)}.")
    return "\n".join(lines)


class MemoryConfig(ActFocusConfig):
    """The settings of a run whose memory is estimated. Arms with a critic may be among them."""

    with_critic = True


def main(argv: list[str] | None = None) -> None:
    """Answer "will it fit?" without loading the model. Exit code 1: it will not."""
    config = parse(MemoryConfig, "Estimates the memory of a training run. Will it fit?", argv)
    config.resolve()
    try:
        folder = config.model or start_folder(config.env, thoughts=config.thoughts)
        needed = estimate_run(folder, config, list(config.chosen_arms().values()))
    except (OSError, ValueError) as error:
        raise SystemExit(f"the memory of this run cannot be estimated: {error}") from None
    there = available(config.device)
    print(describe(needed, there))
    if there is None:
        raise SystemExit(f"How much memory {config.device} has is unknown.")
    if moments_too_large(needed, there):
        raise SystemExit("It will not fit.")
    print(f"It will fit: there are {there / 1e9:.1f} GB.")


if __name__ == "__main__":
    main()
