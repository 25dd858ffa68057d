"""A few of the kills of tests/cache/kills.py; `python -m tests.cache.kills --kills 200` is the long run."""

from __future__ import annotations

from pathlib import Path

from tests.cache.kills import VICTIMS, run


async def test_nothing_confirmed_is_lost_and_nothing_untrue_is_said_whoever_is_killed(tmp_path: Path) -> None:
    done = await run(6, 3, tmp_path / "w")
    assert sum(done[victim] for victim in VICTIMS) == 6 and done["adapters"] > 0
