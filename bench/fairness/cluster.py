"""Several modelled engines behind the router's own loop.

What decides here decides in service: `router.dispatch` with its flows, admission, placement and seats, and for each device the
cache's plan with its look-ahead. Time, links and the engines' steps are made up.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from opentelemetry.trace import INVALID_SPAN

from bench.fairness.engine import Job, Model
from bench.fairness.machine import READY, Machine
from bench.fairness.rules import OUTPUT_WEIGHT, PROMPT_WEIGHT
from cache.engines import LOOK_AHEAD_SECONDS, Expected
from router.accounts import Where
from router.admission import Limits
from router.cache_link import Moved
from router.dispatch import Dispatcher
from router.errors import QueueFull
from router.fleet import EngineUp, Frame
from router.flows import Flows, Tariff
from router.inbox import Cancel, Submit
from router.look_ahead import PERIOD, first_of_each
from router.messages import Completion, Output, Piece
from router.registry_view import Adapter
from router.request import Request, State
from servicekit.errors import DeadlineExceeded, ServiceError

NO_LIMITS = Limits(10**9, 10**9, 10**9, 10**12, 10**12, 10**12)
LOAD_MIB_WEIGHT, WINDOW = 0.5, 2000.0
_TOO_LATE = DeadlineExceeded("the client's deadline has passed", "DEADLINE_EXCEEDED")

# Given the adapter of a request, and the requests that each router has open: the router that gets it.
Deal = Callable[[str, Sequence[int]], int]


@dataclass(frozen=True)
class Setting:
    """What the engines are and how the router is set.

    Attributes:
        deal: None for one router of all engines. Otherwise each engine has a router of its own, and this is the balancer before
            them.
        is_blind: the router does not know where adapters are, and so takes any engine for as good as another.
        deadline: seconds after which a client is gone; None for never. `is_told`: the router knows of it.
        sample: seconds between two looks at the state.
    """

    model: Model
    sizes: Mapping[str, int]
    engines: int = 4
    device_bytes: int = 2 << 30
    limits: Limits = NO_LIMITS
    deal: Deal | None = None
    is_blind: bool = False
    deadline: float | None = None
    is_told: bool = True
    sample: float = 1.0


@dataclass(eq=False)
class Answer:
    """What became of one request; it is where the router puts its answer. Times in seconds."""

    job: Job
    clock: Callable[[], float]
    first_token: float | None = None
    ended: float | None = None
    tokens: int = 0
    error: ServiceError | None = None
    request: Request = field(init=False, repr=False)

    def put(self, piece: Piece) -> None:
        if self.first_token is None:
            self.first_token = self.clock()
        self.tokens += len(piece.token_ids)

    def close(self, end: Completion | ServiceError) -> None:
        self.ended = self.clock()
        self.error = end if isinstance(end, ServiceError) else None

    @property
    def is_refused(self) -> bool:
        return isinstance(self.error, QueueFull)

    @property
    def service(self) -> float:
        """Weighted tokens of an answer that came whole; 0 otherwise."""
        done = self.ended is not None and self.error is None
        return PROMPT_WEIGHT * self.job.prompt + OUTPUT_WEIGHT * self.tokens if done else 0.0


@dataclass(eq=False)
class Group:
    """A router and its engines. `open`: requests that have come and not ended."""

    dispatcher: Dispatcher
    flows: Flows
    machines: list[Machine]
    open: int = 0


class Cluster:
    """Runs one trace.

    Attributes:
        answers: of all requests that have come.
        watch: called at every sample.
    """

    def __init__(self, setting: Setting, watch: Callable[[Cluster], None] = lambda cluster: None) -> None:
        self.setting = setting
        self.now = 0.0
        self.answers: list[Answer] = []
        self.watch = watch
        self.machines = [
            Machine(number, setting.model, setting.sizes, setting.device_bytes, self._job)
            for number in range(setting.engines)
        ]
        self._on: defaultdict[str, frozenset[str]] = defaultdict(frozenset)
        own = [self.machines] if setting.deal is None else [[machine] for machine in self.machines]
        self.groups = [self._group(machines) for machines in own]
        self._group_of = {machine: group for group in self.groups for machine in group.machines}
        self._adapters = {name: Adapter(name, name, size_bytes=size) for name, size in setting.sizes.items()}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def run(self, jobs: Sequence[Job], until: float) -> Cluster:
        """All jobs, in the order of their arrival, for so many seconds."""
        for job in jobs:
            self.at(job.arrived, partial(self._arrive, job))
        self._every(PERIOD, self._look_ahead)
        self._every(self.setting.sample, lambda: self.watch(self))
        while self._events and self._events[0][0] <= until:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
            self._advance()
        return self

    def at(self, moment: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (moment, next(self._count), happen))

    def copies(self, adapter: str) -> int:
        """Engines that have an adapter on their device."""
        return len(self._on[adapter])

    def _job(self, wire: bytes) -> Job:
        """What a request asks for, of which routers know no more than these bytes."""
        return self.answers[int(wire)].job

    def _group(self, machines: list[Machine]) -> Group:
        flows = Flows(Tariff.of(PROMPT_WEIGHT, OUTPUT_WEIGHT, LOAD_MIB_WEIGHT), WINDOW)
        blind = self.setting.is_blind
        where: Callable[[str], Where] = (lambda digest: None) if blind else (lambda digest: self._on[digest])
        dispatcher = Dispatcher(flows, self.setting.limits, where, self._prefetch, lambda: self.now)
        for machine in machines:
            dispatcher.post(EngineUp(machine))
        dispatcher.turn()
        return Group(dispatcher, flows, machines)

    def _every(self, seconds: float, happen: Callable[[], None]) -> None:
        def again() -> None:
            happen()
            self.at(self.now + seconds, again)

        self.at(seconds, again)

    def _arrive(self, job: Job) -> None:
        deal = self.setting.deal
        group = self.groups[deal(job.adapter, [group.open for group in self.groups]) if deal else 0]
        deadline = None if self.setting.deadline is None else self.now + self.setting.deadline
        answer = Answer(job, lambda: self.now)
        self.answers.append(answer)
        answer.request = request = Request(
            request_id=str(len(self.answers) - 1),
            tenant=job.tenant,
            adapter=self._adapters[job.adapter],
            estimated_prompt_tokens=job.prompt,
            wire=str(len(self.answers) - 1).encode(),
            sink=answer,
            span=INVALID_SPAN,
            arrived_at=self.now,
            deadline=deadline if self.setting.is_told else None,
        )
        if deadline is not None:
            self.at(deadline, lambda: self._give_up(group, request))
        self._post(group, Submit(request))

    def _give_up(self, group: Group, request: Request) -> None:
        if request.state is not State.ENDED:
            self._post(group, Cancel(request, _TOO_LATE))

    def _post(self, group: Group, message: Submit | Cancel | Frame | Moved) -> None:
        for machine in group.machines:
            machine.now = self.now
        group.dispatcher.post(message)
        group.dispatcher.turn()
        group.open = group.dispatcher.queued + group.dispatcher.running

    def _prefetch(self, digest: str, engine_id: str, traceparent: str, tenant: str) -> None:
        machine = next(machine for machine in self.machines if machine.engine_id == engine_id)
        machine.device.expect(digest, Expected("", self.now + LOOK_AHEAD_SECONDS, self.now, tenant))
        machine.changed()

    def _look_ahead(self) -> None:
        """What the cache makes of what the routers say of their queues."""
        for group in self.groups:
            of_machine: dict[Machine, dict[str, Expected]] = {machine: {} for machine in group.machines}
            for request in first_of_each([group.dispatcher.queue]):
                digest, until = request.adapter.digest, self.now + LOOK_AHEAD_SECONDS
                expected = Expected("", until, request.arrived_at, request.tenant, "router")
                of_machine[_roomiest(group.machines, digest)][digest] = expected
            for machine, queue in of_machine.items():
                machine.device.look_ahead("router", queue)
                machine.changed()

    def _advance(self) -> None:
        """Lets the engines go on, and tells of adapters that came or went, until nothing changes any more."""
        while True:
            for machine in self.machines:
                arrives = machine.plan(self.now)
                if arrives is not None:
                    self.at(arrives, partial(self._arrived, machine))
                if not machine.is_stepping and (begun := machine.begin(self.now)):
                    machine.is_stepping = True
                    self.at(self.now + begun[0], partial(self._stepped, machine, begun[1]))
            if not self._tell():
                return

    def _tell(self) -> bool:
        moved: set[str] = set()
        for machine in self.machines:
            for digest in machine.news:
                here = frozenset({machine.engine_id})
                on = self._on[digest]
                self._on[digest] = on | here if digest in machine.engine.loaded else on - here
            moved |= machine.news
            machine.news = set()
        if moved and not self.setting.is_blind:
            for group in self.groups:
                self._post(group, Moved(frozenset(moved)))
        return bool(moved)

    def _arrived(self, machine: Machine) -> None:
        arrives = machine.arrived(self.now)
        if arrives is not None:
            self.at(arrives, partial(self._arrived, machine))

    def _stepped(self, machine: Machine, outputs: list[Output]) -> None:
        machine.is_stepping = False
        machine.end()
        self._post(self._group_of[machine], Frame(machine, outputs, READY))


def _roomiest(machines: Sequence[Machine], digest: str) -> Machine:
    """The engine that has a version or waits for it, else the one with most free room."""
    at_it = (one for one in machines if digest in one.device.device or digest in one.device.expected)
    return next(at_it, None) or max(machines, key=lambda machine: machine.device.free_bytes)
