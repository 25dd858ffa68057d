"""An engine as a process: attaches to a cache, loads what it is told, and writes down what is on its device.

It wants one adapter after another by chance, until a file called `pause` is there; it comes back to a cache that has gone.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import sys
from contextlib import suppress
from pathlib import Path

import grpc

from loraplex.cache.v1 import residency_pb2, residency_pb2_grpc
from loraplex.v1 import adapter_pb2 as pb
from loraplex.v1 import adapter_pb2_grpc
from tests.cache.conftest import FakeEngine

BUDGET = 300_000


class Engine(FakeEngine):
    """Checks every file it loads, and says that it holds something only after it wrote that down."""

    state: Path

    async def finish(self, load: residency_pb2.LoadArtifact) -> None:
        path = Path(load.path)
        content = path.read_bytes()  # noqa: ASYNC240
        assert hashlib.sha256(content).hexdigest() == path.with_name(f"{path.name}.sha256").read_text()
        assert load.digest.encode() in content[:4096]
        await super().finish(load)

    async def say(self, **message: object) -> None:
        self.state.with_suffix(".new").write_text("\n".join(self.resident))
        self.state.with_suffix(".new").rename(self.state)
        await super().say(**message)


async def live(engine: Engine, channel: grpc.aio.Channel, folder: Path) -> None:
    adapters = adapter_pb2_grpc.AdapterServiceStub(channel)
    await engine.attach()
    await engine.use()
    while not engine.task.done():
        if (folder / "pause").exists():
            await engine.use()
        else:
            page = await adapters.ListAdapters(pb.ListAdaptersRequest(page_size=1000), timeout=2)
            if page.adapters:
                digest = random.choice(page.adapters).digest
                await engine.use(digest)
                await engine.want(digest)
        await asyncio.sleep(0.03)
    engine.task.result()


async def main(address: str, folder: Path) -> None:
    resident: dict[str, str] = {}
    while True:
        async with grpc.aio.insecure_channel(address) as channel:
            engine = Engine(residency_pb2_grpc.ResidencyServiceStub(channel), budget=BUDGET, resident=resident)
            engine.state = folder / "device"
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await live(engine, channel, folder)
        await asyncio.sleep(0.1)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
