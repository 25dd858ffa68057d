"""Which service may start, which is up, and what the death of one means. Pure: `now` is an argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from launcher.errors import IllegalTransition
from launcher.restart import Deaths, RestartPolicy


class State(Enum):
    """State of a service."""

    WAITING = auto()  # for another service, before its first start
    STARTING = auto()  # its process runs, but does not answer yet
    READY = auto()
    PAUSING = auto()  # died, and will be started again
    LOST = auto()  # will not be started again


class Event(Enum):
    """What happens to a service."""

    START = auto()
    ANSWER = auto()
    DIE = auto()
    GIVE_UP = auto()


TRANSITIONS: Mapping[tuple[State, Event], State] = {
    (State.WAITING, Event.START): State.STARTING,
    (State.STARTING, Event.ANSWER): State.READY,
    (State.STARTING, Event.DIE): State.PAUSING,
    (State.READY, Event.DIE): State.PAUSING,
    (State.PAUSING, Event.START): State.STARTING,
    (State.PAUSING, Event.GIVE_UP): State.LOST,
}


@dataclass(frozen=True)
class Restart:
    """Start the service again after `delay` seconds."""

    delay: float


@dataclass(frozen=True)
class NeverStarted:
    """The service died before it ever answered: it cannot start, and a restart would not help."""


@dataclass(frozen=True)
class TooManyDeaths:
    """The service keeps dying."""


Verdict = Restart | NeverStarted | TooManyDeaths


class Lifecycle:
    """States of all services.

    Args:
        needs: for each service those that must be ready before its first start.
    """

    def __init__(self, needs: Mapping[str, Sequence[str]], policy: RestartPolicy) -> None:
        self._needs = {name: tuple(others) for name, others in needs.items()}
        self._deaths = {name: Deaths(policy) for name in needs}
        self._answered: set[str] = set()
        self.states = dict.fromkeys(needs, State.WAITING)

    @property
    def all_ready(self) -> bool:
        """Whether every service answers."""
        return all(state is State.READY for state in self.states.values())

    def startable(self) -> list[str]:
        """Services that wait for nothing but to be started, in the order they were named."""
        return [
            name
            for name, state in self.states.items()
            if state is State.WAITING and all(need in self._answered for need in self._needs[name])
        ]

    def started(self, name: str) -> None:
        """Its process has been started."""
        self._move(name, Event.START)

    def answers(self, name: str) -> None:
        """It is ready to serve."""
        self._move(name, Event.ANSWER)
        self._answered.add(name)

    def died(self, name: str, now: float) -> Verdict:
        """Its process has ended without being asked to."""
        self._move(name, Event.DIE)
        if name not in self._answered:
            self._move(name, Event.GIVE_UP)
            return NeverStarted()
        delay = self._deaths[name].restart_after(now)
        if delay is None:
            self._move(name, Event.GIVE_UP)
            return TooManyDeaths()
        return Restart(delay)

    def _move(self, name: str, event: Event) -> None:
        state = self.states[name]
        if (state, event) not in TRANSITIONS:
            raise IllegalTransition(f"{name} is {state.name} and cannot {event.name}")
        self.states[name] = TRANSITIONS[state, event]
