"""What is measured, in which order."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from bench.gpu import adapters as made
from bench.gpu import correct, loading, peers, steps
from bench.gpu.machine import Ceilings, Machine, measure_ceilings
from bench.gpu.report import KEPT, Figure, Report
from bench.gpu.serve import serve
from bench.gpu.shapes import MODELS, TINY, NoTokenizer, make_model
from engine.config import Settings
from engine.lora import DeviceAdapter
from engine.model import open_base
from engine.pool import bytes_per_token


@dataclass(frozen=True)
class Plan:
    """Sizes of the measurements."""

    batches: tuple[int, ...] = (1, 16, 64, 128)
    adapters: tuple[int, ...] = (1, 4, 8, 16, 32, 64)
    ranks: tuple[int, ...] = (16, 64, 8)
    main_batch: int = 64
    main_rank: int = 16
    context: int = 512
    prompt: int = 2048
    served: int = 64
    served_adapters: int = 25
    served_prompt: int = 128
    served_output: int = 64
    peft_adapters: int = 8
    adapter_mib: int = 24 * 1024


TINY_PLAN = Plan((1, 2), (1, 2), (4,), 2, 4, 20, 40, 2, 2, 6, 3, 2, 64)


@dataclass
class Course:
    """One run. Nothing is begun after the deadline, monotonic seconds."""

    machine: Machine
    report: Report
    deadline: float
    plan: Plan = field(init=False)

    def __post_init__(self) -> None:
        self.plan = TINY_PLAN if self.machine.dry else Plan()

    def run(self, names: list[str]) -> bool:
        """Whether everything was right."""
        try:
            for found in (*correct.check_kernels(self.machine), *correct.check_tokens(self.machine)):
                self.report.note(found)
        except Exception as error:
            print(f"\nWRONG, nothing is measured: {type(error).__name__}: {error}", flush=True)
            if not isinstance(error, correct.Wrong):
                raise
            return False
        ceilings = measure_ceilings(self.machine)
        for case, value, unit in (
            ("copy on the device", ceilings.copy / 1e9, "GB/s"),
            ("matrix product", ceilings.products / 1e12, "TFLOP/s"),
            ("host to device, pinned", ceilings.upload / 1e9, "GB/s"),
        ):
            self.report.add(Figure("Ceilings of this machine", case, value, unit))
        for name in ["tiny"] if self.machine.dry else names:
            with self._unless_late(name):
                _Model(self, name, ceilings).measure(is_first=name in ("tiny", names[0]))
            self.machine.empty_cache()
        self.report.write()
        return True

    @contextmanager
    def _unless_late(self, what: str) -> Iterator[None]:
        try:
            yield
        except TooLate:
            self.report.note(f"{what}: there was no time for what is missing")

    def check_time(self) -> None:
        """Raises TooLate past the deadline."""
        if time.monotonic() > self.deadline:
            raise TooLate


class TooLate(Exception):
    """Raised when there is no time for more."""


class _Model:
    """Everything about one model."""

    def __init__(self, course: Course, name: str, ceilings: Ceilings) -> None:
        self.course, self.name, self.ceilings = course, name, ceilings
        self.machine, self.report, self.plan = course.machine, course.report, course.plan
        self.seconds: dict[int, float] = {}

    def measure(self, is_first: bool) -> None:
        self.course.check_time()
        model = make_model(MODELS.get(self.name, TINY), self.machine.device, self.machine.dtype)
        self.weights = steps.weight_bytes(model)
        self.parameters = sum(each.numel() for each in model.parameters())
        # On the model as it is: afterwards its layers are ours.
        peer = self._peers(model) if is_first else {}
        model.set_attn_implementation("eager")
        context = max(self.plan.prompt, self.plan.context) + 16
        settings = Settings(
            device=self.machine.device.type, max_sequences=max(self.plan.batches), context_length=context, threads=1,
            adapter_memory_mib=self.plan.adapter_mib, kv_memory_mib=16 if self.machine.dry else 0,
        )  # fmt: skip
        self.base = open_base(model, NoTokenizer(), settings, self.name, "0" * 64, kernels=True)  # type: ignore[arg-type]
        self.report.note(f"{self.name}: logits of prefill, chunk and decode are those of transformers' own attention")
        steps.fill_pool(self.base)
        self._base_steps()
        self._main(peer)
        for part in ([self._loading, self._serving] if is_first else []) + [self._prefill, self._rest]:
            self.course.check_time()
            part()
            self.report.write()

    def floor(self, rows: int, ranks: int = 0) -> float:
        """Seconds to read the weights, keys and values, and so many ranks of adapters once."""
        tokens = rows * (self.plan.context + 1)
        pool = steps.runner_of(self.base).pool
        read = self.weights + tokens * bytes_per_token(pool.layers, pool.dtype) + ranks * made.bytes_per_rank(self.base)
        return read / self.ceilings.copy

    def step(self, rows: int, adapters: list[DeviceAdapter]) -> float:
        self.course.check_time()
        return steps.step_seconds(self.machine, self.base, adapters, rows, self.plan.context)

    def _base_steps(self) -> None:
        section = f"{self.name}: decode step, base alone, context {self.plan.context}"
        for rows in self.plan.batches:
            self.seconds[rows] = self.step(rows, [])
            self.report.add(Figure(section, f"batch {rows}", self.seconds[rows] * 1e3, "ms", self.floor(rows) * 1e3))
        self.report.write()

    def _main(self, peer: dict[str, float]) -> None:
        """What is looked at first: one batch, one rank, and what others make of the same."""
        plan, rows = self.plan, self.plan.main_batch
        with made.loaded(self.machine, self.base, plan.main_rank, max(plan.adapters)) as adapters:
            before, after = self.step(rows, []), self.step(rows, [])
            case = f"batch {rows}, {len(adapters)} adapters resident, none used"
            section = f"{self.name}: base alone, beside the same before any adapter came"
            self.report.add(Figure(section, case, min(before, after) * 1e3, "ms", self.seconds[rows] * 1e3))
            self._with_adapters(rows, plan.main_rank, adapters)
        for name, seconds in peer.items():
            self.report.add(Figure(f"{self.name}: decode step of others", name, seconds * 1e3, "ms"))
        self.report.write()

    def _with_adapters(self, rows: int, rank: int, adapters: list[DeviceAdapter]) -> None:
        """Decode rate with adapters as a share of the base's, and as much as their bytes allow."""
        for count in self.plan.adapters:
            if count > min(rows, len(adapters)):
                continue
            seconds, base = self.step(rows, adapters[:count]), self.seconds[rows]
            case, floor = f"batch {rows}, {count} adapters, rank {rank}", self.floor(rows, rank * count)
            self.report.add(Figure(f"{self.name}: decode step", case, seconds * 1e3, "ms", floor * 1e3))
            section, possible = f"{self.name}: {KEPT}", self.floor(rows) / floor
            self.report.add(Figure(section, case, base / seconds, "of base", possible, is_rate=True))

    def _peers(self, model: Any) -> dict[str, float]:
        plan, found = self.plan, {}
        model.set_attn_implementation("sdpa")
        for rows in (1, plan.main_batch):
            found[f"transformers, base alone, batch {rows}"] = peers.decode_seconds(
                self.machine, model, rows, plan.context
            )
        if not peers.HAS_PEFT:
            self.report.note("PEFT is not installed; it was not measured")
            return found
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with peers.with_peft(model, plan.main_rank, plan.peft_adapters) as (wrapped, names):
                rows = plan.main_batch
                given = {"adapter_names": [names[row % len(names)] for row in range(rows)]}
                seconds = peers.decode_seconds(self.machine, wrapped, rows, plan.context, **given)
                found[f"PEFT, {len(names)} adapters of rank {plan.main_rank}, batch {rows}"] = seconds
        return found

    def _loading(self) -> None:
        for figure in loading.measure(self.machine, self.base, self.plan.main_rank, self.ceilings):
            self.report.add(figure)

    def _serving(self) -> None:
        plan, section = self.plan, f"{self.name}: the whole engine, {self.plan.served} requests at once"
        prompts = [
            [(row * 7919 + place * 31) % self.base.vocab_size for place in range(plan.served_prompt)]
            for row in range(plan.served)
        ]
        with made.loaded(self.machine, self.base, plan.main_rank, plan.served_adapters) as adapters:
            for count in (0, plan.served_adapters):
                self.course.check_time()
                digests = [adapters[row % count].digest if count else "" for row in range(plan.served)]
                served = serve(self.base, adapters, list(zip(prompts, digests, strict=True)), plan.served_output)
                tokens = sum(map(len, served.tokens))
                self.report.add(Figure(section, f"{count} adapters", tokens / served.seconds, "tokens/s", is_rate=True))
                rows = min(plan.served, max(plan.batches))
                decoded = served.decode_seconds / max(1, plan.served_output - 1)
                case = f"{count} adapters, mean time between tokens once all have begun"
                floor = self.floor(rows, count * plan.main_rank) * 1e3
                self.report.add(Figure(section, case, decoded * 1e3, "ms", floor))

    def _prefill(self) -> None:
        section = f"{self.name}: prefill"
        for rows, count in ((1, self.plan.prompt), (4, self.plan.prompt // 4)):
            self.course.check_time()
            seconds = steps.step_seconds(self.machine, self.base, [], rows, 0, count)
            embedding = self.base.vocab_size * MODELS.get(self.name, TINY).hidden_size
            possible = self.ceilings.products / (2 * (self.parameters - 2 * embedding))
            case = f"{rows} prompts of {count} tokens in one step"
            self.report.add(Figure(section, case, rows * count / seconds, "tokens/s", possible, is_rate=True))

    def _rest(self) -> None:
        """The other batches and ranks."""
        plan = self.plan
        for rank in plan.ranks:
            batches = [rows for rows in plan.batches if (rank, rows) != (plan.main_rank, plan.main_batch)]
            most = max(count for count in plan.adapters if count <= max(batches))
            with made.loaded(self.machine, self.base, rank, most) as adapters:
                # The main batch first.
                for rows in sorted(batches, key=lambda rows: rows != plan.main_batch):
                    self._with_adapters(rows, rank, adapters)
            self.report.write()
