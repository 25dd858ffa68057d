"""What a stack of compose.yaml must do, seen from outside: stream, answer through an adapter, leave a trace, be measured."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
import urllib.error
import urllib.request
from typing import Any

import grpc

from demo.catalog import load_catalog
from loraplex.v1 import generation_pb2, generation_pb2_grpc

# The adapter is on no device before the first request, so that every span there can be is in its trace.
SPANS = {"loraplex.receive", "queue", "dispatch", "adapter.load device", "prefill", "decode"}
SERVICES = {"loraplex-router", "loraplex-engine", "loraplex-cache"}
SECONDS = 60


class Failed(Exception):
    """What the stack did not do."""


def stream(router: str, adapter_id: str, prompt: str, trace_id: str) -> generation_pb2.Completion:
    """Streams an answer within a trace of ours; returns what the last message says."""
    request = generation_pb2.GenerateRequest(
        adapter_id=adapter_id,
        chat=generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content=prompt)]),
        stopping=generation_pb2.StoppingParams(max_output_tokens=32),
    )
    metadata = (("traceparent", f"00-{trace_id}-{secrets.token_hex(8)}-01"),)
    began, first, text, completions = time.monotonic(), 0.0, "", []
    with grpc.insecure_channel(router) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        for response in stub.StreamGenerate(request, metadata=metadata, timeout=SECONDS):
            first = first or time.monotonic() - began
            text += response.delta.text
            if response.HasField("completion"):
                completions.append(response.completion)
    if len(completions) != 1 or not text:
        raise Failed(f"{adapter_id or 'base'}: {len(completions)} completions, text {text!r}")
    completion = completions[0]
    report(
        f"{adapter_id or '(base)'}: {text.strip()!r}; first token {first:.2f} s, {completion.usage.output_tokens} tokens"
        f" in {time.monotonic() - began:.2f} s"
    )
    return completion


def find_trace(jaeger: str, trace_id: str) -> None:
    """Waits until Jaeger has the spans of all three services, each below one that is there or below our own."""
    began, spans, services = time.monotonic(), list[Any](), set[str]()
    while time.monotonic() - began < SECONDS:
        answer = ask(f"http://{jaeger}/api/traces/{trace_id}")
        for trace in (answer or {}).get("data") or []:
            spans = trace["spans"]
            services = {trace["processes"][span["processID"]]["serviceName"] for span in spans}
        if {span["operationName"] for span in spans} >= SPANS and services >= SERVICES:
            break
        time.sleep(0.5)
    else:
        raise Failed(
            f"the trace {trace_id} has {sorted(span['operationName'] for span in spans)} of {sorted(services)}"
        )
    ids = {span["spanID"] for span in spans}
    parents = {span["operationName"]: [reference["spanID"] for reference in span["references"]] for span in spans}
    orphans = [name for name, above in parents.items() if name != "loraplex.receive" and not ids.intersection(above)]
    if orphans:
        raise Failed(f"the trace {trace_id} has spans without a parent: {orphans}")
    report(f"trace found after {time.monotonic() - began:.1f} s: {len(spans)} spans of {', '.join(sorted(services))}")


def find_metrics(prometheus: str) -> None:
    """Waits until Prometheus has scraped all three services."""
    began, health = time.monotonic(), dict[str, str]()
    while time.monotonic() - began < SECONDS:
        answer = ask(f"http://{prometheus}/api/v1/targets") or {"data": {"activeTargets": []}}
        health = {target["labels"]["instance"]: target["health"] for target in answer["data"]["activeTargets"]}
        if len(health) == len(SERVICES) and set(health.values()) == {"up"}:
            report(f"metrics scraped from {', '.join(sorted(health))}")
            return
        time.sleep(0.5)
    raise Failed(f"Prometheus sees {health}")


def ask(url: str) -> Any:
    """The JSON at a URL; None when there is none yet."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return json.load(response)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None


def report(line: str) -> None:
    sys.stdout.write(f"    {line}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("router", "jaeger", "prometheus"):
        parser.add_argument(f"--{name}", required=True, help="host:port")
    options = parser.parse_args()
    trace_id = secrets.token_hex(16)
    catalog = load_catalog()
    try:
        stream(options.router, "", catalog.shared_prompt, secrets.token_hex(16))
        for number, entry in enumerate(catalog.adapters):
            completion = stream(options.router, entry.id, entry.prompt, secrets.token_hex(16) if number else trace_id)
            if not completion.adapter_digest:
                raise Failed(f"{entry.id}: no digest in {completion}")
        find_trace(options.jaeger, trace_id)
        find_metrics(options.prometheus)
    except (Failed, grpc.RpcError) as error:
        report(f"FAILED: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
