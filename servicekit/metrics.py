"""Prometheus metrics over HTTP. Each service declares its metrics in its own metrics.py."""

from __future__ import annotations

from prometheus_client import start_http_server

from servicekit.errors import StartupError


def serve_metrics(listen: str) -> None:
    """Serves /metrics on "host:port" in a thread; an empty address serves nothing."""
    if not listen:
        return
    host, _, port = listen.rpartition(":")
    try:
        start_http_server(int(port), addr=host or "127.0.0.1")
    except (OSError, ValueError) as error:
        raise StartupError(f"cannot serve metrics on {listen}: {error}") from None
