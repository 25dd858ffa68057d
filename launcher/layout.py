"""Where things lie on this machine: the data folder with its lock, the runtime folder with its sockets, the host tier."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import CannotStart

# An instance that was killed takes a moment to disappear with all its services.
PATIENCE_WITH_THE_DEAD = 10.0
# Addresses are URIs for gRPC and Redis: nothing that would have to be quoted.
_PLAIN = re.compile(r"[A-Za-z0-9_./+-]+")
_LONGEST_SOCKET = "engine-99.sock"


@dataclass(frozen=True)
class Layout:
    """Folders of one instance.

    Attributes:
        lock: descriptor whose lock keeps a second instance away. Services inherit it, so that the folder counts as
            used until the last of them is gone.
        runtime: sockets, for this user alone.
        own_runtime: whether the runtime folder is outside the data folder and goes away with the instance.
    """

    data_dir: Path
    lock: int
    runtime: Path
    own_runtime: bool
    host_tier: Path

    @property
    def store(self) -> Path:
        """Folder of the embedded store."""
        return self.data_dir / "store"

    @property
    def cache(self) -> Path:
        """Folder of the disk tier."""
        return self.data_dir / "cache"

    def log(self, service: str) -> Path:
        """Log file of a service."""
        return self.data_dir / "logs" / f"{service}.log"

    def socket(self, service: str) -> Path:
        """Socket of a service."""
        return self.runtime / f"{service}.sock"

    def close(self) -> None:
        """Removes the sockets and gives the lock back."""
        for path in self.runtime.glob("*.sock"):
            path.unlink(missing_ok=True)
        if self.own_runtime:
            shutil.rmtree(self.runtime, ignore_errors=True)
        os.close(self.lock)


def open_layout(data_dir: Path) -> Layout:
    """Makes the folders and takes the lock; raises CannotStart when they cannot be had."""
    try:
        for folder in (data_dir, data_dir / "logs", data_dir / "store", data_dir / "cache"):
            folder.mkdir(parents=True, exist_ok=True)
        resolved = data_dir.resolve()
        lock = os.open(resolved / "instance.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CannotStart(f"the data folder {data_dir} cannot be used: {error.strerror}") from None
    _take(lock, data_dir)
    try:
        host_tier = _make_private(host_tier_of(resolved))
        runtime = resolved / "run"
        own_runtime = not _holds_sockets(runtime)
        if own_runtime:
            runtime = Path(tempfile.mkdtemp(prefix="loraplex-", dir="/tmp"))
    except BaseException:
        os.close(lock)
        raise
    return Layout(resolved, lock, runtime, own_runtime, host_tier)


def _take(lock: int, data_dir: Path) -> None:
    """Locks the file and writes our process id into it."""
    deadline = time.monotonic() + PATIENCE_WITH_THE_DEAD
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            owner = os.pread(lock, 20, 0).decode("ascii", "replace").strip()
            if _alive(owner) or time.monotonic() > deadline:
                os.close(lock)
                raise CannotStart(
                    f"the data folder {data_dir} is used by another instance (process {owner or 'unknown'}); "
                    "choose another with --data-dir"
                ) from None
            time.sleep(0.05)
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)


def _alive(process_id: str) -> bool:
    try:
        os.kill(int(process_id), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _holds_sockets(folder: Path) -> bool:
    """Whether a folder of our own can hold sockets: paths of sockets are short, and not every file system has them."""
    if not _PLAIN.fullmatch(str(folder)):
        return False
    probe = folder / _LONGEST_SOCKET
    try:
        folder.mkdir(exist_ok=True)
        folder.chmod(0o700)
        probe.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(probe))
        probe.unlink()
    except OSError:
        return False
    return True


def host_tier_of(data_dir: Path) -> Path:
    """A folder in shared memory that a second start on the same data finds again."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        return data_dir / "host"
    name = hashlib.sha256(f"{os.getuid()}:{data_dir}".encode()).hexdigest()[:12]
    return shared / f"loraplex-{name}"


def _make_private(folder: Path) -> Path:
    """Makes a folder for this user alone: everyone may write to shared memory, and what lies here goes into the model."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise CannotStart(f"the host tier {folder} cannot be used: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise CannotStart(f"the host tier {folder} is not a folder that only this user can write to")
    return folder
