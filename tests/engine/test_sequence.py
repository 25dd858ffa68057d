from __future__ import annotations

from itertools import product

import pytest

from engine.errors import IllegalTransition
from engine.sequence import TRANSITIONS, Event, Sequence, State


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)))
def test_every_state_and_event_is_either_in_the_table_or_refused(state: State, event: Event) -> None:
    sequence = Sequence(1, "", [1], 1, state=state)
    if (state, event) in TRANSITIONS:
        sequence.apply(event)
        assert sequence.state is TRANSITIONS[state, event]
    else:
        with pytest.raises(IllegalTransition) as caught:
            sequence.apply(event)
        assert sequence.state is state
        assert caught.value.metadata == {"state": state.value, "event": event.value}


def test_a_finished_sequence_stays_finished() -> None:
    assert not [event for state, event in TRANSITIONS if state is State.FINISHED]
