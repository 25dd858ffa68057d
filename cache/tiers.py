"""The DISK and HOST tiers: packed artifacts as files, written whole or not at all.

A file gets its name only after its content and its checksum are safe, so a name found is a file complete. Blocks; call it
off the event loop. Any number of threads may use a tier; room is reserved before it is written to.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import stat
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, NamedTuple

from cache.errors import ArtifactDamaged, TierFailed, TierFull
from servicekit.errors import StartupError

_log = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
_CHECKSUM = ".sha256"
_UNFINISHED = ".unfinished"
_CHUNK = 4 * 1024 * 1024


class ArtifactKey(NamedTuple):
    """One version in one number type: one file in a tier."""

    digest: str
    dtype: str

    @property
    def name(self) -> str:
        """Name of its file, without the suffix."""
        return f"{self.digest}.{self.dtype}"

    @staticmethod
    def of(name: str) -> ArtifactKey:
        """The artifact of a name."""
        digest, _, dtype = name.partition(".")
        return ArtifactKey(digest, dtype)


class FileTier:
    """A folder of artifacts with a budget.

    Attributes:
        name: "disk" or "host", for messages.
    """

    def __init__(self, name: str, folder: Path, budget_bytes: int) -> None:
        self.name = name
        self.folder = folder
        self.budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._held: dict[ArtifactKey, int] = {}
        self._own_folder()

    def path(self, key: ArtifactKey) -> Path:
        """Where an artifact is, or would be."""
        return self.folder / f"{key.name}{_SUFFIX}"

    def sizes(self) -> dict[ArtifactKey, int]:
        """Bytes of each complete artifact; for the start, before anything is written.

        Removes everything else: what was left half-written, and what is not ours.
        """
        found: dict[ArtifactKey, int] = {}
        names = {path.name for path in self.folder.iterdir()}
        for name in sorted(names):
            key = ArtifactKey.of(name.removesuffix(_SUFFIX))
            if name.endswith(_SUFFIX) and all(key) and name + _CHECKSUM in names:
                found[key] = (self.folder / name).stat().st_size
        ours = {self.path(key).name + suffix for key in found for suffix in ("", _CHECKSUM)}
        for name in names - ours:
            with suppress(OSError):
                (self.folder / name).unlink()
        with self._lock:
            self._held = dict(found)
        return found

    def write(self, key: ArtifactKey, content: bytes) -> int:
        """Stores an artifact; returns its bytes.

        Raises:
            TierFull: there is no room, by budget or by the file system.
            TierFailed: the file system has another trouble.
        """
        path = self.path(key)
        if self._complete(path):
            return path.stat().st_size
        with self._room_for(key, len(content)):
            self._write_whole(path, len(content), lambda file: _written(file, content))
        return len(content)

    def copy_from(self, other: FileTier, key: ArtifactKey) -> int:
        """Copies an artifact from another tier, checking its checksum on the way; returns its bytes.

        Raises:
            ArtifactDamaged: the other tier's file is damaged or gone; what was left of it has been removed.
            TierFull: there is no room here.
            TierFailed: the file system has another trouble.
        """
        path, source = self.path(key), other.path(key)
        if self._complete(path):
            return path.stat().st_size
        try:
            expected = _checksum_file(source).read_text()
            with source.open("rb") as reader, self._room_for(key, size := os.fstat(reader.fileno()).st_size):
                self._write_whole(path, size, lambda file: _copied(file, reader, expected))
        except (FileNotFoundError, _WrongChecksum):
            other.remove(key)
            raise ArtifactDamaged(source.name, other.name) from None
        return size

    def reserve(self, key: ArtifactKey, needed: int) -> None:
        """Takes the room of an artifact that will be written now, so that writers together stay within the budget.

        Writing it takes no more, and gives it back when it fails. Raises TierFull; takes nothing then.
        """
        with self._lock:
            free = self.budget_bytes - sum(size for other, size in self._held.items() if other != key)
            if needed > free:
                raise TierFull(self.name, needed, max(0, free))
            self._held[key] = needed

    def receive(self, key: ArtifactKey, size: int, checksum: str) -> Incoming:
        """Makes room for an artifact that comes in pieces; see Incoming. Raises TierFull or TierFailed."""
        room = ExitStack()
        room.enter_context(self._room_for(key, size))
        try:
            return Incoming(self, self.path(key), size, checksum, room)
        except OSError as error:
            failure = self.failure(error, self.path(key), size)
            room.__exit__(type(failure), failure, None)
            raise failure from None

    def open(self, key: ArtifactKey) -> tuple[BufferedReader, int, str] | None:
        """An artifact to be read, its bytes and its checksum; None when it is not here. It stays whole when it is removed."""
        path = self.path(key)
        try:
            checksum = _checksum_file(path).read_text()
            file = path.open("rb")
        except FileNotFoundError:
            return None
        return file, os.fstat(file.fileno()).st_size, checksum

    def verify(self, key: ArtifactKey) -> bool:
        """Whether an artifact is what was written; reads all of it."""
        found = self.open(key)
        if found is None:
            return False
        file, _, expected = found
        with file:
            return hashlib.file_digest(file, "sha256").hexdigest() == expected

    def remove(self, key: ArtifactKey) -> None:
        """Removes an artifact. An engine that has mapped it keeps its mapping."""
        path = self.path(key)
        path.unlink(missing_ok=True)
        _checksum_file(path).unlink(missing_ok=True)
        with self._lock:
            self._held.pop(key, None)

    def _own_folder(self) -> None:
        """Makes the folder, and insists that it is ours alone: /dev/shm is everybody's."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            status = self.folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                raise StartupError(f"the folder {self.folder} of the {self.name} tier is not a folder of this user")
            self.folder.chmod(0o700)
        except OSError as error:
            raise StartupError(
                f"the folder {self.folder} of the {self.name} tier cannot be used: {error.strerror}"
            ) from None
        if not os.access(self.folder, os.W_OK):
            raise StartupError(f"the folder {self.folder} of the {self.name} tier is not writable")

    @property
    def free_bytes(self) -> int:
        """What is left of the budget."""
        with self._lock:
            return max(0, self.budget_bytes - sum(self._held.values()))

    @contextmanager
    def _room_for(self, key: ArtifactKey, needed: int) -> Iterator[None]:
        """Takes the room before the artifact is written; gives it back when that fails."""
        self.reserve(key, needed)
        try:
            yield
        except BaseException:
            with self._lock:
                self._held.pop(key, None)
            raise

    def _write_whole(self, path: Path, size: int, write: Callable[[BinaryIO], str]) -> None:
        """Has a file written beside its place, and publishes it there together with the checksum that `write` returns."""
        unfinished = _beside(path)
        try:
            with unfinished.open("wb") as file:
                checksum = write(file)
                _synced(file)
            self.publish(unfinished, path, checksum)
        except OSError as error:
            raise self.failure(error, path, size) from None
        finally:
            unfinished.unlink(missing_ok=True)

    def publish(self, unfinished: Path, path: Path, checksum: str) -> None:
        """Gives a synced file its name, and its checksum beside it. Raises OSError."""
        unfinished_sum = _beside(path)
        try:
            with unfinished_sum.open("wb") as file:
                file.write(checksum.encode())
                _synced(file)
            # The checksum first: an artifact without one is thrown away at the next start.
            os.replace(unfinished_sum, _checksum_file(path))
            os.replace(unfinished, path)
            self._sync_folder()
        finally:
            unfinished_sum.unlink(missing_ok=True)

    def _sync_folder(self) -> None:
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def _complete(self, path: Path) -> bool:
        return path.is_file() and _checksum_file(path).is_file()

    def failure(self, error: OSError, path: Path, needed: int) -> TierFull | TierFailed:
        """What a trouble of the file system means."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return TierFull(self.name, needed, shutil.disk_usage(self.folder).free)
        _log.error("writing %s to the %s tier failed", path, self.name, exc_info=error)
        return TierFailed(self.name, error.strerror or type(error).__name__)


class Incoming:
    """An artifact that comes in pieces: it is in the tier once it is finished, and leaves nothing when it is not. Blocks."""

    def __init__(self, tier: FileTier, path: Path, size: int, checksum: str, room: ExitStack) -> None:
        self._tier, self._path, self._size, self._checksum, self._room = tier, path, size, checksum, room
        self._unfinished = _beside(path)
        self._file = self._unfinished.open("wb")
        self._total = hashlib.sha256()
        self._received, self._done = 0, False

    def add(self, content: bytes) -> None:
        """Takes the next piece; what is more than was announced is counted and not kept. Raises TierFull or TierFailed."""
        self._received += len(content)
        if self._received <= self._size:
            self._total.update(content)
            with self._failing():
                self._file.write(content)

    def finish(self) -> bool:
        """Puts the artifact into the tier; False when it is not what was announced. Raises TierFull or TierFailed."""
        if self._received != self._size or self._total.hexdigest() != self._checksum:
            return False
        with self._failing():
            _synced(self._file)
            self._tier.publish(self._unfinished, self._path, self._checksum)
        self._done = True
        return True

    def close(self) -> None:
        """Gives everything back that was taken, unless it is finished."""
        self._file.close()
        self._unfinished.unlink(missing_ok=True)
        abandoned = None if self._done else _Abandoned()
        with suppress(_Abandoned), self._room:
            if abandoned is not None:
                raise abandoned

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._tier.failure(error, self._path, self._size) from None


class _Abandoned(Exception):
    """An artifact that came in pieces was not finished."""


class _WrongChecksum(Exception):
    """The content read is not what was written."""


def _beside(path: Path) -> Path:
    """A name for a file that is not finished."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}{_UNFINISHED}")


def _checksum_file(path: Path) -> Path:
    return path.with_name(path.name + _CHECKSUM)


def _written(file: BinaryIO, content: bytes) -> str:
    file.write(content)
    return hashlib.sha256(content).hexdigest()


def _copied(file: BinaryIO, reader: BinaryIO, expected: str) -> str:
    total = hashlib.sha256()
    while chunk := reader.read(_CHUNK):
        total.update(chunk)
        file.write(chunk)
    if total.hexdigest() != expected:
        raise _WrongChecksum
    return expected


def _synced(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
