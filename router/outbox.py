"""What the loop has for one client. A slow client costs memory for its own answer at most, and nobody any time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from router.messages import Completion, Delta, Wire
from servicekit.errors import ServiceError


class Outbox:
    """Deltas that were not fetched yet are merged into one; the end comes after them."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[Wire] = []
        self._prompt_logprobs: list[Wire] = []
        self._end: Completion | ServiceError | None = None
        self._changed = asyncio.Event()

    def put(self, delta: Delta) -> None:
        self._text.append(delta.text)
        self._token_ids.extend(delta.token_ids)
        self._logprobs.extend(delta.logprobs)
        self._prompt_logprobs.extend(delta.prompt_logprobs)
        self._changed.set()

    def close(self, end: Completion | ServiceError) -> None:
        self._end = end
        self._changed.set()

    async def events(self) -> AsyncIterator[Delta | Completion]:
        """Yields deltas as they come and the completion last, or raises the error the request ended with."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._text:
                delta = Delta("".join(self._text), self._token_ids, self._logprobs, self._prompt_logprobs)
                self._text, self._token_ids, self._logprobs, self._prompt_logprobs = [], [], [], []
                yield delta
            elif isinstance(self._end, ServiceError):
                raise self._end
            elif self._end is not None:
                yield self._end
                return
            if self._end is not None:
                self._changed.set()
