from __future__ import annotations

from dataclasses import dataclass

from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.batch import build_batch
from engine.blocks import BLOCK_SIZE, BlockPool, blocks_for
from engine.scheduler import Scheduler, Step
from engine.sequence import Sequence, State


def make(arrival: int, prompt: int, adapter: str = "", state: State = State.WAITING) -> Sequence:
    """A sequence that begins like no other."""
    return Sequence(arrival, adapter, [arrival] * prompt, prompt, state=state)


def finish_step(scheduler: Scheduler, step: Step) -> list[Sequence]:
    """What the loop does after a forward pass; returns the sequences that got a token."""
    scheduler.advance(step)
    yielded = [row.sequence for row in step.rows if row.yields_token]
    for sequence in yielded:
        sequence.tokens.append(7)
    return yielded


@dataclass(frozen=True)
class Plan:
    """One sequence of a random run: when it comes, how long it is, whether its adapter is late, when it is cancelled."""

    at: int
    prompt: int
    output: int
    ready_after: int
    cancel_after: int | None


plans = st.lists(
    st.builds(
        Plan,
        at=st.integers(0, 20),
        prompt=st.integers(1, 60),
        output=st.integers(1, 40),
        ready_after=st.sampled_from([0, 0, 0, 3, 10]),
        cancel_after=st.sampled_from([None, None, None, 1, 5]),
    ),
    min_size=1,
    max_size=12,
)


def follow(scheduler: Scheduler, sequence: Sequence, plan: Plan, now: int) -> None:
    if now == plan.at:
        scheduler.add(sequence)
    if now == plan.at + plan.ready_after and sequence.state is State.WAITING_ADAPTER:
        scheduler.adapter_ready(sequence, 1)
    cancelled = plan.cancel_after is not None and now == plan.at + plan.cancel_after
    if cancelled and sequence.state is not State.FINISHED:
        scheduler.remove(sequence)


def check_rows(scheduler: Scheduler, step: Step) -> None:
    """One run of tokens per sequence, with blocks for all of them; everybody in decode takes part."""
    for row in step.rows:
        assert row.start == row.sequence.computed and row.count >= 1
        assert len(row.sequence.blocks) >= blocks_for(row.start + row.count)
    taking_part = {id(row.sequence) for row in step.rows}
    assert len(taking_part) == len(step.rows)
    assert all(id(sequence) in taking_part for sequence in scheduler.running if sequence.pending == 1)
    assert step.rows or not scheduler.has_work


@settings(max_examples=150, deadline=None)
@given(plans, st.integers(1, 6), st.integers(0, 30), st.integers(0, 6))
def test_budgets_hold_nothing_leaks_and_every_sequence_ends(
    script: list[Plan], max_sequences: int, more_tokens: int, more_blocks: int
) -> None:
    # Given a pool that holds the longest sequence and little more
    longest = max(plan.prompt + plan.output for plan in script)
    pool = BlockPool(blocks_for(longest) + more_blocks)
    step_tokens = max_sequences + more_tokens
    scheduler = Scheduler(pool, max_sequences, step_tokens)
    sequences = [make(i, plan.prompt, state=State.WAITING_ADAPTER) for i, plan in enumerate(script)]
    wanted = {id(sequence): plan for sequence, plan in zip(sequences, script, strict=True)}

    # When sequences come, wait, run and go
    for now in range(5000):
        for sequence in sequences:
            follow(scheduler, sequence, wanted[id(sequence)], now)
        step = scheduler.schedule()
        # Then each step keeps its budgets
        assert sum(row.count for row in step.rows) <= step_tokens
        assert len(scheduler.running) <= max_sequences
        check_rows(scheduler, step)
        for sequence in finish_step(scheduler, step):
            if sequence.output_length >= wanted[id(sequence)].output:
                scheduler.remove(sequence)
        scheduler.check_integrity()
        if now > 20 and all(sequence.state is State.FINISHED for sequence in sequences):
            break
    # And at the end every sequence has ended and every block is free
    assert all(sequence.state is State.FINISHED for sequence in sequences)
    assert pool.free_count == pool.total


def test_nobody_waits_behind_a_sequence_whose_adapter_is_loading() -> None:
    scheduler = Scheduler(BlockPool(8), 4, 32)
    scheduler.add(make(1, 5, "late", State.WAITING_ADAPTER))
    scheduler.add(make(2, 5))
    assert [row.sequence.arrival for row in scheduler.schedule().rows] == [2]


def test_a_sequence_whose_adapter_came_late_takes_its_place_by_age() -> None:
    scheduler = Scheduler(BlockPool(2), 1, 32)
    late = make(1, 5, "late", State.WAITING_ADAPTER)
    scheduler.add(late)
    scheduler.add(make(2, 5))
    scheduler.add(make(3, 5))
    scheduler.adapter_ready(late, 4)
    assert [row.sequence.arrival for row in scheduler.schedule().rows] == [1]
    assert late.generation == 4


def test_a_long_prompt_shares_its_steps_with_decode() -> None:
    # Given a sequence in decode
    scheduler = Scheduler(BlockPool(40), 4, 16)
    decoding = make(1, 3)
    scheduler.add(decoding)
    finish_step(scheduler, scheduler.schedule())
    # When a prompt of several steps comes
    scheduler.add(make(2, 100))
    counts: list[int] = []
    while not counts or counts[-1] == 15:
        step = scheduler.schedule()
        # Then the other has its token in each of them
        assert (step.rows[0].sequence, step.rows[0].count) == (decoding, 1)
        counts.append(step.rows[1].count)
        finish_step(scheduler, step)
    assert counts == [15] * 6 + [10]


def test_a_prompt_of_4000_tokens_costs_no_stream_a_step_and_no_step_its_budget() -> None:
    # Given streams in decode
    scheduler = Scheduler(BlockPool(1000), 16, 64)
    streams = [make(arrival, 3) for arrival in range(8)]
    for stream in streams:
        scheduler.add(stream)
    finish_step(scheduler, scheduler.schedule())
    # When prompts of 4,000 tokens come
    long = [make(arrival, 4000) for arrival in (10, 11)]
    for sequence in long:
        scheduler.add(sequence)
    steps = 0
    while not all(sequence.output_length for sequence in long):
        step = scheduler.schedule()
        steps += 1
        # Then every stream has its token in every step, and no step is longer than its budget
        assert {stream.arrival for stream in streams} <= {row.sequence.arrival for row in step.rows if row.count == 1}
        assert sum(row.count for row in step.rows) <= 64
        finish_step(scheduler, step)
    assert steps == -(-8000 // (64 - 8))


def test_a_short_prompt_behind_long_ones_has_its_token_as_if_it_had_half_the_step() -> None:
    scheduler = Scheduler(BlockPool(2000), 16, 64)
    for arrival in range(5):
        scheduler.add(make(arrival, 4000))
    finish_step(scheduler, scheduler.schedule())
    short = make(9, 60)
    scheduler.add(short)
    for _ in range(2):
        finish_step(scheduler, scheduler.schedule())
    assert short.output_length == 1


def test_a_long_prompt_has_half_of_every_step_however_many_short_ones_come() -> None:
    scheduler = Scheduler(BlockPool(400), 16, 64)
    long = make(0, 320)
    scheduler.add(long)
    for now in range(10):
        for arrival in range(4):
            scheduler.add(make(1 + now * 4 + arrival, 30))
        for sequence in finish_step(scheduler, scheduler.schedule()):
            if sequence is not long:
                scheduler.remove(sequence)
    assert long.output_length == 1


@settings(max_examples=200, deadline=None)
@example([213, 2, 5, 210, 209], 8)
@given(st.lists(st.integers(2, 300), min_size=1, max_size=8), st.integers(8, 64))
def test_a_prompt_waits_for_twice_the_older_ones_or_twice_the_shorter_ones_at_most(
    prompts: list[int], step_tokens: int
) -> None:
    scheduler = Scheduler(BlockPool(1000), 8, step_tokens)
    for arrival, prompt in enumerate(prompts):
        scheduler.add(make(arrival, prompt))
    through: dict[int, int] = {}
    now = 0
    while scheduler.has_work:
        now += 1
        for sequence in finish_step(scheduler, scheduler.schedule()):
            through[sequence.arrival] = now
            scheduler.remove(sequence)
    # The last token of a prompt may come alone, as in decode, and is then taken from what is shared: once per prompt.
    count = len(prompts)
    for arrival, prompt in enumerate(prompts):
        of_older = count + sum(-(-older // -(-step_tokens // 2)) for older in prompts[: arrival + 1])
        of_shorter = -(-(count + sum(other for other in prompts if other <= prompt)) // (step_tokens // 2))
        assert through[arrival] <= min(of_older, of_shorter)


def test_an_urgent_prompt_has_the_chunks_of_a_step_to_itself() -> None:
    # Given streams in decode and prompts on their way
    scheduler = Scheduler(BlockPool(1000), 16, 64)
    streams = [make(arrival, 1) for arrival in range(4)]
    prompts = [make(arrival, 100) for arrival in range(4, 8)]
    for sequence in (*streams, *prompts):
        scheduler.add(sequence)
    finish_step(scheduler, scheduler.schedule())
    # When an urgent one comes whose prompt fits a step
    urgent = make(9, 50)
    urgent.is_urgent = True
    scheduler.add(urgent)
    step = scheduler.schedule()
    # Then nothing but decode is beside it
    assert {row.sequence.arrival: row.count for row in step.rows} == {0: 1, 1: 1, 2: 1, 3: 1, 9: 50}
    assert step.is_urgent
    # And with its first token it is like any other
    finish_step(scheduler, step)
    step = scheduler.schedule()
    assert not step.is_urgent and sum(row.count for row in step.rows) == 64


def test_a_step_that_was_given_up_is_scheduled_again() -> None:
    scheduler = Scheduler(BlockPool(100), 4, 64)
    old, urgent = make(0, 40), make(1, 20)
    urgent.is_urgent = True
    scheduler.add(old)
    assert [(row.start, row.count) for row in scheduler.schedule().rows] == [(0, 40)]
    scheduler.add(urgent)
    assert [(row.sequence, row.start, row.count) for row in scheduler.schedule().rows] == [(urgent, 0, 20)]
    step = scheduler.schedule()
    finish_step(scheduler, step)
    assert [(row.sequence, row.start, row.count) for row in scheduler.schedule().rows] == [
        (urgent, 20, 1),
        (old, 0, 40),
    ]
    scheduler.check_integrity()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(2, 300), min_size=1, max_size=6),
    st.lists(st.integers(2, 300), max_size=6),
    st.integers(8, 64),
)
def test_urgent_prompts_double_the_wait_of_others_at_most(
    prompts: list[int], urgent: list[int], step_tokens: int
) -> None:
    scheduler = Scheduler(BlockPool(1000), 16, 16 + step_tokens)
    sequences = [make(arrival, prompt) for arrival, prompt in enumerate(prompts + urgent)]
    for sequence in sequences:
        sequence.is_urgent = sequence.arrival >= len(prompts)
        scheduler.add(sequence)
    through: dict[int, int] = {}
    now, in_a_row = 0, 0
    while scheduler.has_work:
        now += 1
        step = scheduler.schedule()
        others = any(sequence.pending > 1 and not sequence.is_urgent for sequence in scheduler.running)
        in_a_row = in_a_row + 1 if step.is_urgent and not any(
            row.count > 1 and not row.sequence.is_urgent for row in step.rows
        ) else 0  # fmt: skip
        assert in_a_row < 2 or not others
        for sequence in finish_step(scheduler, step):
            through[sequence.arrival] = now
            scheduler.remove(sequence)
    for arrival in range(len(prompts)):
        of_older = arrival + 1 + sum(-(-older // -(-step_tokens // 2)) for older in prompts[: arrival + 1])
        assert through[arrival] <= 2 * of_older


def test_when_blocks_run_out_the_newest_is_computed_again() -> None:
    # Given two sequences that fill the pool but for the spare block of the second's admission
    scheduler = Scheduler(BlockPool(3), 2, 64)
    old, new = make(1, BLOCK_SIZE), make(2, BLOCK_SIZE - 2)
    scheduler.add(old)
    scheduler.add(new)
    finish_step(scheduler, scheduler.schedule())
    assert len(scheduler.running) == 2
    # When both need one more block
    for _ in range(3):
        step = scheduler.schedule()
        finish_step(scheduler, step)
    # Then the newest lost its blocks, kept its tokens, and waits
    assert (new.state, new.preemptions, new.computed, new.blocks) == (State.WAITING, 1, 0, [])
    assert new.output_length > 1
    assert old.preemptions == 0 and old.state is State.RUNNING


def test_a_batch_has_one_segment_per_adapter_and_every_token_once() -> None:
    scheduler = Scheduler(BlockPool(40), 8, 64)
    for arrival, adapter in enumerate(["b", "", "a", "b", "", "a"]):
        scheduler.add(make(arrival, 3 + arrival, adapter))
    step = scheduler.schedule()
    batch = build_batch(step.rows)
    assert [(s.adapter, s.start, s.stop) for s in batch.segments] == [("a", 11, 24), ("b", 24, 33)]
    assert len(batch.tokens) == len(batch.positions) == len(batch.slots) == 33
    assert len(set(batch.slots)) == 33 and min(batch.slots) >= BLOCK_SIZE
    assert [batch.tokens[i] for i in batch.sampled_tokens] == [row.sequence.tokens[-1] for row in batch.sampled]
