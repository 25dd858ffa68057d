"""`python -m cache`: the cache process."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO

from cache.adapters import Adapters
from cache.artifact_service import ArtifactService
from cache.config import Settings
from cache.errors import RegistryUnreachable
from cache.manager import Manager
from cache.registry import Registry
from cache.service import AdapterService, ResidencyService
from cache.sources.setup import make_sources
from cache.tiers import FileTier
from loraplex.cache.v1 import artifact_pb2, artifact_pb2_grpc, residency_pb2, residency_pb2_grpc
from loraplex.v1 import adapter_pb2, adapter_pb2_grpc
from servicekit.errors import StartupError
from servicekit.garbage import settle
from servicekit.metrics import serve_metrics
from servicekit.server import Server, run, stop_requested
from servicekit.settings import read_settings
from servicekit.tracing import setup_tracing

_log = logging.getLogger("cache")

MIB = 1024 * 1024
REDIS_PATIENCE_SECONDS = 5.0
# Threads for files and packing, and how much nicer than the rest they are.
WORKERS, NICE = 6, 10
SERVICES = (
    adapter_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
    residency_pb2.DESCRIPTOR.services_by_name["ResidencyService"].full_name,
    artifact_pb2.DESCRIPTOR.services_by_name["ArtifactService"].full_name,
)


async def main() -> None:
    """Starts the cache, serves until it is told to stop, drains."""
    settings = read_settings(Settings, "cache", sys.argv[1:], os.environ)
    node_id = settings.node_id or socket.gethostname()
    setup_tracing("cache", node_id)
    for library in ("httpcore2", "httpx2", "botocore", "huggingface_hub"):
        # Below warnings they tell of requests and headers, which hold secrets.
        logging.getLogger(library).setLevel(logging.WARNING)
    lock = _lock(Path(settings.data_dir))
    _stand_back_together()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(WORKERS, "work", initializer=_stand_back))
    sources = make_sources(settings)
    manager = Manager(
        Registry(settings.redis, settings.registry),
        sources,
        FileTier("disk", Path(settings.data_dir) / "artifacts", settings.disk_mib * MIB),
        FileTier("host", settings.host_tier_folder(node_id), settings.host_mib * MIB),
        node_id,
        policy=settings.policy,
        tenant_share=settings.tenant_share,
    )
    adapters = Adapters(manager)
    server = Server()
    adapter_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterService(manager, adapters), server.grpc)
    residency_pb2_grpc.add_ResidencyServiceServicer_to_server(ResidencyService(manager.devices, node_id), server.grpc)
    tiers = (manager.holdings.disk, manager.holdings.host)
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(ArtifactService(tiers), server.grpc)
    manager.link.address = settings.advertised()
    serve_metrics(settings.metrics_listen)
    try:
        await _start(manager)
        adapters.resume()
        await server.start(settings.listen, SERVICES)
        await server.set_serving(True)
        settle()
        _log.info("serving on %s, node %s, %d adapters", settings.listen, node_id, len(manager.view.records))
        await stop_requested()
        _log.info("stopping")
        await server.set_serving(False)
    finally:
        await manager.stop()
        await server.drain(1.0)
        await sources.close()
        lock.close()


async def _start(manager: Manager) -> None:
    deadline = time.monotonic() + REDIS_PATIENCE_SECONDS
    while True:
        try:
            return await manager.start()
        except RegistryUnreachable:
            if time.monotonic() > deadline:
                raise StartupError(f"Redis at {manager.link.registry.url} does not answer") from None
            await asyncio.sleep(0.2)


def _stand_back() -> None:
    """Lets engines and routers on this machine go first: this thread reads, packs and writes, which can wait a moment."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.nice(0) + NICE)


def _stand_back_together() -> None:
    """The same for the whole process where the kernel shares processors out among sessions: niceness ends at their borders.

    Only in a session of its own, as the launcher gives it; in a container its share is the container's.
    """
    if os.getsid(0) == os.getpid():
        with suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(NICE), encoding="ascii")


def _lock(data_dir: Path) -> IO[str]:
    """Keeps a second cache away from the same folder, for as long as the file is open."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = (data_dir / "cache.lock").open("w")
    except OSError as error:
        raise StartupError(f"the data folder {data_dir} cannot be used: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise StartupError(f"another cache uses the data folder {data_dir}") from None
    return lock


if __name__ == "__main__":
    run(main, "cache")
