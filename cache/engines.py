"""The engines attached to this cache: what each has on its device, wants and uses. No I/O, no clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from opentelemetry.trace import Span

from cache.artifact import BaseDescription
from cache.residency import DeviceMove, DevicePlace, EvictionPolicy, Plan, Resident, Wanted, device_moved, plan
from cache.tiers import ArtifactKey
from servicekit.errors import ServiceError
from servicekit.tracing import end_span

# How long a wish of a router is remembered, and how long what was loaded for it is kept before it was used.
LOOK_AHEAD_SECONDS = 10.0


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
    """One artifact on one engine.

    Attributes:
        expected_until: it was loaded ahead of a sequence that has not come yet; kept for it until then.
    """

    place: DevicePlace
    size_bytes: int
    last_used: float
    expected_until: float = 0.0


@dataclass(frozen=True)
class Want:
    """A digest that should come to the device.

    Attributes:
        urgent: a sequence waits for it. Otherwise it is look-ahead.
        until: when it ends by itself.
    """

    traceparent: str
    urgent: bool
    until: float


@dataclass
class Engine:
    """One attached engine. Owned by the manager; only `commands` is read elsewhere.

    Attributes:
        commands: what the engine is to be told next; None ends its stream.
        wants: digests that should come to the device, in the order they were asked for.
        refused: why the last want of a digest was given up; until it is wanted again.
        load_spans: the span of each load under way, below the request that asked for it.
    """

    engine_id: str
    base: BaseDescription
    budget_bytes: int
    commands: asyncio.Queue[Command | None] = field(default_factory=asyncio.Queue)
    device: dict[str, OnDevice] = field(default_factory=dict)
    wants: dict[str, Want] = field(default_factory=dict)
    refused: dict[str, ServiceError] = field(default_factory=dict)
    in_use: frozenset[str] = frozenset()
    load_spans: dict[str, Span] = field(default_factory=dict)

    def key(self, digest: str) -> ArtifactKey:
        """The artifact of a version that this engine loads."""
        return ArtifactKey(digest, self.base.dtype)

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

    def want(self, digest: str, traceparent: str, until: float, urgent: bool = False) -> None:
        """Notes a wish; an urgent one also ends when `use` no longer names the digest."""
        self.refused.pop(digest, None)
        if digest in self.device and self.device[digest].place is DevicePlace.DEVICE and not urgent:
            self.device[digest].expected_until = max(self.device[digest].expected_until, until)
            return
        before = self.wants.get(digest)
        if before is not None:
            traceparent, urgent = before.traceparent or traceparent, before.urgent or urgent
            until = max(before.until, until)
        self.wants[digest] = Want(traceparent, urgent, until)

    def use(self, digests: frozenset[str], now: float) -> None:
        """Takes over all the digests that sequences use or wait for."""
        for digest in digests | self.in_use:
            if digest in self.device:
                self.device[digest].last_used = now
                self.device[digest].expected_until = 0.0
        # A sequence that waited and went away wants nothing any more.
        for digest in [digest for digest, want in self.wants.items() if want.urgent and digest not in digests]:
            del self.wants[digest]
        self.in_use = digests

    def refuse(self, digest: str, error: ServiceError) -> None:
        """Gives a want up, and tells the engine why."""
        self.wants.pop(digest, None)
        self.refused[digest] = error
        self.commands.put_nowait(Refuse(digest, error))

    def end_load_span(self, digest: str, error: BaseException | None = None) -> None:
        """Ends the span of a load, if this cache began it."""
        if (span := self.load_spans.pop(digest, None)) is not None:
            end_span(span, error)

    def settle(self, now: float) -> None:
        """Forgets wants that are fulfilled or have ended."""
        for digest, want in list(self.wants.items()):
            entry = self.device.get(digest)
            if entry is not None and entry.place is DevicePlace.DEVICE:
                entry.expected_until = 0.0 if want.urgent else min(want.until, now + LOOK_AHEAD_SECONDS)
                del self.wants[digest]
            elif want.until <= now:
                del self.wants[digest]

    def plan(
        self, pinned: Collection[str], size_of: Callable[[ArtifactKey], int], policy: EvictionPolicy, now: float
    ) -> Plan:
        """What to load and to evict now: what sequences wait for, then what is pinned, then look-ahead."""
        urgent = [digest for digest, want in self.wants.items() if want.urgent]
        ahead = [digest for digest, want in self.wants.items() if not want.urgent]
        wanted = [Wanted(digest, size_of(self.key(digest)), urgent=True) for digest in urgent]
        wanted += [Wanted(digest, size_of(self.key(digest))) for digest in [*sorted(pinned), *ahead]]
        return plan(self._residents(pinned, now), wanted, self.budget_bytes, policy)

    def _residents(self, pinned: Collection[str], now: float) -> list[Resident]:
        return [
            Resident(
                digest,
                entry.size_bytes,
                entry.last_used,
                kept=digest in self.in_use or digest in pinned or entry.place is not DevicePlace.DEVICE,
                expected=entry.expected_until > now,
            )
            for digest, entry in self.device.items()
        ]

    def describe(self, digests: Iterable[str], size_of: Callable[[ArtifactKey], int], now: float) -> None:
        """Takes over what the engine says is on its device."""
        for digest in digests:
            self.move(digest, DeviceMove.REPORTED, size_of(self.key(digest)), now)

    @property
    def free_bytes(self) -> int:
        """Room on the device that nothing takes."""
        return self.budget_bytes - sum(entry.size_bytes for entry in self.device.values())

    @property
    def resident(self) -> Sequence[str]:
        """Digests that sequences can use now."""
        return [digest for digest, entry in self.device.items() if entry.place is DevicePlace.DEVICE]
