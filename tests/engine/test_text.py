"""Tokens to text: nothing is taken back, nothing is lost, stop strings cut at their first appearance."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from engine.answer import Answer, FinishReason, Piece, Stopping
from engine.detokenizer import Detokenizer
from engine.stopping import StopScanner, StopStrings
from tests.engine.tiny import VOCAB, make_tokenizer

BYTE_LEVEL = make_tokenizer()
SPECIAL = frozenset(BYTE_LEVEL.all_special_ids)


def byte_fallback_tokenizer() -> Any:
    """Like Llama 2's: words with a leading space mark, all else as byte tokens."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "a", "b", "▁a", "é", ".", "▁▁"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTE_FALLBACK = byte_fallback_tokenizer()
BYTE_IDS = frozenset(range(2, 258))


def decode_byte_level(ids: list[int]) -> str:
    return str(BYTE_LEVEL.decode(ids, skip_special_tokens=True))


def check_increments(detokenizer: Detokenizer, tokens: list[int], whole: str) -> None:
    shown = ""
    for token in tokens:
        shown += detokenizer.push(token)
        assert whole.startswith(shown)
    assert shown + detokenizer.finish() == whole


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, VOCAB - 1), max_size=40))
def test_any_tokens_of_a_byte_level_tokenizer_join_to_the_whole_text(tokens: list[int]) -> None:
    check_increments(Detokenizer(decode_byte_level, SPECIAL), tokens, decode_byte_level(tokens))


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30))
def test_any_text_streams_without_a_replacement_character(text: str) -> None:
    detokenizer = Detokenizer(decode_byte_level, SPECIAL)
    tokens = BYTE_LEVEL(text)["input_ids"]
    pieces = [detokenizer.push(token) for token in tokens] + [detokenizer.finish()]
    assert "".join(pieces) == decode_byte_level(tokens)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(st.integers(258, 265), st.integers(2, 257), st.sampled_from([0xE4, 0xBD, 0xA0])), max_size=24)
)
def test_byte_fallback_tokens_join_to_the_whole_text(tokens: list[int]) -> None:
    def decode(ids: list[int]) -> str:
        return str(BYTE_FALLBACK.decode(ids, skip_special_tokens=False))

    check_increments(Detokenizer(decode, frozenset({0, 1}), BYTE_IDS), tokens, decode(tokens))


def test_a_character_of_several_tokens_comes_out_whole() -> None:
    tokens = BYTE_LEVEL("a🧪b")["input_ids"]
    assert len(tokens) > 3
    detokenizer = Detokenizer(decode_byte_level, SPECIAL)
    assert [piece for token in tokens if (piece := detokenizer.push(token))] == ["a", "🧪", "b"]


texts = st.text("abc", max_size=12)


@settings(max_examples=500)
@given(st.lists(texts, max_size=8), st.lists(st.text("abc", min_size=1, max_size=4), max_size=4), st.booleans())
def test_where_text_is_cut_into_pieces_does_not_matter(pieces: list[str], stops: list[str], include: bool) -> None:
    whole, strings = "".join(pieces), StopStrings(stops)

    def run(parts: list[str]) -> tuple[str, str | None]:
        scanner, shown = StopScanner(strings, include), ""
        for part in parts:
            scanned = scanner.push(part)
            shown += scanned.text
            assert whole.startswith(shown)
            if scanned.match is not None:
                return shown, scanned.match
        return shown + scanner.finish(), None

    shown, match = run(pieces)
    assert (shown, match) == run(list(whole)) == run([whole])
    # And it is the stop string that is complete first
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    if ends:
        assert match is not None
        assert shown == whole[: min(ends) if include else min(ends) - len(match)]
    else:
        assert (shown, match) == (whole, None)


def answer(stop: list[str] | None = None, **given_stopping: Any) -> Answer:
    stopping: dict[str, Any] = {
        "max_output_tokens": 50,
        "min_output_tokens": 0,
        "strings": StopStrings(stop or []),
        "stop_token_ids": frozenset(),
        "eos_ids": frozenset({0}),
        "include_stop": False,
    }
    return Answer(Stopping(**(stopping | given_stopping)), Detokenizer(decode_byte_level, SPECIAL))


def push_all(subject: Answer, tokens: list[int]) -> list[Piece]:
    pieces = []
    for token in tokens:
        pieces.append(subject.push(token))
        if pieces[-1].reason:
            break
    return pieces


def letters(text: str) -> list[int]:
    return [BYTE_LEVEL.convert_tokens_to_ids(letter) for letter in text]


def test_a_stop_string_split_over_tokens_cuts_the_text_and_keeps_the_tokens() -> None:
    pieces = push_all(answer(["END"]), letters("okENDmore"))
    assert "".join(piece.text for piece in pieces) == "ok"
    assert all(piece.shows_token for piece in pieces) and len(pieces) == 5
    assert (pieces[-1].reason, pieces[-1].stop_match) == (FinishReason.STOP, "END")


def test_what_only_began_like_a_stop_string_comes_out() -> None:
    pieces = push_all(answer(["ENDE"]), [*letters("okEND"), 0])
    assert [piece.text for piece in pieces] == ["o", "k", "", "", "", "END"]
    assert (pieces[-1].reason, pieces[-1].shows_token) == (FinishReason.EOS, False)


def test_a_stop_token_is_left_out_unless_it_is_to_be_included() -> None:
    token = letters("x")[0]
    for include, text in ((False, "ok"), (True, "okx")):
        pieces = push_all(answer(stop_token_ids=frozenset({token}), include_stop=include), [*letters("ok"), token])
        assert "".join(piece.text for piece in pieces) == text
        assert (pieces[-1].reason, pieces[-1].stop_match) == (FinishReason.STOP, str(token))
        assert pieces[-1].shows_token is include


def test_nothing_ends_an_answer_before_its_least_length() -> None:
    subject = answer(["k"], min_output_tokens=4, stop_token_ids=frozenset({9}))
    assert subject.forbidden() == {0, 9}
    pieces = push_all(subject, letters("okokok"))
    assert "".join(piece.text for piece in pieces) == "oko"
    assert len(pieces) == 4
    assert subject.forbidden() == frozenset()


def test_an_unfinished_character_at_the_end_is_not_lost() -> None:
    tokens = BYTE_LEVEL("a🧪")["input_ids"][:-1]
    pieces = push_all(answer(max_output_tokens=len(tokens)), tokens)
    assert "".join(piece.text for piece in pieces) == decode_byte_level(tokens)
    assert pieces[-1].reason is FinishReason.LENGTH
