"""loraplex adapters: what is registered, and where it is."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loraplex._requests import RegisterOptions
from loraplex.commands.output import Parser, as_json, connect, say, table, write
from loraplex.types import Adapter, AdapterEvent, AdapterEventKind, Credentials, Tier

HEADERS = (
    "ADAPTER", "STATE", "TIER", "METHOD", "RANK", "SIZE", "WEIGHT", "PINNED", "LAST USE", "LEASES", "DIGEST", "BASE", "SOURCE",
)  # fmt: skip


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("adapters", help="register, list and watch adapters", description=__doc__)
    actions = parser.add_subparsers(required=True, metavar="ACTION", parser_class=Parser)

    def action(name: str, run: Callable[[argparse.Namespace], int], text: str, *, about_one: bool = True) -> Any:
        made = actions.add_parser(name, parents=[common], help=text, description=text)
        made.set_defaults(run=run)
        made.add_argument("--json", action="store_true", help="one line of JSON for each adapter")
        if about_one:
            made.add_argument("adapter_id", metavar="ID")
        return made

    register = action("register", _register, "register an adapter, or a new version of it")
    register.add_argument("source", metavar="SOURCE", help="a folder on the server's machine, or a URI")
    register.add_argument("--pinned", action="store_true", help="keep it on the device")
    register.add_argument("--base", metavar="NAME", help="name or digest of its base (default: the one its files name)")
    register.add_argument("--weight", type=float, help="share of service (default: 1)")
    register.add_argument("--expected-digest", metavar="HEX", help="refuse other content; needed for https://")
    register.add_argument(
        "--credentials",
        metavar="FILE",
        help="your right to read the source, JSON: token, or access_key_id, secret_access_key, session_token; - reads it here",
    )
    action("list", _list, "list all adapters", about_one=False)
    action("get", _get, "show one adapter")
    delete = action("delete", _delete, "remove an adapter; waits for its running requests")
    delete.add_argument("--force", action="store_true", help="end its running requests")
    preload = action("preload", _preload, "bring an adapter to a tier and wait until it is there")
    preload.add_argument("--tier", choices=("disk", "host", "device"), default="device", help="(default: device)")
    watch = action("watch", _watch, "print the registry, then every change", about_one=False)
    watch.add_argument("--once", action="store_true", help="end after the snapshot")


def _register(options: argparse.Namespace) -> int:
    request = RegisterOptions()
    if options.pinned:
        request["pinned"] = True
    if options.base:
        request["base_model"] = options.base
    if options.weight is not None:
        request["weight"] = options.weight
    if options.expected_digest:
        request["expected_digest"] = options.expected_digest
    if options.credentials:
        request["credentials"] = _credentials(options.credentials)
    source = options.source if "://" in options.source else Path(options.source).expanduser()
    with connect(options) as client:
        _show([client.adapters.register(options.adapter_id, source, **request)], options)
    return 0


def _credentials(file: str) -> Credentials:
    """Not from an argument: those are seen by everyone on the machine. Raises ValueError, without what is in the file."""
    try:
        raw = sys.stdin.read() if file == "-" else Path(file).expanduser().read_text()
        return Credentials(**json.loads(raw))
    except OSError as error:
        raise ValueError(f"--credentials {file}: {error.strerror}") from None
    except (ValueError, TypeError):
        raise ValueError(f"--credentials {file}: not a JSON object of token, or of a key's parts") from None


def _list(options: argparse.Namespace) -> int:
    with connect(options) as client:
        _show(list(client.adapters.list()), options)
    return 0


def _get(options: argparse.Namespace) -> int:
    with connect(options) as client:
        _show([client.adapters.get(options.adapter_id)], options)
    return 0


def _delete(options: argparse.Namespace) -> int:
    with connect(options) as client:
        client.adapters.delete(options.adapter_id, force=options.force)
    say(f"{options.adapter_id} is deleted")
    return 0


def _preload(options: argparse.Namespace) -> int:
    with connect(options) as client:
        _show([client.adapters.preload(options.adapter_id, options.tier)], options)
    return 0


def _watch(options: argparse.Namespace) -> int:
    limit = {} if options.timeout is None else {"timeout": options.timeout}
    with connect(options) as client, client.adapters.watch(**limit) as events:
        for event in events:
            if event.kind is AdapterEventKind.SNAPSHOT_END:
                if options.once:
                    break
                if not options.json and sys.stderr.isatty():
                    say("watching; Ctrl-C stops")
            else:
                write(as_json(event) if options.json else _event_line(event))
    return 0


def _show(adapters: Sequence[Adapter], options: argparse.Namespace) -> None:
    if options.json:
        write("".join(map(as_json, adapters)))
    elif adapters:
        write(table(HEADERS, [_row(adapter) for adapter in adapters]))
    else:
        say("no adapters are registered")


def _row(adapter: Adapter) -> tuple[object, ...]:
    return (
        adapter.adapter_id,
        _name(adapter.state) if adapter.failure is None else f"{_name(adapter.state)} ({adapter.failure.reason})",
        _tiers(adapter),
        adapter.method,
        adapter.rank,
        f"{adapter.size_bytes / 1024 / 1024:.1f} MiB",
        f"{adapter.weight:g}",
        "yes" if adapter.pinned else "no",
        _ago(adapter.last_use_time),
        len(adapter.leases),
        adapter.digest[:12],
        adapter.base_name or adapter.base_digest[:12] or "-",
        adapter.source_uri,
    )


def _tiers(adapter: Adapter) -> str:
    """The best tier on each node; with one node, its name says nothing."""
    best: dict[str, Tier] = {}
    for place in adapter.residency:
        if place.tier is not None:
            best[place.node_id] = max(place.tier, best.get(place.node_id, place.tier), key=lambda tier: tier.value)
    if len(best) <= 1:
        return _name(adapter.tier)
    return ", ".join(f"{node} {_name(tier)}" for node, tier in sorted(best.items()))


def _ago(then: datetime | None) -> str:
    if then is None:
        return "never"
    seconds = max(0, int((datetime.now(UTC) - then).total_seconds()))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"


def _event_line(event: AdapterEvent) -> str:
    kind, adapter = _name(event.kind), event.adapter
    if adapter is None:
        return f"{kind:10}\n"
    places = ", ".join(f"{_name(place.tier)} {place.engine_id or place.node_id}" for place in adapter.residency)
    return f"{kind:10}  {adapter.adapter_id}  {_name(adapter.state)}  {adapter.digest[:12]}  {places or 'nowhere'}\n"


def _name(member: Any) -> str:
    return member.name.lower() if member else "-"
