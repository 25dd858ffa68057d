"""How an engine's places are shared out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.credit import places


@given(st.integers(1, 64), st.dictionaries(st.integers(0, 8), st.integers(0, 64), min_size=1))
def test_everyone_has_a_share_and_nothing_is_left_over(most: int, held: dict[int, int]) -> None:
    limits = places(most, 0, held)
    for router, limit in limits.items():
        assert limit >= -(-most // len(held))
        assert limit >= most - (sum(held.values()) - held[router])
    assert len(held) > 1 or limits == dict.fromkeys(held, most)


@given(st.integers(1, 64), st.dictionaries(st.integers(0, 8), st.integers(0, 64), min_size=1))
def test_while_sequences_wait_for_room_nobody_gets_more(most: int, held: dict[int, int]) -> None:
    assert places(most, 100, held) == held


@given(st.integers(2, 32), st.integers(2, 4), st.data())
def test_whoever_fills_the_engine_the_others_come_to_their_share(most: int, routers: int, data: st.DataObject) -> None:
    # Given one router has all of it, and all want more than there is
    held = {0: most, **dict.fromkeys(range(1, routers), 0)}
    share = -(-most // routers)
    for _ in range(6 * most):
        for router, limit in places(most, 0, held).items():
            held[router] = max(held[router], limit)
        assert sum(held.values()) <= most + share * routers
        # When sequences end, as they do
        ends = data.draw(st.sampled_from([router for router in held if held[router]]))
        held[ends] -= 1
    assert all(held[router] >= share - 1 for router in held)
