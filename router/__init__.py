"""Public API, fair queues, dispatch to engines. Pure Python: nothing here reaches torch or a Rust extension."""
