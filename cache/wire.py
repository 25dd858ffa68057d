"""Messages to dataclasses and back; nothing below service.py and this file knows protobuf."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from cache.artifact import TARGET_DTYPES, BaseDescription
from cache.engines import LOOK_AHEAD_SECONDS, Command, Engine, Evict, Expected, Load
from cache.failures import Failure
from cache.registry import AdapterRecord
from cache.residency import DevicePlace, Place
from cache.watchers import Change
from loraplex.cache.v1 import residency_pb2
from loraplex.v1 import adapter_pb2
from servicekit.errors import InvalidField, code_of

# Worst first; REMOTE is not a place to bring anything to.
TIERS: Mapping[Place | DevicePlace, adapter_pb2.Tier.ValueType] = {
    Place.DISK: adapter_pb2.TIER_DISK,
    Place.HOST: adapter_pb2.TIER_HOST,
    DevicePlace.DEVICE: adapter_pb2.TIER_DEVICE,
}
PLACES = {tier: place for place, tier in TIERS.items()}
KINDS = {
    Change.RESIDENCY: adapter_pb2.AdapterEvent.KIND_RESIDENCY,
    Change.UPDATED: adapter_pb2.AdapterEvent.KIND_UPDATED,
    Change.REGISTERED: adapter_pb2.AdapterEvent.KIND_REGISTERED,
    Change.DELETED: adapter_pb2.AdapterEvent.KIND_DELETED,
}
STATES = {
    "active": adapter_pb2.Adapter.STATE_ACTIVE,
    "draining": adapter_pb2.Adapter.STATE_DRAINING,
}


def adapter_message(
    record: AdapterRecord,
    residency: Sequence[tuple[str, str, Place | DevicePlace]],
    leases: Iterable[str],
    base_name: str,
    last_use_ms: int | None,
    failure: Failure | None,
) -> adapter_pb2.Adapter:
    """An adapter, where it is, who uses it, and what is wrong with it; `leases` are "node/engine"."""
    adapter = adapter_pb2.Adapter(
        adapter_id=record.adapter_id,
        source_uri=record.source_uri,
        digest=record.digest,
        base_model=record.base_model,
        method=record.method,
        rank=record.rank,
        size_bytes=record.size_bytes,
        pinned=record.pinned,
        weight=record.weight,
        # Broken, not merely about to be tried again: no node has it in any tier.
        state=adapter_pb2.Adapter.STATE_FAILED if failure and not residency else STATES[record.state],
        chat_template=record.chat_template,
        target_modules=record.target_modules,
        base_digest=record.base_digest,
        base_name=base_name,
        source_revision=record.source_revision,
        leases=[
            adapter_pb2.Lease(node_id=node_id, engine_id=engine_id)
            for node_id, _, engine_id in (lease.partition("/") for lease in leases)
        ],
        residency=[
            adapter_pb2.Residency(node_id=node_id, engine_id=engine_id, tier=TIERS[place])
            for node_id, engine_id, place in residency
        ],
    )
    adapter.create_time.FromMilliseconds(record.create_time_ms)
    if last_use_ms is not None:
        adapter.last_use_time.FromMilliseconds(last_use_ms)
    if failure is not None:
        adapter.failure.reason, adapter.failure.message = failure.error.reason, failure.error.message
        adapter.failure.retry_time.FromMilliseconds(int((time.time() + failure.retry_at - time.monotonic()) * 1000))
    return adapter


def engine_from(said: residency_pb2.EngineDescription) -> Engine:
    """An engine that has described itself. Raises InvalidField."""
    if not said.engine_id or not said.base_digest or not said.modules:
        raise InvalidField("description", "engine_id, base_digest and modules must be set", "INCOMPLETE_DESCRIPTION")
    if said.dtype not in TARGET_DTYPES:
        raise InvalidField(
            "description.dtype", f"{said.dtype!r} is not one of {', '.join(TARGET_DTYPES)}", "UNKNOWN_DTYPE"
        )
    base = BaseDescription(
        name=said.base_model,
        digest=said.base_digest,
        dtype=said.dtype,
        max_rank=said.max_rank,
        modules={module.name: (module.in_features, module.out_features) for module in said.modules},
    )
    return Engine(said.engine_id, base, said.device_budget_bytes)


def command_message(command: Command) -> residency_pb2.AttachEngineResponse:
    """What an engine is told."""
    if isinstance(command, Load):
        load = residency_pb2.LoadArtifact(
            digest=command.digest,
            path=command.path,
            size_bytes=command.size_bytes,
            traceparent=command.traceparent,
        )
        return residency_pb2.AttachEngineResponse(load=load)
    if isinstance(command, Evict):
        evict = residency_pb2.EvictArtifact(digest=command.digest, force=command.force)
        return residency_pb2.AttachEngineResponse(evict=evict)
    unavailable = residency_pb2.ArtifactUnavailable(
        digest=command.digest,
        code=int(code_of(command.error)),
        reason=command.error.reason,
        message=command.error.message,
    )
    return residency_pb2.AttachEngineResponse(unavailable=unavailable)


def queue_from(said: residency_pb2.LookAheadRequest, now: float) -> list[tuple[str, str, Expected]]:
    """What waits in a router's queue: digest, engine_id or "", and for whom."""
    until = now + LOOK_AHEAD_SECONDS
    return [
        (
            one.digest,
            one.engine_id,
            Expected(one.traceparent, until, now - one.waited_ms / 1000, one.tenant, said.router_id),
        )
        for one in said.expected
    ]
