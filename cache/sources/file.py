"""file:// sources: folders under an allowed root.

A path is resolved, symlinks and all, before it is compared with the roots; then every component is opened again from the root
down without following symlinks. So what was checked is what is read, also when someone swaps a part of it meanwhile. Symlinks
that stay under the roots are fine: a Hugging Face cache is made of them.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

from cache.artifact import WEIGHTS, AdapterFiles
from cache.errors import MalformedAdapter, SourceNotFound, shown
from cache.peft_config import FILE as CONFIG
from cache.sources.source import MAX_CONFIG_BYTES, MAX_TEMPLATE_BYTES, MAX_TOKENIZER_CONFIG_BYTES
from servicekit.errors import InvalidField

PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")


class FileSource:
    """Reads adapters from folders under the roots given."""

    def __init__(self, roots: Sequence[Path], max_weights_bytes: int) -> None:
        self._roots = tuple(root.resolve() for root in roots)
        self._max_weights_bytes = max_weights_bytes

    def read(self, source_uri: str) -> AdapterFiles:
        """The files of the adapter folder a file:// URI names; see Source.read."""
        folder = self._checked_folder(source_uri)
        config = self._file(folder, CONFIG, MAX_CONFIG_BYTES)
        if config is None:
            raise MalformedAdapter(CONFIG, "is missing", "MISSING_FILE")
        weights = self._file(folder, WEIGHTS, self._max_weights_bytes)
        if weights is None:
            raise _no_weights(folder)
        return AdapterFiles(config, weights, self._chat_template(folder))

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
            size = max(status.st_size, len(content))
            message = f"has {size} bytes, the limit is {limit}"
            raise MalformedAdapter(name, message, "FILE_TOO_LARGE", size_bytes=size, limit=limit)
        return content

    def _chat_template(self, folder: Path) -> str:
        """The adapter's own chat template; empty when it has none."""
        name = "chat_template.jinja"
        raw = self._file(folder, name, MAX_TEMPLATE_BYTES)
        if raw is not None:
            with _malformed(name):
                return raw.decode()
        name = "tokenizer_config.json"
        raw = self._file(folder, name, MAX_TOKENIZER_CONFIG_BYTES)
        if raw is None:
            return ""
        with _malformed(name):
            fields = json.loads(raw)
            template = fields.get("chat_template") or "" if isinstance(fields, dict) else None
            # A lone surrogate cannot be encoded, and so not be sent to anyone either.
            if isinstance(template, str) and len(template.encode()) <= MAX_TEMPLATE_BYTES:
                return template
        message = f"chat_template is not one text of at most {MAX_TEMPLATE_BYTES} bytes"
        raise MalformedAdapter(name, message, "MALFORMED_TEMPLATE", limit=MAX_TEMPLATE_BYTES)


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


def _no_weights(folder: Path) -> MalformedAdapter:
    for name in PICKLES:
        if os.path.lexists(folder / name):
            message = f"is a pickle, which is never loaded; save the adapter as {WEIGHTS}"
            return MalformedAdapter(name, message, "PICKLE_REFUSED")
    return MalformedAdapter(WEIGHTS, "is missing", "MISSING_FILE")


@contextmanager
def _malformed(name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError):
        raise MalformedAdapter(name, "is not what it should be: text, or a JSON object", "MALFORMED_TEMPLATE") from None


def _why(error: Exception) -> str:
    return error.strerror or "" if isinstance(error, OSError) else "it leads in a circle"
