"""The rules that are compared: ours, which is the router's own code, and three others, as they are published."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from bench.fairness.engine import Engine, Job, Running
from router.accounts import Where
from router.flows import Flows, Tariff, Ticket

HERE = frozenset({"engine-0"})
NOWHERE: Where = frozenset()
PROMPT_WEIGHT, OUTPUT_WEIGHT = 1, 2


class Rule(Protocol):
    """Decides who joins the engine next."""

    def arrive(self, job: Job, now: float) -> None: ...

    def next(self, engine: Engine, now: float) -> tuple[Job, object] | None:
        """Takes the next request from its queue; None when nobody joins now."""
        ...

    def stepped(self, running: Running) -> None:
        """A sequence has got a token."""
        ...

    def ended(self, running: Running) -> None: ...

    def moved(self, engine: Engine) -> None:
        """Other adapters are on the device than before."""
        ...


class Quiet:
    """For rules that need not hear of something."""

    def stepped(self, running: Running) -> None: ...

    def ended(self, running: Running) -> None: ...

    def moved(self, engine: Engine) -> None: ...


class Fcfs(Quiet):
    """First come, first served."""

    def __init__(self) -> None:
        self._queue: deque[Job] = deque()

    def arrive(self, job: Job, now: float) -> None:
        self._queue.append(job)

    def next(self, engine: Engine, now: float) -> tuple[Job, object] | None:
        if not self._queue or not engine.has_room(self._queue[0]):
            return None
        return self._queue.popleft(), None


class Vtc(Quiet):
    """Virtual token counters (arXiv 2401.00588), as in its artifact: counters by tenant, lifted to the least of the active."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._queues: dict[str, deque[Job]] = {}
        self._counters: dict[str, float] = {}
        self._weights = weights or {}

    def arrive(self, job: Job, now: float) -> None:
        queue = self._queues.setdefault(job.tenant, deque())
        self._counters.setdefault(job.tenant, 0.0)
        if not queue:
            active = [self._counters[name] for name, other in self._queues.items() if other and name != job.tenant]
            if active:
                self._counters[job.tenant] = max(self._counters[job.tenant], min(active))
        queue.append(job)

    def next(self, engine: Engine, now: float) -> tuple[Job, object] | None:
        active = [name for name, queue in self._queues.items() if queue]
        if not active:
            return None
        name = min(active, key=lambda one: self._counters[one])
        if not engine.has_room(self._queues[name][0]):
            return None
        job = self._queues[name].popleft()
        self._counters[name] += PROMPT_WEIGHT * job.prompt / self._weights.get(name, 1.0)
        return job, None

    def stepped(self, running: Running) -> None:
        name = running.job.tenant
        self._counters[name] += OUTPUT_WEIGHT / self._weights.get(name, 1.0)


class Lorax(Quiet):
    """LoRAX's rule: queues by adapter. Of the adapters that are active, the oldest request goes first, those active for less
    than 2 s preferred. An adapter in use stays active; only the first of the active can be put off, and only idle."""

    CYCLE = 2.0

    def __init__(self) -> None:
        self._queues: dict[str, deque[Job]] = {}
        self._pending: deque[str] = deque()
        self._active: dict[str, float] = {}

    def arrive(self, job: Job, now: float) -> None:
        self._queues.setdefault(job.adapter, deque()).append(job)
        if job.adapter not in self._active and job.adapter not in self._pending:
            self._pending.append(job.adapter)

    def next(self, engine: Engine, now: float) -> tuple[Job, object] | None:
        self._exchange(engine, now)
        waiting = [name for name in self._active if self._queues[name]]
        if not waiting:
            return None
        fresh = [name for name in waiting if now - self._active[name] < self.CYCLE]
        name = min(fresh or waiting, key=lambda one: self._queues[one][0].arrived)
        if not engine.has_room(self._queues[name][0]):
            return None
        return self._queues[name].popleft(), None

    def _exchange(self, engine: Engine, now: float) -> None:
        in_use = {one.job.adapter for one in engine.running}
        idle = [name for name in self._active if name not in in_use and not self._queues[name]]
        for name in idle[: len(self._pending)]:
            del self._active[name]
        first = next(iter(self._active), None)
        if first is not None and first not in in_use and self._pending and now - self._active[first] > self.CYCLE:
            del self._active[first]
            self._pending.append(first)
        while self._pending and len(self._active) < engine.model.device_adapters:
            self._active[self._pending.popleft()] = now


class Ours:
    """The router's flows, driven as the router drives them."""

    def __init__(
        self,
        window: float = 0.0,
        tenant_weights: Mapping[str, float] | None = None,
        adapter_weight: Callable[[str], float] = lambda adapter: 1.0,
    ) -> None:
        self.flows = Flows(Tariff.of(PROMPT_WEIGHT, OUTPUT_WEIGHT), window, tenant_weights)
        self._adapter_weight = adapter_weight
        self._jobs: dict[Ticket, Job] = {}
        self._where: dict[str, Where] = {}

    def arrive(self, job: Job, now: float) -> None:
        where = self._where.setdefault(job.adapter, NOWHERE) if job.adapter else None
        weight = self._adapter_weight(job.adapter)
        ticket = self.flows.enqueue(job.tenant, job.adapter, weight, where, job.prompt, job.output)
        self._jobs[ticket] = job

    def next(self, engine: Engine, now: float) -> tuple[Job, object] | None:
        if len(engine.running) >= engine.model.places:
            return None
        loading = sum(not engine.is_resident(one.job.adapter) for one in engine.running)
        half = max(1, engine.model.places // 2)
        kept = (engine.model.places + 8) // 16 if self.flows.is_shared else 0
        room = len(engine.running) + kept < engine.model.places

        def is_open(where: Where) -> bool:
            return where != NOWHERE or loading < half

        def is_warm(where: Where) -> bool:
            return where != NOWHERE

        ticket = (room and self.flows.pick(is_open, is_warm)) or self.flows.pick_newcomer(is_open, is_warm)
        if ticket is None:
            return None
        job = self._jobs[ticket]
        if not engine.has_room(job):
            self.flows.requeue(ticket)
            return None
        if not engine.is_resident(job.adapter):
            self.flows.loading(ticket, "engine-0")
        return job, ticket

    def stepped(self, running: Running) -> None:
        ticket = running.key
        assert isinstance(ticket, Ticket)
        if running.done == 1:
            self.flows.loaded(ticket)
        self.flows.charge(ticket, running.job.prompt, running.done)

    def ended(self, running: Running) -> None:
        ticket = running.key
        assert isinstance(ticket, Ticket)
        self.flows.end(ticket)
        del self._jobs[ticket]

    def moved(self, engine: Engine) -> None:
        for adapter, was in self._where.items():
            where = HERE if engine.is_resident(adapter) else NOWHERE
            if where != was:
                self._where[adapter] = where
                self.flows.moved(adapter, where)
