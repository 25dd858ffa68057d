"""The DISK and HOST tiers: packed artifacts as files, written whole or not at all.

A file gets its name only after its content and its checksum are safe, so a name found is a file complete. Blocks; call it
off the event loop.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from cache.errors import TierFull
from servicekit.errors import Internal, StartupError

_log = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
_CHECKSUM = ".sha256"
_UNFINISHED = ".unfinished"
_CHUNK = 4 * 1024 * 1024


class ChecksumWrong(Internal):
    """Raised when a file's content is not what was written; the file has been removed."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path.name} was damaged on disk and removed", "CHECKSUM_WRONG", file=path.name)


class FileTier:
    """A folder of artifacts with a budget.

    Attributes:
        name: "disk" or "host", for messages.
    """

    def __init__(self, name: str, folder: Path, budget_bytes: int) -> None:
        self.name = name
        self.folder = folder
        self.budget_bytes = budget_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StartupError(f"the folder {folder} of the {name} tier cannot be made: {error.strerror}") from None
        if not os.access(folder, os.W_OK):
            raise StartupError(f"the folder {folder} of the {name} tier is not writable")

    def path(self, digest: str, dtype: str) -> Path:
        """Where the artifact of a version in a number type is."""
        return self.folder / f"{digest}.{dtype}{_SUFFIX}"

    def sizes(self) -> dict[str, int]:
        """File name of each complete artifact -> bytes; removes what was left half-written."""
        found: dict[str, int] = {}
        for path in self.folder.iterdir():
            if path.name.endswith(_UNFINISHED):
                path.unlink(missing_ok=True)
            elif path.name.endswith(_SUFFIX):
                if path.with_name(path.name + _CHECKSUM).is_file():
                    found[path.name] = path.stat().st_size
                else:
                    path.unlink(missing_ok=True)
        for path in self.folder.glob(f"*{_CHECKSUM}"):
            if path.name.removesuffix(_CHECKSUM) not in found:
                path.unlink(missing_ok=True)
        return found

    def write(self, digest: str, dtype: str, content: bytes) -> int:
        """Stores an artifact; returns its bytes.

        Raises:
            TierFull: there is no room, by budget or by the file system.
        """
        path = self.path(digest, dtype)
        if self._complete(path):
            return path.stat().st_size
        self._check_room(len(content))
        checksum = hashlib.sha256(content).hexdigest()
        unfinished = self._unfinished(path)
        try:
            with unfinished.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise self._failure(error, len(content)) from None
        self._publish(unfinished, path, checksum)
        return len(content)

    def copy_from(self, other: FileTier, digest: str, dtype: str) -> int:
        """Copies an artifact from another tier, checking its checksum on the way; returns its bytes.

        Raises:
            ChecksumWrong: the other tier's file is damaged; it has been removed there.
            TierFull: there is no room here.
        """
        path, source = self.path(digest, dtype), other.path(digest, dtype)
        if self._complete(path):
            return path.stat().st_size
        size = source.stat().st_size
        self._check_room(size)
        expected = source.with_name(source.name + _CHECKSUM).read_text()
        unfinished, total = self._unfinished(path), hashlib.sha256()
        try:
            with source.open("rb") as reader, unfinished.open("wb") as writer:
                while chunk := reader.read(_CHUNK):
                    total.update(chunk)
                    writer.write(chunk)
                writer.flush()
                os.fsync(writer.fileno())
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise self._failure(error, size) from None
        if total.hexdigest() != expected:
            unfinished.unlink(missing_ok=True)
            other.remove(digest, dtype)
            raise ChecksumWrong(source)
        self._publish(unfinished, path, expected)
        return size

    def remove(self, digest: str, dtype: str) -> None:
        """Removes an artifact. An engine that has mapped it keeps its mapping."""
        path = self.path(digest, dtype)
        path.unlink(missing_ok=True)
        path.with_name(path.name + _CHECKSUM).unlink(missing_ok=True)

    def _complete(self, path: Path) -> bool:
        return path.is_file() and path.with_name(path.name + _CHECKSUM).is_file()

    def _unfinished(self, path: Path) -> Path:
        return path.with_name(f"{path.name}.{uuid.uuid4().hex}{_UNFINISHED}")

    def _publish(self, unfinished: Path, path: Path, checksum: str) -> None:
        # The checksum first: an artifact without one is thrown away at the next start.
        path.with_name(path.name + _CHECKSUM).write_text(checksum)
        os.replace(unfinished, path)
        with suppress(OSError):
            handle = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def _check_room(self, needed: int) -> None:
        used = sum(path.stat().st_size for path in self.folder.glob(f"*{_SUFFIX}"))
        free = min(self.budget_bytes - used, shutil.disk_usage(self.folder).free)
        if needed > free:
            raise TierFull(self.name, needed, max(0, free))

    def _failure(self, error: OSError, needed: int) -> TierFull:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            _log.error("writing to %s failed", self.folder, exc_info=error)
        return TierFull(self.name, needed, shutil.disk_usage(self.folder).free)
