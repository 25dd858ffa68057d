"""THE engine loop: inbox, schedule, run, sample, emit.

It has a thread of its own and is the only owner of sequences, KV blocks and adapter rows. Others hand it messages with
`post`; it answers through `Connection.deliver` (one frame per router and step) and, to the cache, through `report`.
While there is nothing to do it sleeps on the inbox.

Where a device can compute while the host thinks, a step is launched before the one before it has been read: the loop
schedules it without knowing the last tokens, which the device knows. What a step computes for a sequence that turns out
to have ended is dropped; nobody else can have read it, as steps follow each other on the device.

Where a step is computed at once, it is given up when something urgent comes in; see `engine.interrupts`.

An error in a step ends the sequences that cause it and nothing else: what is left of the step is run without them.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

import torch

from engine import metrics
from engine.batch import build_batch
from engine.blocks import BlockPool
from engine.errors import AdapterRemoved, AnswerOver, BadLogits, BlocksCorrupt, DeviceFull, StepFailed
from engine.flight import Flight, Launcher, Waiting
from engine.interrupts import Interrupted, Interrupts
from engine.isolation import judge
from engine.live import Live, open_live
from engine.lora import DeviceSegment
from engine.messages import (
    Cancel,
    Connection,
    Deny,
    Evict,
    Evicted,
    Failed,
    Frame,
    Hangup,
    Install,
    Load,
    Loaded,
    LoadFailed,
    Message,
    Output,
    Report,
    Submit,
    Usage,
)
from engine.model import Base
from engine.outcome import Outcome
from engine.rows import AdapterRows
from engine.scheduler import Row, Scheduler, Step
from engine.sequence import Sequence, State
from servicekit.errors import ServiceError

_log = logging.getLogger(__name__)

# How often the cache is told how many sequences have begun, when nothing else is to be said.
TELL_SECONDS = 1.0


class EngineLoop:
    """Runs the steps of one base.

    Args:
        base: the loaded model; used by the loop's thread alone from `start` on.
        max_sequences: most that run at the same time.
        step_tokens: most tokens of one step.
        adapter_bytes: device memory for adapters.
        prefix_cache: whether sequences share the blocks of equal prefixes.
        report: takes reports for the cache; called on the loop's thread, returns at once.
    """

    def __init__(
        self,
        base: Base,
        *,
        max_sequences: int,
        step_tokens: int,
        adapter_bytes: int,
        prefix_cache: bool = True,
        report: Callable[[Report], None] = lambda _: None,
    ) -> None:
        self._base = base
        self._report = report
        self._inbox: SimpleQueue[Message | None] = SimpleQueue()
        self._scheduler = Scheduler(BlockPool(base.block_count), max_sequences, step_tokens, prefix_cache=prefix_cache)
        self._rows = AdapterRows(adapter_bytes)
        self._live: dict[Sequence, Live] = {}
        self._by_id: dict[tuple[Connection, int], Live] = {}
        self._in_use: Counter[str] = Counter()
        self._usage = Usage()
        # Sequences by adapter that have begun since the cache was told, and when that was.
        self._begun: Counter[str] = Counter()
        self._told_at = 0.0
        self._outputs: defaultdict[Connection, list[Output]] = defaultdict(list)
        self._arrivals = 0
        self._step = 0
        self._stopping = False
        self._interrupts = Interrupts()
        # Whether something urgent has come in that the step which runs does not know of; and whether that may be given up.
        self._is_pressed = False
        self._may_stop = False
        self._launcher: Launcher = base.launcher or Waiting(base.runner, self._should_stop)
        # The step that was launched and is not over, if any.
        self._flight: Flight | None = None
        self._handlers: dict[type, Callable[[Any], None]] = {
            Submit: self._on_submit,
            Cancel: self._on_cancel,
            Hangup: self._on_hangup,
            Install: self._on_install,
            Evict: self._on_evict,
            Deny: self._on_deny,
        }
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        # Replaced as a whole, so that any thread may read them.
        self.load = self._measure()
        self.loading_by: Mapping[Connection, int] = {}
        self.resident: tuple[str, ...] = ()
        # When the round that is running began, monotonic seconds; infinity while there is nothing to do.
        self._round_began = math.inf

    @property
    def round_seconds(self) -> float:
        """How long the present round has taken; below 0 while there is nothing to do."""
        return time.monotonic() - self._round_began

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the step that is running; sequences that are left are dropped."""
        self._inbox.put(None)
        self._thread.join()

    def post(self, message: Message) -> None:
        """Hands the loop a message; from any thread."""
        self._inbox.put(message)
        if isinstance(message, Submit) and message.request.urgent and message.request.adapter in ("", *self.resident):
            self._is_pressed = True

    def _run(self) -> None:
        torch.set_num_threads(self._base.threads)
        while not self._stopping:
            self._round_began = time.monotonic()
            try:
                self._receive()
                if self._scheduler.has_work:
                    self._run_step()
            except Exception:  # noqa: BLE001 - the thread must live on
                _log.exception("the engine loop failed; every sequence ends")
                self._fail(list(self._live.values()), StepFailed())
            self._emit()

    def _receive(self) -> None:
        """Handles what is in the inbox; sleeps until there is something when there is nothing to run."""
        self._is_pressed = False
        if not self._scheduler.has_work and self._inbox.empty():
            self._check_integrity()
            self._round_began = math.inf
            message = self._inbox.get()
            self._round_began = time.monotonic()
            self._handle(message)
        while True:
            try:
                self._handle(self._inbox.get_nowait())
            except Empty:
                return

    def _handle(self, message: Message | None) -> None:
        if message is None:
            self._stopping = True
        else:
            self._handlers[type(message)](message)

    def _run_step(self) -> None:
        started = time.monotonic()
        step = self._scheduler.schedule()
        if not step.rows:
            self._land()
            return
        self._step += 1
        self._note(step)
        self._may_stop = not step.is_urgent
        attempts = [step.rows]
        while attempts:
            rows = [row for row in attempts.pop() if row.sequence in self._live]
            if not rows:
                continue
            try:
                flight = self._launch(rows)
            except Interrupted:
                # Nothing is lost but time: what has not been advanced is scheduled again.
                metrics.interrupted_steps.inc()
                self._interrupts.lost(time.monotonic() - started)
                return
            except Exception as error:  # noqa: BLE001 - whatever a model raises
                # What was launched before is not to blame, and what it brings may end some of these.
                self._land()
                attempts += self._blame([row for row in rows if row.sequence in self._live], error)
                continue
            metrics.steps.inc()
            self._land()
            self._take_off(flight, [row for row in rows if row.sequence in self._live])
        seconds = time.monotonic() - started
        self._interrupts.stepped(seconds)
        metrics.step_seconds.observe(seconds)

    def _should_stop(self, progress: float) -> bool:
        """Whether the step that runs is given up; see `engine.runner`."""
        return self._is_pressed and self._may_stop and self._interrupts.may_stop(progress)

    def _launch(self, rows: list[Row]) -> Flight:
        """Begins one forward pass."""
        batch = build_batch(rows)
        segments = [
            DeviceSegment(segment.start, segment.stop, self._rows.adapter(segment.adapter, segment.generation))
            for segment in batch.segments
        ]
        return self._launcher.launch(batch, segments, self._live)

    def _take_off(self, flight: Flight, rows: list[Row]) -> None:
        """Lets a step run while the next one is prepared, or, where it must not be, waits for it."""
        for row in rows:
            if row.sequence.pending > 1 or not row.sequence.output_length:
                metrics.prompt_tokens.inc(row.count)
        self._scheduler.advance(Step(rows))
        self._flight = flight
        if not flight.may_stay:
            self._land()
            return
        for row in rows:
            if row.yields_token:
                row.sequence.expect(self._live[row.sequence].answer.ends_next)

    def _land(self) -> None:
        """Waits for the step that was launched, if any; sequences that ended meanwhile get nothing of it."""
        flight, self._flight = self._flight, None
        for outcome in flight.land() if flight else ():
            if outcome.sequence in self._live:
                self._accept(outcome)

    def _blame(self, rows: list[Row], error: Exception) -> list[list[Row]]:
        """Ends the sequences that made a pass raise, as far as it is known; returns what to run instead of it."""
        verdict = judge(rows, error)
        culprits = [self._live[row.sequence] for row in verdict.culprits]
        text = "step %d: a pass over %d sequences failed, %d of them end: %r"
        _log.error(text, self._step, len(rows), len(culprits), error, exc_info=error if culprits else None)
        metrics.failed_steps.inc()
        for live in culprits:
            self._scheduler.forget_prefix(live.sequence)
        self._fail(culprits, error if isinstance(error, ServiceError) else StepFailed())
        return verdict.retries

    def _accept(self, outcome: Outcome) -> None:
        """Gives a sequence what a pass brought it; what goes wrong here is its own as well."""
        live = self._live[outcome.sequence]
        if outcome.is_broken:
            self._scheduler.forget_prefix(live.sequence)
            self._fail([live], BadLogits())
            return
        if outcome.sampled is not None and not live.is_decoding:
            live.is_decoding = True
            live.begin_span("decode")
        try:
            output = live.accept(outcome.sampled, outcome.prompt_logprobs)
        except Exception:  # noqa: BLE001 - a tokenizer's decoder is not ours
            _log.exception("sequence %d cannot go on with token %s", live.request.sequence_id, outcome.sampled)
            self._fail([live], StepFailed())
            return
        self._outputs[live.connection].append(output)
        metrics.output_tokens.inc(outcome.sampled is not None)
        if output.end is not None:
            self._end(live)

    def _note(self, step: Step) -> None:
        """Spans and metrics of a step that is about to run."""
        metrics.preemptions.inc(len(step.preempted))
        metrics.cached_tokens.inc(step.cached_tokens)
        metrics.evicted_kv_blocks.inc(step.evictions)
        for row in step.rows:
            live = self._live[row.sequence]
            if live.span is None:
                live.begin_span("prefill")

    def _on_submit(self, message: Submit) -> None:
        request = message.request
        self._arrivals += 1
        try:
            live = open_live(self._arrivals, request, message.connection, self._base.tokenizer)
        except AnswerOver as error:
            self._outputs[message.connection].append(Output(request.sequence_id, end=Failed(error)))
            return
        self._live[live.sequence] = live
        self._by_id[message.connection, request.sequence_id] = live
        self._in_use[request.adapter] += 1
        if request.adapter:
            self._begun[request.adapter] += 1
        self._scheduler.add(live.sequence)
        if not request.adapter or request.adapter in self._rows:
            self._make_ready(live)

    def _make_ready(self, live: Live) -> None:
        """Lets a sequence go on now that its adapter is there, if it needs one."""
        adapter = live.request.adapter
        live.ready = time.monotonic() if adapter else live.request.received
        self._scheduler.adapter_ready(live.sequence, self._rows.acquire(adapter) if adapter else 0)

    def _on_cancel(self, message: Cancel) -> None:
        live = self._by_id.get((message.connection, message.sequence_id))
        if live is not None:
            self._end(live)

    def _on_hangup(self, message: Hangup) -> None:
        for live in [live for live in self._live.values() if live.connection is message.connection]:
            self._end(live)
        self._outputs.pop(message.connection, None)

    def _on_install(self, message: Install) -> None:
        adapter = message.adapter
        if adapter.digest not in self._rows:
            try:
                self._rows.install(adapter)
            except DeviceFull as error:
                adapter.release()
                self._report(LoadFailed(adapter.digest, error))
                return
        else:
            adapter.release()
        for live in self._waiting_for(adapter.digest):
            self._make_ready(live)
        self._report(Loaded(adapter.digest, self._rows.size_of(adapter.digest)))

    def _on_evict(self, message: Evict) -> None:
        if message.force:
            users = [live for live in self._live.values() if live.request.adapter == message.digest]
            self._fail(users, AdapterRemoved(message.digest))
        can_evict = self._rows.can_evict(message.digest)
        if can_evict:
            self._rows.evict(message.digest)
        self._report(Evicted(message.digest, can_evict))

    def _on_deny(self, message: Deny) -> None:
        self._fail(self._waiting_for(message.digest), message.error)

    def _waiting_for(self, digest: str) -> list[Live]:
        return [self._live[sequence] for sequence in self._scheduler.loading if sequence.adapter == digest]

    def _fail(self, lives: Iterable[Live], error: ServiceError) -> None:
        for live in lives:
            self._outputs[live.connection].append(live.failure(error))
            self._end(live, error)

    def _end(self, live: Live, error: ServiceError | None = None) -> None:
        """Forgets a sequence and frees all it held."""
        sequence = live.sequence
        if sequence.adapter and sequence.state is not State.WAITING_ADAPTER:
            self._rows.release(sequence.adapter, sequence.generation)
        self._scheduler.remove(sequence)
        del self._live[sequence]
        del self._by_id[live.connection, live.request.sequence_id]
        self._in_use[sequence.adapter] -= 1
        if not self._in_use[sequence.adapter]:
            del self._in_use[sequence.adapter]
        live.end_span(error)

    def _emit(self) -> None:
        """Sends the frames of this round, and what the cache must know."""
        self.load = self._measure()
        self.loading_by = Counter(self._live[sequence].connection for sequence in self._scheduler.loading)
        self.resident = tuple(self._rows.digests)
        for connection, outputs in self._outputs.items():
            connection.deliver(Frame(self._step, tuple(outputs), self.load))
        self._outputs.clear()
        usage = Usage(
            frozenset(self._in_use) - {""},
            tuple(dict.fromkeys(sequence.adapter for sequence in self._scheduler.loading)),
        )
        now = time.monotonic()
        if usage != self._usage or (self._begun and now - self._told_at > TELL_SECONDS):
            self._usage, self._told_at = usage, now
            self._report(replace(usage, begun=dict(self._begun)))
            self._begun.clear()

    def _measure(self) -> Load:
        scheduler = self._scheduler
        load = Load(
            len(scheduler.running),
            len(scheduler.waiting),
            len(scheduler.loading),
            scheduler.blocks.free_count,
            scheduler.blocks.total,
        )
        metrics.running_sequences.set(load.running)
        metrics.waiting_sequences.set(load.waiting)
        metrics.loading_sequences.set(load.loading)
        metrics.free_kv_blocks.set(load.free_blocks)
        metrics.cached_kv_blocks.set(scheduler.blocks.published_count)
        metrics.resident_adapters.set(len(self._rows.digests))
        metrics.adapter_bytes.set(self._rows.used_bytes)
        return load

    def _check_integrity(self) -> None:
        try:
            self._scheduler.check_integrity()
        except BlocksCorrupt:
            _log.exception("the account of KV blocks does not add up")
