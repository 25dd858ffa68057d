"""The view of the registry: snapshots, events, old news."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.errors import AdapterNotFound, RegistryNotLoaded
from router.registry_view import BASE, Adapter, Event, Kind, RegistryView, Tier

A1 = Adapter("a", "d1", engines=frozenset({"e"}), tier=Tier.DEVICE, created=1)
A2 = Adapter("a", "d2", tier=Tier.DISK, created=2)
END = Event(Kind.SNAPSHOT_END)


def loaded(*adapters: Adapter) -> RegistryView:
    view = RegistryView()
    view.begin()
    for adapter in adapters:
        view.apply(Event(Kind.SNAPSHOT, adapter))
    view.apply(END)
    return view


def test_nothing_but_the_base_is_known_before_the_first_snapshot_is_complete() -> None:
    view = RegistryView()
    view.apply(Event(Kind.SNAPSHOT, A1))
    assert view.resolve("") is BASE and BASE.tier_name == ""
    with pytest.raises(RegistryNotLoaded) as caught:
        view.resolve("a")
    assert caught.value.metadata == {"adapter_id": "a"}


def test_unknown_deleted_and_draining_adapters_are_not_found() -> None:
    view = loaded(A1)
    assert view.resolve("a") == A1 and A1.tier_name == "device"
    view.apply(Event(Kind.CHANGED, replace(A1, draining=True)))
    for name in ("a", "b"):
        with pytest.raises(AdapterNotFound) as caught:
            view.resolve(name)
        assert caught.value.metadata == {"adapter_id": name}
    view.apply(Event(Kind.DELETED, A1))
    assert view.get("a") is None and view.where("d1") == frozenset()


def test_a_view_stays_in_force_until_the_next_snapshot_is_complete() -> None:
    view = loaded(A1)
    view.begin()
    view.apply(Event(Kind.SNAPSHOT, Adapter("b", "d3")))
    assert view.resolve("a") == A1
    assert view.apply(END) == {"d1", "d3"}
    assert view.get("a") is None and view.resolve("b").digest == "d3"


def test_a_new_version_replaces_the_old_and_old_news_does_not_bring_it_back() -> None:
    view = loaded(A1)
    assert view.apply(Event(Kind.REGISTERED, A2)) == {"d1", "d2"}
    for late in (Kind.REGISTERED, Kind.CHANGED, Kind.DELETED):
        assert view.apply(Event(late, A1)) == set()
    assert view.resolve("a") == A2


def test_a_late_change_does_not_bring_back_what_was_deleted() -> None:
    view = loaded(A1)
    view.apply(Event(Kind.DELETED, A1))
    view.apply(Event(Kind.CHANGED, A1))
    assert view.get("a") is None


def test_residency_is_that_of_the_digest() -> None:
    view = loaded(A1, Adapter("alias", "d1", engines=frozenset({"e"})))
    assert view.where("") is None
    assert view.where("d1") == frozenset({"e"})
    view.apply(Event(Kind.CHANGED, replace(A1, engines=frozenset())))
    assert view.where("d1") == frozenset()
    view.apply(Event(Kind.DELETED, A1))
    assert view.resolve("alias").digest == "d1"


ADAPTERS = st.builds(
    Adapter,
    adapter_id=st.sampled_from("abc"),
    digest=st.sampled_from(["d1", "d2", "d3"]),
    engines=st.frozensets(st.sampled_from(["e", "f"])),
    created=st.integers(0, 3),
)


@given(st.lists(st.tuples(st.sampled_from([kind for kind in Kind if kind != Kind.SNAPSHOT_END]), ADAPTERS) | st.none()))
def test_only_digests_that_an_id_means_are_kept(events: list[tuple[Kind, Adapter] | None]) -> None:
    view = loaded()
    for event in events:
        view.apply(Event(*event) if event else END)
    known = {adapter.digest for name in "abc" if (adapter := view.get(name))}
    assert set(view._engines) == set(view._ids) == known
