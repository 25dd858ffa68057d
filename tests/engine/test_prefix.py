"""Sequences that share blocks, on paper: what they read, what they compute, and what they find."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.blocks import BLOCK_SIZE, BlockPool, blocks_for
from engine.errors import BlocksCorrupt
from engine.prefix import next_key, root_key
from engine.scheduler import Scheduler, Step
from engine.sequence import State
from tests.engine.paper import alone, make, paper


@dataclass(frozen=True)
class Plan:
    """One sequence of a random run."""

    at: int
    adapter: str
    stem: int
    shared: int
    own: list[int]
    output: int
    reuse: bool
    cancel_after: int | None

    @property
    def prompt(self) -> list[int]:
        """Prompts of one stem begin the same."""
        return [self.stem + place % 5 for place in range(self.shared)] + self.own

    @property
    def length(self) -> int:
        return len(self.prompt) + self.output


plans = st.lists(
    st.builds(
        Plan,
        at=st.integers(0, 40),
        adapter=st.sampled_from(["", "a", "b"]),
        stem=st.integers(0, 1),
        shared=st.integers(0, 70),
        own=st.lists(st.integers(0, 2), min_size=1, max_size=20),
        output=st.integers(1, 40),
        reuse=st.sampled_from([True, True, True, False]),
        cancel_after=st.sampled_from([None, None, None, 1, 4]),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(plans, st.integers(0, 12), st.integers(1, 6), st.booleans())
def test_whatever_is_shared_evicted_or_preempted_every_sequence_reads_its_own_prefix_and_answers_as_alone(
    script: list[Plan], more_blocks: int, max_sequences: int, prefix_cache: bool
) -> None:
    most = max(blocks_for(plan.length) for plan in script)
    run = paper(most + more_blocks, max_sequences, prefix_cache)
    sequences = [make(i, plan.prompt, plan.adapter, plan.reuse) for i, plan in enumerate(script)]
    by_sequence = {id(sequence): plan for sequence, plan in zip(sequences, script, strict=True)}
    for now in range(5000):
        for sequence, plan in zip(sequences, script, strict=True):
            if now == plan.at:
                run.scheduler.add(sequence)
            cancelled = plan.cancel_after is not None and now == plan.at + plan.cancel_after
            if cancelled and sequence.state is not State.FINISHED:
                run.scheduler.remove(sequence)
        for sequence in run.step():
            if sequence.output_length >= by_sequence[id(sequence)].output:
                run.scheduler.remove(sequence)
        if now > 50 and not run.scheduler.has_work:
            break
    for sequence, plan in zip(sequences, script, strict=True):
        assert sequence.state is State.FINISHED
        assert sequence.tokens == alone(plan.adapter, plan.prompt, plan.output)[: len(sequence.tokens)]
        assert len(sequence.tokens) == plan.length or plan.cancel_after is not None
        assert sequence.cached_tokens < plan.length and (not sequence.cached_tokens or (plan.reuse and prefix_cache))
    assert run.scheduler.blocks.free_count == run.scheduler.blocks.total
    assert prefix_cache or not run.scheduler.blocks.published_count


@pytest.mark.parametrize(("length", "hit"), [(15, 0), (16, 0), (17, 16), (32, 16), (33, 32), (100, 96)])
def test_the_same_prompt_again_computes_what_its_full_blocks_do_not_hold_and_always_the_last_token(
    length: int, hit: int
) -> None:
    run = paper()
    prompt = list(range(length))
    run.scheduler.add(make(1, prompt))
    run.run(1)
    before = run.computed
    again = make(2, prompt)
    run.scheduler.add(again)
    run.run(1)
    assert (again.cached_tokens, run.cached, run.computed - before) == (hit, hit, length - hit)


def test_an_answer_is_found_by_the_conversation_that_goes_on_from_it() -> None:
    run = paper()
    first = make(1, [1] * 20)
    run.scheduler.add(first)
    run.run(30)
    second = make(2, [*first.tokens, 9, 9])
    run.scheduler.add(second)
    run.run(1)
    assert second.cached_tokens == 48


def test_the_same_prompt_under_another_adapter_or_another_version_finds_nothing() -> None:
    run = paper()
    for arrival, digest in enumerate(["", "a" * 64, "b" * 64]):
        sequence = make(arrival, [5] * 50, digest)
        run.scheduler.add(sequence)
        run.run(2)
        assert sequence.cached_tokens == 0
    again = make(9, [5] * 50, "a" * 64)
    run.scheduler.add(again)
    run.run(2)
    assert again.cached_tokens == 48


def test_equal_prompts_that_come_together_are_computed_once() -> None:
    run = paper()
    sequences = [make(arrival, [*range(90), arrival]) for arrival in range(6)]
    for sequence in sequences:
        run.scheduler.add(sequence)
    run.run(1)
    # Full blocks up to 80 once; of the last block and their own token everybody computes his own
    assert run.computed == 80 + 6 * 11
    assert [sequence.cached_tokens for sequence in sequences] == [0] + [80] * 5


def test_equal_answers_that_are_written_together_end_up_in_the_same_blocks() -> None:
    run = paper()
    first, second = make(1, [1] * 5), make(2, [1] * 5)
    run.scheduler.add(first)
    run.scheduler.add(second)
    while first.output_length < 30:
        run.step()
    assert first.blocks[:2] == second.blocks[:2] and first.blocks[2] != second.blocks[2]


def test_who_needs_the_logits_of_its_whole_prompt_computes_all_of_it_and_leaves_it_to_others() -> None:
    run = paper()
    counts = []
    for arrival, reuse in enumerate([False, False, True]):
        sequence = make(arrival, [4] * 40, reuse=reuse)
        run.scheduler.add(sequence)
        before = run.computed
        run.run(1)
        counts.append((sequence.cached_tokens, run.computed - before))
    assert counts == [(0, 40), (0, 40), (32, 8)]


def test_a_preempted_sequence_goes_on_from_those_of_its_blocks_that_are_left() -> None:
    # Given two sequences that outgrow the pool together
    run = paper(blocks=7, max_sequences=2)
    old, new = make(1, [1] * 30), make(2, [2] * 40)
    run.scheduler.add(old)
    run.scheduler.add(new)
    while not new.preemptions:
        run.step()
    # When the newer is computed again, once the older has ended
    before = run.computed
    run.scheduler.remove(old)
    run.step()
    # Then only what was not in a full block is; and that is not the prompt's cached tokens
    assert run.computed - before < BLOCK_SIZE
    assert new.cached_tokens == 0
    run.run(60)
    assert new.tokens == alone("", [2] * 40, 60)


def test_a_cached_prefix_makes_room_and_counts_as_room() -> None:
    run = paper(blocks=6)
    run.scheduler.add(make(1, [1] * 80))
    run.run(1)
    assert (run.scheduler.blocks.free_count, run.scheduler.blocks.published_count) == (6, 5)
    run.scheduler.add(make(2, [2] * 90))
    assert run.run(1) < 10
    assert (run.scheduler.blocks.free_count, run.scheduler.blocks.evictions) == (6, 5)


def test_a_failed_step_publishes_nothing() -> None:
    scheduler = Scheduler(BlockPool(8), 2, 64)
    scheduler.add(make(1, [1] * 40))
    step = scheduler.schedule()
    scheduler.remove(step.rows[0].sequence)
    assert (scheduler.blocks.published_count, scheduler.blocks.free_count) == (0, 8)


def test_what_a_sequence_with_bad_logits_held_is_found_no_more() -> None:
    run = paper()
    sequences = [make(arrival, [1] * 40) for arrival in range(3)]
    run.scheduler.add(sequences[0])
    run.run(1)
    run.scheduler.add(sequences[1])
    run.step()
    run.scheduler.forget_prefix(sequences[1])
    run.scheduler.remove(sequences[1])
    run.scheduler.add(sequences[2])
    run.run(1)
    assert [sequence.cached_tokens for sequence in sequences] == [0, 32, 0]


def test_a_step_says_what_was_found_and_what_was_evicted_for_it() -> None:
    run = paper(blocks=4)
    run.scheduler.add(make(1, [1] * 33))
    run.run(1)
    run.scheduler.add(make(2, [1] * 40))
    step = run.scheduler.schedule()
    assert (step.cached_tokens, step.evictions) == (32, 0)
    run.scheduler.remove(step.rows[0].sequence)
    run.scheduler.add(make(3, [2] * 60))
    step = run.scheduler.schedule()
    assert (step.cached_tokens, step.evictions) == (0, 2)


def test_integrity_names_a_block_that_is_written_to_and_shared() -> None:
    run = paper()
    first, second = make(1, [1] * 40), make(2, [1] * 40)
    run.scheduler.add(first)
    run.step()
    run.step()
    run.scheduler.add(second)
    run.step()
    second.computed -= BLOCK_SIZE + 8
    with pytest.raises(BlocksCorrupt, match="written to"):
        run.scheduler.check_integrity()


def test_integrity_names_a_block_of_another_prefix() -> None:
    scheduler = Scheduler(BlockPool(8), 2, 64)
    one, other = make(1, [1] * 17), make(2, [1] * 17, "a")
    scheduler.add(one)
    scheduler.add(other)
    scheduler.advance(scheduler.schedule())
    one.blocks[0], other.blocks[0] = other.blocks[0], one.blocks[0]
    with pytest.raises(BlocksCorrupt, match="another prefix"):
        scheduler.check_integrity()


def test_keys_tell_apart_adapters_places_and_contents() -> None:
    one, two = next_key(root_key(""), [1] * BLOCK_SIZE), next_key(root_key(""), [2] * BLOCK_SIZE)
    keys = {root_key(""), root_key("a"), one, two, next_key(root_key("a"), [1] * BLOCK_SIZE)}
    keys |= {next_key(one, [1] * BLOCK_SIZE), next_key(two, [1] * BLOCK_SIZE)}
    assert len(keys) == 7


def test_an_empty_step_changes_nothing() -> None:
    run = paper()
    run.scheduler.advance(Step())
    assert run.scheduler.schedule() == Step()
