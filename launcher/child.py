"""One child process: started bound to our life, its output in its log, its last words for people."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from launcher import bound
from launcher.errors import CannotStart
from launcher.plan import Service

# Enough of a log for a traceback with a long message.
_TAIL_BYTES = 16 * 1024
_MARK = "cannot start: "


class Child:
    """A service's process, or the one it had."""

    def __init__(self, service: Service, log: Path, lock: int) -> None:
        self.service = service
        self.log = log
        self._lock = lock
        self._log_start = 0
        self._process: asyncio.subprocess.Process | None = None
        # What is in the log of an earlier start would only confuse; one is kept.
        if log.exists():
            log.replace(log.with_suffix(".log.1"))

    async def start(self) -> None:
        """Starts the process; raises CannotStart when there is no such program."""
        service = self.service
        shim = (sys.executable, "-I", "-S", bound.__file__, str(os.getpid()), str(int(service.orphan_signal)))
        service.forget()
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *shim,
                    *service.command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **service.environ},
                    pass_fds=(self._lock,),
                    # Ctrl-C is for us: we stop the services one after the other.
                    start_new_session=True,
                )
            except OSError as error:
                raise CannotStart(f"{service.name}: {error.strerror}") from None

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None and self._process.returncode is None

    async def ended(self) -> int:
        """Waits for the end of the process; returns its exit code, negative for a signal."""
        return await self._process.wait() if self._process else 0

    def kill(self) -> None:
        """Ends it at once."""
        self._send(signal.SIGKILL)

    async def stop(self, patience: float) -> bool:
        """Asks it to end; after `patience` seconds ends it. Returns whether it ended by itself."""
        self._send(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.ended(), patience)
        except TimeoutError:
            self.kill()
            await self.ended()
            return False
        return True

    def last_words(self) -> str:
        """Why it says it died: its "cannot start" line, else the last line of its log."""
        with self.log.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, end - _TAIL_BYTES))
            lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        for line in reversed(lines):
            if _MARK in line:
                return line.partition(_MARK)[2]
        return lines[-1] if lines else "it said nothing"

    def _send(self, number: signal.Signals) -> None:
        if self._process and self.running:
            try:
                self._process.send_signal(number)
            except ProcessLookupError:
                return
