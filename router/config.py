"""Settings of the router."""

from __future__ import annotations

import math
from dataclasses import dataclass

from router.admission import Limits
from servicekit.settings import setting

_COUNTS = (
    "max_queued_requests",
    "max_queued_per_tenant",
    "max_queued_per_adapter",
    "max_queued_tokens",
    "max_queued_tokens_per_tenant",
    "max_queued_tokens_per_adapter",
)
_AMOUNTS = ("drain_seconds", "prompt_token_weight", "output_token_weight", "load_mib_weight", "window_tokens")


@dataclass(frozen=True)
class Settings:
    """The router: public API, fair queues, dispatch to engines."""

    listen: str = setting("127.0.0.1:50051", "Address of the public API.")
    engines: tuple[str, ...] = setting(("127.0.0.1:50061",), "Address of an engine; may be repeated.")
    default_base: str = setting(
        "", "Name or digest of the base that answers requests without an adapter; empty is that of the first engine."
    )
    cache: str = setting("127.0.0.1:50071", "Address of the node's cache.")
    metrics_listen: str = setting("", "Address of /metrics.")
    router_id: str = setting("", "Name in traces and logs; made up when empty.")
    max_queued_requests: int = setting(10000, "Most requests that wait, all tenants together.")
    max_queued_per_tenant: int = setting(5000, "Most requests of one tenant that wait.")
    max_unread_kib: int = setting(4096, "Most of one answer that may wait for its client to read it.")
    engine_silence_seconds: float = setting(
        30.0, "An engine that says nothing for this long is taken for lost; longer than any step takes."
    )
    max_queued_per_adapter: int = setting(5000, "Most requests for one adapter that wait.")
    max_queued_tokens: int = setting(20_000_000, "Most tokens of prompts and expected answers that wait, all together.")
    max_queued_tokens_per_tenant: int = setting(10_000_000, "The same of one tenant.")
    max_queued_tokens_per_adapter: int = setting(10_000_000, "The same for one adapter.")
    drain_seconds: float = setting(30.0, "How long requests may go on after SIGTERM.")
    # Decoding is bound by memory traffic and prefill by arithmetic: a token of output takes the accelerator about
    # twice as long as a token of a long prompt. The same default as the VTC paper.
    prompt_token_weight: float = setting(1.0, "Charge of a prompt token that was not in the prefix cache.")
    output_token_weight: float = setting(2.0, "Charge of an output token.")
    # 84 MB, rank 16 on all layers of an 8B model, take a PCIe link about as long as 25 such tokens take the accelerator.
    load_mib_weight: float = setting(0.5, "Charge of a MiB of an adapter that is brought to a device.")
    window_tokens: float = setting(
        2000.0,
        "How far, in weighted tokens, a flow whose adapter is on the device may get ahead of one that waits for its.",
    )
    redis: str = setting(
        "", "Redis or Valkey that routers of the same engines share charges through; empty shares none."
    )
    registry: str = setting("default", "Name of the registry in Redis; routers with the same name share charges.")
    share_quantum: int = setting(1000, "Weighted tokens of one flow that are served before other routers are told.")
    tenant_weights: tuple[str, ...] = setting(
        (), "A tenant's share against others, as NAME=WEIGHT; may be repeated. Who is not named has weight 1."
    )

    def __post_init__(self) -> None:
        if not self.engines:
            raise ValueError("engines: at least one address is needed")
        if len(set(self.engines)) != len(self.engines):
            raise ValueError("engines: an address is named twice")
        for name in (*_COUNTS, "max_unread_kib", "share_quantum"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1")
        if not (math.isfinite(self.engine_silence_seconds) and self.engine_silence_seconds > 0):
            raise ValueError("engine_silence_seconds: must be a number above 0")
        for name in _AMOUNTS:
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name}: must be a number of at least 0")
        if self.output_token_weight == 0:
            raise ValueError("output_token_weight: must be above 0")
        _ = self.weights_of_tenants

    @property
    def limits(self) -> Limits:
        return Limits(*(getattr(self, name) for name in _COUNTS))

    @property
    def weights_of_tenants(self) -> dict[str, float]:
        """Raises ValueError for one that is not NAME=WEIGHT with a weight above 0, or named twice."""
        weights: dict[str, float] = {}
        for text in self.tenant_weights:
            name, _, number = text.rpartition("=")
            try:
                weight = float(number)
            except ValueError:
                weight = 0.0
            if not name or name in weights or not 0 < weight < math.inf:
                raise ValueError(
                    f"tenant_weights: {text!r} must be NAME=WEIGHT, once for a name, with a weight above 0"
                )
            weights[name] = weight
        return weights
