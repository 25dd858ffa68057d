"""python -m router"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from loraplex.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2, generation_pb2_grpc
from router import metrics
from router.adapter_service import AdapterServicer
from router.bases import Bases
from router.cache_link import CacheLink
from router.config import Settings
from router.dispatch import Dispatcher
from router.fleet import Fleet, Frame
from router.flows import Flows, Tariff
from router.inbox import Message, Stop
from router.ledger import Ledger
from router.look_ahead import LookAhead
from router.service import GenerationServicer
from servicekit.garbage import settle
from servicekit.metrics import serve_metrics
from servicekit.server import Server, run, stop_requested
from servicekit.settings import read_settings
from servicekit.tracing import setup_tracing

if TYPE_CHECKING:
    from router.sharing import Sharing

_log = logging.getLogger("router")

_SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    adapter_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
)
# What is left for streams that never end by themselves, and for last messages that are on their way.
_LAST_MOMENTS = 0.5


class Router:
    """The parts of a router, put together."""

    def __init__(self, settings: Settings, router_id: str) -> None:
        self.settings = settings
        self.server = Server()
        self.cache = CacheLink(settings.cache, self._post)
        self.fleet = Fleet(
            settings.engines,
            router_id,
            self._post,
            settings.engine_silence_seconds,
            default_base=settings.default_base,
        )
        self.sharing = open_sharing(settings)
        self.dispatcher = Bases(self._make_dispatcher, lambda: self.fleet.default_base)
        self.generation = GenerationServicer(
            self.cache.view,
            lambda: self.fleet.engines,
            lambda: self.fleet.default_base,
            self.dispatcher.post,
            settings.max_unread_kib * 1024,
        )
        self.look_ahead = LookAhead(self.cache.residency, router_id, lambda: self.dispatcher.queues)
        metrics.QUEUED.set_function(lambda: self.dispatcher.queued)
        metrics.RUNNING.set_function(lambda: self.dispatcher.running)
        metrics.ENGINES.set_function(lambda: len(self.fleet.engines))
        self._readiness_changed = asyncio.Event()

    def _make_dispatcher(self, base: str) -> Dispatcher:
        settings = self.settings
        weights = settings.prompt_token_weight, settings.output_token_weight, settings.load_mib_weight
        view = self.cache.view
        flows = Flows(Tariff.of(*weights), settings.window_tokens, settings.weights_of_tenants, view.is_on_host)
        dispatcher = Dispatcher(flows, settings.limits, view.where, self.cache.prefetch)
        if self.sharing:
            flows.ledger = Ledger(settings.share_quantum)
            self.sharing.add(base, flows.ledger, flows.lead, dispatcher.post)
        return dispatcher

    def _post(self, message: Message) -> None:
        self.dispatcher.post(message)
        # Not for every frame: this wakes a task.
        if not isinstance(message, Frame) or message.credit.is_draining:
            self._readiness_changed.set()

    async def run(self, stop_requested: Coroutine[Any, Any, None]) -> None:
        """Serves until it is asked to stop; then drains."""
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self.generation, self.server.grpc)
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterServicer(self.cache), self.server.grpc)
        await self.server.start(self.settings.listen, _SERVICES)
        health = asyncio.create_task(self._report_health())
        loops = (self.dispatcher.run(), self.fleet.run(), self.cache.follow(), self.look_ahead.run())
        parts = [health, *map(asyncio.create_task, loops)]
        if self.sharing:
            parts.append(asyncio.create_task(self.sharing.run()))
        stop = asyncio.create_task(stop_requested)
        # The parts run for ever: one that ends has failed, and a router without it would only pretend to serve.
        await asyncio.wait([stop, *parts], return_when=asyncio.FIRST_COMPLETED)
        for part in parts:
            if part.done():
                part.result()
        health.cancel()
        await self._drain()
        if self.sharing:
            self.sharing.stop()
        for task in (stop, *parts):
            task.cancel()
        await asyncio.gather(stop, *parts, return_exceptions=True)
        await self.cache.close()
        if self.sharing:
            await self.sharing.close()

    async def _report_health(self) -> None:
        """SERVING only while a request would be answered, whichever adapter it names."""
        serving = False
        while True:
            await self._readiness_changed.wait()
            self._readiness_changed.clear()
            ready = bool(self.fleet.engines) and self.cache.view.loaded
            if ready != serving:
                serving = ready
                await self.server.set_serving(serving)
                _log.info("serving on port %d" if serving else "not serving on port %d", self.server.port)

    async def _drain(self) -> None:
        _log.info("draining for %.0f s at most", self.settings.drain_seconds)
        await self.server.set_serving(False)
        try:
            await asyncio.wait_for(self.generation.drain(), self.settings.drain_seconds)
        except TimeoutError:
            _log.warning("requests were still running when the time to drain was over")
            self.dispatcher.post(Stop())
        await self.server.drain(_LAST_MOMENTS)
        _log.info("stopped")


def open_sharing(settings: Settings) -> Sharing | None:
    """What shares charges with other routers, if they are to be shared: else Redis's library is not loaded."""
    if not settings.redis:
        return None
    from router.sharing import Sharing

    return Sharing(settings.redis, settings.registry)


async def main() -> None:
    settings = read_settings(Settings, "router", sys.argv[1:], os.environ)
    router_id = settings.router_id or f"router-{socket.gethostname()}-{os.getpid()}"
    setup_tracing("router", router_id)
    serve_metrics(settings.metrics_listen)
    settle()
    await Router(settings, router_id).run(stop_requested())


if __name__ == "__main__":
    run(main, "router")
