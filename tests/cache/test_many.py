"""A thousand adapters registered, two hundred in use, on a device that holds forty."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cache.conftest import (
    Cache,
    FakeEngine,
    Store,
    binary_of,
    eventually,
    make_tensors,
    serve_cache,
    write_adapter,
)
from tests.cache.test_loads import SIZE, device
from tests.cache.test_look_ahead import look_ahead, room_for
from tests.cache.test_service import register

REGISTERED, USED, HELD, AT_ONCE = 1000, 200, 40, 8


async def use_all(cache: Cache, engine: FakeEngine, digests: list[str], rng: random.Random, rounds: int) -> None:
    """Requests come in groups; each group waits in the queue while the one before it is served."""
    groups = [rng.sample(digests, AT_ONCE) for _ in range(rounds)]
    for group, behind in zip(groups, [*groups[1:], []], strict=True):
        await look_ahead(cache, *behind)
        await engine.use(*group)
        await engine.want(*(digest for digest in group if digest not in engine.resident))
        await eventually(lambda group=group: engine.resident.keys() >= set(group))  # type: ignore[misc]
    await engine.use()


@pytest.fixture
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """Goes with all that is registered in it."""
    store = Store(binary_of("valkey"), tmp_path_factory.mktemp("s"))
    store.start()
    yield store
    store.kill()


async def test_a_thousand_adapters_keep_every_budget_and_memory_flat(own_store: Store, tmp_path: Path) -> None:
    async with serve_cache(own_store.url, tmp_path, host_bytes=100 * SIZE) as cache:
        engine = FakeEngine(cache.residency)
        await engine.attach()
        digests: list[str] = []
        for first in range(0, REGISTERED, 50):
            folders = [
                write_adapter(cache.root / f"f{n}", make_tensors(rank=1, seed=n), r=1) for n in range(first, first + 50)
            ]
            made = await asyncio.gather(*(register(cache, f"a{first + n}", folder) for n, folder in enumerate(folders)))
            digests += [adapter.digest for adapter in made]
        await room_for(cache, engine, HELD)
        used, rng = random.Random(1).sample(digests, USED), random.Random(2)
        await use_all(cache, engine, used, rng, 40)
        before = psutil.Process().memory_info().rss
        await use_all(cache, engine, used, rng, 40)
        grown = psutil.Process().memory_info().rss - before
        # The fake engine asserts its own budget with every load
        assert not engine.refusals and not engine.task.done()
        held = sum(path.stat().st_size for path in cache.manager.holdings.host.folder.glob("*.safetensors"))
        assert 0 < held <= 100 * SIZE
        assert len(engine.resident) <= HELD and len(engine.loads) > USED
        await eventually(lambda: not device(cache).wants)
        assert device(cache).expected.keys() <= set(used)
        assert grown < 8 << 20
        engine.leave()
