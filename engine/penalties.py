"""What a request changes of its logits before anything is chosen: penalties for tokens that were there, and a bias.

Kept from token to token: a step costs a sequence one entry, however long its answer is, and no look at its tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch


class SeenTokens:
    """The distinct tokens of one sequence, and how often each is in its answer."""

    def __init__(self, prompt: Iterable[int]) -> None:
        distinct = list(dict.fromkeys(prompt))
        self._places = {token: place for place, token in enumerate(distinct)}
        # Both grow by doubling; what lies beyond len(self) is room.
        self._ids = torch.tensor(distinct, dtype=torch.long)
        self._counts = torch.zeros(len(distinct))

    def __len__(self) -> int:
        return len(self._places)

    def push(self, token: int) -> None:
        """Adds a token of the answer."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            room = max(64, place)
            self._ids = torch.cat([self._ids, self._ids.new_zeros(room)])
            self._counts = torch.cat([self._counts, self._counts.new_zeros(room)])
        self._ids[place] = token
        self._counts[place] += 1

    @property
    def ids(self) -> torch.Tensor:
        """The tokens, int64."""
        return self._ids[: len(self)]

    @property
    def counts(self) -> torch.Tensor:
        """How often each of `ids` is in the answer, float32; 0 for those that are in the prompt only."""
        return self._counts[: len(self)]


class Bias:
    """A request's logit bias as tensors."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self.ids = torch.tensor(list(bias), dtype=torch.long)
        self.values = torch.tensor(list(bias.values()))


@dataclass(frozen=True, slots=True)
class Penalty:
    """Penalties of one row.

    Attributes:
        repetition: divides the positive and multiplies the negative logits of all tokens seen; 1 changes nothing.
        frequency: subtracted once per occurrence in the answer.
        presence: subtracted where there is an occurrence in the answer.
    """

    row: int
    seen: SeenTokens
    repetition: float
    frequency: float
    presence: float


def penalize(logits: torch.Tensor, penalties: Sequence[Penalty]) -> None:
    """Applies penalties, at most one a row, to logits [rows, vocab] in place."""
    sizes = [len(penalty.seen) for penalty in penalties]
    place = _places(logits, [penalty.row for penalty in penalties], [penalty.seen.ids for penalty in penalties])
    counts = torch.cat([penalty.seen.counts for penalty in penalties]).to(logits.device)

    def spread(values: list[float]) -> torch.Tensor:
        return torch.tensor(values).repeat_interleave(torch.tensor(sizes)).to(logits.device)

    scores = logits[place]
    repetition = spread([penalty.repetition for penalty in penalties])
    scores = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores -= counts * spread([penalty.frequency for penalty in penalties])
    scores -= (counts > 0) * spread([penalty.presence for penalty in penalties])
    logits[place] = scores


def add_bias(logits: torch.Tensor, rows: Sequence[int], biases: Sequence[Bias]) -> None:
    """Adds one bias per row, to logits [rows, vocab] in place."""
    place = _places(logits, rows, [bias.ids for bias in biases])
    logits[place] += torch.cat([bias.values for bias in biases]).to(logits.device)


def _places(
    logits: torch.Tensor, rows: Sequence[int], ids: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of those tokens of those rows, each one once."""
    sizes = torch.tensor([len(some) for some in ids])
    row = torch.tensor(rows).repeat_interleave(sizes)
    return row.to(logits.device), torch.cat(list(ids)).to(logits.device)
