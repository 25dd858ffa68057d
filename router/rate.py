"""How fast requests are served, as far as it was seen. PURE."""

from __future__ import annotations

import math

# Seconds that must have been observed before a rate is believed.
_ENOUGH = 1.0


class ServiceRate:
    """Tokens dispatched per second while requests wait, older ones forgotten exponentially.

    What is served while nothing waits says how much was asked for, not how much could be served.
    """

    __slots__ = ("_noted_at", "_seconds", "_tokens", "_window")

    def __init__(self, window: float = 10.0) -> None:
        self._window = window
        self._tokens = 0.0
        self._seconds = 0.0
        self._noted_at: float | None = None

    def note(self, now: float, tokens: int, *, is_busy: bool) -> None:
        """Requests of so many tokens have left the queue just now; `is_busy`: others still wait."""
        if self._noted_at is not None:
            elapsed = max(0.0, now - self._noted_at)
            kept = math.exp(-elapsed / self._window)
            self._seconds = self._seconds * kept + elapsed
            self._tokens = self._tokens * kept + tokens
        self._noted_at = now if is_busy else None

    def per_second(self, now: float) -> float | None:
        """None as long as nothing can be said."""
        idle = max(0.0, now - self._noted_at) if self._noted_at is not None else 0.0
        seconds = self._seconds + idle
        return self._tokens / seconds if seconds >= _ENOUGH else None


class Pace:
    """Seconds from dispatch to the end of an answer for each of its tokens, older answers forgotten exponentially."""

    def __init__(self, memory: int = 64) -> None:
        self._memory = memory
        self._answers = 0
        self._per_token = 0.0

    def note(self, seconds: float, tokens: int) -> None:
        """An answer of so many tokens, at least one, took so long."""
        self._answers = min(self._memory, self._answers + 1)
        self._per_token += (seconds / tokens - self._per_token) / self._answers

    def seconds(self, tokens: int) -> float:
        """What so many tokens may take; 0 as long as nothing is known."""
        return self._per_token * tokens
