"""Errors and statuses, walked as a table, and through a real server in both directions."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from servicekit import errors
from servicekit.errors import Code, InvalidField, NotImplementedYet, RemoteError, ServiceError, Unavailable, code_of
from servicekit.server import Server
from servicekit.status import from_rpc_error, to_status
from tests.servicekit.echo import EchoServer, echo_server

TABLE = {
    errors.InvalidField: Code.INVALID_ARGUMENT,
    errors.NotFound: Code.NOT_FOUND,
    errors.AlreadyExists: Code.ALREADY_EXISTS,
    errors.NotServable: Code.FAILED_PRECONDITION,
    errors.NotImplementedYet: Code.UNIMPLEMENTED,
    errors.PermissionDenied: Code.PERMISSION_DENIED,
    errors.Exhausted: Code.RESOURCE_EXHAUSTED,
    errors.Unavailable: Code.UNAVAILABLE,
    errors.Aborted: Code.ABORTED,
    errors.Cancelled: Code.CANCELLED,
    errors.DeadlineExceeded: Code.DEADLINE_EXCEEDED,
    errors.Internal: Code.INTERNAL,
}
STARTED_BY_FIELD = (InvalidField, NotImplementedYet)


def example(kind: type[ServiceError]) -> ServiceError:
    if issubclass(kind, STARTED_BY_FIELD):
        return kind("sampling.top_p", "must be above 0 and at most 1", "OUT_OF_RANGE")
    return kind("no more than 10", "TOO_MANY", limit=10)


def info_of(status: status_pb2.Status) -> error_details_pb2.ErrorInfo:
    info = error_details_pb2.ErrorInfo()
    assert [detail.Unpack(info) for detail in status.details].count(True) == 1
    return info


def test_every_class_of_the_module_is_in_the_table() -> None:
    found = {
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, ServiceError) and kind not in (ServiceError, RemoteError)
    }
    assert found == set(TABLE)


def test_the_table_in_the_docstring_says_the_same() -> None:
    rows = [line.split() for line in (errors.__doc__ or "").splitlines() if line.lstrip().startswith(("├──", "└──"))]
    assert {(row[1], row[2]) for row in rows} == {(kind.__name__, code.name) for kind, code in TABLE.items()}


def test_codes_are_those_of_grpc() -> None:
    assert {code.name: int(code) for code in Code} == {
        code.name: code.value[0] for code in grpc.StatusCode if code is not grpc.StatusCode.OK
    }


@pytest.mark.parametrize(("kind", "code"), TABLE.items(), ids=[kind.__name__ for kind in TABLE])
def test_status_carries_code_message_and_one_error_info(kind: type[ServiceError], code: Code) -> None:
    error = example(kind)
    status = to_status(error)
    info = info_of(status)
    assert (status.code, status.message) == (code, error.message)
    assert (info.reason, info.domain) == (error.reason, "loraplex")
    assert dict(info.metadata) == error.metadata
    assert len(status.details) == 1


def test_fields_are_named_in_message_and_metadata() -> None:
    error = InvalidField("stopping.stop", "at most 64", "TOO_MANY", limit=64)
    assert str(error) == "stopping.stop: at most 64"
    assert error.metadata == {"field": "stopping.stop", "limit": "64"}
    assert NotImplementedYet("constraint").metadata == {"field": "constraint"}


@pytest.mark.parametrize(("delay", "sent"), [(1.5, 1.5), (0.0, 0.001), (0.0001, 0.001)])
def test_a_delay_becomes_retry_info_and_is_never_zero(delay: float, sent: float) -> None:
    status = to_status(errors.Exhausted("queue is full", "QUEUE_FULL", retry_after=delay))
    retry = error_details_pb2.RetryInfo()
    assert status.details[1].Unpack(retry)
    assert retry.retry_delay.ToNanoseconds() / 1e9 == pytest.approx(sent)


@pytest.mark.parametrize("kind", TABLE, ids=lambda kind: kind.__name__)
async def test_round_trip_over_a_real_server(kind: type[ServiceError]) -> None:
    error = example(kind)
    error.retry_after = 2.5

    async def fail(request: bytes, context: Any) -> bytes:
        raise error

    async with echo_server(unary=fail) as server:
        remote = from_rpc_error(await server.error_of_unary())
    assert isinstance(remote, RemoteError)
    assert (code_of(remote), remote.message, remote.reason) == (TABLE[kind], error.message, error.reason)
    assert remote.metadata == error.metadata
    assert remote.retry_after == 2.5


async def test_an_error_of_another_service_is_passed_on_as_it_is() -> None:
    async def fail(request: bytes, context: Any) -> bytes:
        raise errors.NotFound("no adapter x", "ADAPTER_UNKNOWN", adapter_id="x")

    async with echo_server(unary=fail) as behind:

        async def forward(request: bytes, context: Any) -> bytes:
            return await behind.unary(request)

        async with echo_server(unary=forward) as server:
            error = await server.error_of_unary()
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert info_of(rpc_status.from_call(error)).reason == "ADAPTER_UNKNOWN"  # type: ignore[arg-type]


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        error = from_rpc_error(await EchoServer(Server(), channel).error_of_unary())
    assert isinstance(error, Unavailable)
    assert error.reason == "SERVICE_UNREACHABLE"


async def test_a_status_without_error_info_keeps_its_code() -> None:
    async def fail(request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.DATA_LOSS, "gone")
        return b""

    async with echo_server(unary=fail) as server:
        error = from_rpc_error(await server.error_of_unary())
    assert (code_of(error), error.message, error.reason) == (Code.DATA_LOSS, "gone", "DATA_LOSS")


async def _stream_that(responses: int, error: Exception) -> AsyncIterator[bytes]:
    for number in range(responses):
        yield b"%d" % number
    raise error


@pytest.mark.parametrize("kind", ["unary", "stream", "collect", "chat"])
async def test_an_unforeseen_exception_is_internal_and_keeps_its_text(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "password=hunter2"
    error = await _failure(kind, ValueError(secret))
    assert error.code() is grpc.StatusCode.INTERNAL
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert info_of(status).reason == "INTERNAL"
    assert secret not in str(status) and secret not in str(error.debug_error_string())
    assert secret in caplog.text


@pytest.mark.parametrize("kind", ["unary", "stream", "collect", "chat"])
async def test_a_service_error_ends_every_kind_of_call(kind: str) -> None:
    error = await _failure(kind, errors.Aborted("engine lost", "ENGINE_LOST"))
    assert error.code() is grpc.StatusCode.ABORTED
    assert info_of(rpc_status.from_call(error)).reason == "ENGINE_LOST"  # type: ignore[arg-type]


async def test_bytes_that_are_no_message_are_an_invalid_argument(caplog: pytest.LogCaptureFixture) -> None:
    async def answer(request: Any, context: Any) -> bytes:
        return b""

    async with echo_server(parse=status_pb2.Status.FromString, unary=answer, stream=answer) as server:
        for call in (server.unary(b"\xff"), server.stream(b"\xff").read()):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not caplog.text


class Parsed:
    """Something that can be referred to weakly."""

    def __init__(self, data: bytes) -> None:
        self.data = data


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_a_handler_that_waits_can_let_go_of_its_request(kind: str) -> None:
    seen: list[weakref.ref[Parsed]] = []

    async def wait(request: Parsed, context: Any) -> bytes:
        seen.append(weakref.ref(request))
        del request
        await asyncio.get_running_loop().create_future()
        return b""

    async with echo_server(parse=Parsed, unary=wait, stream=wait) as server:
        call = asyncio.ensure_future(server.unary()) if kind == "unary" else server.stream()
        async with asyncio.timeout(5):
            while not seen:  # noqa: ASYNC110 - a test
                await asyncio.sleep(0.002)
        assert seen[0]() is None
        call.cancel()


async def _failure(kind: str, raised: Exception) -> grpc.aio.AioRpcError:
    """The error that a call of this kind ends with when its handler raises."""

    async def fail(request: Any, context: Any) -> bytes:
        raise raised

    def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
        return _stream_that(2, raised)

    async def stream_handler(request: Any, context: Any) -> AsyncIterator[bytes]:
        async for response in stream(request, context):
            yield response

    calls: dict[str, tuple[Callable[..., Any], Callable[[EchoServer], Awaitable[grpc.aio.AioRpcError]]]] = {
        "unary": (fail, EchoServer.error_of_unary),
        "collect": (fail, EchoServer.error_of_collect),
        "stream": (stream_handler, lambda server: server.error_of_stream(b"0", b"1")),
        "chat": (stream_handler, lambda server: server.error_of_chat(b"0", b"1")),
    }
    handler, call = calls[kind]
    async with echo_server(**{kind: handler}) as server:
        return await call(server)
