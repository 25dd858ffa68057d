"""Stop strings: finds the first one in a growing text, and holds back what may become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class StopStrings:
    """The stop strings of a request, with what looking for them needs."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.beginnings = frozenset(stop[:length] for stop in stops for length in range(1, len(stop)))
        self.longest = max((len(stop) for stop in stops), default=0)


@dataclass(frozen=True, slots=True)
class Scanned:
    """Text that may be shown, and the stop string that ends it, if any."""

    text: str
    match: str | None = None


class StopScanner:
    """Looks for stop strings in text that comes in pieces; the result does not depend on where the pieces are cut.

    The stop string that is complete first wins; of those that are complete at the same place, the longest.
    """

    def __init__(self, strings: StopStrings, include_stop: bool) -> None:
        self._strings = strings
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str, armed: bool = True) -> Scanned:
        """Adds text. While not armed nothing matches, and what is complete by then never will."""
        start = len(self._held)
        text = self._held + text
        found = self._first(text, complete_after=start) if armed else None
        if found is not None:
            self._held = ""
            begin, end = found
            return Scanned(text[: end if self._include_stop else begin], text[begin:end])
        keep = self._could_begin(text)
        self._held = text[len(text) - keep :]
        return Scanned(text[: len(text) - keep])

    def finish(self) -> str:
        """Returns what was held back; no text follows."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str, complete_after: int) -> tuple[int, int] | None:
        """Begin and end of the first stop string that ends beyond `complete_after`."""
        found: list[tuple[int, int]] = []
        for stop in self._strings.stops:
            begin = text.find(stop, max(0, complete_after - len(stop) + 1))
            if begin >= 0:
                found.append((begin + len(stop), begin))
        if not found:
            return None
        end, begin = min(found)
        return begin, end

    def _could_begin(self, text: str) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        for length in range(min(self._strings.longest - 1, len(text)), 0, -1):
            if text[len(text) - length :] in self._strings.beginnings:
                return length
        return 0
