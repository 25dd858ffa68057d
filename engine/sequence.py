"""State of one request inside the engine.

Two rules about this file. Whatever changes the state of a sequence goes through `Sequence.apply`; whatever is not in
TRANSITIONS is an error that changes nothing. And the file knows no adapter weights, no text and no clock: a sequence
here is its tokens, how many of them have keys and values, the blocks those are in, and the names of its prefixes.

                      ADAPTER_READY            ADMITTED
    WAITING_ADAPTER ───────────────▶ WAITING ───────────▶ RUNNING
           │                            │ ▲                 │  │
           │ ENDED                ENDED │ └──── PREEMPTED ──┘  │ ENDED
           └────────────▶ FINISHED ◀────┴──────────────────────┘
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from engine.blocks import BLOCK_SIZE
from engine.errors import IllegalTransition
from engine.prefix import next_key, root_key

# Stands for a token that is computed but not yet known on the host; only ever the last one.
UNKNOWN = -1


class State(Enum):
    """Where a sequence is in its life."""

    WAITING_ADAPTER = "waiting for its adapter"
    WAITING = "waiting for room"
    RUNNING = "running"
    FINISHED = "finished"


class Event(Enum):
    """What can happen to a sequence."""

    ADAPTER_READY = "told that its adapter is ready"
    ADMITTED = "admitted"
    PREEMPTED = "preempted"
    ENDED = "ended"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.WAITING_ADAPTER, Event.ADAPTER_READY): State.WAITING,
    (State.WAITING, Event.ADMITTED): State.RUNNING,
    (State.RUNNING, Event.PREEMPTED): State.WAITING,
    (State.WAITING_ADAPTER, Event.ENDED): State.FINISHED,
    (State.WAITING, Event.ENDED): State.FINISHED,
    (State.RUNNING, Event.ENDED): State.FINISHED,
}


@dataclass(slots=True, eq=False)
class Sequence:
    """One request inside the engine.

    Attributes:
        arrival: place in the order of arrival; unique in the engine's life.
        adapter: digest of the adapter; empty for the base.
        tokens: prompt and answer so far. The last token of a running sequence has no keys and values yet.
        prompt_length: how many of `tokens` are the prompt.
        generation: generation of the adapter's rows this sequence was promised; 0 for the base.
        computed: how many of `tokens`, from the first, have keys and values.
        blocks: KV blocks, in the order of the tokens they hold.
        preemptions: times `computed` fell back to 0.
        reuse_prefix: whether keys and values that are in the pool already may be taken over. One that needs the logits
            of its whole prompt must compute all of it.
        cached_tokens: tokens of the prompt taken over so before its first token; recomputation does not count.
        unscored: places of the prompt whose logits are still to be read, for the log probability of the token after
            each. Never those read already: recomputation does not repeat them.
        is_urgent: whether other prompts wait for its own.
        is_closing: whether the token that is not known yet ends the answer, whatever it is.
    """

    arrival: int
    adapter: str
    tokens: list[int]
    prompt_length: int
    generation: int = 0
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    preemptions: int = 0
    reuse_prefix: bool = True
    cached_tokens: int = 0
    unscored: range = range(0)
    is_urgent: bool = False
    is_closing: bool = False
    state: State = State.WAITING_ADAPTER
    _prefix_keys: list[bytes] = field(default_factory=list, init=False)

    def apply(self, event: Event) -> None:
        """Moves to the next state; raises IllegalTransition, unchanged, where there is none."""
        state = TRANSITIONS.get((self.state, event))
        if state is None:
            raise IllegalTransition(self.state.value, event.value)
        self.state = state

    @property
    def awaits_token(self) -> bool:
        """Whether its last token is not known yet."""
        return self.tokens[-1] == UNKNOWN

    def expect(self, is_closing: bool) -> None:
        """Notes that its next token is being computed."""
        self.tokens.append(UNKNOWN)
        self.is_closing = is_closing

    def learn(self, token: int) -> None:
        """Adds its next token, in its place where it was expected."""
        if self.awaits_token:
            self.tokens[-1] = token
        else:
            self.tokens.append(token)

    @property
    def pending(self) -> int:
        """Tokens without keys and values: 1 in decode, more in prefill."""
        return len(self.tokens) - self.computed

    @property
    def output_length(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt_length

    def prefix_keys(self, count: int) -> list[bytes]:
        """Keys of its first `count` blocks, which must be full."""
        keys = self._prefix_keys
        while len(keys) < count:
            start = len(keys) * BLOCK_SIZE
            parent = keys[-1] if keys else root_key(self.adapter)
            keys.append(next_key(parent, self.tokens[start : start + BLOCK_SIZE]))
        return keys[:count]
