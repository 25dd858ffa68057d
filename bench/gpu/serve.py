"""The whole engine loop: scheduler, steps launched ahead, sampling, text; no gRPC."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from opentelemetry.context import Context

from engine.answer import Stopping
from engine.loop import EngineLoop
from engine.lora import DeviceAdapter
from engine.messages import Failed, Frame, Install, Loaded, Request, Submit
from engine.model import Base
from engine.sampler import Sampling
from engine.stopping import StopStrings


class Listener:
    """A router's end of the stream."""

    def __init__(self, count: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.first: list[float] = [0.0] * count
        self.failures: list[str] = []
        self.done = threading.Event()
        self._left = count

    def deliver(self, frame: Frame) -> None:
        now = time.perf_counter()
        for output in frame.outputs:
            mine = self.tokens[output.sequence_id]
            if output.token_ids and not mine:
                self.first[output.sequence_id] = now
            mine.extend(output.token_ids)
            if isinstance(output.end, Failed):
                self.failures.append(str(output.end.error))
            self._left -= output.end is not None
        if not self._left:
            self.done.set()


@dataclass(frozen=True)
class Served:
    """Tokens of each request, and how long all of them took, seconds; decode from the last first token on."""

    tokens: list[list[int]]
    seconds: float
    decode_seconds: float


def serve(
    base: Base, adapters: Sequence[DeviceAdapter], requests: Sequence[tuple[list[int], str]], output: int
) -> Served:
    """Answers all requests (prompt, digest) at once, greedily, `output` tokens each; twice, the second time counts."""
    there = threading.Semaphore(0)

    def heard(report: object) -> None:
        if isinstance(report, Loaded):
            there.release()

    loop = EngineLoop(
        base, max_sequences=len(requests), step_tokens=max(512, len(requests)), adapter_bytes=1 << 50,
        prefix_cache=False, report=heard,
    )  # fmt: skip
    loop.start()
    try:
        for adapter in adapters:
            loop.post(Install(adapter))
            there.acquire()
        _burst(loop, requests, output)
        return _burst(loop, requests, output)
    finally:
        loop.stop()


def _burst(loop: EngineLoop, requests: Sequence[tuple[list[int], str]], output: int) -> Served:
    listener = Listener(len(requests))
    stopping = Stopping(output, 0, StopStrings(()), frozenset(), frozenset(), False)
    began = time.perf_counter()
    for number, (prompt, digest) in enumerate(requests):
        request = Request(number, digest, tuple(prompt), Sampling(), stopping, time.monotonic(), Context())
        loop.post(Submit(listener, request))
    if not listener.done.wait(300):
        raise RuntimeError("the engine does not end")
    if listener.failures:
        raise RuntimeError(listener.failures[0])
    ended = time.perf_counter()
    return Served(listener.tokens, ended - began, ended - max(listener.first))
