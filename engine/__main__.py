"""The engine process: python -m engine --model FOLDER."""

from __future__ import annotations

import asyncio
import glob
import logging
import os
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers.utils import logging as transformers_logging

from engine.adapters import reader_for
from engine.cache_link import CacheLink
from engine.config import Settings
from engine.limits import MIB
from engine.loop import EngineLoop
from engine.messages import Report
from engine.model import Base, load_base
from engine.service import Engine, EngineServicer
from loraplex.engine.v1 import engine_pb2, engine_pb2_grpc
from servicekit.garbage import collect_when_idle
from servicekit.metrics import serve_metrics
from servicekit.server import Server, run, stop_requested
from servicekit.settings import read_settings
from servicekit.tracing import setup_tracing

_log = logging.getLogger("engine")

SERVICE = engine_pb2.DESCRIPTOR.services_by_name["EngineService"].full_name


# A step takes Python's lock hundreds of times, and gives it away as often. Each time, another thread keeps it for so long
# before it is asked to give it back: with the 5 ms that are usual, steps beside a busy thread take ten times as long.
LOCK_SECONDS = 0.0001


async def main() -> None:
    """Binds, loads the base, serves, and drains when told to stop."""
    settings = read_settings(Settings, "engine", sys.argv[1:], os.environ)
    sys.setswitchinterval(LOCK_SECONDS)
    engine_id = settings.engine_id or f"engine-{uuid.uuid4().hex[:8]}"
    setup_tracing("engine", engine_id)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    serve_metrics(settings.metrics_listen)

    # Bound before the base is loaded: an address in use is known at once, and health can be asked meanwhile.
    server, servicer = Server(), EngineServicer()
    engine_pb2_grpc.add_EngineServiceServicer_to_server(servicer, server.grpc)
    await server.start(settings.listen, [SERVICE])
    try:
        stop = asyncio.create_task(stop_requested())
        # In a thread that ends: while another thread has workers of its own, OpenMP lets those of the loop sleep after
        # every product instead of waiting for the next one, and a step on CPU takes up to twice as long.
        passing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="load-base")
        loading = asyncio.ensure_future(asyncio.get_running_loop().run_in_executor(passing, load_base, settings))
        await asyncio.wait((stop, loading), return_when=asyncio.FIRST_COMPLETED)
        if stop.done():
            # A load cannot be interrupted; nothing is lost by leaving it.
            os._exit(0)
        passing.shutdown(wait=False)
        await _serve(settings, engine_id, loading.result(), server, servicer, stop)
    finally:
        # Also when the base cannot be loaded: a server that still runs would keep the process alive.
        await server.drain(1.0)


async def _serve(
    settings: Settings, engine_id: str, base: Base, server: Server, servicer: EngineServicer, stop: asyncio.Task[None]
) -> None:
    adapter_bytes = settings.adapter_memory_mib * MIB
    link = _link(settings, engine_id, base, adapter_bytes)
    loop = EngineLoop(
        base,
        max_sequences=settings.max_sequences,
        step_tokens=settings.step_tokens,
        adapter_bytes=adapter_bytes,
        prefix_cache=settings.prefix_cache,
        report=link.report if link else _unheard,
    )
    loop.start()
    attached = asyncio.create_task(link.run(loop)) if link else None
    # Adapters are a thousand objects each: a step would wait a quarter of a second when a hundred have come up.
    collecting = asyncio.create_task(collect_when_idle(lambda: loop.round_seconds < 0))
    servicer.open(
        Engine(engine_id, base, loop, settings.max_sequences, settings.max_rank, serves_adapters=link is not None)
    )
    await server.set_serving(True)
    _log.info("%s serves %s on %s", engine_id, base.name, settings.listen)

    await stop
    _log.info("stopping; running sequences get %d s to finish", settings.drain_seconds)
    await server.set_serving(False)
    await servicer.drain(settings.drain_seconds)
    collecting.cancel()
    if attached:
        attached.cancel()
    loop.stop()


def _link(settings: Settings, engine_id: str, base: Base, adapter_bytes: int) -> CacheLink | None:
    if not settings.cache:
        return None
    dtype, rank = getattr(torch, base.dtype), settings.max_rank
    reader = reader_for(base.runner.adapters, _host_tier(settings), base.projections, dtype, rank)
    return CacheLink(settings.cache, engine_id, base, reader, adapter_bytes)


def _host_tier(settings: Settings) -> str:
    """Pattern of the folders artifacts may lie in."""
    if settings.host_tier:
        return glob.escape(os.path.realpath(settings.host_tier))
    # The cache's default folder carries its node's id; any of this user's will do.
    return f"/dev/shm/loraplex-{os.getuid()}-*"


def _unheard(report: Report) -> None:
    """Takes reports where there is no cache to send them to."""


if __name__ == "__main__":
    run(main, "engine")
