"""The launcher's one loop: starts services, hears them become ready or die, restarts them, and drains them."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.child import Child
from launcher.errors import CannotStart, GaveUp
from launcher.layout import Layout
from launcher.lifecycle import Lifecycle, NeverStarted, Restart, State
from launcher.plan import STOP_SECONDS, Service
from launcher.progress import Progress
from launcher.ready import until_ready
from launcher.restart import RestartPolicy

TICK = 0.25


@dataclass(frozen=True)
class Answers:
    """A service is ready."""

    name: str


@dataclass(frozen=True)
class Died:
    """A service's process has ended."""

    name: str
    exit_code: int


@dataclass(frozen=True)
class Due:
    """The pause of a service is over."""

    name: str


@dataclass(frozen=True)
class Stop:
    """We are to stop."""


class Supervisor:
    """Runs services until it is stopped or one of them cannot be kept alive.

    Attributes:
        ready: set once every service answers for the first time.
    """

    def __init__(
        self,
        services: Sequence[Service],
        layout: Layout,
        progress: Progress,
        policy: RestartPolicy = RestartPolicy(),  # noqa: B008 - frozen
    ) -> None:
        self.ready = asyncio.Event()
        self._progress = progress
        self._children: Mapping[str, Child] = {
            service.name: Child(service, layout.log(service.name), layout.lock) for service in services
        }
        self._lifecycle = Lifecycle({service.name: service.needs for service in services}, policy)
        self._inbox: asyncio.Queue[Answers | Died | Due | Stop] = asyncio.Queue()
        self._watches: set[asyncio.Task[None]] = set()
        self._stopping = False

    def stop(self) -> None:
        """Drains and ends; asked twice, ends at once."""
        if self._stopping:
            for child in self._children.values():
                child.kill()
        self._stopping = True
        self._inbox.put_nowait(Stop())

    async def run(self) -> None:
        """Returns when everything is stopped.

        Raises:
            CannotStart: a service died before it was ready.
            GaveUp: a service kept dying.
        """
        ticking = asyncio.create_task(self._tick())
        try:
            await self._start_what_can()
            while not isinstance(message := await self._inbox.get(), Stop):
                await self._handle(message)
        finally:
            ticking.cancel()
            await self._drain()

    async def _handle(self, message: Answers | Died | Due) -> None:
        match message:
            case Answers(name):
                self._lifecycle.answers(name)
                self._progress.ready(name)
                await self._start_what_can()
                if self._lifecycle.all_ready:
                    self.ready.set()
            case Died(name, exit_code):
                self._judge(name, exit_code)
            case Due(name):
                if self._lifecycle.states[name] is State.PAUSING:
                    await self._start(name)

    def _judge(self, name: str, exit_code: int) -> None:
        child = self._children[name]
        verdict = self._lifecycle.died(name, time.monotonic())
        self._progress.gone(name)
        if isinstance(verdict, NeverStarted):
            raise CannotStart(f"{name}: {child.last_words()} (log: {child.log})")
        how = _manner(exit_code)
        if not isinstance(verdict, Restart):
            raise GaveUp(f"{name} keeps dying, the last time {how}: {child.last_words()} (log: {child.log})")
        self._progress.line(f"{name} {how}; starting it again in {verdict.delay:g} s (log: {child.log})")
        asyncio.get_running_loop().call_later(verdict.delay, self._inbox.put_nowait, Due(name))

    async def _start_what_can(self) -> None:
        for name in self._lifecycle.startable():
            await self._start(name)

    async def _start(self, name: str) -> None:
        child = self._children[name]
        await child.start()
        self._lifecycle.started(name)
        self._progress.starting(name)
        watch = asyncio.create_task(self._watch(child))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)

    async def _watch(self, child: Child) -> None:
        """Tells the loop when a process answers and when it ends."""
        name = child.service.name
        answering = asyncio.create_task(until_ready(child.service))
        ending = asyncio.create_task(child.ended())
        try:
            await asyncio.wait([answering, ending], return_when=asyncio.FIRST_COMPLETED)
            if not ending.done():
                self._inbox.put_nowait(Answers(name))
            self._inbox.put_nowait(Died(name, await ending))
        finally:
            answering.cancel()
            ending.cancel()
            await asyncio.gather(answering, ending, return_exceptions=True)

    async def _drain(self) -> None:
        """Stops the services stage by stage: whoever is asked last still has somebody to ask."""
        self._stopping = True
        for watch in list(self._watches):
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        self._progress.clear()
        running = [child for child in self._children.values() if child.running]
        for stage in sorted({child.service.stage for child in running}):
            members = [child for child in running if child.service.stage == stage]
            ended = await asyncio.gather(*(child.stop(STOP_SECONDS) for child in members))
            for child, by_itself in zip(members, ended, strict=True):
                how = "stopped" if by_itself else "did not stop in time and was ended"
                self._progress.line(f"{child.service.name:10} {how}")

    async def _tick(self) -> None:
        while True:
            self._progress.tick()
            await asyncio.sleep(TICK)


def _manner(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"was ended by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was ended by signal {-exit_code}"
