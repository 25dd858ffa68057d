"""The public AdapterService: every call is the cache's to answer, and its answer arrives unchanged."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc

from loraplex.v1 import adapter_pb2, adapter_pb2_grpc
from router.cache_link import CacheLink
from router.errors import CacheUnreachable
from router.registry_view import Event, Kind
from router.wire import adapter_from
from servicekit.errors import ServiceError, Unavailable
from servicekit.status import from_rpc_error

Context = grpc.aio.ServicerContext[Any, Any]
Response = TypeVar("Response")

_TRACE_KEYS = ("traceparent", "tracestate")


class AdapterServicer(adapter_pb2_grpc.AdapterServiceServicer):
    """What is changed through this router is in its view before the caller knows of it."""

    def __init__(self, cache: CacheLink) -> None:
        self._cache = cache

    async def RegisterAdapter(
        self, message: adapter_pb2.RegisterAdapterRequest, context: Context
    ) -> adapter_pb2.RegisterAdapterResponse:
        response = await self._forward(self._cache.adapters.RegisterAdapter, message, context)
        self._cache.apply(Event(Kind.REGISTERED, adapter_from(response.adapter)))
        return response

    async def GetAdapter(
        self, message: adapter_pb2.GetAdapterRequest, context: Context
    ) -> adapter_pb2.GetAdapterResponse:
        return await self._forward(self._cache.adapters.GetAdapter, message, context)

    async def ListAdapters(
        self, message: adapter_pb2.ListAdaptersRequest, context: Context
    ) -> adapter_pb2.ListAdaptersResponse:
        return await self._forward(self._cache.adapters.ListAdapters, message, context)

    async def UpdateAdapter(
        self, message: adapter_pb2.UpdateAdapterRequest, context: Context
    ) -> adapter_pb2.UpdateAdapterResponse:
        response = await self._forward(self._cache.adapters.UpdateAdapter, message, context)
        self._cache.apply(Event(Kind.CHANGED, adapter_from(response.adapter)))
        return response

    async def DeleteAdapter(
        self, message: adapter_pb2.DeleteAdapterRequest, context: Context
    ) -> adapter_pb2.DeleteAdapterResponse:
        response = await self._forward(self._cache.adapters.DeleteAdapter, message, context)
        known = self._cache.view.get(message.adapter_id)
        if known:
            self._cache.apply(Event(Kind.DELETED, known))
        return response

    async def PreloadAdapter(
        self, message: adapter_pb2.PreloadAdapterRequest, context: Context
    ) -> adapter_pb2.PreloadAdapterResponse:
        return await self._forward(self._cache.adapters.PreloadAdapter, message, context)

    async def WatchAdapters(
        self, message: adapter_pb2.WatchAdaptersRequest, context: Context
    ) -> AsyncIterator[adapter_pb2.AdapterEvent]:
        call = self._cache.adapters.WatchAdapters(
            message, timeout=context.time_remaining(), metadata=_trace_of(context)
        )
        context.add_done_callback(lambda _: call.cancel())  # type: ignore[arg-type]
        try:
            async for event in call:
                yield event
        except grpc.aio.AioRpcError as error:
            raise self._as_ours(error) from None

    async def _forward(self, method: Callable[..., Awaitable[Response]], message: object, context: Context) -> Response:
        try:
            return await method(message, timeout=context.time_remaining(), metadata=_trace_of(context))
        except grpc.aio.AioRpcError as error:
            raise self._as_ours(error) from None

    def _as_ours(self, error: grpc.aio.AioRpcError) -> ServiceError:
        """The cache's own word, or, when it has not said anything, that it cannot be reached."""
        forwarded = from_rpc_error(error)
        return CacheUnreachable(self._cache.address) if isinstance(forwarded, Unavailable) else forwarded


def _trace_of(context: Context) -> tuple[tuple[str, str | bytes], ...]:
    return tuple((key, value) for key, value in context.invocation_metadata() or () if key in _TRACE_KEYS)
