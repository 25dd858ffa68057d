"""Bursts through the engine's own loop in this process: no gRPC, no router, no cache."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path

import torch
from opentelemetry.context import Context

from bench.engine.adapters import write_artifact
from bench.engine.workload import OUTPUT_TOKENS, Burst, Case, prompts
from engine.answer import Stopping
from engine.loop import EngineLoop
from engine.messages import Failed, Frame, Install, Loaded, Report, Request, Submit
from engine.model import Base
from engine.rows import ArtifactReader
from engine.sampler import Sampling
from engine.stopping import StopStrings

ADAPTER_BYTES = 8 << 30


class _Listener:
    """A router's end of the stream that notes when every token came."""

    def __init__(self, count: int) -> None:
        self.arrivals: list[list[float]] = [[] for _ in range(count)]
        self.failures: list[str] = []
        self._left = count
        self.done = threading.Event()

    def deliver(self, frame: Frame) -> None:
        now = time.perf_counter()
        for output in frame.outputs:
            self.arrivals[output.sequence_id].extend([now] * len(output.token_ids))
            if isinstance(output.end, Failed):
                self.failures.append(str(output.end.error))
            if output.end is not None:
                self._left -= 1
        if not self._left:
            self.done.set()


class InProcess:
    """An engine loop with `adapters` random adapters on its device. Use as a context."""

    def __init__(self, base: Base, adapters: int, rank: int, *, max_sequences: int, step_tokens: int) -> None:
        self._base, self._adapters, self._rank = base, adapters, rank
        self._loaded = threading.Semaphore(0)
        self._loop = EngineLoop(
            base,
            max_sequences=max_sequences,
            step_tokens=step_tokens,
            adapter_bytes=ADAPTER_BYTES,
            report=self._on_report,
        )

    def __enter__(self) -> InProcess:
        self._loop.start()
        dtype: torch.dtype = getattr(torch, self._base.dtype)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(os.path.realpath(name))
            reader = ArtifactReader(
                str(folder), self._base.projections, dtype, torch.device(self._base.device), self._rank
            )
            for number in range(self._adapters):
                path = write_artifact(folder, number, self._base.targets, self._rank, dtype)
                self._loop.post(Install(reader.read(path.name, str(path))))
                path.unlink()
        for _ in range(self._adapters):
            self._loaded.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.stop()

    def _on_report(self, report: Report) -> None:
        if isinstance(report, Loaded):
            self._loaded.release()

    def burst(self, case: Case, seed: int, output_tokens: int = OUTPUT_TOKENS) -> Burst:
        """One burst of a case; raises RuntimeError when a request fails."""
        listener = _Listener(case.concurrency)
        stopping = Stopping(output_tokens, 0, StopStrings(()), frozenset(), frozenset(), False)
        wanted = zip(prompts(case.concurrency, self._base.vocab_size, seed), case.assign(seed), strict=True)
        began = time.perf_counter()
        for number, (prompt, adapter) in enumerate(wanted):
            digest = "" if adapter is None else f"random-{adapter:04d}"
            request = Request(number, digest, tuple(prompt), Sampling(), stopping, time.monotonic(), Context())
            self._loop.post(Submit(listener, request))
        listener.done.wait()
        if listener.failures:
            raise RuntimeError(listener.failures[0])
        ended = max(times[-1] for times in listener.arrivals)
        return Burst(ended - began, [[moment - began for moment in times] for times in listener.arrivals])
