"""Metrics of the router."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

# From a token's time on an accelerator to the patience of a batch job.
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)

QUEUED = Gauge("loraplex_router_queued_requests", "Requests that wait for an engine.")
RUNNING = Gauge("loraplex_router_running_requests", "Requests that are on an engine.")
ENGINES = Gauge("loraplex_router_connected_engines", "Engines that can take requests.")
REQUESTS = Counter("loraplex_router_requests_total", "Requests that have ended, by status code.", ["status"])
OUTPUT_TOKENS = Counter("loraplex_router_output_tokens_total", "Tokens received from engines.")
MIGRATIONS = Counter("loraplex_router_migrations_total", "Requests that another engine took over.")
QUEUE_SECONDS = Histogram("loraplex_router_queue_seconds", "From arrival to dispatch.", buckets=_SECONDS)
FIRST_TOKEN_SECONDS = Histogram("loraplex_router_first_token_seconds", "From arrival to first token.", buckets=_SECONDS)
