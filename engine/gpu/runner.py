"""Steps on a GPU: written into one buffer, brought over by one copy, computed without a look back.

Steps of nothing but decode are graphs, by their padded shape, by what the adapters of the step need, and by how tokens
are chosen. Any other step is the same pass without a graph.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from engine.batch import Batch
from engine.flight import Flight, Landed
from engine.gpu import sampling, shape
from engine.gpu.attention import Decoded, KernelStep, Prefilled
from engine.gpu.graphs import CudaGraphs, DirectGraphs, Graphs
from engine.gpu.sampling import BROKEN, Asked, Mode
from engine.gpu.shape import Shape
from engine.gpu.upload import HOSTS, Tables, Upload, event
from engine.interrupts import Stop, never
from engine.kernels.attention.launch import prefill_rows, splits_for
from engine.linear import ActiveAdapters
from engine.live import Live
from engine.lora import Arranger, DeviceSegment, StepDeltas
from engine.outcome import Outcome, read_logits
from engine.pool import KvPool
from engine.sampler import Sampled, SampleRow
from engine.scheduler import Row
from engine.sequence import UNKNOWN
from engine.sequence import Sequence as EngineSequence


@runtime_checkable
class Adapters(Arranger, Protocol):
    """The adapters of steps, see `engine.rank_store`."""

    def bucket(self, segments: Sequence[DeviceSegment]) -> Hashable:
        """The shape of what a graph needs for these segments."""

    def prepare(self, segments: Sequence[DeviceSegment], bucket: Any) -> StepDeltas:
        """Writes the segments where a graph of that bucket looks for them."""

    def wait(self, segments: Sequence[DeviceSegment]) -> None:
        """Lets the current stream wait for copies of these adapters that are under way."""


@dataclass
class GpuRunner:
    """The model, its keys and values, and its adapters. Used by one thread at a time.

    Args:
        max_rows: most rows of a step.
        context_length: most tokens of a sequence.
    """

    model: Any
    pool: KvPool
    active: ActiveAdapters
    adapters: Adapters
    max_rows: int
    context_length: int
    graphs: Graphs = field(init=False)

    def __post_init__(self) -> None:
        self._device: torch.device = self.model.device
        self._vocab_size: int = self.model.get_input_embeddings().num_embeddings
        is_cuda = self._device.type == "cuda"
        self.graphs = CudaGraphs() if is_cuda else DirectGraphs()
        sizes = [max(layer.key_size, layer.value_size) for layer in self.pool.layers.values()]
        self._m = prefill_rows(max(sizes), self.pool.dtype.itemsize)
        most = shape.rows_bucket(self.max_rows)
        largest = Shape(most, most, most, splits_for(self.context_length))
        self._padded = Upload(largest.layout.total, self._device)
        # Steps without graphs have a buffer of their own, which may be replaced by a larger one.
        self._exact = Upload(1024, self._device)
        self._tables = Tables()
        self._landing = [torch.zeros(most, dtype=torch.int32, device="cpu", pin_memory=is_cuda) for _ in range(HOSTS)]
        self._chosen = torch.zeros(most, dtype=torch.int32, device=self._device)
        self._places: dict[EngineSequence, int] = {}
        self._turn = 0

    @torch.inference_mode()
    def run(self, batch: Batch, segments: list[DeviceSegment], stop: Stop = never) -> torch.Tensor:
        """Float32 logits of batch.sampled_tokens, then of batch.scored_tokens, on the device. Nothing is given up here."""
        return self.compute(batch, segments, None)

    @torch.inference_mode()
    def launch(self, batch: Batch, segments: list[DeviceSegment], lives: Mapping[EngineSequence, Live]) -> Flight:
        """See `flight.Launcher`."""
        rows = [lives[row.sequence].sample_row() for row in batch.sampled]
        if batch.scored or not all(map(sampling.is_plain, rows)):
            logits = self.compute(batch, segments, None)
            self._places = {}
            # A graph's answer is its own; the sampler writes into what it gets.
            return Landed(read_logits(batch, logits.clone(), lives))
        chosen = self.compute(batch, segments, rows)
        self._places = {row.sequence: place for place, row in enumerate(batch.sampled)}
        self._chosen[: len(chosen)].copy_(chosen)
        return self._depart(chosen, batch.sampled)

    def _depart(self, chosen: torch.Tensor, rows: list[Row]) -> Flight:
        self._turn = (self._turn + 1) % HOSTS
        landing = self._landing[self._turn][: len(rows)]
        landing.copy_(chosen[: len(rows)], non_blocking=True)
        arrived = None
        if self._device.type == "cuda":
            arrived = event()
            arrived.record()
        return _Flight(rows, landing, arrived)

    def compute(self, batch: Batch, segments: list[DeviceSegment], rows: list[SampleRow] | None) -> torch.Tensor:
        """Tokens of the rows, [at least as many], or without rows the logits."""
        mode = Mode.LOGITS if rows is None else sampling.mode_of(rows)
        padded = shape.decode_shape(batch) if len(batch.singles) <= self.max_rows else None
        upload = self._padded if padded else self._exact
        form = padded or shape.exact_shape(batch, self._m)
        if form.layout.total > upload.capacity:
            upload = self._exact = Upload(form.layout.total * 2, self._device)
        host = upload.begin()
        shape.write(host, form, batch, self._sources(batch), self._tables, self._m)
        if rows:
            sampling.write(host, form.layout.places, rows, self._vocab_size)
        upload.send(form.layout.total)
        if padded is None:
            return self._body(form, upload, mode, self.adapters.arrange(segments))
        if segments:
            self.adapters.wait(segments)
        bucket = self.adapters.bucket(segments) if segments else None
        deltas = [self.adapters.prepare(segments, bucket)] if segments else []
        answer = self.graphs.run((padded, bucket, mode), lambda: self._body(form, upload, mode, deltas))
        return answer[: len(batch.sampled)]

    def _sources(self, batch: Batch) -> list[int]:
        """Where tokens that are not known yet come from. Only a last token can be one, so its row yields the next."""
        sources = [shape.HERE] * len(batch.tokens)
        for row, index in zip(batch.sampled, batch.sampled_tokens, strict=True):
            if batch.tokens[index] == UNKNOWN:
                sources[index] = self._places[row.sequence]
        return sources

    def _body(self, form: Shape, upload: Upload, mode: Mode, deltas: Sequence[StepDeltas]) -> torch.Tensor:
        """The pass itself. Reads the upload and the tokens of the step before, so it can be repeated."""
        views = upload.views(form.layout)
        source = views["source"]
        before = self._chosen.index_select(0, source.clamp(min=0))
        tokens = torch.where(source >= 0, before, views["tokens"])
        self.active.deltas = deltas
        try:
            output = self.model(
                input_ids=tokens.long()[None],
                position_ids=views["positions"].long()[None],
                use_cache=False,
                logits_to_keep=views["kept"].long(),
                paged=self._attention(form, views),
            )
        finally:
            self.active.deltas = ()
        logits: torch.Tensor = output.logits[0].float()
        return logits if mode is Mode.LOGITS else sampling.choose(logits, Asked.of(views), mode)

    def _attention(self, form: Shape, views: dict[str, torch.Tensor]) -> KernelStep:
        decoded = prefilled = None
        if form.singles:
            tables = views["tables"].view(form.singles, form.single_blocks)
            decoded = Decoded(tables, views["rows"], views["lengths"], form.splits)
        if form.chunks:
            tables = views["chunk_tables"].view(form.chunks, form.chunk_blocks)
            tiles, chunks = views["tiles"].view(form.tiles, 2), views["chunks"].view(form.chunks, 3)
            prefilled = Prefilled(tables, tiles, chunks, self._m)
        return KernelStep(self.pool, views["slots"], decoded, prefilled)


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step whose tokens are on their way to the host."""

    rows: list[Row]
    landing: torch.Tensor
    arrived: torch.cuda.Event | None
    may_stay: bool = True

    def land(self) -> list[Outcome]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return [
            Outcome(row.sequence, is_broken=True) if token == BROKEN else Outcome(row.sequence, Sampled(token, None))
            for row, token in zip(self.rows, self.landing.tolist(), strict=True)
        ]
