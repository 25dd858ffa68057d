"""What a call can fail with: one class per gRPC status.

    LoraplexError
    ├── Cancelled            CANCELLED            the call was cancelled
    ├── Unknown              UNKNOWN              something on the way answered without saying what
    ├── InvalidArgument      INVALID_ARGUMENT     a field is malformed or too long; `field` names it
    ├── DeadlineExceeded     DEADLINE_EXCEEDED    the timeout ran out
    ├── NotFound             NOT_FOUND            no such adapter
    ├── AlreadyExists        ALREADY_EXISTS       the id is taken
    ├── PermissionDenied     PERMISSION_DENIED    the caller may not
    ├── ResourceExhausted    RESOURCE_EXHAUSTED   a queue or quota is full; `retry_delay` says when to try again
    ├── FailedPrecondition   FAILED_PRECONDITION  well formed, but not servable on this base; the text names what
    ├── Aborted              ABORTED              lost after tokens were sent, and could not be continued
    ├── OutOfRange           OUT_OF_RANGE         not sent by Loraplex
    ├── Unimplemented        UNIMPLEMENTED        a field or a source this server does not serve yet
    ├── Internal             INTERNAL             a defect of the server
    ├── Unavailable          UNAVAILABLE          nothing was answered; safe to retry, and retried already
    ├── DataLoss             DATA_LOSS            not sent by Loraplex
    └── Unauthenticated      UNAUTHENTICATED      no valid credentials

Arguments that cannot even be sent raise ValueError or TypeError before anything is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "loraplex"
_DETAILS_KEY = "grpc-status-details-bin"


class LoraplexError(Exception):
    """Root of what a call raises.

    Attributes:
        message: for people.
        reason: stable name of the cause, from google.rpc.ErrorInfo; empty when Loraplex did not send the status.
        metadata: what varies in the message, by name.
        retry_delay: seconds after which the server expects a retry to make sense, or None.
    """

    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_delay: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_delay = retry_delay

    @property
    def field(self) -> str:
        """The field of the request that is wrong, or ""."""
        return self.metadata.get("field", "")

    def __str__(self) -> str:
        return f"{self.status.name}: {self.message}" + (f" [{self.reason}]" if self.reason else "")


class Cancelled(LoraplexError):
    """The call was cancelled."""

    status = grpc.StatusCode.CANCELLED


class Unknown(LoraplexError):
    """Something on the way answered without saying what is wrong."""

    status = grpc.StatusCode.UNKNOWN


class InvalidArgument(LoraplexError):
    """A field is malformed, out of its range or too long."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class DeadlineExceeded(LoraplexError):
    """The timeout ran out."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED


class NotFound(LoraplexError):
    """What was asked for does not exist."""

    status = grpc.StatusCode.NOT_FOUND


class AlreadyExists(LoraplexError):
    """The id is taken."""

    status = grpc.StatusCode.ALREADY_EXISTS


class PermissionDenied(LoraplexError):
    """The caller may not do this."""

    status = grpc.StatusCode.PERMISSION_DENIED


class ResourceExhausted(LoraplexError):
    """A queue, a quota or a tier is full."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class FailedPrecondition(LoraplexError):
    """Well formed, but not servable on this base or in this state."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class Aborted(LoraplexError):
    """Lost after tokens were sent, and could not be continued."""

    status = grpc.StatusCode.ABORTED


class OutOfRange(LoraplexError):
    """Not sent by Loraplex itself."""

    status = grpc.StatusCode.OUT_OF_RANGE


class Unimplemented(LoraplexError):
    """A field or a source this server does not serve yet."""

    status = grpc.StatusCode.UNIMPLEMENTED


class Internal(LoraplexError):
    """A defect of the server."""

    status = grpc.StatusCode.INTERNAL


class Unavailable(LoraplexError):
    """Nothing was answered."""

    status = grpc.StatusCode.UNAVAILABLE


class DataLoss(LoraplexError):
    """Not sent by Loraplex itself."""

    status = grpc.StatusCode.DATA_LOSS


class Unauthenticated(LoraplexError):
    """No valid credentials."""

    status = grpc.StatusCode.UNAUTHENTICATED


BY_STATUS: Mapping[grpc.StatusCode, type[LoraplexError]] = {
    kind.status: kind
    for kind in (
        Cancelled, Unknown, InvalidArgument, DeadlineExceeded, NotFound, AlreadyExists, PermissionDenied,
        ResourceExhausted, FailedPrecondition, Aborted, OutOfRange, Unimplemented, Internal, Unavailable, DataLoss,
        Unauthenticated,
    )
}  # fmt: skip


def error_from(failed: grpc.RpcError) -> LoraplexError:
    """The typed error of a failed call, of the sync or the asyncio API."""
    call: Any = failed
    if not (callable(getattr(call, "code", None)) and isinstance(call.code(), grpc.StatusCode)):
        return Unknown(str(failed))
    reason, metadata, retry_delay = "", {}, None
    for detail in _details(call.trailing_metadata() or ()):
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN:
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(retry.DESCRIPTOR) and detail.Unpack(retry):
            retry_delay = retry.retry_delay.ToNanoseconds() / 1e9
    kind = BY_STATUS.get(call.code(), Unknown)
    return kind(call.details() or "", reason=reason, metadata=metadata, retry_delay=retry_delay)


def _details(trailing: Iterable[tuple[str, str | bytes]]) -> list[Any]:
    for key, value in trailing:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:
                return []
    return []
