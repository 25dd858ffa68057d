"""Versions that could not be brought up: why, and when it is tried again. No I/O; times are monotonic seconds."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass

from cache.residency import retry_delay
from servicekit.errors import ServiceError


@dataclass(frozen=True)
class Failure:
    """The last of `count` failures in a row."""

    error: ServiceError
    count: int
    retry_at: float


class Failures:
    """Broken versions are remembered, so that they are refused at once and not read again and again."""

    def __init__(self, jitter: Callable[[], float]) -> None:
        self._jitter = jitter
        self._failures: dict[str, Failure] = {}

    def __contains__(self, digest: str) -> bool:
        return digest in self._failures

    def note(self, digest: str, error: ServiceError, now: float, *, at_once: bool = False) -> None:
        """Notes a failure; it is tried again later and later, or at once."""
        before = self._failures.get(digest)
        count = before.count + 1 if before else 1
        delay = 0.0 if at_once else retry_delay(count, self._jitter)
        self._failures[digest] = Failure(error, count, now + delay)

    def error(self, digest: str, now: float) -> ServiceError | None:
        """Why a version is not to be tried now; None when it is."""
        failure = self._failures.get(digest)
        return failure.error if failure is not None and failure.retry_at > now else None

    def last(self, digest: str) -> Failure | None:
        """The last failure of a version, also when it may be tried again."""
        return self._failures.get(digest)

    def forgive(self, digest: str) -> None:
        """Forgets a version's failures: it came up, or someone insists."""
        self._failures.pop(digest, None)

    def forget_before(self, then: float) -> None:
        """Forgets what could have been tried again since a time, and was not asked for."""
        for digest in [digest for digest, failure in self._failures.items() if failure.retry_at < then]:
            del self._failures[digest]

    def keep_only(self, digests: Set[str]) -> None:
        """Forgets all other versions."""
        for digest in self._failures.keys() - digests:
            del self._failures[digest]
