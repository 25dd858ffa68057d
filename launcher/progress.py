"""What `loraplex up` shows while it starts: one line per event, and on a terminal also what is being waited for."""

from __future__ import annotations

import time
from typing import TextIO

_NAME_WIDTH = 10
_CLEAR = "\r\x1b[K"


class Progress:
    """Lines with the seconds since the start. A closed terminal is no reason to stop serving."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._began = time.monotonic()
        self._waiting: dict[str, float] = {}

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    def starting(self, name: str) -> None:
        """A service has been started."""
        self._waiting[name] = time.monotonic()
        if self._live:
            self.tick()
        else:
            self.line(f"{name:{_NAME_WIDTH}} starting")

    def ready(self, name: str, detail: str = "") -> None:
        """A service answers."""
        took = time.monotonic() - self._waiting.pop(name, self._began)
        self.line(f"{name:{_NAME_WIDTH}} ready after {took:.1f} s{detail and f'  {detail}'}")

    def gone(self, name: str) -> None:
        """A service is not waited for any more."""
        self._waiting.pop(name, None)

    def line(self, text: str) -> None:
        """A line that stays."""
        self._write(f"{_CLEAR if self._live else ''}{self.elapsed:6.1f} s  {text}\n")
        self.tick()

    def tick(self) -> None:
        """On a terminal, shows what is being waited for."""
        if self._live and self._waiting:
            now = time.monotonic()
            waiting = ", ".join(f"{name} ({now - since:.0f} s)" for name, since in self._waiting.items())
            self._write(f"{_CLEAR}{self.elapsed:6.1f} s  waiting for {waiting}")

    def clear(self) -> None:
        """Takes the line of what is being waited for away."""
        self._waiting.clear()
        if self._live:
            self._write(_CLEAR)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._live = False
