"""One of several modelled engines: its steps and its link are made up, what is on its device is decided by the cache's plan."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping

from bench.fairness.engine import Engine, Job, Model, Running
from cache.artifact import BaseDescription
from cache.costs import cost_to_device
from cache.engines import Engine as Attached
from cache.engines import Worth
from cache.residency import DeviceMove, DevicePlace, Place
from cache.tiers import ArtifactKey
from router.fleet import Engine as Connection
from router.messages import Credit, Finished, FinishReason, Output, Sequence, Started

READY = Credit(None, is_draining=False)
_BASE = BaseDescription(name="model", digest="", dtype="float16", max_rank=64, modules={})


class Machine(Connection):
    """What the router takes for a connection to an engine. Times in seconds.

    A sequence whose adapter is on its way waits by itself; one whose adapter is there begins as soon as one of the places is
    free. Adapters come from the node's disk, one after the other.

    Args:
        sizes: bytes of every adapter.
        device_bytes: room for adapters on the device.
        job: tells what a request asks for.

    Attributes:
        device: the cache's state of this engine.
        is_stepping: a step is under way.
        served: tokens computed, of prompts and answers.
        moved_bytes: loaded onto the device so far, and `loads`, how many adapters that were.
        news: adapters that came or went since they were last told of.
    """

    def __init__(
        self, number: int, model: Model, sizes: Mapping[str, int], device_bytes: int, job: Callable[[bytes], Job]
    ) -> None:
        self.engine_id = self.address = f"engine-{number}"
        self.max_sequences = model.places
        self.is_draining = False
        self.engine = Engine(model)
        self.device = Attached(self.engine_id, _BASE, device_bytes)
        self.is_stepping = False
        self.served = self.moved_bytes = self.loads = 0
        self.news: set[str] = set()
        self.now = 0.0
        self._job = job
        self._worth = {digest: Worth(size, cost_to_device(Place.DISK, size)) for digest, size in sizes.items()}
        # Sequences that have not begun, in the order they came.
        self._waiting: dict[int, Running] = {}
        self._in_use: Counter[str] = Counter()
        self._begun: Counter[str] = Counter()
        self._link: deque[str] = deque()
        self._arrives_at: float | None = None
        self._is_changed = False

    def submit(self, sequence: Sequence) -> None:
        job = self._job(sequence.request)
        self._waiting[sequence.sequence_id] = Running(job, sequence.sequence_id, self.now)
        self._use(job.adapter, 1)
        if self.device.place(job.adapter) is not DevicePlace.DEVICE:
            self.device.want(job.adapter)

    def cancel(self, sequence_id: int) -> None:
        found = self._waiting.pop(sequence_id, None)
        if found is None:
            found = next((one for one in self.engine.running if one.key == sequence_id), None)
            if found is None:
                return
            self.engine.running.remove(found)
        self._use(found.job.adapter, -1)

    def changed(self) -> None:
        """Something is expected that was not."""
        self._is_changed = True

    def plan(self, now: float) -> float | None:
        """Goes on with loads and evictions; the time at which a load that begins now ends."""
        self.now = now
        if not self._is_changed:
            return None
        self._is_changed = False
        self.device.use(frozenset(self._in_use), self._begun, self._appraise, now)
        self._begun.clear()
        self.device.settle(now)
        while True:
            decided = self.device.plan((), self._appraise)
            for digest in decided.loads:
                self.device.move(digest, DeviceMove.LOAD, self._worth[digest].size_bytes, now)
                self._link.append(digest)
            for digest in decided.evictions:
                self.device.move(digest, DeviceMove.EVICT)
                self.device.move(digest, DeviceMove.EVICTED)
                del self.engine.loaded[digest]
                self.news.add(digest)
            if not decided.evictions:
                break
        return self._begin_load(now)

    def arrived(self, now: float) -> float | None:
        """The load under way has ended; the time at which the next one will."""
        digest = self._link.popleft()
        self._arrives_at = None
        self.device.move(digest, DeviceMove.LOADED)
        self.engine.loaded[digest] = None
        self.loads += 1
        self.moved_bytes += self._worth[digest].size_bytes
        self.news.add(digest)
        self._is_changed = True
        return self._begin_load(now)

    def begin(self, now: float) -> tuple[float, list[Output]] | None:
        """Runs a step: its duration and what it says at its end; None when there is nothing to run."""
        self.now = now
        outputs = self._admit(now)
        if not self.engine.running:
            return None
        before = sum(one.prefilled for one in self.engine.running)
        seconds, _, ready = self.engine.step()
        self.served += len(ready) + sum(one.prefilled for one in self.engine.running) - before
        for one in ready:
            output = outputs.setdefault(_number(one), _output(one))
            output.token_ids = (0,)
            if not one.left:
                output.end = Finished(FinishReason.EOS, "", one.done, 0)
        return seconds, list(outputs.values())

    def end(self) -> None:
        """The step is over: those that are answered leave."""
        for one in [one for one in self.engine.running if not one.left]:
            self.engine.running.remove(one)
            self._use(one.job.adapter, -1)

    @property
    def resident(self) -> frozenset[str]:
        return frozenset(self.engine.loaded)

    def _admit(self, now: float) -> dict[int, Output]:
        outputs: dict[int, Output] = {}
        for number, one in list(self._waiting.items()):
            if len(self.engine.running) >= self.max_sequences:
                break
            if self.engine.is_resident(one.job.adapter):
                del self._waiting[number]
                self.engine.running.append(one)
                outputs[number] = _output(one)
                outputs[number].started = Started(one.job.prompt, 0, now - one.joined)
        return outputs

    def _use(self, digest: str, count: int) -> None:
        was = self._in_use[digest]
        self._in_use[digest] += count
        self._begun[digest] += max(0, count)
        if not self._in_use[digest]:
            del self._in_use[digest]
        if not was or was + count == 0:
            self._is_changed = True

    def _begin_load(self, now: float) -> float | None:
        if self._arrives_at is not None or not self._link:
            return None
        self._arrives_at = now + self._worth[self._link[0]].cost
        return self._arrives_at

    def _appraise(self, key: ArtifactKey) -> Worth:
        return self._worth[key.digest]


def _number(running: Running) -> int:
    assert isinstance(running.key, int)
    return running.key


def _output(running: Running) -> Output:
    return Output(_number(running), "", (), (), (), None, None)
