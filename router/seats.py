"""An engine's places, and who sits there."""

from __future__ import annotations

from dataclasses import dataclass, field

from router.accounts import Where
from router.fleet import Engine
from router.messages import Credit
from router.placement import Places
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
