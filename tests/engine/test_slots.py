from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.slots import Slots

sets = st.lists(st.sets(st.integers(0, 12)), max_size=20)


@given(sets)
def test_copying_as_told_keeps_every_slot_true(changes: list[set[int]]) -> None:
    slots: Slots[int] = Slots()
    array: list[int | None] = [None] * 13
    for wanted in changes:
        for write in slots.update(wanted):
            array[write.slot] = write.key if write.source is None else array[write.source]
            assert array[write.slot] == write.key
        assert len(slots) == len(wanted)
        assert {array[slots[key]] for key in wanted} == wanted
        assert sorted(slots[key] for key in wanted) == list(range(len(wanted)))


@given(sets)
def test_nothing_is_copied_that_could_stay(changes: list[set[int]]) -> None:
    slots: Slots[int] = Slots()
    held: set[int] = set()
    for wanted in changes:
        writes = slots.update(wanted)
        filled = [write.key for write in writes if write.source is None]
        moved = [write.key for write in writes if write.source is not None]
        assert set(filled) == wanted - held and len(filled) == len(wanted - held)
        assert len(moved) <= max(0, len(held - wanted) - len(filled))
        held = wanted
