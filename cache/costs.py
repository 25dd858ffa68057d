"""What it takes to bring an artifact back, by where it would then live.

Orders of magnitude: policies compare, they do not promise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cache.residency import Place


@dataclass(frozen=True)
class Step:
    """One way up: a delay in seconds, then so many bytes per second."""

    seconds: float
    bytes_per_second: float

    def cost(self, size_bytes: int) -> float:
        """Seconds for so many bytes."""
        return self.seconds + size_bytes / self.bytes_per_second


TO_DEVICE = Step(0.002, 8e9)
TO_HOST = Step(0.003, 1e9)
TO_DISK = Step(0.5, 50e6)
# The steps from each place to a device; a place that is left out is as far as the source.
_WAYS: Mapping[Place, tuple[Step, ...]] = {
    Place.HOST: (TO_DEVICE,),
    Place.DISK: (TO_HOST, TO_DEVICE),
    Place.STAGING: (TO_HOST, TO_DEVICE),
}


def cost_to_device(place: Place, size_bytes: int) -> float:
    """Seconds to bring an artifact from a place on the node to a device."""
    return sum(step.cost(size_bytes) for step in _WAYS.get(place, (TO_DISK, TO_HOST, TO_DEVICE)))
