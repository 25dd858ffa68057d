"""One engine as the cache sees it, in any order of events: no illegal move, budgets and leases kept, every lease ends.

The device on the other side is modelled as the real one behaves: it loads and evicts when it comes to it, and refuses to evict
what its sequences use.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache.artifact import BaseDescription
from cache.engines import LOOK_AHEAD_SECONDS, Engine, Evict, Expected, Load, Worth
from cache.policies import POLICIES
from cache.residency import DeviceMove, DevicePlace
from cache.tiers import ArtifactKey

BASE = BaseDescription(name="tiny", digest="b", dtype="float32", max_rank=64, modules={})
SIZES = {f"d{number}": size for number, size in enumerate((1, 2, 3, 5, 8, 13, 21, 34, 3, 5))}
BUDGET = 40
digests = st.sampled_from(sorted(SIZES))


def appraise(key: ArtifactKey) -> Worth:
    return Worth(SIZES[key.digest], SIZES[key.digest] / 10)


class OneEngine(RuleBasedStateMachine):
    @initialize(policy=st.sampled_from(sorted(POLICIES)), share=st.sampled_from([0.4, 1.0]))
    def attach(self, policy: str, share: float) -> None:
        self.now = 0.0
        self.engine = Engine("engine", BASE, BUDGET)
        self.engine.policy, self.engine.tenant_share = POLICIES[policy](BUDGET), share
        self.pinned: set[str] = set()
        self.device: dict[str, int] = {}
        self.sequences: dict[str, int] = {}
        self.told: list[Load | Evict] = []

    # What sequences and routers do

    @rule(digest=digests)
    def a_sequence_comes(self, digest: str) -> None:
        self.sequences[digest] = self.sequences.get(digest, 0) + 1
        self._say_usage()

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def a_sequence_ends(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.sequences)))
        self.sequences[digest] -= 1
        self.sequences = {each: count for each, count in self.sequences.items() if count}
        self._say_usage()

    def _say_usage(self) -> None:
        self.engine.use(frozenset(self.sequences), {}, appraise, self.now)
        for digest in self.sequences:
            if digest not in self.device:
                self.engine.want(digest)

    @rule(digest=digests, tenant=st.sampled_from(["", "a", "b"]))
    def a_prefetch(self, digest: str, tenant: str) -> None:
        self.engine.expect(digest, Expected("", self.now + LOOK_AHEAD_SECONDS, self.now, tenant))

    @rule(queue=st.lists(digests, unique=True), router=st.sampled_from(["r0", "r1"]))
    def a_router_speaks(self, queue: list[str], router: str) -> None:
        until = self.now + LOOK_AHEAD_SECONDS
        expected = {d: Expected("", until, self.now - 9 + n, "", router) for n, d in enumerate(queue)}
        self.engine.look_ahead(router, expected)

    @rule(digest=digests)
    def a_pin(self, digest: str) -> None:
        self.pinned ^= {digest}

    @rule(seconds=st.sampled_from([0.1, 1.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    # What the cache does

    @rule()
    def plan(self) -> None:
        engine = self.engine
        engine.settle(self.now)
        decided = engine.plan(self.pinned, appraise)
        leased = {d for d in engine.device if d in engine.in_use or d in self.pinned}
        assert not leased.intersection(decided.evictions)
        # What is queued goes only for what is needed sooner, and only if it does not fit beside that
        needed = [*engine.wants, *sorted(self.pinned), *sorted(engine.expected, key=lambda d: engine.expected[d].since)]
        taken = leased | {d for d, entry in engine.device.items() if entry.place is DevicePlace.LOADING}
        for digest in needed:
            if sum(SIZES[each] for each in taken | {digest}) <= BUDGET:
                taken.add(digest)
        assert not taken.intersection(decided.evictions)
        for digest in decided.loads:
            engine.move(digest, DeviceMove.LOAD, SIZES[digest], self.now)
            self.told.append(Load(digest, "", SIZES[digest], ""))
        for digest in decided.evictions:
            engine.move(digest, DeviceMove.EVICT)
            self.told.append(Evict(digest, force=False))

    # What the engine does

    @precondition(lambda self: self.told)
    @rule()
    def the_engine_obeys(self) -> None:
        command = self.told.pop(0)
        if isinstance(command, Load):
            self.device[command.digest] = command.size_bytes
            self.engine.move(command.digest, DeviceMove.LOADED, command.size_bytes)
        elif command.digest in self.sequences:
            self.engine.move(command.digest, DeviceMove.KEPT)
        else:
            del self.device[command.digest]
            self.engine.move(command.digest, DeviceMove.EVICTED)

    @precondition(lambda self: self.told and isinstance(self.told[0], Load))
    @rule()
    def a_load_fails(self) -> None:
        self.engine.move(self.told.pop(0).digest, DeviceMove.LOAD_FAILED)

    @rule(lost=st.booleans())
    def the_stream_breaks(self, lost: bool) -> None:
        """The engine comes back with what is on its device, or as a new process without anything."""
        before = self.engine
        self.engine = Engine("engine", BASE, BUDGET, policy=before.policy, tenant_share=before.tenant_share)
        if lost:
            self.device, self.sequences = {}, {}
        self.told = []
        for digest in before.device:
            before.policy.left(digest)
        self.engine.describe(self.device, appraise, self.now)
        self._say_usage()

    # What always holds

    @invariant()
    def the_budget_is_kept(self) -> None:
        assert sum(self.device.values()) <= BUDGET
        assert self.engine.free_bytes >= 0

    @invariant()
    def what_is_believed_to_be_there_is_there(self) -> None:
        assert set(self.engine.resident) <= self.device.keys()

    def teardown(self) -> None:
        """When sequences, routers and pins are gone, every lease ends by itself, and the device agrees."""
        if not hasattr(self, "engine"):
            return
        self.sequences, self.pinned = {}, set()
        self._say_usage()
        self.now += LOOK_AHEAD_SECONDS + 1
        self.engine.settle(self.now)
        while self.told:
            self.the_engine_obeys()
        assert not self.engine.wants and not self.engine.expected and not self.engine.in_use
        assert set(self.engine.resident) == self.device.keys()
        # Then anything can have the whole device
        for digest in sorted(SIZES, key=lambda each: -SIZES[each]):
            self.a_sequence_comes(digest)
            while digest not in self.device:
                self.plan()
                assert self.told
                while self.told:
                    self.the_engine_obeys()
            self.a_sequence_ends_now(digest)

    def a_sequence_ends_now(self, digest: str) -> None:
        del self.sequences[digest]
        self._say_usage()


OneEngine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestOneEngine = OneEngine.TestCase
