"""file:// sources: folders under an allowed root.

A path is resolved, symlinks and all, before it is compared with the roots; then every component is opened again from the root
down without following symlinks. So what was checked is what is read, also when someone swaps a part of it meanwhile. Symlinks
that stay under the roots are fine: a Hugging Face cache is made of them.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

from cache.artifact import AdapterFiles
from cache.errors import MalformedAdapter, SourceNotFound, SourceTooSlow, shown
from cache.sources.source import PICKLES, Credentials, Limits, adapter_files, too_large
from servicekit.errors import InvalidField


class FileSource:
    """Reads adapters from folders under the roots given, in threads of its own: a file system may hang for ever."""

    def __init__(self, roots: Sequence[Path], max_weights_bytes: int, limits: Limits | None = None) -> None:
        self._roots = tuple(root.resolve() for root in roots)
        self._limits = replace(limits or Limits(), weights_bytes=max_weights_bytes)
        self._threads = ThreadPoolExecutor(self._limits.at_once, thread_name_prefix="file-source")

    async def look(self, source_uri: str, credentials: Credentials, revision: str = "") -> str:
        """Nothing to ask: the roots are open to every caller, and a folder has no revision; see Source.look."""
        return ""

    async def fetch(self, source_uri: str, revision: str, credentials: Credentials) -> AdapterFiles:
        """The adapter's files as they are now; see Source.fetch."""
        reading = asyncio.get_running_loop().run_in_executor(self._threads, self.read, source_uri)
        try:
            return await asyncio.wait_for(reading, self._limits.total_seconds)
        except TimeoutError:
            raise SourceTooSlow(source_uri, self._limits.total_seconds) from None

    async def close(self) -> None:
        """Waits for nobody: a thread may hang in its file system."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def read(self, source_uri: str) -> AdapterFiles:
        """The files of the adapter folder a file:// URI names. Blocks."""
        folder = self._checked_folder(source_uri)
        found = {name: self._file(folder, name, limit) for name, limit in self._limits.files.items()}
        held = {name: content for name, content in found.items() if content is not None}
        return adapter_files(held, _pickle_of(folder))

    def _checked_folder(self, source_uri: str) -> Path:
        path = unquote(source_uri.removeprefix("file://"))
        if not path.startswith("/") or "\0" in path:
            raise InvalidField("source_uri", "must be file:///absolute/path, without a host", "MALFORMED_URI")
        try:
            folder = Path(path).resolve()
            # The roots are checked before anything is said about what exists outside of them.
            if self._root_of(folder) is None:
                raise self._outside(source_uri)
            if not folder.exists():
                raise SourceNotFound(source_uri, f"there is no folder {shown(path)}")
            if not folder.is_dir():
                raise InvalidField("source_uri", f"{shown(path)} is not a folder", "NOT_A_FOLDER")
        except (OSError, RuntimeError) as error:
            message = f"{shown(path)} cannot be read ({_why(error)})"
            raise InvalidField("source_uri", message, "UNREADABLE") from None
        return folder

    def _root_of(self, path: Path) -> Path | None:
        return next((root for root in self._roots if path.is_relative_to(root)), None)

    def _outside(self, source_uri: str) -> InvalidField:
        roots = ", ".join(map(str, self._roots)) or "none is configured"
        return InvalidField(
            "source_uri",
            f"is not under an allowed root, symlinks resolved (roots: {roots})",
            "OUTSIDE_ROOTS",
            source_uri=shown(source_uri),
        )

    def _file(self, folder: Path, name: str, limit: int) -> bytes | None:
        """Content of a regular file of the folder; None when there is no such file."""
        try:
            path = (folder / name).resolve(strict=True)
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError) as error:
            raise MalformedAdapter(name, f"cannot be read ({_why(error)})", "UNREADABLE_FILE") from None
        root = self._root_of(path)
        if root is None:
            raise MalformedAdapter(name, "is a symbolic link out of the allowed roots", "OUTSIDE_ROOTS")
        try:
            handle = _open_beneath(root, path.relative_to(root).parts)
        except OSError as error:
            message = f"cannot be read, or changed meanwhile ({_why(error)})"
            raise MalformedAdapter(name, message, "UNREADABLE_FILE") from None
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise MalformedAdapter(name, "is not a regular file", "NOT_A_FILE")
            # The size is looked at before anything is read, and reading stops at the limit if the file grows.
            content = file.read(limit + 1) if status.st_size <= limit else b""
        if max(status.st_size, len(content)) > limit:
            raise too_large(name, max(status.st_size, len(content)), limit)
        return content


def _open_beneath(root: Path, parts: Sequence[str]) -> int:
    """Opens a file by the names that lead to it, none of which may be a symbolic link. Raises OSError."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = inner
        # O_NONBLOCK: opening a fifo must not wait for its writer.
        return os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    finally:
        os.close(folder)


def _pickle_of(folder: Path) -> str:
    """Name of a file that holds the weights as a pickle; "" when there is none."""
    return next((name for name in PICKLES if os.path.lexists(folder / name)), "")


def _why(error: Exception) -> str:
    return error.strerror or "" if isinstance(error, OSError) else "it leads in a circle"
