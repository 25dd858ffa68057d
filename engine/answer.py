"""The answer of one sequence: what its tokens mean to the client, and when it ends.

What goes where when an answer ends:
- by the end-of-sequence token: that token is in neither text nor token ids, but is counted;
- by a stop token: the same, unless the stop is to be included, then it is in both;
- by a stop string: the text is cut before it (after it, when the stop is to be included); the token ids are all tokens
  produced, the one that completed the string included;
- by length: everything is in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from enum import Enum

from engine.detokenizer import Detokenizer
from engine.errors import AnswerOver
from engine.stopping import StopScanner, StopStrings


class FinishReason(Enum):
    """Why an answer ended."""

    LENGTH = "length"
    EOS = "eos"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Stopping:
    """When an answer ends.

    Attributes:
        max_output_tokens: always at least 1.
        eos_ids: empty when the answer goes on after them.
    """

    max_output_tokens: int
    min_output_tokens: int
    strings: StopStrings
    stop_token_ids: frozenset[int]
    eos_ids: frozenset[int]
    include_stop: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token adds to an answer."""

    text: str
    shows_token: bool
    reason: FinishReason | None = None
    stop_match: str = ""


class Answer:
    """Turns tokens into pieces of an answer until one of them ends it."""

    def __init__(self, stopping: Stopping, detokenizer: Detokenizer) -> None:
        self._stopping = stopping
        self._detokenizer = detokenizer
        self._scanner = StopScanner(stopping.strings, stopping.include_stop)
        self.output_tokens = 0

    def forbidden(self) -> Set[int]:
        """Token ids that must not come next: those that would end the answer before its least length."""
        if self._is_long_enough():
            return frozenset()
        return self._stopping.eos_ids | self._stopping.stop_token_ids

    @property
    def ends_next(self) -> bool:
        """Whether the next token is the last one, whatever it is."""
        return self.output_tokens + 1 >= self._stopping.max_output_tokens

    def resume(self, tokens: Iterable[int]) -> None:
        """Takes over what another engine has produced and sent; raises AnswerOver where that ends the answer."""
        for token in tokens:
            if self.push(token).reason is not None:
                raise AnswerOver

    def push(self, token: int) -> Piece:
        """Adds the next token."""
        stopping = self._stopping
        self.output_tokens += 1
        if token in stopping.stop_token_ids:
            shown = self._detokenizer.push(token) if stopping.include_stop else ""
            return self._end(shown, stopping.include_stop, FinishReason.STOP, str(token))
        if token in stopping.eos_ids:
            return self._end("", False, FinishReason.EOS)
        text = self._detokenizer.push(token)
        if self.output_tokens >= stopping.max_output_tokens:
            return self._end(text, True, FinishReason.LENGTH)
        scanned = self._scanner.push(text, armed=self._is_long_enough())
        if scanned.match is not None:
            return Piece(scanned.text, True, FinishReason.STOP, scanned.match)
        return Piece(scanned.text, True)

    def _end(self, text: str, shows_token: bool, reason: FinishReason, stop_match: str = "") -> Piece:
        """Lets out what was held back; a stop string in it still ends the answer."""
        scanned = self._scanner.push(text + self._detokenizer.finish(), armed=self._is_long_enough())
        if scanned.match is not None:
            return Piece(scanned.text, shows_token, FinishReason.STOP, scanned.match)
        return Piece(scanned.text + self._scanner.finish(), shows_token, reason, stop_match)

    def _is_long_enough(self) -> bool:
        return self.output_tokens >= self._stopping.min_output_tokens
