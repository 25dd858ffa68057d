"""What the router itself can refuse or lose.

    servicekit.errors.ServiceError
    ├── InvalidField             INVALID_ARGUMENT     INVALID_FIELD, see validation.py
    ├── NotImplementedYet        UNIMPLEMENTED        NOT_IMPLEMENTED, see validation.py
    ├── NotFound
    │   └── AdapterNotFound      NOT_FOUND            ADAPTER_NOT_FOUND
    ├── Exhausted
    │   ├── QueueFull            RESOURCE_EXHAUSTED   QUEUE_FULL, TOKENS_FULL, TENANT_QUEUE_FULL, TENANT_TOKENS_FULL,
    │                                                  ADAPTER_QUEUE_FULL, ADAPTER_TOKENS_FULL,
    │                                                  DEADLINE_UNREACHABLE; with a retry delay
    │   └── ClientTooSlow        RESOURCE_EXHAUSTED   CLIENT_TOO_SLOW
    ├── Unavailable
    │   ├── NoEngine             UNAVAILABLE          NO_ENGINE
    │   ├── EngineLost           UNAVAILABLE          ENGINE_LOST
    │   ├── RegistryNotLoaded    UNAVAILABLE          REGISTRY_NOT_LOADED
    │   ├── CacheUnreachable     UNAVAILABLE          CACHE_UNREACHABLE
    │   └── Draining             UNAVAILABLE          DRAINING
    ├── Aborted
    │   └── AnswerLost           ABORTED              DRAINING, or as the engine said
    ├── Internal
    │   ├── EngineBrokeContract  INTERNAL             ENGINE_BROKE_CONTRACT
    │   └── IllegalTransition    INTERNAL             ILLEGAL_TRANSITION
    └── RemoteError              as the engine or the cache said

Pure.
"""

from __future__ import annotations

from servicekit.errors import Aborted, Exhausted, Internal, NotFound, Unavailable


class AdapterNotFound(NotFound):
    """Raised when an adapter is not registered, or is being deleted."""

    def __init__(self, adapter_id: str) -> None:
        super().__init__(f"adapter {adapter_id!r} is not registered", "ADAPTER_NOT_FOUND", adapter_id=adapter_id)


class QueueFull(Exhausted):
    """Raised when as much waits as may wait, or waiting would be in vain."""

    def __init__(self, message: str, reason: str, limit: float, retry_after: float) -> None:
        super().__init__(message, reason, retry_after=retry_after)
        self.metadata = {"limit": str(limit)}


class ClientTooSlow(Exhausted):
    """Raised when a client has left more of its answer unread than may wait for it."""

    def __init__(self, limit_bytes: int) -> None:
        text = f"more than {limit_bytes} bytes of the answer were not read"
        super().__init__(text, "CLIENT_TOO_SLOW", limit=limit_bytes)


class NoEngine(Unavailable):
    """Raised when no engine is connected, and none was a moment ago."""

    def __init__(self) -> None:
        super().__init__("no engine is connected", "NO_ENGINE")


class EngineLost(Unavailable):
    """Raised for an answer whose engine was lost when no other came to go on with it; nothing is charged for it."""

    def __init__(self, engine_id: str, output_tokens: int) -> None:
        text = f"engine {engine_id} was lost while it answered, and no other can go on"
        super().__init__(text, "ENGINE_LOST", engine_id=engine_id, output_tokens=output_tokens)


class RegistryNotLoaded(Unavailable):
    """Raised when an adapter is asked for before the registry was read once."""

    def __init__(self, adapter_id: str) -> None:
        super().__init__("the registry of adapters was not read yet", "REGISTRY_NOT_LOADED")
        self.metadata = {"adapter_id": adapter_id}


class CacheUnreachable(Unavailable):
    """Raised when a call to the registry cannot be made."""

    def __init__(self, address: str) -> None:
        super().__init__("the cache, which holds the registry, cannot be reached", "CACHE_UNREACHABLE", cache=address)


class Draining(Unavailable):
    """Raised when this router is stopping and nothing was answered."""

    def __init__(self) -> None:
        super().__init__("this router is stopping", "DRAINING")


class AnswerLost(Aborted):
    """Raised when an answer ends half-way through no fault of its own."""


class EngineBrokeContract(Internal):
    """Raised when an engine says something the contract does not allow."""

    def __init__(self, engine_id: str, what: str) -> None:
        super().__init__(f"engine {engine_id} {what}", "ENGINE_BROKE_CONTRACT", engine_id=engine_id)


class IllegalTransition(Internal):
    """Raised when a request is to change to a state that cannot follow its own; it keeps its own."""

    def __init__(self, current: str, following: str) -> None:
        super().__init__(f"a request that is {current} cannot become {following}", "ILLEGAL_TRANSITION")
