"""When the step that runs is given up for a sequence that is urgent. PURE.

Where a step takes a tenth of a second, most of what somebody waits for a first token beside a busy engine is the step
that happens to run. It can be given up between two layers: nothing of it has been told, and to compute it again writes
the same keys and values to the same places. What it had done is lost, though. So of the time of all steps no more than
a share is lost; a step that has come far is finished; and one with an urgent prompt in it is never given up.
"""

from __future__ import annotations

from collections.abc import Callable

# Of the time spent in steps, what may be lost; and how many seconds of that can be saved up for a rush.
SHARE = 0.04
MOST_SAVED = 0.5

# Done to this part, a step is finished.
FAR = 0.6


# Asked with the part of a pass that is done, from 0 to 1: whether it is given up.
Stop = Callable[[float], bool]


def never(_: float) -> bool:
    """For passes that are not given up."""
    return False


class Interrupted(Exception):
    """Raised inside a forward pass that is given up."""


class Interrupts:
    """The account of the time that may be lost, in seconds."""

    def __init__(self) -> None:
        self._left = MOST_SAVED

    def may_stop(self, progress: float) -> bool:
        """Whether a step that is done to this part, from 0 to 1, may be given up."""
        return progress < FAR and self._left > 0

    def stepped(self, seconds: float) -> None:
        """Notes a step that was finished."""
        self._left = min(MOST_SAVED, self._left + SHARE * seconds)

    def lost(self, seconds: float) -> None:
        """Notes a step that was given up."""
        self._left -= seconds
