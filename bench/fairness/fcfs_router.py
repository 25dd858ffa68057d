"""python -m bench.fairness.fcfs_router: the router with its queue first come, first served. For comparison only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import router.__main__ as service
from router.accounts import Where
from router.flows import Flows, Ticket
from servicekit.server import run


class FcfsFlows(Flows):
    """All requests are of one flow, so they keep the order of their arrival."""

    def enqueue(self, tenant: str, digest: str, *rest: Any, **more: Any) -> Ticket:
        return super().enqueue("everyone", "", *rest, **more)

    def pick(self, is_open: Callable[[Where], bool], *rest: Any, **more: Any) -> Ticket | None:
        return super().pick(lambda where: is_open(None))

    @property
    def is_shared(self) -> bool:
        return False


if __name__ == "__main__":
    setattr(service, "Flows", FcfsFlows)  # noqa: B010
    run(service.main, "router")
