"""Paged attention behind transformers' attention interface.

Models call `paged_attention` for every layer. What it needs to know about the step comes along as the keyword argument
`paged`, which transformers hands down from `model.forward(...)`; there is no global. `paged` is a `PagedStep`, or, once
at load, a `Probe` that only writes down the shapes a model uses.

It has no entry in transformers' mask interface: for an attention implementation without one, models build no mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers import AttentionInterface

from engine.batch import Batch, Chunk, Single
from engine.blocks import BLOCK_SIZE

PAGED = "loraplex_paged"

# What models pass along that attention over a paged pool has no use for.
NEUTRAL = frozenset(
    {"dropout", "position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position", "is_causal",
     "output_router_logits", "position_embeddings", "layer_past", "head_mask", "return_dict"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Form:
    """How one layer attends: factor on the scores, tanh cap on them, how many tokens back it sees (None: all)."""

    scaling: float
    softcap: float | None
    window: int | None


class Paged(Protocol):
    """What may be handed down as `paged`."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: Form
    ) -> torch.Tensor:
        """Attention of [heads, T, D] queries given [kv_heads, T, D] keys and values of the step's own tokens.

        Returns [T, heads, D of value].
        """


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    paged: Paged | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [1, heads, T, D], key and value [1, kv_heads, T, D] -> [1, T, heads, D].

    Raises UnsupportedAttention for what this attention does not compute, rather than compute something else.
    """
    is_causal = kwargs.get("is_causal") is not False and getattr(module, "is_causal", True)
    if attention_mask is not None or not is_causal:
        raise UnsupportedAttention("its attention is not causal self-attention over the step's tokens")
    if paged is None:
        raise UnsupportedAttention("it does not hand keyword arguments down to its attention")
    softcap, window = kwargs.pop("softcap", None), kwargs.pop("sliding_window", None)
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in NEUTRAL)
    if unknown:
        raise UnsupportedAttention(f"its attention uses {', '.join(unknown)}")
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise UnsupportedAttention("its attention layers are not numbered")
    form = Form(scaling if scaling is not None else query.shape[-1] ** -0.5, softcap, window)
    return paged.attend(layer, query[0], key[0], value[0], form)[None], None


AttentionInterface.register(PAGED, paged_attention)


class UnsupportedAttention(Exception):
    """Raised inside a forward pass when a model wants attention we do not compute; the model is refused at load."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Keys and values of one token in one layer."""

    kv_heads: int
    key_size: int
    value_size: int


class Probe:
    """Writes down the shape of every layer and answers zeros.

    Attributes:
        layers: by layer number.
        windows: how many tokens back each layer asked to see, by layer number; None: all.
        calls: how many times a layer attended.
    """

    def __init__(self) -> None:
        self.layers: dict[int, LayerShape] = {}
        self.windows: dict[int, int | None] = {}
        self.calls = 0

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: Form
    ) -> torch.Tensor:
        self.layers[layer] = LayerShape(key.shape[0], key.shape[-1], value.shape[-1])
        self.windows[layer] = form.window
        self.calls += 1
        return query.new_zeros(query.shape[1], query.shape[0], value.shape[-1])


class KvPool:
    """Keys and values of all slots: per layer [slots, kv_heads, size]. Slots of block 0 stay zero."""

    def __init__(
        self, layers: dict[int, LayerShape], block_count: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        slots = (block_count + 1) * BLOCK_SIZE
        # zeros, not empty: padded reads must be finite, and untouched zero pages cost no memory on CPU.
        self.keys = {
            number: torch.zeros(slots, shape.kv_heads, shape.key_size, dtype=dtype, device=device)
            for number, shape in layers.items()
        }
        self.values = {
            number: torch.zeros(slots, shape.kv_heads, shape.value_size, dtype=dtype, device=device)
            for number, shape in layers.items()
        }


def bytes_per_block(layers: dict[int, LayerShape], dtype: torch.dtype) -> int:
    """Memory of one block over all layers."""
    sizes = sum(shape.kv_heads * (shape.key_size + shape.value_size) for shape in layers.values())
    return sizes * BLOCK_SIZE * dtype.itemsize


class PagedStep:
    """Attention of one batch. Index tensors are built once here and used by every layer."""

    def __init__(self, batch: Batch, pool: KvPool, device: torch.device) -> None:
        self._pool = pool
        self._slots = torch.tensor(batch.slots, device=device)
        self._singles = _Singles(batch.singles, device) if batch.singles else None
        self._chunks = [_Chunk(chunk, device) for chunk in batch.chunks]
        self._only_singles = not batch.chunks

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: Form
    ) -> torch.Tensor:
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        keys.index_copy_(0, self._slots, key.transpose(0, 1))
        values.index_copy_(0, self._slots, value.transpose(0, 1))
        query = query.transpose(0, 1)  # [T, heads, D]
        if self._singles is not None and self._only_singles:
            return self._singles.attend(query, keys, values, form)
        out = query.new_empty(query.shape[0], query.shape[1], value.shape[-1])
        if self._singles is not None:
            out[self._singles.index] = self._singles.attend(query[self._singles.index], keys, values, form)
        for chunk in self._chunks:
            out[chunk.start : chunk.stop] = chunk.attend(query[chunk.start : chunk.stop], keys, values, form)
        return out


class _Singles:
    """Rows of one token: all sequences gathered into one padded batch."""

    def __init__(self, singles: list[Single], device: torch.device) -> None:
        self.index = torch.tensor([single.index for single in singles], device=device)
        self._lengths = torch.tensor([single.length for single in singles], device=device)
        self._longest = max(single.length for single in singles)
        widest = max(len(single.blocks) for single in singles)
        table = [single.blocks + [0] * (widest - len(single.blocks)) for single in singles]
        slots = _slots_of(torch.tensor(table, device=device))[:, : self._longest]
        beyond = torch.arange(self._longest, device=device) >= self._lengths[:, None]
        # Padding reads block 0, which is zero for ever: what another sequence left behind (NaN even) cannot leak in.
        self._slots = slots.masked_fill(beyond, 0).flatten()
        self._masks: dict[int | None, torch.Tensor] = {}

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, form: Form) -> torch.Tensor:
        rows, heads, size = query.shape
        kv_heads = keys.shape[1]
        # Query heads that share a key head become query positions: nothing is repeated.
        query = query.reshape(rows, kv_heads, heads // kv_heads, size)
        key = keys.index_select(0, self._slots).view(rows, self._longest, kv_heads, size).transpose(1, 2)
        value = values.index_select(0, self._slots).view(rows, self._longest, kv_heads, -1).transpose(1, 2)
        return _attend(query, key, value, self._mask(form.window, query.dtype), form).reshape(rows, heads, -1)

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """[rows, 1, 1, longest], added to the scores."""
        if window not in self._masks:
            place = torch.arange(self._longest, device=self._lengths.device)
            last = self._lengths[:, None] - 1
            self._masks[window] = _additive(_visible(last, place, window), dtype)[:, None, None, :]
        return self._masks[window]


class _Chunk:
    """A row of several tokens of one sequence."""

    def __init__(self, chunk: Chunk, device: torch.device) -> None:
        self.start, self.stop, self._context = chunk.start, chunk.stop, chunk.context
        self._length = chunk.context + chunk.stop - chunk.start
        self._slots = _slots_of(torch.tensor([chunk.blocks], device=device))[0, : self._length]
        self._masks: dict[int | None, torch.Tensor] = {}

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, form: Form) -> torch.Tensor:
        repeats = query.shape[1] // keys.shape[1]
        # [1, heads, length, size]; a chunk is compute-bound, repeating its keys costs little.
        key = keys.index_select(0, self._slots).transpose(0, 1).repeat_interleave(repeats, dim=0)[None]
        value = values.index_select(0, self._slots).transpose(0, 1).repeat_interleave(repeats, dim=0)[None]
        out = _attend(query.transpose(0, 1)[None], key, value, self._mask(form.window, query.dtype), form)
        return out[0].transpose(0, 1)

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """[tokens, length], added to the scores."""
        if window not in self._masks:
            place = torch.arange(self._length, device=self._slots.device)
            self._masks[window] = _additive(_visible(place[self._context :, None], place, window), dtype)
        return self._masks[window]


def _slots_of(blocks: torch.Tensor) -> torch.Tensor:
    """[rows, blocks] -> the slots of those blocks, [rows, blocks * BLOCK_SIZE]."""
    offsets = torch.arange(BLOCK_SIZE, device=blocks.device)
    return (blocks[:, :, None] * BLOCK_SIZE + offsets).flatten(1)


def _visible(place: torch.Tensor, other: torch.Tensor, window: int | None) -> torch.Tensor:
    """Whether the token at `place` sees the one at `other`: not the future, and less than `window` tokens back."""
    visible = other <= place
    return visible if window is None else visible & (other > place - window)


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, float("-inf"))


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, form: Form
) -> torch.Tensor:
    """softmax(cap(query · keyᵀ · scaling) + mask) · value over the last two dimensions."""
    if form.softcap is None:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=form.scaling)
    scores = torch.tanh(query @ key.transpose(-1, -2) * (form.scaling / form.softcap)) * form.softcap
    return torch.softmax((scores + mask).float(), dim=-1).to(value.dtype) @ value
