"""What a request costs, its place in a flow, and the accounts of flows and tenants. PURE. The law is in flows.py."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from router.accounts import Account, Level, Where
from router.rate import ServiceRate

# Charges are whole numbers of these per weighted token.
MICRO = 1_000_000
MIB = 1 << 20

# How much of a flow's expected answer is that of its latest one: an eighth.
_MEMORY = 8


@dataclass(frozen=True, slots=True)
class Work:
    """Work done for a request: prompt tokens that were computed, output tokens, bytes of its adapter that were moved."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    load_bytes: int = 0


NOTHING = Work()


@dataclass(frozen=True, slots=True)
class Tariff:
    """Micro-tokens charged per token of prompt and of output, and per MiB loaded."""

    prompt: int
    output: int
    load: int = 0

    @staticmethod
    def of(prompt_weight: float, output_weight: float, load_weight: float = 0.0) -> Tariff:
        return Tariff(round(prompt_weight * MICRO), round(output_weight * MICRO), round(load_weight * MICRO))

    def cost(self, work: Work) -> int:
        tokens = self.prompt * work.prompt_tokens + self.output * work.output_tokens
        return tokens + self.load * work.load_bytes // MIB


class Tenant(Account):
    """A tenant's account, its flows, and how fast it is served."""

    __slots__ = ("flows", "level", "name", "rate", "waiting_weight")

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.flows: dict[str, Flow] = {}
        self.level: Level[Flow] = Level()
        self.rate = ServiceRate()
        # Of its flows with requests that wait; for estimates only.
        self.waiting_weight = 0.0


class Flow(Account):
    """An adapter's account below a tenant, and its queue.

    Attributes:
        listed_at: where it is in its tenant's level; False when it is not in it.
    """

    __slots__ = ("_outputs", "digest", "listed_at", "queue", "tenant", "where")

    def __init__(self, tenant: Tenant, digest: str) -> None:
        super().__init__()
        self.tenant = tenant
        self.digest = digest
        self.where: Where = None
        self.listed_at: Where | bool = False
        self.queue: OrderedDict[int, Ticket] = OrderedDict()
        self._outputs = 0

    @property
    def expected_output(self) -> int:
        """Tokens of its next answer, judged by the latest; 0 when there was none."""
        return self._outputs // _MEMORY

    def learn(self, output_tokens: int) -> None:
        if self._outputs:
            self._outputs += output_tokens - self._outputs // _MEMORY
        else:
            self._outputs = output_tokens * _MEMORY


@dataclass(slots=True, eq=False)
class Ticket:
    """One request's place in its flow, and what was charged for it.

    Attributes:
        prompt_tokens: of its prompt, estimated.
        most_output: tokens its answer may have at most; None when that is open.
        work: done so far, as far as is known.
        expected_output: tokens of answer that were charged in advance.
        cost: of its work, in micro-tokens.
        paid: what its flow was charged, in micro-tokens after the flow's weight; in advance, that may be above `charged`.
        waiting_tokens: what it adds to the tokens that wait while it does.
        is_first: whether its tenant had nothing else on engines when it was picked.
        paid_by_tenant: what its tenant was charged, after the tenant's weight.
    """

    number: int
    flow: Flow = field(repr=False)
    prompt_tokens: int = 0
    most_output: int | None = None
    work: Work = NOTHING
    expected_output: int = 0
    cost: int = 0
    paid: int = 0
    paid_by_tenant: int = 0
    waiting_tokens: int = 0
    is_first: bool = False
    _ratio: tuple[int, int] = (1, 1)
    _tenant_ratio: tuple[int, int] = (1, 1)

    @property
    def tenant(self) -> str:
        return self.flow.tenant.name

    @property
    def digest(self) -> str:
        return self.flow.digest

    @property
    def where(self) -> Where:
        return self.flow.where

    @property
    def tokens(self) -> int:
        """What it adds to the tokens that wait: its prompt, and the answer its flow's latest ones let expect."""
        return self.prompt_tokens + self._likely_output()

    @property
    def charged(self) -> int:
        """What its flow is charged for its work so far, in micro-tokens after the flow's weight."""
        return self.cost * self._ratio[1] // self._ratio[0]

    def open_account(self) -> None:
        """Fixes weights and the answer charged in advance, for as long as it is on an engine."""
        self.expected_output = self._likely_output()
        self._ratio, self._tenant_ratio = self.flow.ratio, self.flow.tenant.ratio

    def pay(self, cost: int) -> tuple[int, int]:
        """Makes a cost, before weights, what was paid; returns by how much that changes the flow's and tenant's charges."""
        before = self.paid, self.paid_by_tenant
        self.paid = cost * self._ratio[1] // self._ratio[0]
        self.paid_by_tenant = cost * self._tenant_ratio[1] // self._tenant_ratio[0]
        return self.paid - before[0], self.paid_by_tenant - before[1]

    def _likely_output(self) -> int:
        expected = self.flow.expected_output
        return expected if self.most_output is None else min(expected, self.most_output)
