"""Settings of the engine process."""

from __future__ import annotations

from dataclasses import dataclass

from servicekit.settings import setting

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Settings:
    """The engine: one base model, the step loop, adapters on the device."""

    listen: str = setting("127.0.0.1:50061", "Address to listen on.")
    model: str = setting("", "Base model: a folder, or owner/name on the Hugging Face hub.")
    cache: str = setting("127.0.0.1:50071", "Address of the node's cache; empty serves the base only.")
    engine_id: str = setting("", "Name of this engine; empty makes one up.")
    dtype: str = setting("auto", "Number type of weights and activations: auto is float32 on CPU, bfloat16 on GPU.")
    device: str = setting("auto", "Device to run on: auto takes a GPU when there is one.")
    max_sequences: int = setting(32, "Most sequences that run at the same time.")
    step_tokens: int = setting(512, "Most tokens in one step, decode and prefill together.")
    context_length: int = setting(0, "Most tokens of prompt and answer together; 0 takes the model's.")
    kv_memory_mib: int = setting(
        0, "Memory for keys and values; 0 takes a share of what is free. On CPU half of it speeds up decode."
    )
    prefix_cache: bool = setting(True, "Keep keys and values of prompts and answers for requests that begin the same.")
    adapter_memory_mib: int = setting(1024, "Device memory for adapters.")
    max_rank: int = setting(512, "Largest adapter rank to accept.")
    host_tier: str = setting("", "Folder artifacts must lie in; empty is the cache's default in shared memory.")
    threads: int = setting(0, "CPU threads of a step; 0 is torch's default.")
    metrics_listen: str = setting("", "Address to serve Prometheus metrics on; empty serves none.")
    drain_seconds: int = setting(30, "Longest time running sequences get to finish after SIGTERM.")

    def __post_init__(self) -> None:
        for name in ("max_sequences", "step_tokens", "adapter_memory_mib", "max_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in ("context_length", "kv_memory_mib", "threads", "drain_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}")
        if self.step_tokens < self.max_sequences:
            raise ValueError("step_tokens must be at least max_sequences, or a step could not decode every sequence")
