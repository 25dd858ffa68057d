"""Errors of the engine.

Internal
├── IllegalTransition   ILLEGAL_TRANSITION   a sequence was told to do what its state does not allow
├── BlocksCorrupt       BLOCKS_CORRUPT       a KV block is lost, held twice or freed twice
├── RowsCorrupt         ROWS_CORRUPT         rows of adapters are lost, held twice or given back twice
├── StaleRows           STALE_ROWS           a step would have used adapter rows that are no longer its own
├── BadLogits           BAD_LOGITS           the model's output for one sequence is not finite
└── StepFailed          STEP_FAILED          a step raised because of one sequence, or whatever it held
Exhausted
├── DeviceFull          DEVICE_FULL          an adapter does not fit in what is left of the adapter memory
└── RowsFull            ROWS_FULL            fewer rows are free than were asked for
NotServable
├── BadArtifact         BAD_ARTIFACT         a packed adapter is not what it says, or does not fit this base
└── NoAdapters          NO_ADAPTERS          this engine has no cache and serves the base only
Aborted
├── AdapterRemoved      ADAPTER_REMOVED      the adapter was taken away while a sequence used it
├── PromptDiffers       PROMPT_DIFFERS       an answer is to go on behind another prompt than it began with
└── AnswerOver          ANSWER_OVER          an answer is to go on that has ended
Unavailable
├── EngineLoading       ENGINE_LOADING       the base is not loaded yet
├── EngineHangs         ENGINE_HANGS         a step does not end
└── EngineDraining      ENGINE_DRAINING      the process is about to end and takes nothing new
"""

from __future__ import annotations

from servicekit.errors import Aborted, Exhausted, Internal, NotServable, Unavailable


class IllegalTransition(Internal):
    """Raised when a sequence's state does not allow an event; the sequence is unchanged."""

    def __init__(self, state: str, event: str) -> None:
        super().__init__(
            f"a sequence that is {state} cannot be {event}", "ILLEGAL_TRANSITION", state=state, event=event
        )


class BlocksCorrupt(Internal):
    """Raised when the account of KV blocks does not add up."""

    def __init__(self, what: str) -> None:
        super().__init__(f"KV blocks: {what}", "BLOCKS_CORRUPT")


class RowsCorrupt(Internal):
    """Raised when the account of rows of adapters does not add up."""

    def __init__(self, what: str) -> None:
        super().__init__(f"rows: {what}", "ROWS_CORRUPT")


class StaleRows(Internal):
    """Raised before a step would use adapter rows of another generation than its sequence started with."""

    def __init__(self, digest: str, expected: int, found: int | None) -> None:
        super().__init__(
            f"adapter {digest[:12]}: rows of generation {expected} are gone, found {found}",
            "STALE_ROWS",
            digest=digest,
            expected=expected,
            found=found,
        )
        self.digest = digest
        self.generation = expected


class BadLogits(Internal):
    """Raised for one sequence whose logits are NaN or infinite."""

    def __init__(self) -> None:
        super().__init__("the model's output is not a finite number", "BAD_LOGITS")


class StepFailed(Internal):
    """Raised for a sequence that makes a step raise when nothing else is in it."""

    def __init__(self) -> None:
        super().__init__("computing the next token failed, see the engine's log", "STEP_FAILED")


class DeviceFull(Exhausted):
    """Raised when an adapter does not fit in what is left of the adapter memory."""

    def __init__(self, needed: int, free: int, budget: int) -> None:
        super().__init__(
            f"the adapter takes {needed} bytes; {free} of {budget} are free",
            "DEVICE_FULL",
            needed_bytes=needed,
            free_bytes=free,
            budget_bytes=budget,
        )


class RowsFull(Exhausted):
    """Raised when fewer rows are free than an adapter needs."""

    def __init__(self, needed: int, free: int, total: int) -> None:
        super().__init__(f"{needed} rows are needed; {free} of {total} are free", "ROWS_FULL")
        self.needed, self.free, self.total = needed, free, total


class BadArtifact(NotServable):
    """Raised when a packed adapter is not what it says, or does not fit this base."""

    def __init__(self, message: str, **metadata: str | int | None) -> None:
        super().__init__(message, "BAD_ARTIFACT")
        self.metadata = {key: str(value) for key, value in metadata.items()}


class NoAdapters(NotServable):
    """Raised for a request with an adapter on an engine that has no cache."""

    def __init__(self) -> None:
        super().__init__("this engine serves the base only", "NO_ADAPTERS")


class AdapterRemoved(Aborted):
    """Raised for a sequence whose adapter was removed by force."""

    def __init__(self, digest: str) -> None:
        super().__init__("the adapter was removed while it answered", "ADAPTER_REMOVED", digest=digest)


class PromptDiffers(Aborted):
    """Raised for a continuation whose prompt is not what the engine before made of it."""

    def __init__(self, found: int, expected: int) -> None:
        text = f"the prompt has {found} tokens here and had {expected} on the engine that began the answer"
        super().__init__(text, "PROMPT_DIFFERS", prompt_tokens=found, expected_tokens=expected)


class AnswerOver(Aborted):
    """Raised for a continuation of an answer that ends before it: the engines do not agree on when answers end."""

    def __init__(self) -> None:
        super().__init__("the answer that is to go on ends by itself before", "ANSWER_OVER")


class EngineLoading(Unavailable):
    """Raised while the base is not loaded yet."""

    def __init__(self) -> None:
        super().__init__("the engine is loading its base", "ENGINE_LOADING", retry_after=1.0)


class EngineHangs(Unavailable):
    """Raised for a router that comes while a step does not end."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the engine's step has been running for {seconds:.0f} s", "ENGINE_HANGS", retry_after=1.0)


class EngineDraining(Unavailable):
    """Raised for what arrives after the engine was told to end."""

    def __init__(self) -> None:
        super().__init__("the engine is shutting down", "ENGINE_DRAINING", retry_after=1.0)
