"""Attention of a step by the kernels. Tokens first, then heads; everything about the step is on the device already."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.attention import Form
from engine.kernels.attention import launch
from engine.pool import KvPool


@dataclass(frozen=True, slots=True)
class Decoded:
    """Rows of one token; see `launch.decode`."""

    tables: torch.Tensor
    rows: torch.Tensor
    lengths: torch.Tensor
    splits: int


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Rows of several tokens; see `launch.prefill`."""

    tables: torch.Tensor
    tiles: torch.Tensor
    chunks: torch.Tensor
    m: int


@dataclass(frozen=True, slots=True)
class KernelStep:
    """What is handed to models as `paged`.

    Attributes:
        slots: [T] int32, where the keys and values of each token go; negative for padding.
    """

    pool: KvPool
    slots: torch.Tensor
    decoded: Decoded | None
    prefilled: Prefilled | None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: Form
    ) -> torch.Tensor:
        """Attention of [heads, T, D] queries given [kv_heads, T, D] keys and values of the step's own tokens."""
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        launch.write(key.transpose(0, 1), value.transpose(0, 1), self.slots, keys, values)
        query = query.transpose(0, 1)
        out = query.new_empty(query.shape[0], query.shape[1], value.shape[-1])
        if self.decoded is not None:
            launch.decode(
                query, keys, values, self.decoded.tables, self.decoded.rows, self.decoded.lengths, out,
                scaling=form.scaling, softcap=form.softcap, window=form.window, splits=self.decoded.splits,
            )  # fmt: skip
        if self.prefilled is not None:
            launch.prefill(
                query, keys, values, self.prefilled.tables, self.prefilled.tiles, self.prefilled.chunks, out,
                m=self.prefilled.m, scaling=form.scaling, softcap=form.softcap, window=form.window,
            )  # fmt: skip
        return out
