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
from engine.interrupts import Interrupted, Stop, never
from engine.lanes import Lanes, LaneStep
from engine.pool import KvPool, LayerShape

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


class PagedStep:
    """Attention of one batch. Index tensors are built once here and used by every layer.

    Args:
        stop: asked before every layer, with the part of the step that is done, whether it is given up.
    """

    def __init__(self, batch: Batch, pool: KvPool, lanes: Lanes, device: torch.device, stop: Stop = never) -> None:
        self._pool = pool
        self._stop = stop
        self._slots = torch.tensor(batch.slots, device=device)
        in_lanes, paged = lanes.arrange(batch.singles)
        self._rows: list[_Lanes | _Singles | _Chunk] = [_Lanes(step) for step in in_lanes]
        if paged:
            self._rows.append(_Singles(paged, device))
        self._rows += [_Chunk(chunk, device) for chunk in batch.chunks]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: Form
    ) -> torch.Tensor:
        """See Paged. Raises Interrupted when the step is given up."""
        if self._stop(layer / len(self._pool.layers)):
            raise Interrupted
        step = _Layer(
            layer,
            query.transpose(0, 1),
            key.transpose(0, 1),
            value.transpose(0, 1),
            self._pool.keys[layer],
            self._pool.values[layer],
            form,
        )
        step.pool_keys.index_copy_(0, self._slots, step.key)
        step.pool_values.index_copy_(0, self._slots, step.value)
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[-1])
        for rows in self._rows:
            rows.attend(step, out)
        return out


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's attention: query [T, heads, size], key and value [T, kv_heads, size] of the step's own tokens."""

    number: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    pool_keys: torch.Tensor
    pool_values: torch.Tensor
    form: Form


class _Lanes:
    """Rows of one token whose sequences have lanes."""

    def __init__(self, step: LaneStep) -> None:
        self._step = step
        self._masks = _Masks(step.last[:, None], torch.arange(step.longest))

    def attend(self, layer: _Layer, out: torch.Tensor) -> None:
        step, form = self._step, layer.form
        step.append(layer.number, layer.key.index_select(0, step.index), layer.value.index_select(0, step.index))
        keys, values = step.keys[layer.number], step.values[layer.number]
        rows, kv_heads = keys.shape[:2]
        # Query heads that share a key head become query positions: nothing is repeated.
        query = (layer.query.index_select(0, step.index) * form.scaling).view(rows * kv_heads, -1, keys.shape[2])
        scores = torch.bmm(query, keys.flatten(0, 1)[:, :, : step.longest]).view(rows, kv_heads, -1, step.longest)
        if form.softcap is not None:
            scores = torch.tanh(scores / form.softcap) * form.softcap
        scores += self._masks.get(form.window, scores.dtype)[:, None, None]
        shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype).flatten(0, 1)
        mixed = torch.bmm(shares, values.flatten(0, 1)[:, : step.longest])
        out.index_copy_(0, step.index, mixed.view(rows, -1, mixed.shape[-1]))


class _Singles:
    """Rows of one token: all sequences gathered into one padded batch."""

    def __init__(self, singles: list[Single], device: torch.device) -> None:
        self._index = torch.tensor([single.index for single in singles], device=device)
        self._lengths = torch.tensor([single.length for single in singles], device=device)
        self._longest = max(single.length for single in singles)
        widest = max(len(single.blocks) for single in singles)
        table = [single.blocks + [0] * (widest - len(single.blocks)) for single in singles]
        slots = _slots_of(torch.tensor(table, device=device))[:, : self._longest]
        beyond = torch.arange(self._longest, device=device) >= self._lengths[:, None]
        # Padding reads block 0, which is zero for ever: what another sequence left behind (NaN even) cannot leak in.
        self._slots = slots.masked_fill(beyond, 0).flatten()
        self._masks = _Masks(self._lengths[:, None] - 1, torch.arange(self._longest, device=device))

    def attend(self, layer: _Layer, out: torch.Tensor) -> None:
        query, form = layer.query.index_select(0, self._index), layer.form
        rows, heads, size = query.shape
        kv_heads = layer.pool_keys.shape[1]
        # Query heads that share a key head become query positions: nothing is repeated.
        query = query.reshape(rows, kv_heads, heads // kv_heads, size)
        key = layer.pool_keys.index_select(0, self._slots).view(rows, self._longest, kv_heads, size).transpose(1, 2)
        value = layer.pool_values.index_select(0, self._slots).view(rows, self._longest, kv_heads, -1).transpose(1, 2)
        mask = self._masks.get(form.window, query.dtype)[:, None, None]
        out.index_copy_(0, self._index, _attend(query, key, value, mask, form).reshape(rows, heads, -1))


class _Chunk:
    """A row of several tokens of one sequence."""

    def __init__(self, chunk: Chunk, device: torch.device) -> None:
        self._tokens = slice(chunk.start, chunk.stop)
        self._is_first = chunk.context == 0
        length = chunk.context + chunk.stop - chunk.start
        self._slots = _slots_of(torch.tensor([chunk.blocks], device=device))[0, :length]
        place = torch.arange(length, device=device)
        self._masks = _Masks(place[chunk.context :, None], place)

    def attend(self, layer: _Layer, out: torch.Tensor) -> None:
        query, form = layer.query[self._tokens], layer.form
        if self._is_first:
            key, value = layer.key[self._tokens], layer.value[self._tokens]
        else:
            key, value = (pool.index_select(0, self._slots) for pool in (layer.pool_keys, layer.pool_values))
        repeats = query.shape[1] // key.shape[1]
        # [1, heads, length, size]; a chunk is compute-bound, repeating its keys costs little.
        key, value = (one.transpose(0, 1).repeat_interleave(repeats, dim=0)[None] for one in (key, value))
        # Without a mask to read, the upper half is not computed either.
        is_plain = self._is_first and form.softcap is None and form.window is None
        mask = None if is_plain else self._masks.get(form.window, query.dtype)
        out[self._tokens] = _attend(query.transpose(0, 1)[None], key, value, mask, form)[0].transpose(0, 1)


class _Masks:
    """What is added to scores, [queries, keys], made once for each window.

    A token at `place` sees the one at `other` unless that is in the future, or `window` or more tokens back.
    """

    def __init__(self, place: torch.Tensor, other: torch.Tensor) -> None:
        self._place = place
        self._other = other
        self._made: dict[int | None, torch.Tensor] = {}

    def get(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """0 where a token sees the other, -inf elsewhere."""
        if window not in self._made:
            visible = self._other <= self._place
            if window is not None:
                visible &= self._other > self._place - window
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            self._made[window] = mask.masked_fill_(~visible, float("-inf"))
        return self._made[window]


def _slots_of(blocks: torch.Tensor) -> torch.Tensor:
    """[rows, blocks] -> the slots of those blocks, [rows, blocks * BLOCK_SIZE]."""
    offsets = torch.arange(BLOCK_SIZE, device=blocks.device)
    return (blocks[:, :, None] * BLOCK_SIZE + offsets).flatten(1)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, form: Form
) -> torch.Tensor:
    """softmax(cap(query · keyᵀ · scaling) + mask) · value over the last two dimensions; without a mask, causal."""
    if form.softcap is None or mask is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=form.scaling
        )
    scores = torch.tanh(query @ key.transpose(-1, -2) * (form.scaling / form.softcap)) * form.softcap
    return torch.softmax((scores + mask).float(), dim=-1).to(value.dtype) @ value
