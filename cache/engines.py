"""The engines attached to this cache: what each has on its device, wants and uses. No I/O, no clock."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from opentelemetry.trace import Span

from cache.artifact import BaseDescription
from cache.plan import Plan, Policy, Resident, Wanted, plan
from cache.policies import Value
from cache.residency import DeviceMove, DevicePlace, device_moved
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


@dataclass(frozen=True)
class Worth:
    """What an artifact takes on a device, and the seconds it takes to bring it there from where it lives on the node."""

    size_bytes: int
    cost: float


Appraise = Callable[[ArtifactKey], Worth]


@dataclass
class OnDevice:
    """One artifact on one engine; `tenant` is on whose behalf it was loaded."""

    place: DevicePlace
    size_bytes: int
    last_used: float
    tenant: str = ""


@dataclass(frozen=True)
class Expected:
    """A digest that will be needed on the device: a lease on room there, in the order of who has waited longest.

    Attributes:
        until: when it ends by itself, unless it is renewed.
        since: since when a request has waited for it.
        tenant: on whose behalf.
        router_id: whose queue it stands in. Empty for one use, with which it ends.
    """

    traceparent: str
    until: float
    since: float
    tenant: str = ""
    router_id: str = ""


@dataclass
class Engine:
    """One attached engine. Owned by the manager; only `commands` is read elsewhere.

    Attributes:
        commands: what the engine is to be told next; None ends its stream.
        wants: digests that sequences wait for, in the order they were asked for.
        expected: the look-ahead: digests that requests wait for in routers' queues, on the device or not.
        refused: why the last want of a digest was given up; until it is wanted again.
        load_spans: the span of each load under way, below the request that asked for it.
    """

    engine_id: str
    base: BaseDescription
    budget_bytes: int
    commands: asyncio.Queue[Command | None] = field(default_factory=asyncio.Queue)
    device: dict[str, OnDevice] = field(default_factory=dict)
    wants: dict[str, None] = field(default_factory=dict)
    expected: dict[str, Expected] = field(default_factory=dict)
    refused: dict[str, ServiceError] = field(default_factory=dict)
    in_use: frozenset[str] = frozenset()
    load_spans: dict[str, Span] = field(default_factory=dict)
    policy: Policy = field(default_factory=Value)
    tenant_share: float = 1.0

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
            self.policy.left(digest)
        elif digest in self.device:
            self.device[digest].place = place
            self.device[digest].size_bytes = size_bytes or self.device[digest].size_bytes
        else:
            expected = self.expected.get(digest)
            self.device[digest] = OnDevice(place, size_bytes, now, expected.tenant if expected else "")
            self.policy.entered(digest, size_bytes)

    def want(self, digest: str) -> None:
        """A sequence waits for this one; until it is there, is refused, or `use` does not name it any more."""
        self.refused.pop(digest, None)
        self.wants.setdefault(digest)

    def expect(self, digest: str, expected: Expected) -> None:
        """One use is to come."""
        self.refused.pop(digest, None)
        self.expected.setdefault(digest, expected)

    def look_ahead(self, router_id: str, queue: Mapping[str, Expected]) -> None:
        """Takes over what waits in a router's queue, in place of what waited there before."""
        self.expected = {d: one for d, one in self.expected.items() if one.router_id != router_id} | dict(queue)

    def use(
        self, digests: frozenset[str], begun: Mapping[str, int], appraise: Appraise, now: float
    ) -> Mapping[str, int]:
        """Takes over all the digests that sequences use or wait for; returns how often each was asked for since.

        Args:
            begun: how many sequences have begun with each; one with each that has come into use, where that is not said.
        """
        uses = dict.fromkeys(digests - self.in_use, 1) | {digest: count for digest, count in begun.items() if count > 0}
        for digest, count in uses.items():
            worth = appraise(self.key(digest))
            for _ in range(count):
                self.policy.used(digest, worth.size_bytes, worth.cost)
            if self.place(digest) is DevicePlace.DEVICE:
                self._has_come(digest)
        for digest in digests | self.in_use | uses.keys():
            if digest in self.device:
                self.device[digest].last_used = now
        # A sequence that waited and went away wants nothing any more.
        self.wants = {digest: None for digest in self.wants if digest in digests}
        self.in_use = digests
        return uses

    def refuse(self, digest: str, error: ServiceError) -> None:
        """Gives a want up, and tells the engine why."""
        self.wants.pop(digest, None)
        self.expected.pop(digest, None)
        if digest not in self.device:
            self.policy.left(digest)
        self.refused[digest] = error
        self.commands.put_nowait(Refuse(digest, error))

    def end_load_span(self, digest: str, error: BaseException | None = None) -> None:
        """Ends the span of a load, if this cache began it."""
        if (span := self.load_spans.pop(digest, None)) is not None:
            end_span(span, error)

    def settle(self, now: float) -> None:
        """Forgets what is fulfilled or has ended. What was asked for without end is kept a while for who will use it."""
        self.wants = {digest: None for digest in self.wants if self.place(digest) is not DevicePlace.DEVICE}
        for digest, expected in list(self.expected.items()):
            if expected.until <= now:
                del self.expected[digest]
            elif self.place(digest) is DevicePlace.DEVICE and digest in self.in_use:
                self._has_come(digest)
            elif expected.until == math.inf and self.place(digest) is DevicePlace.DEVICE:
                self.expected[digest] = replace(expected, until=now + LOOK_AHEAD_SECONDS)

    def forget(self, digest: str) -> None:
        """A version is given up that no adapter points to: what was preloaded once is not brought back for that."""
        if digest in self.expected and not self.expected[digest].router_id:
            del self.expected[digest]

    @property
    def needed(self) -> frozenset[str]:
        """What requests use or wait for, here or in a router's queue."""
        return self.in_use | {digest for digest, expected in self.expected.items() if expected.router_id}

    def _has_come(self, digest: str) -> None:
        """The one use that was expected has come. What stands in a router's queue, its router takes out."""
        if digest in self.expected and not self.expected[digest].router_id:
            del self.expected[digest]

    def plan(self, pinned: Collection[str], appraise: Appraise) -> Plan:
        """What to load and to evict now: what sequences wait for, then what is pinned, then look-ahead."""
        urgent = list(self.wants)
        ahead = sorted(self.expected, key=lambda digest: self.expected[digest].since)
        sizes = {digest: appraise(self.key(digest)).size_bytes for digest in (*urgent, *pinned, *ahead)}
        wanted = [Wanted(digest, sizes[digest], urgent=True) for digest in (*urgent, *sorted(pinned))]
        wanted += [Wanted(digest, sizes[digest]) for digest in ahead]
        residents = self._residents(pinned, appraise)
        return plan(residents, wanted, self.budget_bytes, self.policy, tenant_share=self.tenant_share)

    def _residents(self, pinned: Collection[str], appraise: Appraise) -> list[Resident]:
        return [
            Resident(
                digest,
                entry.size_bytes,
                entry.last_used,
                kept=digest in self.in_use or digest in pinned or entry.place is DevicePlace.LOADING,
                leaving=entry.place is DevicePlace.EVICTING and digest not in self.in_use,
                cost=appraise(self.key(digest)).cost,
                tenant=entry.tenant,
            )
            for digest, entry in self.device.items()
        ]

    def describe(self, digests: Iterable[str], appraise: Appraise, now: float) -> None:
        """Takes over what the engine says is on its device."""
        for digest in digests:
            self.move(digest, DeviceMove.REPORTED, appraise(self.key(digest)).size_bytes, now)

    @property
    def free_bytes(self) -> int:
        """Room on the device that nothing takes."""
        return self.budget_bytes - sum(entry.size_bytes for entry in self.device.values())

    @property
    def resident(self) -> Sequence[str]:
        """Digests that sequences can use now."""
        return [digest for digest, entry in self.device.items() if entry.place is DevicePlace.DEVICE]
