"""What to load into a tier and what to evict from it: decided here, without devices, clocks or I/O.

What is needed is a list in the order in which it is needed: what sequences wait for, what is pinned, then the look-ahead, which
is what waits in the routers' queues. As much of that list as fits the budget beside the leases is the horizon. Then:

1. What is leased is never evicted, nor is anything within the horizon.
2. Room is made by evicting what nobody has asked for, in the order of a policy; after that what lies beyond the horizon, the
   last needed first (Belady 1966, doi:10.1147/sj.52.0078, as far as the queue lets us see).
3. Loads fit into what is free now. Room that an eviction will make is used by a later plan, after the eviction was done.
4. A tenant that holds more than its share of the tier gives up its own first.

The order of the queue decides who comes first, so look-ahead cannot hold up a sequence, and nothing needed late can push out
what is needed soon. It also means that nobody starves: who waits moves up, and once it is in the horizon it stays there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

# So many of the look-ahead are loaded before they are waited for, so that the next loads are under way. More would mean to
# evict before it is known what else is asked for; only where there is room for all of it, all of it is loaded. Those behind the
# first push out nothing that is queued: until they are waited for, leases end, and something needed later may go instead.
EAGER = 2


@dataclass(frozen=True)
class Resident:
    """Something that takes room in a tier.

    Attributes:
        last_used: time of its last use, any unit that grows.
        kept: it is leased: pinned, in use or on its way in; never evicted.
        leaving: it is on its way out; its room will be free.
        cost: seconds to bring it back from where it would live once it is evicted.
        tenant: on whose behalf it was loaded; empty for nobody's.
    """

    digest: str
    size_bytes: int
    last_used: float
    kept: bool = False
    leaving: bool = False
    cost: float = 0.0
    tenant: str = ""


@dataclass(frozen=True)
class Wanted:
    """Something that is needed in a tier, whether it is there or not; urgent when a sequence waits for it or it is pinned."""

    digest: str
    size_bytes: int
    urgent: bool = False


@dataclass(frozen=True)
class Plan:
    """What to do now. Every wanted artifact that is not there is in exactly one of loads, waiting and hopeless.

    Attributes:
        loads: fit into what is free, in the order wanted.
        evictions: make room for those of `waiting` that can be helped.
        waiting: do not fit yet.
        hopeless: are larger than the whole budget.
    """

    loads: tuple[str, ...]
    evictions: tuple[str, ...]
    waiting: tuple[str, ...]
    hopeless: tuple[str, ...]


class Policy(Protocol):
    """Says in which order a tier gives things up. It learns from what happens; `order` changes nothing."""

    def used(self, digest: str, size_bytes: int, cost: float) -> None:
        """Something is asked for, there or not. `cost` is what it takes to bring it to the tier, in seconds."""
        ...

    def entered(self, digest: str, size_bytes: int) -> None:
        """Something takes room in the tier."""
        ...

    def left(self, digest: str) -> None:
        """Something has left the tier."""
        ...

    def order(self, candidates: Iterable[Resident]) -> Sequence[Resident]:
        """The candidates, the first to be evicted first."""
        ...


def plan(
    residents: Sequence[Resident],
    wanted: Sequence[Wanted],
    budget_bytes: int,
    policy: Policy,
    *,
    tenant_share: float = 1.0,
) -> Plan:
    """See the module. `wanted` is in the order in which it is needed.

    A wanted artifact that does not fit beside the leases and what is needed sooner does not stop smaller ones behind it.
    """
    here = {resident.digest: resident for resident in residents}
    needs = _without_repeats(wanted)
    near = _horizon(here, needs, budget_bytes)
    room = _Room(budget_bytes - sum(resident.size_bytes for resident in residents), here, needs, near)
    loads: list[str] = []
    waiting: list[str] = []
    hopeless: list[str] = []
    missing = sum(want.size_bytes for want in needs if want.digest in near and want.digest not in here)
    eager = len(needs) if missing <= room.free else EAGER
    ahead = 0
    for want in needs:
        ahead += not want.urgent
        if want.digest in here:
            continue
        if want.size_bytes > budget_bytes:
            hopeless.append(want.digest)
            continue
        is_due = want.digest in near and (want.urgent or ahead <= eager)
        if is_due and room.take(want.size_bytes):
            loads.append(want.digest)
            continue
        waiting.append(want.digest)
        if is_due:
            room.make(want.size_bytes, policy, budget_bytes * tenant_share, gently=not want.urgent and ahead > 1)
    return Plan(tuple(loads), tuple(room.evictions), tuple(waiting), tuple(hopeless))


def make_room(
    unasked: Iterable[Resident], soon: Sequence[Resident], size_bytes: int, free_bytes: int
) -> tuple[str, ...]:
    """What to evict now for something of a size, in a tier that everything is brought to by someone who waits for it.

    The same as `plan` would say, but read only as far as it takes: such a tier may hold very many.

    Args:
        unasked: what may go and nobody has asked for, the first to go first.
        soon: what may go and is needed soon, the soonest first; as far as it fits beside the newcomer it is the horizon.
        free_bytes: what neither the residents take nor anything on its way.

    Returns:
        Digests that together make the room; none when there is room, or when all that may go would not make it.
    """
    lacking = size_bytes - free_bytes
    victims: list[Resident] = []
    freed = 0
    if lacking <= 0:
        return ()
    for resident in unasked:
        victims.append(resident)
        freed += resident.size_bytes
        if freed >= lacking:
            return tuple(victim.digest for victim in _enough(victims, lacking))
    left = freed + sum(resident.size_bytes for resident in soon) - lacking
    if left < 0:
        return ()
    late: list[Resident] = []
    for resident in soon:
        if resident.size_bytes <= left:
            left -= resident.size_bytes
        else:
            late.append(resident)
    return tuple(victim.digest for victim in _enough([*victims, *reversed(late)], lacking))


def _without_repeats(wanted: Sequence[Wanted]) -> list[Wanted]:
    first: dict[str, Wanted] = {}
    for want in wanted:
        first.setdefault(want.digest, want)
    return list(first.values())


def _horizon(here: dict[str, Resident], needs: Sequence[Wanted], budget_bytes: int) -> set[str]:
    """Those of the needs that fit together beside the leases, the first before the later ones."""
    left = budget_bytes - sum(resident.size_bytes for resident in here.values() if resident.kept)
    near: set[str] = set()
    for want in needs:
        resident = here.get(want.digest)
        size = want.size_bytes if resident is None else 0 if resident.kept else resident.size_bytes
        if size <= left:
            left -= size
            near.add(want.digest)
    return near


class _Room:
    """What is free while a plan is made, and what will be."""

    def __init__(self, free: int, here: dict[str, Resident], needs: Sequence[Wanted], near: set[str]) -> None:
        self.evictions: list[str] = []
        self.free = free
        self._coming = sum(resident.size_bytes for resident in here.values() if resident.leaving)
        self._here, self._needs, self._near = here, needs, near
        self._asked = {want.digest for want in needs}
        self._victims: list[Resident] | None = None

    def take(self, size_bytes: int) -> bool:
        """Takes some of what is free, if that is enough."""
        if size_bytes > self.free:
            return False
        self.free -= size_bytes
        return True

    def make(self, size_bytes: int, policy: Policy, quota_bytes: float, *, gently: bool) -> None:
        """Keeps what is free for something larger, and evicts for what it lacks beside what is coming anyway.

        Gently: only if it need not evict what someone waits for, if later.
        """
        lacking = size_bytes - max(self.free, 0) - self._coming
        if lacking > 0 and self._victims is None:
            self._victims = self._in_order(policy, quota_bytes)
        victims = [one for one in self._victims or () if not (gently and one.digest in self._asked)]
        if gently and sum(victim.size_bytes for victim in victims) < lacking:
            return
        self.free = min(self.free, 0)
        if lacking > 0:
            chosen = _enough(victims, lacking)
            self.evictions += [victim.digest for victim in chosen]
            self._victims = [victim for victim in self._victims or () if victim not in chosen]
            lacking -= sum(victim.size_bytes for victim in chosen)
        self._coming = max(-lacking, 0)

    def _in_order(self, policy: Policy, quota_bytes: float) -> list[Resident]:
        """Everything that may go, the first to go first."""
        may_go = [resident for resident in self._here.values() if not (resident.kept or resident.leaving)]
        unasked = list(policy.order(resident for resident in may_go if resident.digest not in self._asked))
        late = [self._here[want.digest] for want in reversed(self._needs) if want.digest in self._here]
        late = [one for one in late if not (one.kept or one.leaving) and one.digest not in self._near]
        return _over_quota_first(unasked, self._here.values(), quota_bytes) + late


def _over_quota_first(victims: list[Resident], here: Iterable[Resident], quota_bytes: float) -> list[Resident]:
    """The victims of tenants that hold more than the quota first, as far as they hold more."""
    holds: Counter[str] = Counter()
    for resident in here:
        holds[resident.tenant] += 0 if resident.leaving else resident.size_bytes
    first: list[Resident] = []
    then: list[Resident] = []
    for victim in victims:
        over = victim.tenant != "" and holds[victim.tenant] > quota_bytes
        holds[victim.tenant] -= victim.size_bytes if over else 0
        (first if over else then).append(victim)
    return first + then


def _enough(victims: Sequence[Resident], lacking: int) -> list[Resident]:
    """The first victims that together free so many bytes, without those that are not needed for it after all."""
    chosen: list[Resident] = []
    freed = 0
    for victim in victims:
        if freed >= lacking:
            break
        chosen.append(victim)
        freed += victim.size_bytes
    # The last may be so large that earlier ones, which are worth less, can stay all the same; most valuable first.
    for victim in reversed(chosen[:-1]):
        if freed - victim.size_bytes >= lacking:
            chosen.remove(victim)
            freed -= victim.size_bytes
    return chosen
