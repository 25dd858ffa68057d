"""One loop for every base: requests go to the loop whose engines serve the base their adapter was made for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from router.cache_link import Moved
from router.dispatch import Dispatcher
from router.fleet import EngineDown, EngineUp, Frame
from router.inbox import Message, Stop, Submit
from router.request import Request


class Bases:
    """Passes messages on to the loops.

    Args:
        make: makes the loop of a base.
        default: digest of the base that answers requests without an adapter; empty while none is known.
    """

    def __init__(self, make: Callable[[str], Dispatcher], default: Callable[[], str]) -> None:
        self._make = make
        self._default = default
        self._loops: dict[str, Dispatcher] = {}
        self._tasks: asyncio.TaskGroup | None = None

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return sum(loop.queued for loop in self._loops.values())

    @property
    def running(self) -> int:
        """Requests that are on an engine."""
        return sum(loop.running for loop in self._loops.values())

    @property
    def queues(self) -> list[Collection[Request]]:
        """The requests that wait, of each base in order."""
        return [loop.queue for loop in self._loops.values()]

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            for loop in self._loops.values():
                tasks.create_task(loop.run())
            await asyncio.get_running_loop().create_future()

    def post(self, message: Message) -> None:
        """Hands a message to the loop it is for, or to all."""
        if isinstance(message, Moved | Stop):
            for loop in self._loops.values():
                loop.post(message)
        elif isinstance(message, EngineUp | EngineDown | Frame):
            self._loop(message.engine.base_digest).post(message)
        else:
            request = message.request
            if isinstance(message, Submit):
                request.base = request.adapter.base_digest or self._default()
            self._loop(request.base).post(message)

    def _loop(self, base: str) -> Dispatcher:
        loop = self._loops.get(base)
        if loop is None:
            loop = self._loops[base] = self._make(base)
            if self._tasks is not None:
                self._tasks.create_task(loop.run())
        return loop
