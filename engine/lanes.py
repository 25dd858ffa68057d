"""Keys and values of decoding sequences, a second time, laid out for decode on CPU.

Attention over pages has to gather them first, for every layer of every step. A sequence that decodes reads the same
pages again and again, so its keys and values are also kept in a lane: one run of memory, keys transposed, lanes of
similar length side by side, so that one batched product attends for all of them and nothing is gathered. The pool stays
the truth. A lane is filled from it when its sequence begins to decode, and then gets each new token beside the pool; it
goes when its sequence is not in a step.

What a lane holds of a sequence is always right, as tokens are only ever appended; all it can be is short, then it is
filled again. Lanes have a budget of memory; who finds no room attends over pages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.batch import Single
from engine.pool import KvPool, LayerShape, bytes_per_token
from engine.slots import Slots

SHORTEST = 64


@dataclass(frozen=True, slots=True)
class LaneStep:
    """The lanes of one length in one step; n of them.

    Attributes:
        keys, values: by layer, [n, kv_heads, key_size, tokens] and [n, kv_heads, tokens, value_size].
        lanes: [n] 0 to n - 1.
        index: [n] the token of the batch that each lane's sequence has.
        last: [n] place of that token in its sequence.
        longest: tokens of the longest sequence.
    """

    keys: dict[int, torch.Tensor]
    values: dict[int, torch.Tensor]
    lanes: torch.Tensor
    index: torch.Tensor
    last: torch.Tensor
    longest: int

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Adds the step's keys [n, kv_heads, key_size] and values [n, kv_heads, value_size], in order of the lanes."""
        self.keys[layer][self.lanes, :, :, self.last] = key
        self.values[layer][self.lanes, :, self.last] = value


class _Group:
    """Lanes of one length."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.slots: Slots[int] = Slots()
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        # How many tokens of each sequence its lane holds.
        self.filled: dict[int, int] = {}
        self.capacity = 0

    def resize(self, shapes: dict[int, LayerShape], capacity: int, dtype: torch.dtype) -> None:
        kept = min(capacity, self.capacity)
        for layer, shape in shapes.items():
            keys = torch.zeros(capacity, shape.kv_heads, shape.key_size, self.tokens, dtype=dtype)
            values = torch.zeros(capacity, shape.kv_heads, self.tokens, shape.value_size, dtype=dtype)
            if kept:
                keys[:kept] = self.keys[layer][:kept]
                values[:kept] = self.values[layer][:kept]
            self.keys[layer], self.values[layer] = keys, values
        self.capacity = capacity


class Lanes:
    """All lanes of one pool. Used by one thread at a time.

    Args:
        pool: where the sequences' keys and values are.
        budget_bytes: memory they may take; 0 for none.
    """

    def __init__(self, pool: KvPool, budget_bytes: int) -> None:
        self._pool = pool
        self._budget = budget_bytes
        self._token_bytes = bytes_per_token(pool.layers, pool.dtype)
        self._groups: dict[int, _Group] = {}

    @property
    def size_bytes(self) -> int:
        """Memory the lanes take now."""
        return sum(group.capacity * group.tokens * self._token_bytes for group in self._groups.values())

    def arrange(self, singles: Sequence[Single]) -> tuple[list[LaneStep], list[Single]]:
        """Gives the step's single rows their lanes; returns these and the rows there was no memory for."""
        by_length: defaultdict[int, list[Single]] = defaultdict(list)
        for single in singles:
            by_length[max(SHORTEST, 1 << (single.length - 1).bit_length())].append(single)
        for tokens, group in self._groups.items():
            if tokens not in by_length:
                group.slots.update(())
                group.filled.clear()
        steps: list[LaneStep] = []
        left: list[Single] = []
        for tokens, rows in by_length.items():
            if self._make_room(tokens, len(rows)):
                steps.append(self._step(self._groups[tokens], rows))
            else:
                left += rows
        return steps, left

    def _make_room(self, tokens: int, count: int) -> bool:
        """Whether there are `count` lanes of that length now; lengths nobody has any more give up theirs for it."""
        group = self._groups.get(tokens)
        if group is not None and group.capacity >= count:
            return True
        capacity = 1 << (count - 1).bit_length()
        for unused in [other for other in self._groups.values() if not other.filled and other.tokens != tokens]:
            if self.size_bytes + capacity * tokens * self._token_bytes > self._budget:
                del self._groups[unused.tokens]
        # While a group is copied to its new place, both are there.
        if self.size_bytes + capacity * tokens * self._token_bytes > self._budget:
            if group is not None:
                del self._groups[tokens]
            return False
        group = self._groups.setdefault(tokens, _Group(tokens))
        group.resize(self._pool.layers, capacity, self._pool.dtype)
        return True

    def _step(self, group: _Group, rows: Sequence[Single]) -> LaneStep:
        owners = {single.owner: single for single in rows}
        for write in group.slots.update(owners):
            if write.source is not None:
                for stored in (*group.keys.values(), *group.values.values()):
                    stored[write.slot] = stored[write.source]
            else:
                group.filled[write.key] = 0
        group.filled = {owner: group.filled[owner] for owner in owners}
        for owner, single in owners.items():
            if group.filled[owner] < single.length - 1:
                self._fill(group, group.slots[owner], single)
            group.filled[owner] = single.length
        ordered = sorted(rows, key=lambda single: group.slots[single.owner])
        count = len(ordered)
        return LaneStep(
            {layer: keys[:count] for layer, keys in group.keys.items()},
            {layer: values[:count] for layer, values in group.values.items()},
            torch.arange(count),
            torch.tensor([single.index for single in ordered]),
            torch.tensor([single.length - 1 for single in ordered]),
            max(single.length for single in ordered),
        )

    def _fill(self, group: _Group, slot: int, single: Single) -> None:
        """Copies a sequence from its blocks. The rest of the lane becomes zero: whose it was before must not show."""
        known = single.length - 1
        slots = torch.tensor(single.slots(known), dtype=torch.long)
        for layer in self._pool.layers:
            keys, values = group.keys[layer][slot], group.values[layer][slot]
            keys[:, :, known:] = 0
            values[:, known:] = 0
            keys[:, :, :known] = self._pool.keys[layer].index_select(0, slots).permute(1, 2, 0)
            values[:, :known] = self._pool.values[layer].index_select(0, slots).transpose(0, 1)
