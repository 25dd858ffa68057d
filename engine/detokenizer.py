"""Tokens to text, one at a time, without taking anything back."""

from __future__ import annotations

from collections.abc import Callable, Set

REPLACEMENT = "\ufffd"


class Detokenizer:
    """Turns a growing list of tokens into a growing text.

    What `push` and `finish` return, joined, is `decode` of all tokens, and never contains a replacement character that
    a later token would have turned into something else. Text is held back while

    - it ends in a replacement character: the bytes of a character may not be complete;
    - the last token is a byte token: byte fallback decodes a run of bytes as a whole, one more byte can change it all.

    Decoding starts a few tokens back each time, because a token's text depends on the one before it (a leading space).
    """

    def __init__(
        self, decode: Callable[[list[int]], str], special_ids: Set[int] = frozenset(), byte_ids: Set[int] = frozenset()
    ) -> None:
        self._decode = decode
        self._special_ids = special_ids
        self._byte_ids = byte_ids
        self._tokens: list[int] = []
        # The text of tokens[:emitted] has been returned; tokens[context:emitted] are decoded again as context.
        self._context = 0
        self._emitted = 0

    def push(self, token: int) -> str:
        """Adds a token; returns the text that is certain now."""
        if token in self._special_ids:
            return ""
        self._tokens.append(token)
        if token in self._byte_ids:
            return ""
        return self._emit(hold=True)

    def finish(self) -> str:
        """Returns what was held back; no token follows."""
        return self._emit(hold=False)

    def _emit(self, hold: bool) -> str:
        window = self._tokens[self._context :]
        text = self._decode(window)
        if hold and text.endswith(REPLACEMENT):
            return ""
        known = self._decode(window[: self._emitted - self._context])
        self._context, self._emitted = self._emitted, len(self._tokens)
        return text[len(known) :]
