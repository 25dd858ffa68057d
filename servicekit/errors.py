"""Errors a caller can act on, each with one gRPC status and one reason.

    ServiceError
    ├── InvalidField          INVALID_ARGUMENT     the caller sent something malformed; names field and limit
    ├── NotFound              NOT_FOUND            what was asked for does not exist
    ├── AlreadyExists         ALREADY_EXISTS       the id is taken
    ├── NotServable           FAILED_PRECONDITION  well formed, but this server cannot serve it; names what
    ├── NotImplementedYet     UNIMPLEMENTED        a documented field or scheme without code behind it
    ├── PermissionDenied      PERMISSION_DENIED    the caller may not
    ├── Exhausted             RESOURCE_EXHAUSTED   a queue or a tier is full; may carry a retry delay
    ├── Unavailable           UNAVAILABLE          nothing was done; safe to retry
    ├── Aborted               ABORTED              lost half-way and could not be continued
    ├── Cancelled             CANCELLED            the caller went away or asked to stop
    ├── DeadlineExceeded      DEADLINE_EXCEEDED    the caller's time ran out
    └── Internal              INTERNAL             an invariant of ours is broken
    StartupError              (no status)          a process cannot start; one line for people, exit code 2

Pure: no grpc here, so that code without I/O can raise these. `servicekit.status` turns them into statuses.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class Code(IntEnum):
    """gRPC status codes by their numbers on the wire."""

    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class ServiceError(Exception):
    """Root of what may leave a service. Only its subclasses are raised.

    Args:
        message: for people; says what is wrong and what the limit is.
        reason: UPPER_SNAKE_CASE, stable, goes to ErrorInfo.reason.
        retry_after: seconds after which a retry makes sense, for google.rpc.RetryInfo.
        metadata: goes to ErrorInfo.metadata; repeats what varies in the message.
    """

    code: ClassVar[Code] = Code.UNKNOWN

    def __init__(self, message: str, reason: str, *, retry_after: float | None = None, **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.retry_after = retry_after
        self.metadata = {key: str(value) for key, value in metadata.items()}


class InvalidField(ServiceError):
    """Raised when a field of a request is malformed or out of range."""

    code = Code.INVALID_ARGUMENT

    def __init__(self, field: str, message: str, reason: str = "INVALID_FIELD", **metadata: object) -> None:
        super().__init__(f"{field}: {message}", reason)
        self.metadata = {"field": field, **{key: str(value) for key, value in metadata.items()}}
        self.field = field


class NotFound(ServiceError):
    """Raised when what was asked for does not exist."""

    code = Code.NOT_FOUND


class AlreadyExists(ServiceError):
    """Raised when an id is taken."""

    code = Code.ALREADY_EXISTS


class NotServable(ServiceError):
    """Raised when something well formed cannot be served here."""

    code = Code.FAILED_PRECONDITION


class NotImplementedYet(ServiceError):
    """Raised when a documented field or scheme has no code behind it yet."""

    code = Code.UNIMPLEMENTED

    def __init__(self, field: str, message: str = "is not served yet", reason: str = "NOT_IMPLEMENTED") -> None:
        super().__init__(f"{field}: {message}", reason, field=field)
        self.field = field


class PermissionDenied(ServiceError):
    """Raised when the caller may not do this."""

    code = Code.PERMISSION_DENIED


class Exhausted(ServiceError):
    """Raised when a queue, a quota or a tier is full."""

    code = Code.RESOURCE_EXHAUSTED


class Unavailable(ServiceError):
    """Raised when nothing was done and a retry is safe."""

    code = Code.UNAVAILABLE


class Aborted(ServiceError):
    """Raised when something was lost half-way and could not be continued."""

    code = Code.ABORTED


class Cancelled(ServiceError):
    """Raised when the caller went away or asked to stop."""

    code = Code.CANCELLED


class DeadlineExceeded(ServiceError):
    """Raised when the caller's time ran out."""

    code = Code.DEADLINE_EXCEEDED


class Internal(ServiceError):
    """Raised when an invariant of ours is broken."""

    code = Code.INTERNAL


class RemoteError(ServiceError):
    """An error another service of ours reported, passed on as it is."""

    def __init__(
        self,
        code: int,
        message: str,
        reason: str,
        metadata: dict[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, reason, retry_after=retry_after)
        self.remote_code = Code(code)
        self.metadata = dict(metadata or {})


class StartupError(Exception):
    """Raised when a process cannot start; its text is one line for people and the exit code is 2."""


def code_of(error: ServiceError) -> Code:
    """The status code an error leaves with."""
    return error.remote_code if isinstance(error, RemoteError) else error.code
