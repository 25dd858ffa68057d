"""A modelled node: one engine with places and a queue, one link to its device; the plan and the policies are the real ones.

The engine has PLACES places. Requests take them in the order they came and start in that order, each once its adapter is on the
device; then it holds place and adapter for its tokens. That order makes what is moved comparable between policies, and with a
bound that knows the order; a real engine lets those with their adapter there go first. The link moves one adapter at a time.
A place is given only when the adapters of all who have one fit on the device together.

What has a place, running or not, is leased: no server evicts it. With look-ahead the plan also knows the queue behind the
places, as it does from the routers; without, it sees a request when it has taken a place, which is what vLLM and SGLang do.
"""

from __future__ import annotations

import heapq
import statistics
from collections import Counter, defaultdict, deque
from dataclasses import dataclass

from bench.residency.traces import Request, Trace
from cache.artifact import BaseDescription
from cache.costs import TO_DEVICE
from cache.engines import Engine, Expected, Worth
from cache.plan import Policy
from cache.residency import DeviceMove, DevicePlace
from cache.tiers import ArtifactKey

PLACES = 16
TOKEN_SECONDS = 0.03
# No policy may count on more: a router that has queued so many refuses the next.
QUEUE = 256
FOREVER = 1e9


@dataclass(frozen=True)
class Outcome:
    """What one policy made of one trace.

    Attributes:
        moved: bytes loaded onto the device.
        hits: share of the requests whose adapter was on the device when they took a place.
        wait: mean seconds for which a request that had a place waited for its adapter.
        looked_ahead: different adapters in the queue behind the places, on average.
        timetable: start and end of each request, in the order of the trace.
    """

    moved: int
    hits: float
    wait: float
    looked_ahead: float
    timetable: tuple[tuple[float, float], ...]


class Node:
    """Runs one trace."""

    def __init__(
        self, trace: Trace, budget_bytes: int, policy: Policy, *, look_ahead: bool, tenant_share: float
    ) -> None:
        base = BaseDescription(name="model", digest="", dtype="float16", max_rank=64, modules={})
        self._engine = Engine("engine", base, budget_bytes)
        self._engine.policy, self._engine.tenant_share = policy, tenant_share
        self._trace, self._look_ahead = trace, look_ahead
        self._now = 0.0
        self._queue: deque[Request] = deque()
        self._queued: defaultdict[str, deque[Request]] = defaultdict(deque)
        self._seated: deque[tuple[Request, float]] = deque()
        self._running: list[tuple[float, int, str]] = []
        self._begun: Counter[str] = Counter()
        self._loading: deque[str] = deque()
        self._load_ends = float("inf")
        self._moved = self._hits = 0
        self._waits: list[float] = []
        self._ahead: list[int] = []
        self._timetable: list[tuple[float, float]] = []

    def run(self) -> Outcome:
        """The whole trace, until everything is answered."""
        arrivals = deque(self._trace.requests)
        while arrivals or self._queue or self._seated or self._running:
            next_arrival = arrivals[0].at if arrivals and len(self._queue) < QUEUE else float("inf")
            next_end = self._running[0][0] if self._running else float("inf")
            moment = min(next_arrival, next_end, self._load_ends)
            if moment == float("inf"):
                raise RuntimeError("the modelled engine has stopped")
            self._now = max(self._now, moment)
            if moment == self._load_ends:
                self._loaded()
            elif moment == next_end:
                heapq.heappop(self._running)
            else:
                self._arrive(arrivals.popleft())
            self._seat()
            self._look()
            self._plan()
        return Outcome(
            self._moved,
            self._hits / len(self._trace.requests),
            statistics.fmean(self._waits),
            statistics.fmean(self._ahead),
            tuple(self._timetable),
        )

    def _appraise(self, key: ArtifactKey) -> Worth:
        size = self._trace.sizes[key.digest]
        return Worth(size, TO_DEVICE.cost(size))

    def _arrive(self, request: Request) -> None:
        self._queue.append(request)
        self._queued[request.digest].append(request)

    def _look(self) -> None:
        """What a router says of its queue."""
        if self._look_ahead:
            queue = {digest: waiting[0] for digest, waiting in self._queued.items() if waiting}
            self._engine.look_ahead(
                "router", {digest: Expected("", FOREVER, one.at, one.tenant, "router") for digest, one in queue.items()}
            )

    def _seat(self) -> None:
        """Gives free places to the queue, starts those in front whose adapter is there, says what is in use."""
        self._use()
        while self._queue and len(self._seated) + len(self._running) < PLACES and self._fits(self._queue[0].digest):
            request = self._queue.popleft()
            there = self._engine.place(request.digest) is DevicePlace.DEVICE
            self._hits += there
            self._seated.append((request, self._now))
            self._begun[request.digest] += 1
            self._use()
            if not there:
                self._engine.want(request.digest)
            self._queued[request.digest].popleft()
            self._ahead.append(sum(map(bool, self._queued.values())))
        while self._seated and self._engine.place(self._seated[0][0].digest) is DevicePlace.DEVICE:
            request, since = self._seated.popleft()
            self._waits.append(self._now - since)
            self._timetable.append((self._now, self._now + request.tokens * TOKEN_SECONDS))
            heapq.heappush(self._running, (self._timetable[-1][1], len(self._waits), request.digest))
        self._use()

    def _fits(self, digest: str) -> bool:
        """Whether the adapters of all who have a place, and this one, fit together."""
        together = self._engine.in_use | {digest}
        return sum(self._trace.sizes[digest] for digest in together) <= self._engine.budget_bytes

    def _use(self) -> None:
        in_use = Counter(request.digest for request, _ in self._seated) + Counter(d for _, _, d in self._running)
        if self._begun or in_use.keys() != self._engine.in_use:
            self._engine.use(frozenset(in_use), self._begun, self._appraise, self._now)
            self._begun.clear()

    def _plan(self) -> None:
        engine = self._engine
        while True:
            engine.settle(self._now)
            decided = engine.plan((), self._appraise)
            for digest in decided.loads:
                engine.move(digest, DeviceMove.LOAD, self._trace.sizes[digest], self._now)
                self._moved += self._trace.sizes[digest]
                self._loading.append(digest)
            for digest in decided.evictions:
                engine.move(digest, DeviceMove.EVICT)
                engine.move(digest, DeviceMove.EVICTED)
            if not decided.evictions:
                break
        if self._loading and self._load_ends == float("inf"):
            self._begin_load()

    def _begin_load(self) -> None:
        self._load_ends = self._now + TO_DEVICE.cost(self._trace.sizes[self._loading[0]])

    def _loaded(self) -> None:
        self._engine.move(self._loading.popleft(), DeviceMove.LOADED)
        self._load_ends = float("inf")
        if self._loading:
            self._begin_load()
