"""Accounts that are charged, and the order of those that wait. PURE. The law they serve is in flows.py."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Generic, TypeVar

# Engines that have an adapter on their device; None: served by every engine (the base).
Where = frozenset[str] | None


class Account:
    """Something that is charged. `_rest` is what divisions left over, in micro-tokens · numerator of the weight."""

    __slots__ = ("_denominator", "_numerator", "_rest", "charge", "running")

    def __init__(self) -> None:
        self.charge = 0
        self.running = 0
        self._rest = 0
        self._numerator, self._denominator = 1, 1

    def set_weight(self, weight: float) -> None:
        # A float is a fraction of integers exactly, so weights need no rounding either.
        ratio = weight.as_integer_ratio()
        if ratio != (self._numerator, self._denominator):
            self._numerator, self._denominator = ratio
            self._rest = 0

    def add(self, cost: int) -> None:
        added, self._rest = divmod(cost * self._denominator + self._rest, self._numerator)
        self.charge += added


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
    """The backlogged accounts of one level, by where they can be served."""

    def __init__(self) -> None:
        self._orders: dict[Where, Order[A]] = {}
        self._highest_pick = 0
        self._last: A | None = None

    def least(self, is_open: Callable[[Where], bool]) -> A | None:
        found: A | None = None
        for where, order in self._orders.items():
            if is_open(where):
                account = order.least()
                if account is not None and (found is None or account.charge < found.charge):
                    found = account
        return found

    def level(self) -> int:
        """The charge a newcomer is lifted to."""
        reference = self.least(_anywhere) or self._last
        return max(self._highest_pick, reference.charge if reference else 0)

    def served(self, account: A) -> None:
        self._highest_pick = max(self._highest_pick, account.charge)
        self._last = account

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
    return True
