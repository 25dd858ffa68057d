"""How a client reaches a server, and how often a call is tried."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import grpc

from loraplex._requests import CallOptions
from loraplex.errors import LoraplexError, Unavailable

DEFAULT_ADDRESS = "127.0.0.1:50051"
TENANT_KEY = "x-loraplex-tenant"

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Our own retries wait between attempts; the channel must not wait longer than they do.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


@dataclass(frozen=True)
class Retry:
    """When a call that ended with UNAVAILABLE is made again: at most `attempts` times in all, with growing pauses.

    Only what is safe is repeated: never a stream that has said something, never a deletion that may have happened.

    Attributes:
        attempts: calls in all, at least 1; 1 never retries.
        first_delay, longest_delay: seconds; each pause is twice the one before, less up to half of it at random.
    """

    attempts: int = 4
    first_delay: float = 0.1
    longest_delay: float = 2.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.first_delay < 0 or self.longest_delay < 0:
            raise ValueError(f"retry: {self} has a number out of range")

    def delay(self, failures: int, at_least: float, luck: float) -> float:
        """Pause after that many failures, 1 or more; `luck` is between 0 and 1."""
        return max(at_least, min(self.longest_delay, self.first_delay * 2.0 ** (failures - 1)) * (1 - luck / 2))


@dataclass(frozen=True)
class Connection:
    """What the sync and the asyncio client share: address, identity, limits."""

    address: str
    tenant: str
    token: str
    timeout: float | None
    tls: bool | grpc.ChannelCredentials
    retry: Retry

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """None for a plaintext channel."""
        return grpc.ssl_channel_credentials() if self.tls is True else self.tls or None

    def metadata(self, extra: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        own = {TENANT_KEY: self.tenant, "authorization": f"Bearer {self.token}" if self.token else ""}
        merged = {**{key: value for key, value in own.items() if value}, **extra}
        return tuple((key.lower(), value) for key, value in merged.items())

    def attempts(self, options: CallOptions, *, stream: bool = False, repeatable: bool = True) -> Attempts:
        """The attempts of one call; a stream has no timeout but its own."""
        timeout = options.get("timeout", None if stream else self.timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        return Attempts(self.retry, deadline, self.metadata(options.get("metadata", {})), repeatable)


@dataclass
class Attempts:
    """One call, however often it is made."""

    retry: Retry
    deadline: float | None
    metadata: tuple[tuple[str, str], ...]
    repeatable: bool
    failures: int = field(default=0)

    @property
    def timeout(self) -> float | None:
        """Seconds left for the next attempt."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def pause_after(self, error: LoraplexError) -> float | None:
        """Seconds to wait before the next attempt, or None when there is to be none."""
        self.failures += 1
        # Without a reason the status was made by the transport, which cannot know whether the server acted.
        safe = isinstance(error, Unavailable) and (self.repeatable or bool(error.reason))
        if not safe or self.failures >= self.retry.attempts:
            return None
        pause = self.retry.delay(self.failures, error.retry_delay or 0.0, random.random())
        left = self.timeout
        return None if left is not None and pause >= left else pause
