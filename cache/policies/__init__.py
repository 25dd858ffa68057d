"""The policies a tier can give things up by: one file each, all behind `cache.plan.Policy`, none with I/O or a clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cache.plan import Policy
from cache.policies.gdsf import Gdsf
from cache.policies.lfu import Lfu
from cache.policies.lru import Lru
from cache.policies.s3fifo import S3Fifo
from cache.policies.sieve import Sieve
from cache.policies.value import Value

# By the name they are set by; each is made for a tier of so many bytes.
POLICIES: Mapping[str, Callable[[int], Policy]] = {
    "value": lambda _: Value(),
    "lru": lambda _: Lru(),
    "lfu": lambda _: Lfu(),
    "gdsf": lambda _: Gdsf(),
    "s3fifo": S3Fifo,
    "sieve": lambda _: Sieve(),
}

__all__ = ["POLICIES", "Gdsf", "Lfu", "Lru", "S3Fifo", "Sieve", "Value"]
