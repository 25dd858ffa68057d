"""What a forward pass means for its sequences: logits become next tokens and log probabilities of the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

import torch

from engine.batch import Batch
from engine.live import Live
from engine.logprobs import TokenLogprob, logprobs_of
from engine.sampler import Sampled, sample
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a pass brought one sequence.

    Attributes:
        sampled: its next token; None while there is more of the prompt to compute.
        prompt_logprobs: of the next tokens of the prompt, where they are wanted.
        is_broken: whether its logits are not finite; then it has neither.
    """

    sequence: Sequence
    sampled: Sampled | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    is_broken: bool = False


def read_logits(batch: Batch, logits: torch.Tensor, lives: Mapping[Sequence, Live]) -> list[Outcome]:
    """One outcome for each sequence of the batch that has one.

    Args:
        logits: of batch.sampled_tokens, then of batch.scored_tokens; overwritten.
        lives: has all sequences of the batch.
    """
    count = len(batch.sampled_tokens)
    scores = _score(batch, logits[count:], lives)
    tokens = sample(logits[:count], [lives[row.sequence].sample_row() for row in batch.sampled])
    sampled = {row.sequence: token for row, token in zip(batch.sampled, tokens, strict=True)}
    return [
        _outcome(sequence, sampled.get(sequence), scores.get(sequence, []), sequence in sampled)
        for sequence in dict.fromkeys((*sampled, *scores))
    ]


def _outcome(
    sequence: Sequence, sampled: Sampled | None, scores: list[TokenLogprob | None], yields_token: bool
) -> Outcome:
    found = tuple(score for score in scores if score is not None)
    if len(found) < len(scores) or (yields_token and sampled is None):
        return Outcome(sequence, is_broken=True)
    return Outcome(sequence, sampled, found)


def _score(
    batch: Batch, logits: torch.Tensor, lives: Mapping[Sequence, Live]
) -> dict[Sequence, list[TokenLogprob | None]]:
    """Log probabilities of the prompt tokens after batch.scored_tokens.

    The logits are as many rows as the step has tokens at most, whatever the length of the prompt.
    """
    places = [(row.sequence, place) for row in batch.scored for place in row.scored]
    tokens = [sequence.tokens[place + 1] for sequence, place in places]
    tops = [lives[sequence].request.sampling.top_logprobs for sequence, _ in places]
    found = iter(logprobs_of(logits, tokens, tops))
    return {row.sequence: list(islice(found, len(row.scored))) for row in batch.scored}
