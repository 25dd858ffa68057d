"""Lower bounds on the bytes any policy must load for requests that start in a given order. Belady's, for sizes that differ.

With different sizes the best policy is hard to find (NP), but what it cannot go below is a linear programme: FOO of Berger,
Beckmann, Harchol-Balter, "Practical Bounds on Optimal Caching with Variable Object Sizes", SIGMETRICS 2018. Between two
requests for the same adapter it is either kept, as a whole or (in the bound only) in part, or loaded again. While request t
starts, its own adapter takes its room and what is kept across t must fit beside it. The bound knows the whole future.

Without a timetable it knows no leases: an adapter may go the moment its request has started, and may be kept in part. No server
can do either. With the timetable of a run it knows both: from the start of a request to its end its adapter takes its room
whatever else is kept, and what is left is shared out among adapters that are kept as a whole or not at all, which is an integer
programme. That is a bound for every policy under which requests run when they ran then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

from bench.residency.traces import Trace

# How long an integer programme may take, and how close to the best is enough.
SECONDS = 60.0
GAP = 0.002


@dataclass(frozen=True)
class _Gap:
    """An adapter that is not leased from start `begin` on and is asked for again at start `end`."""

    size: int
    begin: int
    end: int


def least_moved(trace: Trace, budget_bytes: int, timetable: Sequence[tuple[float, float]] | None = None) -> float:
    """Bytes.

    Args:
        timetable: start and end of each request, in the order of the trace; without one there are no leases, and adapters
            may be kept in part.
    """
    sizes = [trace.sizes[request.digest] for request in trace.requests]
    runs = timetable or [(float(t), float(t)) for t in range(len(sizes))]
    loads, gaps, leased = _gaps(trace, runs)
    if not gaps:
        return float(loads)
    if max(leased) > budget_bytes:
        raise ValueError("the leases of the timetable do not fit the budget")
    return loads - _most_saved(gaps, [budget_bytes - taken for taken in leased], whole=timetable is not None)


def _gaps(trace: Trace, runs: Sequence[tuple[float, float]]) -> tuple[int, list[_Gap], list[int]]:
    """The bytes loaded if nothing is kept without a lease, what might be kept, and the bytes leased at each start."""
    until: dict[str, float] = {}
    free_from: dict[str, int] = {}
    gaps: list[_Gap] = []
    leased: list[int] = []
    loads = 0
    for t, (request, (start, end)) in enumerate(zip(trace.requests, runs, strict=True)):
        for digest, at in until.items():
            if at <= start:
                free_from.setdefault(digest, t)
        digest, size = request.digest, trace.sizes[request.digest]
        if digest not in until:
            loads += size
        elif digest in free_from:
            loads += size
            gaps.append(_Gap(size, free_from.pop(digest), t))
        until[digest] = max(end, until.get(digest, end))
        leased.append(sum(trace.sizes[other] for other in until if other not in free_from))
    return loads, gaps, leased


def _most_saved(gaps: Sequence[_Gap], room: Sequence[int], *, whole: bool) -> float:
    """Bytes. Variables: per gap the part kept, and per start the bytes kept across it, which may take the room there is.

    Of an integer programme that is not solved in time, it is what the solver has proven that nobody can exceed.
    """
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    scale = float(np.mean([gap.size for gap in gaps]))

    def put(row: int, column: int, value: float) -> None:
        rows.append(row)
        columns.append(column)
        values.append(value)

    # across[t] = across[t-1] + kept of the gaps that begin at t - kept of the gaps that end at t
    for t in range(len(room)):
        put(t, len(gaps) + t, 1.0)
        if t:
            put(t, len(gaps) + t - 1, -1.0)
    for number, gap in enumerate(gaps):
        put(gap.begin, number, -gap.size / scale)
        put(gap.end, number, gap.size / scale)
    solved = linprog(
        [-gap.size / scale for gap in gaps] + [0.0] * len(room),
        A_eq=csr_matrix((values, (rows, columns)), shape=(len(room), len(gaps) + len(room))),
        b_eq=np.zeros(len(room)),
        bounds=[(0, 1)] * len(gaps) + [(0, bytes_left / scale) for bytes_left in room],
        integrality=[int(whole)] * len(gaps) + [0] * len(room),
        method="highs",
        options={"time_limit": SECONDS, "mip_rel_gap": GAP} if whole else {},
    )
    proven = solved.get("mip_dual_bound") if whole else solved.fun
    if proven is None:
        raise RuntimeError(solved.message)
    return float(-proven * scale)
