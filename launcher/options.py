"""Options of `loraplex up`: flags first, then environment variables, then defaults."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

MOST_ENGINES = 64
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Options:
    """What `loraplex up` was asked to do.

    Attributes:
        port: 0 takes a free one.
        model: folder or hub id; empty is the demo base with its demo adapters.
        redis: URL of a store that runs already; empty starts the embedded one.
    """

    host: str
    port: int
    model: str
    adapter_roots: tuple[str, ...]
    redis: str
    engines: int
    data_dir: Path
    device: str
    dtype: str
    demo_adapters: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parse_options(argv: Sequence[str], environ: Mapping[str, str]) -> Options:
    """Exits with code 2 and one line when the arguments are malformed."""
    given = _parser(environ).parse_args(list(argv))
    roots = given.adapter_root or [root for root in environ.get("LORAPLEX_CACHE_ADAPTER_ROOTS", "").split(":") if root]
    return Options(
        host=given.host,
        port=given.port,
        model=given.model,
        adapter_roots=tuple(roots),
        redis=given.redis,
        engines=given.engines,
        data_dir=Path(given.data_dir).expanduser(),
        device=given.device,
        dtype=given.dtype,
        demo_adapters=given.demo_adapters,
    )


def default_data_dir(environ: Mapping[str, str]) -> str:
    """LORAPLEX_DATA_DIR, else a folder of the user's."""
    if own := environ.get("LORAPLEX_DATA_DIR"):
        return own
    return os.path.join(environ.get("XDG_DATA_HOME") or "~/.local/share", "loraplex")


def _parser(environ: Mapping[str, str]) -> _Parser:
    parser = _Parser(
        prog="loraplex up",
        description="Starts store, cache, engines and router on this machine; Ctrl-C or SIGTERM drains and stops them.",
        epilog="Settings of a single service are taken from its variables, for example LORAPLEX_ENGINE_MAX_SEQUENCES.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address of the public API (default: %(default)s)")
    add("--port", type=_port, default=50051, help="port of the public API; 0 takes a free one (default: %(default)s)")
    add(
        "--model", default=environ.get("LORAPLEX_ENGINE_MODEL", ""), metavar="DIR_OR_HUB_ID",
        help="base model: a folder, or owner/name on the Hugging Face hub (default: the demo base)",
    )  # fmt: skip
    add(
        "--adapter-root", action="append", metavar="DIR",
        help="folder that file:// adapters may lie in; may be repeated",
    )  # fmt: skip
    add(
        "--redis", type=_redis_url, default=environ.get("LORAPLEX_CACHE_REDIS", ""), metavar="URL",
        help="redis://, rediss:// or unix:// of a running Redis or Valkey (default: an embedded one)",
    )  # fmt: skip
    add("--engines", type=_engines, default=1, metavar="N", help="number of engines (default: %(default)s)")
    add(
        "--data-dir", default=default_data_dir(environ), metavar="DIR",
        help="registry, disk tier and embedded store [LORAPLEX_DATA_DIR] (default: %(default)s)",
    )  # fmt: skip
    add("--device", default=environ.get("LORAPLEX_ENGINE_DEVICE", "auto"), help="auto, cpu, cuda (default: auto)")
    add("--dtype", choices=DTYPES, default=environ.get("LORAPLEX_ENGINE_DTYPE", "auto"), help="(default: auto)")
    add(
        "--demo-adapters", action=argparse.BooleanOptionalAction, default=True,
        help="register the demo adapters when the demo base is served (default: yes)",
    )  # fmt: skip
    return parser


def _number(text: str, least: int, most: int) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{number} is not between {least} and {most}")
    return number


def _port(text: str) -> int:
    return _number(text, 0, 65535)


def _engines(text: str) -> int:
    return _number(text, 1, MOST_ENGINES)


def _redis_url(text: str) -> str:
    if text and not text.startswith(("redis://", "rediss://", "unix://")):
        raise argparse.ArgumentTypeError(f"{text!r} is none of redis://, rediss:// and unix://")
    return text
