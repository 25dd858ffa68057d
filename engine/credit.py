"""How much of an engine each router may use now. PURE.

An engine runs at most so many sequences at a time. Given more, it would serve them in the order they came in, not in the
order the routers would choose later. So each router is told its places: its share of the engine whatever the others do,
and beyond that what the others leave. A router that comes to a full engine gets its share as the sequences of the others
end, since these are then given no new ones; meanwhile the engine has that share more than it can run, at most.

What waits for memory counts too: while more sequences than a few wait for room, no router gets a place more than it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

R = TypeVar("R")

# Of its sequences, this share may wait for room, so that there is one to begin as soon as another ends.
_MAY_WAIT = 1 / 16


def places(max_sequences: int, waiting: int, held: Mapping[R, int]) -> dict[R, int]:
    """Most sequences each router may have on the engine.

    Args:
        max_sequences: most that the engine runs.
        waiting: sequences that wait for room in the engine.
        held: how many each router has there, without those that wait for their adapter.
    """
    if waiting > max(1, max_sequences * _MAY_WAIT):
        return dict(held)
    total = sum(held.values())
    share = -(-max_sequences // max(1, len(held)))
    return {router: max(share, max_sequences - (total - own)) for router, own in held.items()}
