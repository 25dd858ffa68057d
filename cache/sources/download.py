"""One file over HTTP to disk: resumed where it broke off, retried with back-off, never larger than it may be.

A part is kept under a name made of what it is a part of, so that the next attempt, or the next process, goes on with it. It is
continued only while the server says, by If-Range and a strong ETag, that it is still the same file; otherwise it begins anew.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

import httpcore2

from cache.errors import SourceForbidden, SourceMoved, SourceNotFound, SourceUnreachable, shown
from cache.sources.http import HttpClient, Response
from cache.sources.source import too_large

_log = logging.getLogger(__name__)

T = TypeVar("T")

# Attempts in a row that bring no new byte before a source counts as unreachable.
ATTEMPTS = 5
FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.25, 10.0
# Parts that no one came back for.
STALE_PART_SECONDS = 24 * 3600.0
_BROKEN = (httpcore2.NetworkError, httpcore2.TimeoutException, httpcore2.ProtocolError, ConnectionError)
_WRITE_BYTES = 1 << 20
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


@dataclass(frozen=True)
class RemoteFile:
    """One file to be had.

    Attributes:
        source_uri: what the caller asked for, for messages.
        name: the file's, for messages.
        limit: most bytes it may have.
        sign: from a method and the headers of a request to the headers that are sent; adds what proves the caller's right.
        etag: the only content that will do, the server is held to it by If-Match; "" takes any.
        redirects: whether they are followed.
    """

    source_uri: str
    name: str
    url: str
    limit: int
    sign: Callable[[str, Mapping[str, str]], Mapping[str, str]]
    etag: str = ""
    redirects: bool = True


class _Again(Exception):
    """Worth another attempt. Says what happened, and how many seconds the server asked for."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class Downloads:
    """See the module. Its methods are called on the event loop; the disk is used in threads.

    Args:
        folder: holds the parts, and nothing else.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in folder.iterdir():
            with suppress(OSError):
                if path.stat().st_mtime < time.time() - STALE_PART_SECONDS:
                    path.unlink()

    async def head(self, client: HttpClient, file: RemoteFile) -> Mapping[str, str] | None:
        """The headers of a file, None when there is none. Raises SourceForbidden, SourceUnreachable or InvalidField."""

        async def ask() -> Mapping[str, str]:
            async with client.open("HEAD", file.url, file.sign("HEAD", {}), redirects=file.redirects) as response:
                _check(file, response, 200)
                return response.headers

        try:
            return await _persist(file, ask, lambda: 0)
        except SourceNotFound:
            return None

    async def fetch(self, client: HttpClient, file: RemoteFile) -> bytes | None:
        """The content of a file; None when there is none.

        Raises:
            MalformedAdapter: it is larger than it may be.
            SourceForbidden, SourceMoved: the server says so.
            SourceUnreachable: too many attempts in a row brought nothing.
            InvalidField: the URL leads to where sources must not be read from.
        """
        name = hashlib.sha256("\n".join((file.source_uri, file.name, file.url, file.etag)).encode()).hexdigest()
        lock = self._locks.setdefault(name, asyncio.Lock())
        async with lock:
            part = await asyncio.to_thread(_Part, self._folder / name, file.etag)
            try:
                await _persist(file, lambda: _continue(client, file, part), lambda: part.size)
                return await asyncio.to_thread(part.take)
            except SourceNotFound:
                return None


class _Part:
    """What has arrived of a file, and the ETag it arrived under. Blocks."""

    def __init__(self, path: Path, etag: str) -> None:
        self._data, self._tag = path.with_suffix(".part"), path.with_suffix(".etag")
        self.etag = etag
        with suppress(OSError):
            self.etag = self.etag or self._tag.read_text()
        # What came without a tag cannot be told from something else.
        self.size = self._data.stat().st_size if self.etag and self._data.exists() else 0

    def begin(self, etag: str) -> None:
        """Starts anew."""
        self._data.write_bytes(b"")
        self._tag.write_text(etag)
        self.etag, self.size = etag, 0

    def add(self, content: bytes) -> None:
        with self._data.open("ab") as file:
            file.write(content)
        self.size += len(content)

    def take(self) -> bytes:
        """The whole content; the part is gone then."""
        content = self._data.read_bytes()
        self.discard()
        return content

    def discard(self) -> None:
        self._data.unlink(missing_ok=True)
        self._tag.unlink(missing_ok=True)
        self.size = 0


async def _continue(client: HttpClient, file: RemoteFile, part: _Part) -> None:
    """One attempt: asks for what is missing and keeps what comes."""
    asked = {"if-match": file.etag} if file.etag else {}
    if part.size:
        asked |= {"range": f"bytes={part.size}-", "if-range": part.etag}
    async with client.open("GET", file.url, file.sign("GET", asked), redirects=file.redirects) as response:
        if response.status == 416:
            # The part has all there is, or is of something else.
            await asyncio.to_thread(part.discard)
            raise _Again("the source does not continue the file")
        _check(file, response, 200, 206)
        if response.headers.get("content-encoding", "identity") != "identity":
            raise SourceUnreachable(file.source_uri, f"{file.name} comes in an encoding that was not asked for")
        total = await _begin(file, response, part)
        await _receive(file, response, part)
    if total is not None and part.size != total:
        raise _Again(f"the source ended {file.name} after {part.size} of {total} bytes")


async def _begin(file: RemoteFile, response: Response, part: _Part) -> int | None:
    """Gets the part ready for what comes; returns how large the whole file is, None when the server does not say."""
    if response.status == 206:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
        if match is None or int(match[1]) != part.size:
            await asyncio.to_thread(part.discard)
            raise _Again("the source sent another range than it was asked for")
        total: int | None = int(match[2])
    else:
        length = response.headers.get("content-length", "")
        total = int(length) if length.isdecimal() else None
        await asyncio.to_thread(part.begin, strong_etag(response.headers))
    if total is not None and total > file.limit:
        await asyncio.to_thread(part.discard)
        raise too_large(file.name, total, file.limit)
    return total


async def _receive(file: RemoteFile, response: Response, part: _Part) -> None:
    waiting = bytearray()
    try:
        async for piece in response.body():
            waiting += piece
            if part.size + len(waiting) > file.limit:
                waiting.clear()
                await asyncio.to_thread(part.discard)
                raise too_large(file.name, file.limit + 1, file.limit)
            if len(waiting) >= _WRITE_BYTES:
                await asyncio.to_thread(part.add, bytes(waiting))
                waiting.clear()
    finally:
        # Also when the connection broke or time ran out: what came is not asked for again.
        if waiting:
            part.add(bytes(waiting))


async def _persist(file: RemoteFile, attempt: Callable[[], Awaitable[T]], size: Callable[[], int]) -> T:
    """Attempts until one succeeds, or ATTEMPTS in a row brought nothing; waits longer each time, by chance up to that."""
    failed = 0
    while True:
        before = size()
        try:
            return await attempt()
        except (*_BROKEN, _Again) as error:
            failed = 1 if size() > before else failed + 1
            what = _words(error)
            if isinstance(error.__cause__, ssl.SSLCertVerificationError):
                raise SourceUnreachable(file.source_uri, f"its certificate is refused: {what}") from None
            if failed >= ATTEMPTS:
                raise SourceUnreachable(file.source_uri, f"{file.name}: {what}, {failed} times in a row") from None
            after = error.after if isinstance(error, _Again) else 0.0
            longest = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2**failed)
            _log.info("%s of %s: %s; trying again", file.name, shown(file.source_uri), what)
            await asyncio.sleep(max(after, random.uniform(longest / 2, longest)))


def _check(file: RemoteFile, response: Response, *wanted: int) -> None:
    """Raises what a status means, when it is not wanted."""
    status = response.status
    if status in wanted:
        return
    if status in (401, 403):
        raise SourceForbidden(file.source_uri)
    if status in (404, 410):
        raise SourceNotFound(file.source_uri, f"there is no {file.name}")
    if status == 412:
        raise SourceMoved(file.source_uri)
    if status in (408, 425, 429) or status >= 500:
        after = response.headers.get("retry-after", "")
        seconds = min(float(after), LONGEST_DELAY_SECONDS) if after.isdecimal() else 0.0
        raise _Again(f"the source answers {status}", seconds)
    raise SourceUnreachable(file.source_uri, f"the source answers {status} for {file.name}")


def _words(error: Exception) -> str:
    if isinstance(error, httpcore2.TimeoutException):
        return "the source does not answer in time"
    return shown(error) if isinstance(error, _Again | httpcore2.ConnectError) else "the connection broke"


def strong_etag(headers: Mapping[str, str]) -> str:
    """The ETag when equal ones mean equal bytes, else ""."""
    etag = headers.get("etag", "")
    return etag if re.fullmatch(r'"[\x21\x23-\x7e]{1,256}"', etag) else ""
