"""loraplex info: the base being served and the limits of a request; with several, all of them."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from loraplex.commands.output import as_json, connect, write


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("info", parents=[common], help="the base and its limits", description=__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="as one line of JSON")


def run(options: argparse.Namespace) -> int:
    with connect(options) as client:
        info = client.model_info()
    if options.json:
        write(as_json(info))
        return 0
    fields = dataclasses.asdict(info)
    del fields["bases"]
    for name, value in fields.items():
        shown = ", ".join(value) if isinstance(value, tuple) else value
        write(f"{name.replace('_', ' '):18}{shown}\n")
    # The first is the one shown already.
    for base in info.bases[1:]:
        engines = ", ".join(base.engine_ids)
        write(f"{'also serves':18}{base.base_model}, digest {base.base_digest[:12]}, on {engines}\n")
    return 0
