"""Settings of the cache process."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from cache.policies import POLICIES
from servicekit.settings import setting

KINDS = ("file", "hf", "s3", "https")


@dataclass(frozen=True)
class Settings:
    """The cache: registry of adapters, disk and host tiers, the plan of every device tier of its node."""

    listen: str = setting("127.0.0.1:50071", "Address to listen on.")
    redis: str = setting(
        "redis://127.0.0.1:6379/0", "Redis or Valkey, 7.0 or newer: redis://, rediss://, unix://, redis+sentinel://."
    )
    registry: str = setting("default", "Name of the registry in Redis; caches with the same name share it.")
    data_dir: str = setting("", "Folder of the disk tier.")
    host_tier: str = setting("", "Folder of the host tier; empty is one in /dev/shm of this user and node.")
    node_id: str = setting("", "Name of this node; empty takes the host's name.")
    adapter_roots: tuple[str, ...] = setting((), "Folder that file:// sources may lie in; may be repeated.")
    disk_mib: int = setting(
        16384, "Room for artifacts on disk; when it is full, those go that their sources would give again."
    )
    host_mib: int = setting(4096, "Room for artifacts in shared memory.")
    max_adapter_mib: int = setting(2048, "Largest adapter file to read.")
    policy: str = setting("value", f"How a device gives adapters up: {', '.join(POLICIES)}.")
    tenant_share: float = setting(1.0, "Part of a device above which a tenant gives up its own adapters first.")
    sources: tuple[str, ...] = setting(("file", "hf", "s3", "https"), "Kind of source to serve; may be repeated.")
    source_networks: tuple[str, ...] = setting(
        (), "Private network that https:// sources may be read from, http:// too; may be repeated."
    )
    source_credentials: str = setting("", "JSON file of rights to read sources; docs/sources.md shows one.")
    s3_endpoint: str = setting("", "URL of the S3-compatible store; empty is AWS.")
    s3_region: str = setting("us-east-1", "Region that requests to the store are signed for.")
    hub_endpoint: str = setting("", "URL of the hub; empty is HF_ENDPOINT, or Hugging Face's.")
    source_connect_seconds: float = setting(10.0, "Longest wait for a connection to a source.")
    source_idle_seconds: float = setting(30.0, "Longest time a source may send nothing.")
    source_seconds: float = setting(900.0, "Longest time to read one adapter from its source.")
    source_readers: int = setting(4, "Adapters read from one kind of source at the same time.")
    advertise: str = setting(
        "", "Address other nodes read artifacts from; empty is the one listened on, if it has a host."
    )
    metrics_listen: str = setting("", "Address to serve Prometheus metrics on; empty serves none.")

    def __post_init__(self) -> None:
        for name in ("disk_mib", "host_mib", "max_adapter_mib", "source_readers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in ("source_connect_seconds", "source_idle_seconds", "source_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0")
        if unknown := set(self.sources) - set(KINDS):
            raise ValueError(f"sources: unknown are {', '.join(sorted(unknown))}; known are {', '.join(KINDS)}")
        # It becomes part of a folder's name, and of names in Redis.
        if not re.fullmatch(r"[A-Za-z0-9._-]{0,128}", self.node_id) or self.node_id in (".", ".."):
            raise ValueError(f"node_id {self.node_id!r} may have letters, digits, '.', '_' and '-' only")
        if self.policy not in POLICIES:
            raise ValueError(f"policy {self.policy!r} is not one of {', '.join(POLICIES)}")
        if not 0 < self.tenant_share <= 1:
            raise ValueError(f"tenant_share {self.tenant_share} is not above 0 and at most 1")
        if not self.data_dir:
            raise ValueError("no folder for the disk tier is set (--data-dir)")

    def host_tier_folder(self, node_id: str) -> Path:
        """The folder of the host tier."""
        return Path(self.host_tier or f"/dev/shm/loraplex-{os.getuid()}-{node_id}")

    def advertised(self) -> str:
        """The address other nodes are told; "" when it cannot be known."""
        host = self.listen.rpartition(":")[0].strip("[]")
        return self.advertise or (
            "" if host in ("", "0.0.0.0", "::") or self.listen.startswith("unix:") else self.listen
        )
