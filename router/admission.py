"""Whether one more request may wait. PURE."""

from __future__ import annotations

import math
from dataclasses import dataclass

# A rejected caller is told to come back when this share of the limit has been served: late enough that those rejected
# with it do not all meet a full queue again, early enough that the queue does not run empty.
_SHARE_TO_SERVE = 0.1
_SHORTEST_RETRY = 0.1
# Also the answer while nothing is being served at all.
_LONGEST_RETRY = 30.0


@dataclass(frozen=True)
class Limits:
    """Most requests that may wait."""

    queued: int
    queued_per_tenant: int


@dataclass(frozen=True)
class Admit:
    """The request may wait."""


@dataclass(frozen=True)
class Reject:
    """The request may not wait; a retry makes sense after `retry_after` seconds."""

    reason: str
    limit: int
    retry_after: float


class ServiceRate:
    """Requests dispatched per second, older ones forgotten exponentially."""

    def __init__(self, window: float = 10.0) -> None:
        self._window = window
        self._count = 0.0
        self._noted_at = 0.0

    def note(self, now: float) -> None:
        self._count = self._remembered(now) + 1.0
        self._noted_at = now

    def per_second(self, now: float) -> float:
        return self._remembered(now) / self._window

    def _remembered(self, now: float) -> float:
        return self._count * math.exp(-max(0.0, now - self._noted_at) / self._window)


def admit(limits: Limits, queued: int, queued_by_tenant: int, per_second: float) -> Admit | Reject:
    """Decides on one more request, with so many waiting and so many being dispatched per second."""
    if queued_by_tenant >= limits.queued_per_tenant:
        return _reject("TENANT_QUEUE_FULL", limits.queued_per_tenant, per_second)
    if queued >= limits.queued:
        return _reject("QUEUE_FULL", limits.queued, per_second)
    return Admit()


def _reject(reason: str, limit: int, per_second: float) -> Reject:
    if per_second * _LONGEST_RETRY <= limit * _SHARE_TO_SERVE:
        return Reject(reason, limit, _LONGEST_RETRY)
    return Reject(reason, limit, max(_SHORTEST_RETRY, limit * _SHARE_TO_SERVE / per_second))
