"""An answer goes on behind what another engine has produced, as if it had been produced here."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from engine import service
from loraplex.engine.v1 import engine_pb2 as wire
from loraplex.v1 import generation_pb2 as public
from tests.engine.stack import PROMPT, Stream, running_stack

REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"sampling": public.SamplingParams(temperature=1.5, top_p=0.95, seed=11)},
    "penalties": {
        "sampling": public.SamplingParams(
            temperature=0.9, seed=5, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.4
        )
    },
    "logprobs": {
        "sampling": public.SamplingParams(temperature=1.0, seed=3),
        "output": public.OutputOptions(top_logprobs=2, prompt_logprobs=True),
    },
    "text": {"text": "The quick", "sampling": public.SamplingParams(temperature=2.0, seed=8)},
}
TOKENS = 40


async def whole(stream: Stream, number: int, digest: str, given: dict[str, Any]) -> list[wire.SequenceOutput]:
    stream.submit(number, digest, stopping=public.StoppingParams(max_output_tokens=TOKENS, ignore_eos=True), **given)
    await stream.end_of(number)
    return outputs_of(stream, number)


def outputs_of(stream: Stream, number: int) -> list[wire.SequenceOutput]:
    return [output for frame in stream.frames for output in frame.outputs if output.sequence_id == number]


def go_on(stream: Stream, number: int, digest: str, given: dict[str, Any], answered: list[int], prompt: int) -> None:
    """Submits what another engine has answered so far."""
    stream.submit(number, digest, stopping=public.StoppingParams(max_output_tokens=TOKENS, ignore_eos=True), **given)
    submitted = stream._out._queue[-1].submit  # type: ignore[attr-defined]
    submitted.continuation.token_ids.extend(answered)
    submitted.continuation.prompt_tokens = prompt


@pytest.mark.parametrize("kind", REQUESTS)
async def test_every_cut_gives_the_same_answer(tiny_model: Any, tmp_path: Path, kind: str) -> None:
    given = REQUESTS[kind]
    async with running_stack(tiny_model("llama"), tmp_path) as stack:
        stream = await stack.stream()
        adapter = stack.adapters[0]
        stack.cache.load(adapter)
        outputs = await whole(stream, 1, adapter.digest, given)
        answer = [output for output in outputs if output.token_ids]
        tokens = [token for output in answer for token in output.token_ids]
        assert len(tokens) == TOKENS
        prompt = stream.started[1].prompt_tokens
        for cut in (1, 2, 15, 16, 17, 31, TOKENS - 1):
            number = 100 + cut
            go_on(stream, number, adapter.digest, given, tokens[:cut], prompt)
            end = await stream.end_of(number)
            found = outputs_of(stream, number)
            # Text, tokens and log probabilities are those that were not sent yet, no more and no less
            assert [token for output in found for token in output.token_ids] == tokens[cut:]
            assert "".join(o.text for o in found) == "".join(o.text for o in answer[cut:])
            assert [e.token_id for o in found for e in o.logprobs] == [
                e.token_id for o in answer[cut:] for e in o.logprobs
            ]
            for one, other in zip(found, answer[cut:], strict=True):
                for entry, expected in zip(one.logprobs, other.logprobs, strict=True):
                    assert entry.logprob == pytest.approx(expected.logprob, abs=1e-4)
            assert not any(output.prompt_logprobs for output in found)
            # And the account is that of the whole answer
            started = stream.started[number]
            assert started.prompt_tokens == prompt and started.cached_prompt_tokens <= prompt
            assert end.finished == outputs[-1].finished and end.finished.output_tokens == TOKENS


async def test_stop_strings_and_limits_are_seen_across_the_seam(tiny_model: Any, tmp_path: Path) -> None:
    sampling = public.SamplingParams(temperature=1.5, seed=4)
    async with running_stack(tiny_model("llama"), tmp_path) as stack:
        stream = await stack.stream()
        answer = [output for output in await whole(stream, 1, "", {"sampling": sampling}) if output.token_ids]
        tokens = [token for output in answer for token in output.token_ids]
        text = "".join(output.text for output in answer)
        stop = text[12:18]
        assert len(stop) == 6
        ending = public.StoppingParams(max_output_tokens=TOKENS, ignore_eos=True, stop=[stop])
        stream.submit(2, sampling=sampling, stopping=ending)
        end = await stream.end_of(2)
        assert end.finished.stop_match == stop
        expected = stream.sequences[2]
        for cut in range(1, len(expected.token_ids)):
            number = 100 + cut
            stream.submit(number, sampling=sampling, stopping=ending)
            submitted = stream._out._queue[-1].submit  # type: ignore[attr-defined]
            submitted.continuation.token_ids.extend(tokens[:cut])
            submitted.continuation.prompt_tokens = len(PROMPT)
            assert (await stream.end_of(number)).finished == end.finished
            sent = "".join(output.text for output in outputs_of(stream, 2)[:cut])
            assert sent + stream.sequences[number].text == expected.text
            assert stream.sequences[number].token_ids == expected.token_ids[cut:]


async def test_what_cannot_go_on_is_refused_by_itself(tiny_model: Any, tmp_path: Path) -> None:
    async with running_stack(tiny_model("llama"), tmp_path) as stack:
        stream = await stack.stream()
        go_on(stream, 1, "", {}, [7, 8], len(PROMPT) + 1)
        assert (await stream.end_of(1)).failed.reason == "PROMPT_DIFFERS"
        go_on(stream, 2, "", {}, [7] * TOKENS, len(PROMPT))
        failed = (await stream.end_of(2)).failed
        assert (failed.code, failed.reason) == (grpc.StatusCode.ABORTED.value[0], "ANSWER_OVER")
        go_on(stream, 3, "", {}, [10**6], len(PROMPT))
        assert (await stream.end_of(3)).failed.metadata["field"] == "continuation.token_ids"
        go_on(stream, 4, "", {}, [7, 8], len(PROMPT))
        assert (await stream.end_of(4)).finished.output_tokens == TOKENS


async def test_routers_share_the_places_and_hear_of_the_end(tiny_model: Any, tmp_path: Path) -> None:
    async with running_stack(tiny_model("llama"), tmp_path) as stack:
        first = await stack.stream()
        long = public.StoppingParams(max_output_tokens=240, ignore_eos=True)
        for number in range(6):
            first.submit(number, stopping=long)
        await first.until(lambda: len(first.started) == 6)
        assert {frame.load.places for frame in first.frames if frame.outputs} == {8}
        second = await stack.stream()
        second.submit(1, stopping=long)
        await second.until(lambda: bool(second.started))
        # What the other leaves, or half of it all
        assert second.frames[-1].load.places == 4
        await first.until(lambda: first.frames[-1].load.places == 7)
        for number in range(6):
            first.cancel(number)
        await second.until(lambda: second.frames[-1].load.places == 8)
        stack.servicer._draining = True
        stack.servicer._share()
        await first.until(lambda: first.frames[-1].draining)
        second.submit(2)
        assert (await second.end_of(2)).failed.reason == "ENGINE_DRAINING"


async def test_an_engine_whose_step_hangs_is_silent_and_takes_no_new_router(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_stack(tiny_model("llama"), tmp_path) as stack:
        stream = await stack.stream()
        await stream.until(lambda: len(stream.frames) >= 1)
        # Given a step that does not end
        hangs = threading.Event()
        launch = stack.loop._launch

        def wait(rows: Any) -> Any:
            hangs.wait(20)
            return launch(rows)

        monkeypatch.setattr(stack.loop, "_launch", wait)
        stream.submit(1)
        await asyncio.sleep(1.5)
        heard = len(stream.frames)
        await asyncio.sleep(2)
        assert len(stream.frames) == heard
        monkeypatch.setattr(service, "HANGING_SECONDS", 1.0)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stack.stub.Dispatch(iter(())).read()
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        # And it goes on when the step does
        hangs.set()
        assert (await stream.end_of(1)).finished.output_tokens == 12
