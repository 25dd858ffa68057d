"""Stands in for Jaeger: OTLP on port 4317, and on port 16686 GET /api/traces/ID in the shape of Jaeger's own answer."""

from __future__ import annotations

import json
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.otlp_collector import Collector, ReceivedSpan


def as_jaeger(spans: list[ReceivedSpan]) -> dict[str, Any]:
    services = sorted({span.service for span in spans})
    return {
        "data": [
            {
                "traceID": spans[0].trace_id,
                "spans": [
                    {
                        "spanID": span.span_id,
                        "operationName": span.name,
                        "processID": span.service,
                        "references": [{"refType": "CHILD_OF", "spanID": span.parent_id}] if span.parent_id else [],
                        "startTime": span.start // 1000,
                        "duration": (span.end - span.start) // 1000,
                    }
                    for span in spans
                ],
                "processes": {service: {"serviceName": service} for service in services},
            }
        ]
    }


def main() -> None:
    collector = Collector("0.0.0.0:4317")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            spans = collector.spans(self.path.removeprefix("/api/traces/"))
            self.send_response(200 if spans else 404)
            self.end_headers()
            self.wfile.write(json.dumps(as_jaeger(spans) if spans else {"data": None}).encode())

        def log_message(self, *_: Any) -> None:
            """Not one line for each question."""

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    ThreadingHTTPServer(("0.0.0.0", 16686), Handler).serve_forever()


if __name__ == "__main__":
    main()
