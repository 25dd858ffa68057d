"""The GPU benchmark runs from end to end on tiny shapes, with nothing installed but torch, triton and transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
for name in {missing}:
    sys.modules[name] = None
sys.argv = ["bench.gpu", "--dry-run", "--out", {out!r}]
from bench.gpu.__main__ import main
main()
"""
SERVICES = [
    "grpc",
    "google.protobuf",
    "opentelemetry",
    "prometheus_client",
    "redis",
    "uvloop",
    "loraplex",
    "numpy.distutils",
]


@pytest.mark.timeout(600)
def test_a_dry_run_goes_through_and_writes_no_results(tmp_path: Path) -> None:
    program = PROGRAM.format(missing=SERVICES, out=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "DRY RUN, NOT A MEASUREMENT" in done.stdout
    assert "greedy tokens in float32: 3 of 3 requests" in done.stdout
    for section in (
        "Ceilings",
        "decode step",
        "kept of the base's decode rate",
        "loading",
        "the whole engine",
        "prefill",
    ):
        assert section in done.stdout
    assert not any(tmp_path.iterdir())
