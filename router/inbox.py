"""What the loop is told: by handlers, by the fleet, by the cache link, by other routers, and by itself."""

from __future__ import annotations

from dataclasses import dataclass

from router.cache_link import Moved
from router.fleet import EngineDown, EngineUp, Frame
from router.ledger import Begun, Elsewhere
from router.request import Request
from servicekit.errors import ServiceError


@dataclass(frozen=True, slots=True)
class Submit:
    """A request has arrived."""

    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    """A request's client is gone; of no effect when the request has ended."""

    request: Request
    error: ServiceError


@dataclass(frozen=True, slots=True)
class GraceOver:
    """Time is up for the engines that were lost as number `loss`."""

    loss: int


@dataclass(frozen=True, slots=True)
class Stop:
    """All requests end now."""


# For whichever loop it concerns, and for one loop.
Message = Submit | Cancel | Stop | EngineUp | EngineDown | Frame | Moved
LoopMessage = Message | GraceOver | Elsewhere | Begun
