"""A lower bound on the bytes any policy must load for requests that start in a given order. Belady's, for sizes that differ.

With different sizes the best policy is hard to find (NP), but what it cannot go below is a linear programme: FOO of Berger,
Beckmann, Harchol-Balter, "Practical Bounds on Optimal Caching with Variable Object Sizes", SIGMETRICS 2018. Between two
requests for the same adapter it is either kept, as a whole or (in the bound only) in part, or loaded again. While request t
starts, its own adapter takes its room and what is kept across t must fit beside it. The bound knows the whole future and no
leases, so it is lower than what a server can reach that must not evict what runs.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

from bench.residency.traces import Trace


def least_moved(trace: Trace, budget_bytes: int) -> float:
    """Bytes. Variables: per pair of neighbouring requests the part kept, and per request the bytes kept across it."""
    digests = [request.digest for request in trace.requests]
    count, last = len(digests), dict[str, int]()
    pairs: list[tuple[int, int]] = []
    for number, digest in enumerate(digests):
        if digest in last:
            pairs.append((last[digest], number))
        last[digest] = number
    sizes = np.array([trace.sizes[digest] for digest in digests], dtype=float)
    if not pairs:
        return float(sizes.sum())
    # across[t] = across[t-1] + kept of the pairs that begin at t-1 - kept of the pairs that end at t
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []

    def put(row: int, column: int, value: float) -> None:
        rows.append(row)
        columns.append(column)
        values.append(value)

    for t in range(count):
        put(t, len(pairs) + t, 1.0)
        if t:
            put(t, len(pairs) + t - 1, -1.0)
    for number, (begin, end) in enumerate(pairs):
        put(begin + 1, number, -sizes[begin])
        put(end, number, sizes[begin])
    saved = np.array([sizes[begin] for begin, _ in pairs])
    scale = sizes.mean()
    solved = linprog(
        np.concatenate([-saved, np.zeros(count)]) / scale,
        A_eq=csr_matrix((np.array(values) / scale, (rows, columns)), shape=(count, len(pairs) + count)),
        b_eq=np.zeros(count),
        bounds=[(0, 1)] * len(pairs) + [(0, max(0.0, budget_bytes - size)) for size in sizes],
        method="highs",
    )
    if not solved.success:
        raise RuntimeError(solved.message)
    return float(sizes.sum() + solved.fun * scale)
