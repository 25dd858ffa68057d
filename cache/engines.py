"""The engines attached to this cache: what each has on its device, wants and uses."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from cache.artifact import BaseDescription
from cache.residency import DeviceMove, DevicePlace, Resident, device_moved
from servicekit.errors import ServiceError


@dataclass(frozen=True)
class Load:
    """Tells an engine to bring an artifact to its device."""

    digest: str
    path: str
    size_bytes: int
    traceparent: str


@dataclass(frozen=True)
class Evict:
    """Tells an engine to remove an artifact; with force, also when sequences use it."""

    digest: str
    force: bool


@dataclass(frozen=True)
class Refuse:
    """Tells an engine that an artifact it wants cannot be had."""

    digest: str
    error: ServiceError


Command = Load | Evict | Refuse


@dataclass
class OnDevice:
    """One artifact on one engine."""

    place: DevicePlace
    size_bytes: int
    last_used: float


@dataclass
class Engine:
    """One attached engine. Owned by the manager; only `commands` is read elsewhere.

    Attributes:
        commands: what the engine is to be told next; None ends its stream.
        wanted: digests that should come to the device, most wanted first; the trace context that asked for each.
    """

    engine_id: str
    base: BaseDescription
    budget_bytes: int
    commands: asyncio.Queue[Command | None] = field(default_factory=asyncio.Queue)
    device: dict[str, OnDevice] = field(default_factory=dict)
    wanted: dict[str, str] = field(default_factory=dict)
    in_use: frozenset[str] = frozenset()

    def place(self, digest: str) -> DevicePlace:
        """Where an artifact is on this engine."""
        entry = self.device.get(digest)
        return entry.place if entry else DevicePlace.ABSENT

    def move(self, digest: str, move: DeviceMove, size_bytes: int = 0, now: float = 0.0) -> None:
        """Moves an artifact; raises IllegalMove."""
        place = device_moved(self.place(digest), move)
        if place is DevicePlace.ABSENT:
            del self.device[digest]
        elif digest in self.device:
            self.device[digest].place = place
            self.device[digest].size_bytes = size_bytes or self.device[digest].size_bytes
        else:
            self.device[digest] = OnDevice(place, size_bytes, now)

    def touch(self, digests: Sequence[str], now: float) -> None:
        """Notes that these are being used."""
        for digest in digests:
            if digest in self.device:
                self.device[digest].last_used = now

    def residents(self, pinned: frozenset[str]) -> list[Resident]:
        """What takes room on the device."""
        return [
            Resident(
                digest,
                entry.size_bytes,
                entry.last_used,
                kept=digest in self.in_use or digest in pinned or entry.place is not DevicePlace.DEVICE,
            )
            for digest, entry in self.device.items()
        ]

    @property
    def resident(self) -> list[str]:
        """Digests that sequences can use now."""
        return [digest for digest, entry in self.device.items() if entry.place is DevicePlace.DEVICE]
