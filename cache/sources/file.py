"""file:// sources: folders under an allowed root.

A path is resolved, symlinks and all, before it is compared with the roots, and every file is opened relative to the folder
that was checked, without following a last symlink: what was checked is what is read, also when someone swaps it meanwhile.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

from cache.artifact import WEIGHTS, AdapterFiles
from cache.errors import MalformedAdapter, SourceNotFound
from cache.peft_config import FILE as CONFIG
from cache.sources.source import MAX_CONFIG_BYTES, MAX_TEMPLATE_BYTES
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
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if Path(os.readlink(f"/proc/self/fd/{handle}")) != folder:
                raise self._outside(source_uri)
            config = self._file(handle, CONFIG, MAX_CONFIG_BYTES)
            if config is None:
                raise MalformedAdapter(CONFIG, "is missing", "MISSING_FILE")
            weights = self._file(handle, WEIGHTS, self._max_weights_bytes)
            if weights is None:
                raise self._no_weights(handle)
            return AdapterFiles(config, weights, self._chat_template(handle))
        finally:
            os.close(handle)

    def _checked_folder(self, source_uri: str) -> Path:
        path = unquote(source_uri.removeprefix("file://"))
        if not path.startswith("/") or "\0" in path:
            raise InvalidField("source_uri", "must be file:///absolute/path, without a host", "MALFORMED_URI")
        try:
            folder = Path(path).resolve()
            inside = any(folder.is_relative_to(root) for root in self._roots)
            # The roots are checked before anything is said about what exists outside of them.
            if not inside:
                raise self._outside(source_uri)
            if not folder.exists():
                raise SourceNotFound(source_uri, f"there is no folder {path}")
            if not folder.is_dir():
                raise InvalidField("source_uri", f"{path} is not a folder", "NOT_A_FOLDER")
        except (OSError, RuntimeError) as error:
            raise InvalidField("source_uri", f"{path} cannot be read ({error})", "UNREADABLE") from None
        return folder

    def _outside(self, source_uri: str) -> InvalidField:
        roots = ", ".join(map(str, self._roots)) or "none is configured"
        return InvalidField(
            "source_uri",
            f"is not under an allowed root, symlinks resolved (roots: {roots})",
            "OUTSIDE_ROOTS",
            source_uri=source_uri,
        )

    def _file(self, folder: int, name: str, limit: int) -> bytes | None:
        """Content of a regular file of the folder; None when there is no such file."""
        try:
            # O_NONBLOCK: opening a fifo must not wait for its writer.
            handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except FileNotFoundError:
            return None
        except OSError:
            raise MalformedAdapter(name, "cannot be opened, or is a symbolic link", "UNREADABLE_FILE") from None
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise MalformedAdapter(name, "is not a regular file", "NOT_A_FILE")
            if status.st_size > limit:
                message = f"has {status.st_size} bytes, the limit is {limit}"
                raise MalformedAdapter(name, message, "FILE_TOO_LARGE", size_bytes=status.st_size, limit=limit)
            content = file.read(limit + 1)
        if len(content) > limit:
            raise MalformedAdapter(name, f"has more than {limit} bytes", "FILE_TOO_LARGE", limit=limit)
        return content

    def _no_weights(self, folder: int) -> MalformedAdapter:
        for name in PICKLES:
            with suppress(OSError):
                os.stat(name, dir_fd=folder, follow_symlinks=False)
                return MalformedAdapter(
                    name, f"is a pickle, which is never loaded; save the adapter as {WEIGHTS}", "PICKLE_REFUSED"
                )
        return MalformedAdapter(WEIGHTS, "is missing", "MISSING_FILE")

    def _chat_template(self, folder: int) -> str:
        raw = self._file(folder, "chat_template.jinja", MAX_TEMPLATE_BYTES)
        if raw is not None:
            try:
                return raw.decode()
            except UnicodeDecodeError:
                raise MalformedAdapter("chat_template.jinja", "is not UTF-8", "MALFORMED_TEMPLATE") from None
        raw = self._file(folder, "tokenizer_config.json", MAX_CONFIG_BYTES)
        if raw is None:
            return ""
        try:
            template = json.loads(raw).get("chat_template") or ""
        except (ValueError, AttributeError, RecursionError):
            raise MalformedAdapter("tokenizer_config.json", "is not a JSON object", "MALFORMED_CONFIG") from None
        if not isinstance(template, str) or len(template.encode()) > MAX_TEMPLATE_BYTES:
            message = f"chat_template is not one text of at most {MAX_TEMPLATE_BYTES} bytes"
            raise MalformedAdapter("tokenizer_config.json", message, "MALFORMED_TEMPLATE")
        return template
