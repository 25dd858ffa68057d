"""The places of engines, and who sits there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from router.accounts import Where
from router.fleet import Engine
from router.messages import Credit
from router.placement import Demand, Places, choose, is_open, next_home
from router.request import Request


@dataclass(slots=True, eq=False)
class Seats(Places):
    """An engine's places and who sits there, by number of the sequence."""

    engine: Engine = field(kw_only=True)
    requests: dict[int, Request] = field(default_factory=dict)

    def take(self, request: Request, where: Where, now: float) -> bool:
        """Seats a request; returns whether its adapter must be loaded first."""
        digest, number = request.adapter.digest, request.sequence_id
        self.requests[number] = request
        must_load = not self.has(where)
        if must_load:
            self.loading.setdefault(digest, now)
        # One that goes on with an answer may be one of many with its adapter, all sent at once.
        if not must_load or request.has_answered:
            self.held.add(number)
        return must_load

    def leave(self, request: Request) -> None:
        number = request.sequence_id
        del self.requests[number]
        if number in self.held:
            self.held.discard(number)
        elif request.started is None:
            self.loading.pop(request.adapter.digest, None)

    def begin(self, request: Request) -> None:
        """A sequence has begun, so its adapter is there."""
        self.loading.pop(request.adapter.digest, None)
        self.held.add(request.sequence_id)

    def credit(self, credit: Credit) -> None:
        self.limit = self.max_sequences if credit.places is None else credit.places
        self.is_draining = credit.is_draining


class Seating:
    """The places of all engines of a loop, and where in them its requests should go.

    Args:
        where: tells which engines have a digest.
    """

    def __init__(self, where: Callable[[str], Where]) -> None:
        self._view = where
        self._of: dict[Engine, Seats] = {}
        self._demand = Demand()

    def __iter__(self) -> Iterator[Seats]:
        return iter(self._of.values())

    def __len__(self) -> int:
        return len(self._of)

    def of(self, engine: Engine) -> Seats | None:
        return self._of.get(engine)

    def add(self, engine: Engine) -> None:
        self._of[engine] = Seats(engine.engine_id, engine.max_sequences, engine=engine)

    def remove(self, engine: Engine) -> Seats:
        """The places of an engine that is gone, with those who sat there."""
        return self._of.pop(engine)

    @property
    def has_room(self) -> bool:
        return any(seats.has_room for seats in self)

    def keep(self, *, for_newcomers: bool) -> None:
        """Keeps a few places of each engine, or none, for tenants that have nothing on engines."""
        for seats in self:
            seats.keep(for_newcomers=for_newcomers)

    def where(self, digest: str) -> Where:
        """Engines that have an adapter and take new sequences; None, which is all of them, for the base."""
        where = self._view(digest)
        return where and where & {seats.engine_id for seats in self if not seats.is_draining}

    def is_open(self, where: Where, now: float) -> bool:
        """Whether a request for an adapter that is on these engines can be sent."""
        return is_open(where, self, now)

    def choose(self, digest: str, where: Where, now: float) -> Seats | None:
        """The places a request should go to; None while none can take it."""
        return choose(digest, where, list(self), now, self._demand.homes(digest))

    def any_with_room(self) -> Seats | None:
        """The least loaded of those with room."""
        return min((seats for seats in self if seats.has_room), key=lambda seats: seats.load, default=None)

    def next_home(self, digest: str, where: Where) -> Seats | None:
        """Where an adapter should be brought to; None when it need not."""
        return next_home(digest, where, list(self), self._demand.homes(digest))

    def expect(self, digest: str) -> int:
        """One more request for an adapter; returns how many there are, waiting and seated."""
        self._demand.add(digest, self._of.values())
        return self._demand.count(digest)

    def expect_no_more(self, digest: str) -> None:
        """One of them has ended."""
        self._demand.remove(digest, self._of.values())

    def release(self, request: Request) -> Seats | None:
        """Frees the place of a request; returns where it was."""
        for seats in self:
            if request.sequence_id in seats.requests:
                seats.leave(request)
                return seats
        return None
