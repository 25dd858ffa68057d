"""Runs the real loop in this process and collects what a router would receive."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from opentelemetry.context import Context

from engine.adapters import reader_for
from engine.answer import Stopping
from engine.config import Settings
from engine.loop import EngineLoop
from engine.messages import Failed, Finished, Frame, Install, Output, Report, Request, Submit
from engine.model import Base, load_base
from engine.rows import ArtifactReader
from engine.sampler import Sampling
from engine.stopping import StopStrings
from tests.engine.tiny import TinyAdapter


@dataclass
class Collected:
    """The joined outputs of one sequence."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    end: Finished | Failed | None = None

    @property
    def finished(self) -> Finished:
        assert isinstance(self.end, Finished), self.end
        return self.end

    @property
    def failed(self) -> Failed:
        assert isinstance(self.end, Failed), self.end
        return self.end


class Router:
    """A connection that remembers everything."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.sequences: defaultdict[int, Collected] = defaultdict(Collected)
        self._changed = threading.Condition()

    def deliver(self, frame: Frame) -> None:
        with self._changed:
            self.frames.append(frame)
            for output in frame.outputs:
                collected = self.sequences[output.sequence_id]
                collected.text += output.text
                collected.token_ids += output.token_ids
                collected.outputs.append(output)
                collected.end = output.end or collected.end
            self._changed.notify_all()

    def wait(self, *ids: int, timeout: float = 60) -> None:
        """Until these sequences have ended."""
        with self._changed:
            done = self._changed.wait_for(lambda: all(self.sequences[i].end for i in ids), timeout)
        assert done, {i: self.sequences[i].end for i in ids}

    def wait_for_tokens(self, sequence_id: int, count: int, timeout: float = 60) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.sequences[sequence_id].token_ids) >= count, timeout)


def request(prompt: list[int], adapter: str = "", sequence_id: int = 1, **given: Any) -> Request:
    """A request; keywords go to Sampling or Stopping by name, or to the request itself."""
    stopping: dict[str, Any] = {
        "max_output_tokens": 16,
        "min_output_tokens": 0,
        "strings": StopStrings(given.pop("stop", ())),
        "stop_token_ids": frozenset(),
        "eos_ids": frozenset({0}),
        "include_stop": False,
    }
    prompt_logprobs, urgent = given.pop("prompt_logprobs", False), given.pop("urgent", False)
    stopping |= {key: given.pop(key) for key in list(given) if key in stopping}
    return Request(
        sequence_id, adapter, tuple(prompt), Sampling(**given), Stopping(**stopping), time.monotonic(), Context(),
        prompt_logprobs, urgent=urgent,
    )  # fmt: skip


class InProcess:
    """A loop over a tiny base."""

    def __init__(
        self, base: Base, max_sequences: int = 16, step_tokens: int = 64, *, prefix_cache: bool = True
    ) -> None:
        self.base = base
        self.reports: list[Report] = []
        self.loop = EngineLoop(
            base,
            max_sequences=max_sequences,
            step_tokens=step_tokens,
            adapter_bytes=1 << 30,
            prefix_cache=prefix_cache,
            report=self.reports.append,
        )
        self.loop.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.stop()

    def install(self, *adapters: TinyAdapter) -> None:
        for adapter in adapters:
            self.loop.post(Install(reader(self.base, adapter.path.parent).read(adapter.digest, str(adapter.path))))

    def run(self, *requests: Request, timeout: float = 60) -> list[Collected]:
        """Submits all at once, waits for all, in order; sequence ids are given here."""
        router = Router()
        ids = range(1, len(requests) + 1)
        for number, wanted in zip(ids, requests, strict=True):
            self.loop.post(Submit(router, replace(wanted, sequence_id=number)))
        router.wait(*ids, timeout=timeout)
        return [router.sequences[number] for number in ids]


def reader(base: Base, root: Path) -> ArtifactReader:
    return reader_for(base.runner.adapters, os.path.realpath(root), base.projections, torch.float32, 512)


def tiny_base(folder: Path, **settings: Any) -> Base:
    return load_base(Settings(model=str(folder), device="cpu", threads=1, **({"kv_memory_mib": 16} | settings)))
