"""Asks a server whether it would answer a request: exit code 0 when it would, 1 when not.

    python -m servicekit.healthcheck 127.0.0.1:50051

For containers, whose health is the exit code of a command; it loads little, since it runs every few seconds.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def check(address: str, timeout: float) -> str:
    """What is wrong with the server at an address, in one line; empty when it is SERVING."""
    with grpc.insecure_channel(address) as channel:
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            response = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.RpcError as error:
            return f"{address}: {error.code().name}: {error.details()}"
    if response.status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    return f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m servicekit.healthcheck", description="Asks a server's health.")
    parser.add_argument("address", help="host:port or unix:path of the server")
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds to wait for an answer (default: 2)")
    options = parser.parse_args()
    trouble = check(options.address, options.timeout)
    if trouble:
        sys.stderr.write(trouble + "\n")
    return 1 if trouble else 0


if __name__ == "__main__":
    sys.exit(main())
