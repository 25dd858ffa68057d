"""Settings of the router."""

from __future__ import annotations

import math
from dataclasses import dataclass

from servicekit.settings import setting


@dataclass(frozen=True)
class Settings:
    """The router: public API, fair queues, dispatch to engines."""

    listen: str = setting("127.0.0.1:50051", "Address of the public API.")
    engines: tuple[str, ...] = setting(("127.0.0.1:50061",), "Address of an engine; may be repeated.")
    cache: str = setting("127.0.0.1:50071", "Address of the node's cache.")
    metrics_listen: str = setting("", "Address of /metrics.")
    router_id: str = setting("", "Name in traces and logs; made up when empty.")
    max_queued_requests: int = setting(10000, "Most requests that wait, all tenants together.")
    max_queued_per_tenant: int = setting(5000, "Most requests of one tenant that wait.")
    max_unread_kib: int = setting(4096, "Most of one answer that may wait for its client to read it.")
    engine_silence_seconds: float = setting(
        30.0, "An engine that says nothing for this long is taken for lost; longer than any step takes."
    )
    drain_seconds: float = setting(30.0, "How long requests may go on after SIGTERM.")
    # Decoding is bound by memory traffic and prefill by arithmetic: a token of output takes the accelerator about
    # twice as long as a token of a long prompt. The same default as the VTC paper.
    prompt_token_weight: float = setting(1.0, "Charge of a prompt token that was not in the prefix cache.")
    output_token_weight: float = setting(2.0, "Charge of an output token.")
    window_tokens: float = setting(
        2048.0, "How far ahead, in charged tokens, adapters on a device may get of one that is still loading."
    )

    def __post_init__(self) -> None:
        if not self.engines:
            raise ValueError("engines: at least one address is needed")
        if len(set(self.engines)) != len(self.engines):
            raise ValueError("engines: an address is named twice")
        for name in ("max_queued_requests", "max_queued_per_tenant", "max_unread_kib"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1")
        if not (math.isfinite(self.engine_silence_seconds) and self.engine_silence_seconds > 0):
            raise ValueError("engine_silence_seconds: must be a number above 0")
        for name in ("drain_seconds", "prompt_token_weight", "output_token_weight", "window_tokens"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name}: must be a number of at least 0")
        if self.output_token_weight == 0:
            raise ValueError("output_token_weight: must be above 0")
