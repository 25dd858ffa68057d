"""python -m bench.gpu: the engine on this GPU, beside what its memory and arithmetic allow.

Correctness first: where an answer is wrong, nothing is measured. Then the most wanted figures first; what there is no
time for is named. Without a GPU, or with --dry-run, everything is run once on tiny shapes in Triton's interpreter:
that shows that it runs, and measures nothing.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    """Prints the tables, and writes them to bench/results where they are measurements."""
    arguments = _parse()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if arguments.dry_run:
        # Before Triton is imported: it decides then.
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if not arguments.dry_run and not torch.cuda.is_available():
        print("There is no GPU: a dry run, which measures nothing.")
        os.execv(sys.executable, [sys.executable, "-m", "bench.gpu", *sys.argv[1:], "--dry-run"])
    from bench.gpu.absent import stand_in

    missing = stand_in()
    from bench.gpu.course import Course
    from bench.gpu.machine import Machine
    from bench.gpu.report import Report

    device = torch.device("cpu" if arguments.dry_run else "cuda")
    machine = Machine(device, torch.float32 if arguments.dry_run else torch.bfloat16, arguments.dry_run)
    title = f"{machine.name}, {datetime.date.today().isoformat()}"
    slug = "-".join("".join(c if c.isalnum() else " " for c in machine.name.lower()).split())
    path = None if machine.dry else Path(arguments.out) / f"{datetime.date.today().isoformat()}-{slug}"
    import transformers
    import triton

    facts = [
        f"torch {torch.__version__}, triton {triton.__version__}, transformers {transformers.__version__}",
        f"command: python -m bench.gpu {' '.join(sys.argv[1:])}".rstrip(),
        "weights are random; every figure is the median of three runs, warm",
        *([f"not installed, left out: {', '.join(missing)}"] if missing else []),
    ]
    report = Report(f"{'DRY RUN, NOT A MEASUREMENT: ' if machine.dry else ''}{title}", facts, path)
    print(f"# {report.title}", *facts, sep="\n", flush=True)
    course = Course(machine, report, deadline=time.monotonic() + arguments.budget)
    sys.exit(0 if course.run(arguments.models) else 1)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on CPU, in Triton's interpreter")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which nothing more is begun")
    parser.add_argument("--models", nargs="*", default=["Llama-3-8B", "Mistral-7B"], help="in this order")
    parser.add_argument("--out", default=str(RESULTS), help="folder of the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
