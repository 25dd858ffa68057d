"""What the engine tells Prometheus."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

running_sequences = Gauge("loraplex_engine_running_sequences", "Sequences that take part in steps.")
waiting_sequences = Gauge("loraplex_engine_waiting_sequences", "Sequences that wait for room.")
loading_sequences = Gauge("loraplex_engine_loading_sequences", "Sequences that wait for their adapter.")
free_kv_blocks = Gauge("loraplex_engine_free_kv_blocks", "KV blocks that are free, idle cached ones included.")
cached_kv_blocks = Gauge("loraplex_engine_cached_kv_blocks", "KV blocks whose prefix can be found, in use or idle.")
resident_adapters = Gauge("loraplex_engine_resident_adapters", "Adapters on the device.")
adapter_bytes = Gauge("loraplex_engine_adapter_bytes", "Device memory held by adapters.")

steps = Counter("loraplex_engine_steps", "Forward passes.")
interrupted_steps = Counter(
    "loraplex_engine_interrupted_steps", "Forward passes that were given up for an urgent prompt and begun again."
)
failed_steps = Counter("loraplex_engine_failed_steps", "Forward passes that raised.")
prompt_tokens = Counter("loraplex_engine_prompt_tokens", "Prompt tokens computed, recomputation included.")
cached_tokens = Counter("loraplex_engine_prefix_cache_hit_tokens", "Tokens found in the prefix cache, not computed.")
evicted_kv_blocks = Counter("loraplex_engine_prefix_cache_evictions", "KV blocks whose prefix made room for another.")
output_tokens = Counter("loraplex_engine_output_tokens", "Tokens produced.")
preemptions = Counter("loraplex_engine_preemptions", "Sequences that lost their KV blocks and were computed again.")
step_seconds = Histogram(
    "loraplex_engine_step_seconds",
    "Duration of a step.",
    buckets=(0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12),
)
