"""Whether and when a service that died is started again. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RestartPolicy:
    """At most `patience` restarts within `window` seconds, each twice as late as the one before.

    Attributes:
        first_delay, longest_delay: seconds between death and restart.
        patience: restarts within the window; one death more and the service is given up.
        window: seconds after which a death is forgotten.
    """

    first_delay: float = 0.5
    longest_delay: float = 15.0
    patience: int = 5
    window: float = 120.0


@dataclass
class Deaths:
    """Deaths of one service."""

    policy: RestartPolicy
    times: list[float] = field(default_factory=list)

    def restart_after(self, now: float) -> float | None:
        """Notes a death; returns the seconds to wait before the restart, or None when it is not worth another."""
        self.times = [time for time in self.times if now - time < self.policy.window]
        self.times.append(now)
        if len(self.times) > self.policy.patience:
            return None
        return min(self.policy.longest_delay, self.policy.first_delay * 2.0 ** (len(self.times) - 1))
