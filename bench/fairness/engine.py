"""A modelled engine: continuous batching over a KV pool, with the step times of a real one.

It stands for what the rules under test cannot change. Requests join when the pool has room for all they may come to; a
step produces one token of every sequence that has begun; prompts of those that join are computed before it. Adapters
are loaded one after the other; a sequence whose adapter is not on the device waits for it in its place.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Job:
    """One request of a trace; times in seconds. `load_seconds`: how long its adapter takes to the device, cold."""

    arrived: float
    tenant: str
    adapter: str
    prompt: int
    output: int


@dataclass(frozen=True)
class Model:
    """Step times of an engine, in seconds, and its room.

    Attributes:
        step: a step with no sequence in it.
        per_sequence: what each sequence in decode adds.
        per_prompt_token: what each prompt token adds.
        kv_tokens: room for prompts and answers.
        step_tokens: most tokens of a step; prompts are computed in parts, those that joined first first.
        places: most sequences at a time.
        join_every: steps between two times that requests may join.
        device_adapters: adapters the device holds.
        load: seconds to bring an adapter to the device.
    """

    step: float
    per_sequence: float
    per_prompt_token: float
    kv_tokens: int
    places: int = 1000
    step_tokens: int = 1_000_000
    join_every: int = 1
    device_adapters: int = 1000
    load: float = 0.0


# VTC's engine: S-LoRA's on an A10G with Llama-2-7b and a pool of 10,000 tokens. It lets requests join every 10 steps. Prefill
# takes 0.214 ms a token (the artifact's cost_profile.json); the step time is set so that its published throughput,
# 1.744 requests a second of 256 tokens in and 256 out, comes out.
A10G = Model(step=0.0265, per_sequence=0.0007, per_prompt_token=0.000214, kv_tokens=10_000, join_every=10)


@dataclass(eq=False, slots=True)
class Running:
    """A sequence on the engine. `key` is the rule's own."""

    job: Job
    key: object
    joined: float
    done: int = 0
    prefilled: int = 0

    @property
    def left(self) -> int:
        return self.job.output - self.done


@dataclass
class Engine:
    """The state of one modelled engine. `loaded` is in the order of last use."""

    model: Model
    running: list[Running] = field(default_factory=list)
    loaded: dict[str, None] = field(default_factory=dict)
    loads: int = 0
    _loading: str | None = None
    _ready_at: float = 0.0

    def has_room(self, job: Job) -> bool:
        """Whether the pool holds all that is running, and this, whatever happens: S-LoRA's rule."""
        if len(self.running) >= self.model.places:
            return False
        # By time to go: when the k-th ends, those that have more to go hold what they have by then.
        sizes = [(one.left, one.job.prompt + one.done) for one in self.running]
        sizes.append((job.output, job.prompt))
        sizes.sort(reverse=True)
        held = peak = 0
        for count, (left, size) in enumerate(sizes, 1):
            held += size
            peak = max(peak, held + count * left)
        return peak < self.model.kv_tokens

    def is_resident(self, adapter: str) -> bool:
        return not adapter or adapter in self.loaded

    @property
    def waiting(self) -> list[str]:
        """Adapters that sequences wait for, in the order of their arrival."""
        return list(dict.fromkeys(one.job.adapter for one in self.running if not self.is_resident(one.job.adapter)))

    def load(self, now: float) -> list[str]:
        """Goes on loading; returns what has arrived. An adapter in use is not evicted."""
        arrived = []
        if self._loading is not None and now >= self._ready_at:
            self.loaded[self._loading] = None
            arrived.append(self._loading)
            self._loading = None
        if self._loading is None:
            wanted = next(iter(self.waiting), None)
            if wanted is not None and self._room_for_adapter():
                self._loading, self._ready_at = wanted, now + self.model.load
                self.loads += 1
        return arrived

    def use(self, adapter: str) -> None:
        if adapter in self.loaded:
            self.loaded[adapter] = self.loaded.pop(adapter)

    def step(self) -> tuple[float, list[Running], list[Running]]:
        """Runs a step: its duration, the sequences whose prompt it computed, and those it made a token for."""
        ready = [one for one in self.running if self.is_resident(one.job.adapter)]
        going = [one for one in ready if one.prefilled == one.job.prompt]
        begun = []
        prompts, budget = 0, self.model.step_tokens - len(going)
        for one in ready:
            self.use(one.job.adapter)
            part = min(one.job.prompt - one.prefilled, budget - prompts)
            one.prefilled += part
            prompts += part
            if part and one.prefilled == one.job.prompt:
                begun.append(one)
        for one in (*going, *begun):
            one.done += 1
        model = self.model
        seconds = model.step + model.per_sequence * len(going) + model.per_prompt_token * prompts
        return seconds, begun, [*going, *begun]

    def _room_for_adapter(self) -> bool:
        if len(self.loaded) < self.model.device_adapters:
            return True
        in_use = {one.job.adapter for one in self.running}
        idle = next((adapter for adapter in self.loaded if adapter not in in_use), None)
        if idle is None:
            return False
        del self.loaded[idle]
        return True
