"""Decoding that reads its key-value cache once a step.

While a model decodes, each step feeds one new token per episode and looks up the keys and values of
all tokens before it. Reading them takes most of the time, so both halves of this file avoid moving
them more often than needed: the cache grows without being copied at each step, and on a processor
the attention reads it once for all query heads.
"""

from __future__ import annotations

import transformers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def preallocated_cache(model: transformers.PreTrainedModel, limit: int) -> Cache:
    """An empty cache for a model. limit: how many positions will ever come."""
    layers = [PreallocatedLayer(limit) for _ in range(model.config.num_hidden_layers)]
    return Cache(layers=layers)


class PreallocatedLayer(DynamicLayer):
    """The cache of one layer of the model, in buffers that double when they are full.

    transformers' own layer copies everything at each step (`torch.cat`). limit: how many positions
    will ever come, which the buffers need not exceed. Keys are stored in the dtype of the values:
    under autocast, rotary embeddings leave them in float32, and then each step would cast all of
    the stored keys once more.
    """

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple:
        """Append keys and values of new positions, (B, heads, new, D) each. Returns all so far."""
        new = key_states.to(value_states.dtype), value_states
        if not self.is_initialized:
            self.lazy_initialization(*new)
            self.buffers = [states[:, :, :0] for states in new]
            self.keys, self.values = self.buffers
        before = self.keys.shape[2]
        after = before + value_states.shape[2]
        if after > self.buffers[0].shape[2]:
            capacity = max(after, min(2 * after, self.limit))
            self._move_to_buffers(self.keys, self.values, capacity)
        for buffer, states in zip(self.buffers, new, strict=True):
            buffer[:, :, before:after] = states
        self.keys, self.values = (buffer[:, :, :after] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Continue with these episodes of the batch, some of them perhaps several times."""
        capacity = self.buffers[0].shape[2]
        self._move_to_buffers(self.keys[indices], self.values[indices], capacity)

    def _move_to_buffers(self, keys: Tensor, values: Tensor, capacity: int) -> None:
        """Copy keys and values into new buffers with room for `capacity` positions."""
        length = keys.shape[2]
        self.buffers = []
        for states in (keys, values):
            batch, heads, _, width = states.shape
            buffer = states.new_empty(batch, heads, capacity, width)
            buffer[:, :, :length] = states
            self.buffers.append(buffer)
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)


def use_packed_attention(model: transformers.PreTrainedModel) -> None:
    """Decode with `packed_sdpa`, if transformers would decode with SDPA."""
    if model.config._attn_implementation == "sdpa":
        transformers.AttentionInterface.register("packed_sdpa", packed_sdpa)
        transformers.AttentionMaskInterface.register("packed_sdpa", sdpa_mask)
        model.set_attn_implementation("packed_sdpa")


def packed_sdpa(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,  # some models give it by name
    **options,
) -> tuple[Tensor, None]:
    """transformers' SDPA, except where every episode feeds one token: query (B, heads, 1, D).

    In that case several query heads share each key-value head. They are presented as query
    positions of one head, so that the cache is read once and not once per query head. On a
    processor, decoding waits for little else.
    """
    if query.shape[2] > 1 or attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    kv_heads, width = key.shape[1], query.shape[3]
    packed = query.reshape(len(query), kv_heads, -1, width)  # (B, kv heads, heads / kv heads, D)
    out = scaled_dot_product_attention(packed, key, value, scale=options.get("scaling"))
    return out.reshape(len(query), 1, -1, value.shape[3]), None  # (B, 1, heads, D)
