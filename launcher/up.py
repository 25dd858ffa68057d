"""`loraplex up`: checks, starts, announces, waits, drains."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launcher import checks, demo_adapters
from launcher.errors import LauncherError
from launcher.layout import Layout, open_layout
from launcher.options import Options, parse_options
from launcher.plan import Service, plan_services, public_address
from launcher.progress import Progress
from launcher.supervisor import Supervisor

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the first service is started.

    Attributes:
        address: of the public API.
        demo: whether the demo adapters belong to the base.
    """

    services: list[Service]
    layout: Layout
    address: str
    demo: bool


def main(argv: Sequence[str]) -> int:
    """Runs until stopped; returns the exit code. What goes wrong is one line on standard error."""
    options = parse_options(argv, os.environ)
    progress = Progress(sys.stdout)
    try:
        prepared = prepare(options, progress)
        try:
            asyncio.run(_serve(prepared, progress))
        finally:
            prepared.layout.close()
    except LauncherError as error:
        progress.clear()
        sys.stderr.write(f"loraplex up: {' '.join(str(error).split())}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def prepare(options: Options, progress: Progress) -> Prepared:
    """Checks everything and makes the folders; raises CannotStart."""
    options = checks.checked(options)
    binary = checks.store_binary(options)
    layout = open_layout(options.data_dir)
    try:
        model, demo = options.model, not options.model and options.demo_adapters
        if not model:
            model = str(checks.demo_base(progress.line))
        if demo:
            options = replace(options, adapter_roots=(*options.adapter_roots, str(demo_adapters.root())))
        services = plan_services(options, layout, checks.machine(os.environ), model, binary)
    except BaseException:
        layout.close()
        raise
    progress.line(f"base {model}, data in {layout.data_dir}")
    return Prepared(services, layout, public_address(options.host, options.port), demo)


async def _serve(prepared: Prepared, progress: Progress) -> None:
    supervisor = Supervisor(prepared.services, prepared.layout, progress)
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        # nohup has SIGHUP ignored, and means it.
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, supervisor.stop)
    announcing = asyncio.create_task(_announce(supervisor, prepared, progress))
    announcing.add_done_callback(lambda done: supervisor.stop() if not done.cancelled() and done.exception() else None)
    try:
        await supervisor.run()
    finally:
        announcing.cancel()
        outcome = await asyncio.gather(announcing, return_exceptions=True)
    if isinstance(outcome[0], Exception):
        raise outcome[0]


async def _announce(supervisor: Supervisor, prepared: Prepared, progress: Progress) -> None:
    await supervisor.ready.wait()
    if prepared.demo:
        outcome = await demo_adapters.register(prepared.address)
        for problem in outcome.problems:
            progress.line(problem)
        if outcome.registered:
            progress.line(f"{'adapters':10} {', '.join(outcome.registered)}")
    progress.line(f"serving on {prepared.address}; Ctrl-C stops")
