"""Accounts that are charged, and the order of those that wait. PURE. The law they serve is in flows.py."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

# Engines that have an adapter on their device; None: served by every engine (the base).
Where = frozenset[str] | None

Question = Callable[[Where], bool]


class Account:
    """Something that is charged, in micro-tokens.

    Attributes:
        charge: what all its tickets have paid, what it was lifted by, and what other routers have served of it: the sum of the
            three, to the last micro-token.
        running: its tickets that were picked and have not ended.
        queued: its tickets that wait, and their tokens.
    """

    __slots__ = ("_ratio", "charge", "elsewhere", "lifted", "queued", "queued_tokens", "running", "weight")

    def __init__(self) -> None:
        self.charge = 0
        self.lifted = 0
        self.elsewhere = 0
        self.running = 0
        self.queued = 0
        self.queued_tokens = 0
        self.set_weight(1.0)

    def set_weight(self, weight: float) -> None:
        """From the next pick on; what was picked before goes on at the weight it was picked with."""
        self.weight = weight
        # A float is a fraction of integers exactly, so no weight needs rounding.
        self._ratio = weight.as_integer_ratio()

    @property
    def ratio(self) -> tuple[int, int]:
        """The weight as numerator and denominator."""
        return self._ratio

    def served_elsewhere(self, cost: int) -> None:
        """Takes over what another router has served, before the weight."""
        share = cost * self._ratio[1] // self._ratio[0]
        self.elsewhere += share
        self.charge += share

    def lift(self, level: int) -> None:
        """Raises the charge to a level if it is below."""
        if self.charge < level:
            self.lifted += level - self.charge
            self.charge = level


A = TypeVar("A", bound=Account)


class Order(Generic[A]):
    """Accounts by charge. An entry may lie below its account's charge and is put right when it comes to the top."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, A]] = []
        self._valid: dict[A, int] = {}
        self._entries = 0

    def __len__(self) -> int:
        return len(self._valid)

    def __contains__(self, account: A) -> bool:
        return account in self._valid

    def put(self, account: A) -> None:
        """Adds an account, or renews its entry after its charge has fallen."""
        if len(self._heap) > 2 * len(self._valid) + 64:
            self._heap = [entry for entry in self._heap if self._valid.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, self._entry(account))

    def discard(self, account: A) -> None:
        self._valid.pop(account, None)

    def least(self) -> A | None:
        heap = self._heap
        while heap:
            charge, number, account = heap[0]
            if self._valid.get(account) != number:
                heapq.heappop(heap)
            elif charge < account.charge:
                heapq.heapreplace(heap, self._entry(account))
            else:
                return account
        return None

    def _entry(self, account: A) -> tuple[int, int, A]:
        self._entries += 1
        self._valid[account] = self._entries
        return account.charge, self._entries, account


class Level(Generic[A]):
    """The accounts of one level that could be served, by where.

    Attributes:
        highest_pick: the highest charge at which anyone was picked here.
    """

    def __init__(self) -> None:
        self._orders: dict[Where, Order[A]] = {}
        self._last: A | None = None
        self.highest_pick = 0

    def least(self, is_open: Question) -> A | None:
        found: A | None = None
        for where, order in self._orders.items():
            if is_open(where):
                account = order.least()
                if account is not None and (found is None or account.charge < found.charge):
                    found = account
        return found

    def next(self, is_open: Question, is_warm: Question, window: int) -> A | None:
        """The open account with the least charge; rather a warm one that is no more than `window` above it."""
        least = self.least(is_open)
        if least is None or not window:
            return least
        warm = self.least(is_warm)
        return warm if warm is not None and warm.charge <= least.charge + window else least

    def level(self) -> int:
        """The charge a newcomer is lifted to."""
        reference = self.least(_anywhere) or self._last
        return max(self.highest_pick, reference.charge if reference else 0)

    def served(self, account: A) -> None:
        self.highest_pick = max(self.highest_pick, account.charge)
        self._last = account

    @property
    def wheres(self) -> Iterable[Where]:
        """The distinct places its accounts could be served at."""
        return self._orders.keys()

    def covers(self, where: Where) -> bool:
        """Whether any of its accounts could be served on each of these engines."""
        if not where or None in self._orders:
            return where in self._orders or (where is not None and bool(self._orders))
        return not where.difference(*(other for other in self._orders if other))

    def is_in(self, where: Where) -> bool:
        return where in self._orders

    def enter(self, account: A, where: Where) -> None:
        self._orders.setdefault(where, Order()).put(account)

    def leave(self, account: A, where: Where) -> None:
        order = self._orders[where]
        order.discard(account)
        if not order:
            del self._orders[where]

    def fell(self, account: A) -> None:
        for order in self._orders.values():
            if account in order:
                order.put(account)


def _anywhere(where: Where) -> bool:
    """Whether an account is anywhere at all."""
    return True
