"""Passes captured once by their shape and replayed: on a GPU the host says one thing per step instead of a thousand.

What is replayed is the first pass of its shape: it reads and writes the same memory every time. So whatever differs
from step to step must lie in buffers that do not move. `DirectGraphs` keeps to that without a GPU: it calls the pass
it was given first, whatever it is given later, so that a test sees what was not in a buffer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch

_log = logging.getLogger(__name__)

Pass = Callable[[], torch.Tensor]


class Graphs(Protocol):
    """Runs passes by their shape."""

    def __len__(self) -> int:
        """How many shapes there are."""

    def run(self, shape: Hashable, body: Pass) -> torch.Tensor:
        """What the first pass given for this shape answers on what is in its buffers now."""


class CudaGraphs:
    """CUDA graphs, all in one pool of memory: they run one after the other. Used by one thread at a time.

    A pass is run twice before it is captured, the second time in the graph: it must be one that can be repeated.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool: Any = None
        self._is_refused = False

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, shape: Hashable, body: Pass) -> torch.Tensor:
        if self._is_refused:
            return body()
        if shape not in self._graphs:
            try:
                self._graphs[shape] = self._capture(body)
            except RuntimeError as error:
                # A model that looks at numbers on the host in its forward pass; it runs, only slower.
                _log.warning("steps cannot be captured and run without graphs: %s", str(error).splitlines()[0])
                self._is_refused = True
                return body()
        graph, answer = self._graphs[shape]
        graph.replay()
        return answer

    def _capture(self, body: Pass) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        # Once by itself: kernels are compiled, libraries choose theirs, none of which can happen in a capture.
        body()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads copy adapters meanwhile: what they do is not this graph's.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            answer = body()
        if self._pool is None:
            self._pool = graph.pool()
        return graph, answer


class DirectGraphs:
    """What CudaGraphs does, without capturing anything."""

    def __init__(self) -> None:
        self._passes: dict[Hashable, Pass] = {}

    def __len__(self) -> int:
        return len(self._passes)

    def run(self, shape: Hashable, body: Pass) -> torch.Tensor:
        return self._passes.setdefault(shape, body)()
