"""What the loop has for one client. A slow client costs memory for its own answer, up to a bound, and nobody any time.

A client is written to at once while the router has little to do. Under load the pieces of an answer are collected: its
first goes at once, and from then on the client is written to with the next beat of the router's pulse. A message costs
the same whatever is in it, so this is what lets one process serve many thousand tokens a second.
"""

from __future__ import annotations

import asyncio
from array import array

from router.errors import ClientTooSlow
from router.messages import Completion, Delta, Piece, Wire
from servicekit.errors import ServiceError

# Seconds between two beats: under load, an answer is written to its client at most once in each.
BEAT = 0.02
# Pieces in a beat from which on they are collected.
LOADED = 20
# What a piece costs beside its text, and a log probability with its alternatives; bytes, roughly.
_PIECE_BYTES = 64
_LOGPROB_BYTES = 1024


class Pulse:
    """Beats while there is something to send, and knows whether that is much."""

    def __init__(self) -> None:
        self.is_loaded = False
        self._pieces = 0
        self._waiting: list[Outbox] = []
        self._timer: asyncio.TimerHandle | None = None

    def note(self) -> None:
        """Counts a piece."""
        self._pieces += 1
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(BEAT, self._beat)

    def later(self, outbox: Outbox) -> None:
        """Wakes an outbox with the next beat."""
        self._waiting.append(outbox)

    def _beat(self) -> None:
        self.is_loaded = self._pieces > LOADED
        self._timer = asyncio.get_running_loop().call_later(BEAT, self._beat) if self._pieces else None
        self._pieces = 0
        waiting, self._waiting = self._waiting, []
        for outbox in waiting:
            outbox.wake()


class Collected:
    """Pieces of an answer, merged into one."""

    __slots__ = ("_logprobs", "_prompt_logprobs", "_text", "_token_ids", "size_bytes")

    def __init__(self) -> None:
        self.size_bytes = 0
        self._text: list[str] = []
        self._token_ids = array("i")
        self._logprobs: list[Wire] = []
        self._prompt_logprobs: list[Wire] = []

    def add(self, piece: Piece) -> None:
        self._text.append(piece.text)
        self._token_ids.extend(piece.token_ids)
        self.size_bytes += len(piece.text) + _PIECE_BYTES
        if piece.logprobs or piece.prompt_logprobs:
            self._logprobs.extend(piece.logprobs)
            self._prompt_logprobs.extend(piece.prompt_logprobs)
            self.size_bytes += _LOGPROB_BYTES * (len(piece.logprobs) + len(piece.prompt_logprobs))

    def take(self) -> Delta:
        """All that is there; nothing is left."""
        delta = Delta("".join(self._text), self._token_ids, self._logprobs, self._prompt_logprobs)
        self._text, self._token_ids = [], array("i")
        if self._logprobs or self._prompt_logprobs:
            self._logprobs, self._prompt_logprobs = [], []
        self.size_bytes = 0
        return delta


class Outbox:
    """For a client that reads an answer as it comes. Pieces that were not fetched yet are one; the end comes after them."""

    __slots__ = ("_end", "_fetching", "_has_begun", "_limit", "_must_wait", "_pieces", "_pulse")

    def __init__(self, pulse: Pulse, limit_bytes: int) -> None:
        self._pulse = pulse
        self._limit = limit_bytes
        self._pieces = Collected()
        self._end: Completion | ServiceError | None = None
        self._has_begun = False
        self._must_wait = False
        self._fetching: asyncio.Future[None] | None = None

    def put(self, piece: Piece) -> ClientTooSlow | None:
        """Adds a piece; returns an error where too much is unread, with which the request should end."""
        self._pieces.add(piece)
        if self._pieces.size_bytes > self._limit:
            return ClientTooSlow(self._limit)
        self._pulse.note()
        if not (self._has_begun and self._pulse.is_loaded):
            self.wake()
        elif not self._must_wait:
            self._must_wait = True
            self._pulse.later(self)
        return None

    def close(self, end: Completion | ServiceError) -> None:
        self._end = end
        self.wake()

    def wake(self) -> None:
        """Lets the client have what is there."""
        self._must_wait = False
        if self._fetching is not None and not self._fetching.done():
            self._fetching.set_result(None)

    async def next(self) -> Delta | Completion:
        """The next piece once there is one, the completion last; raises the error the request ended with."""
        while True:
            if self._pieces.size_bytes and not self._must_wait:
                self._has_begun = True
                return self._pieces.take()
            if self._end is not None:
                return completed(self._end)
            self._fetching = asyncio.get_running_loop().create_future()
            await self._fetching


class Whole:
    """For a client that gets its answer in one message.

    Attributes:
        end: how the request ended.
    """

    __slots__ = ("_pieces", "end")

    def __init__(self) -> None:
        # Made with the first piece: there is none for as long as a request waits.
        self._pieces: Collected | None = None
        self.end: asyncio.Future[Completion | ServiceError] = asyncio.get_running_loop().create_future()

    def put(self, piece: Piece) -> None:
        if self._pieces is None:
            self._pieces = Collected()
        self._pieces.add(piece)

    def close(self, end: Completion | ServiceError) -> None:
        if not self.end.done():
            self.end.set_result(end)

    def take(self) -> Delta:
        """The answer."""
        return (self._pieces or Collected()).take()


def completed(end: Completion | ServiceError) -> Completion:
    """The completion; raises the error where the request ended with one."""
    if isinstance(end, ServiceError):
        raise end
    return end
