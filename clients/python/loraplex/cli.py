"""The `loraplex` command. Errors are one line on standard error; exit code 1, 2 for wrong usage, 130 for Ctrl-C."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points

from loraplex._connection import DEFAULT_ADDRESS
from loraplex.commands import adapters, bench, generate, info
from loraplex.commands.output import INTERRUPTED, PIPE_CLOSED, Parser, explain, say
from loraplex.errors import LoraplexError

# Commands of other distributions: a name and a function that takes the arguments and returns the exit code.
GROUP = "loraplex.commands"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Text of a model may hold what the terminal cannot show.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] == "up":
        return _up(arguments[1:])
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
    except LoraplexError as error:
        say(explain(error, options.address))
        return 1
    except (TypeError, ValueError) as error:
        # Arguments that the client refuses to send.
        say(f"loraplex: {error}")
        return 2
    return code


def _parser() -> Parser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--address",
        default=os.environ.get("LORAPLEX_ADDRESS", DEFAULT_ADDRESS),
        help="server [LORAPLEX_ADDRESS] (default: %(default)s)",
    )
    common.add_argument("--tenant", default="", help="whom the requests are charged to")
    common.add_argument("--timeout", type=float, default=None, metavar="SECONDS", help="limit of the whole call")
    parser = Parser(prog="loraplex", description="Talks to a Loraplex server, or starts one.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    commands.add_parser("up", help="start everything on this machine", add_help=False)
    for module in (generate, adapters, bench, info):
        module.add_parser(commands, common)
    return parser


def _up(arguments: list[str]) -> int:
    found: list[EntryPoint] = [entry for entry in entry_points(group=GROUP) if entry.name == "up"]
    if not found:
        say("loraplex: `loraplex up` needs the server: pip install 'loraplex-server[cache,engine,store]'")
        return 1
    try:
        run = found[0].load()
    except ImportError as error:
        say(f"loraplex: the installed server is not complete: {error}")
        return 1
    return int(run(arguments))


if __name__ == "__main__":
    sys.exit(main())
