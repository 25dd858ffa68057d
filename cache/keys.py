"""Every key in Redis, and what is in it. Built here and nowhere else.

All keys of a registry share the hash tag {name}, so that a script may touch several of them on a cluster.

    loraplex:{name}:epoch        string  made once; another one means another, or an emptied, registry
    loraplex:{name}:revision     integer counts every change of an adapter
    loraplex:{name}:bases        hash    digest -> JSON: a base that engines have described
    loraplex:{name}:base         string  JSON: the one base of a registry that could hold no other; moved to `bases` when read
    loraplex:{name}:adapters     hash    adapter_id -> JSON: the adapter's record
    loraplex:{name}:nodes        zset    node_id -> time it was last heard of, milliseconds of Redis's clock
    loraplex:{name}:residency    hash    node_id -> JSON: {"address", "run", "serial", "held": digest -> tiers}
    loraplex:{name}:leases       zset    "node/engine digest" -> time the lease ends, milliseconds of Redis's clock
    loraplex:{name}:last_use     zset    digest -> time it was last used, milliseconds of Redis's clock
    loraplex:{name}:fetch:WHAT   string  the node that fetches WHAT from its source now; ends by itself
    loraplex:{name}:events       channel JSON: {"revision", "adapter_id"} is a hint to read again, never the truth itself;
                                         {"node", "run", "serial", "moved": digest -> tiers} is residency that changed
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Keys:
    """The keys of one registry."""

    name: str

    def _key(self, what: str) -> str:
        return f"loraplex:{{{self.name}}}:{what}"

    @property
    def epoch(self) -> str:
        return self._key("epoch")

    @property
    def revision(self) -> str:
        return self._key("revision")

    @property
    def base(self) -> str:
        return self._key("base")

    @property
    def bases(self) -> str:
        return self._key("bases")

    @property
    def adapters(self) -> str:
        return self._key("adapters")

    @property
    def nodes(self) -> str:
        return self._key("nodes")

    @property
    def residency(self) -> str:
        return self._key("residency")

    @property
    def leases(self) -> str:
        return self._key("leases")

    @property
    def last_use(self) -> str:
        return self._key("last_use")

    def fetch(self, what: str) -> str:
        return self._key(f"fetch:{what}")

    @property
    def events(self) -> str:
        return self._key("events")
