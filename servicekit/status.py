"""ServiceError <-> gRPC status with google.rpc.ErrorInfo, in both directions."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from servicekit.errors import Code, Internal, InvalidField, RemoteError, ServiceError, Unavailable, code_of

DOMAIN = "loraplex"

_log = logging.getLogger(__name__)


def to_status(error: ServiceError) -> status_pb2.Status:
    """The status an error leaves with: its code, its message, one ErrorInfo, and RetryInfo when it has a delay."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    details = [_pack(info)]
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(max(1, round(error.retry_after * 1000)))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=int(code_of(error)), message=error.message, details=details)


def from_rpc_error(error: grpc.RpcError) -> ServiceError:
    """What a call to another service of ours ended with, ready to be raised again."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return Internal(str(error), "UNEXPECTED_RPC_ERROR")
    code = int(error.code().value[0])
    message = error.details() or ""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    if status is not None:
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        unpacked = [detail.Unpack(info) or detail.Unpack(retry) for detail in status.details]
        if any(unpacked) and info.reason:
            delay = retry.retry_delay.ToNanoseconds() / 1e9
            return RemoteError(code, message, info.reason, dict(info.metadata), delay or None)
    if code == Code.UNAVAILABLE:
        return Unavailable(message, "SERVICE_UNREACHABLE")
    return RemoteError(code, message, error.code().name)


def _pack(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: ServiceError) -> NoReturn:
    """Ends an RPC with an error's status."""
    await context.abort_with_status(rpc_status.to_status(to_status(error)))
    raise AssertionError("abort returned")


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns a ServiceError that leaves a handler into its status, and any other exception into INTERNAL.

    The text of an unforeseen exception goes to the log, not to the caller.
    """

    def __init__(self) -> None:
        # By method: the handler, and the guarded one that is made of it once, not for every call.
        self._guarded: dict[str, tuple[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        known, guarded = self._guarded.get(handler_call_details.method, (None, None))
        if known is not handler:
            guarded = _guard(handler)
            self._guarded[handler_call_details.method] = handler, guarded
        return guarded


def _guard(handler: Any) -> Any:
    """Rebuilds a method handler around its behaviour.

    Its request is parsed here and not by gRPC, which would keep the message for as long as the call lasts: so a handler that
    waits can let go of what it has read.
    """
    makers = {
        (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler, _guard_unary),
        (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler, _guard_stream),
        (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler, _guard_unary),
        (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler, _guard_stream),
    }
    attribute, make, guard = makers[handler.request_streaming, handler.response_streaming]
    behaviour, parse = getattr(handler, attribute), handler.request_deserializer
    guarded = guard(behaviour, _as_it_is if handler.request_streaming else _parser(parse or _as_it_is))
    return make(
        guarded,
        request_deserializer=parse if handler.request_streaming else None,
        response_serializer=handler.response_serializer,
    )


def _as_it_is(request: Any) -> Any:
    return request


def _parser(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parsed(request: bytes) -> Any:
        try:
            return parse(request)
        except DecodeError:
            raise InvalidField("request", "is not a message of the kind that this call takes") from None

    return parsed


def _guard_unary(behaviour: Any, parse: Callable[[Any], Any]) -> Any:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await behaviour(parse(request), context)
        except Exception as error:  # noqa: BLE001 - the last frame of ours
            await abort(context, _foreseen(error))

    return guarded


def _guard_stream(behaviour: Any, parse: Callable[[Any], Any]) -> Any:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            responses = behaviour(parse(request), context)
            if inspect.isawaitable(responses):
                # A handler that calls context.write itself, as the health service's Watch does.
                await responses
                return
            # Closed here and now: a handler's `finally` must not wait for the garbage collector.
            async with aclosing(responses):
                async for response in responses:
                    yield response
        except Exception as error:  # noqa: BLE001 - the last frame of ours
            await abort(context, _foreseen(error))

    return guarded


def _foreseen(error: Exception) -> ServiceError:
    if isinstance(error, grpc.aio.AbortError | asyncio.CancelledError):
        raise error
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, grpc.RpcError):
        return from_rpc_error(error)
    _log.error("unforeseen error in a handler", exc_info=error)
    return Internal("internal error, see the server's log", "INTERNAL")
