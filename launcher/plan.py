"""Options -> the services to run: their commands, addresses and order."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.layout import Layout
from launcher.options import Options

# The router lets running requests finish for as long as its own drain_seconds; then we lose patience.
DRAIN_SECONDS = 30
STOP_SECONDS = DRAIN_SECONDS + 5.0


@dataclass(frozen=True)
class Service:
    """One child process.

    Attributes:
        address: gRPC target of its health service; for the store, the path of its socket.
        needs: services that must be ready before its first start.
        environ: variables it gets besides ours.
        stage: services of the lowest stage are stopped first.
        orphan_signal: what the kernel sends it when we die. The store writes out what it has; the others hold
            nothing that could be lost, and must be gone before the next start.
    """

    name: str
    command: tuple[str, ...]
    address: str
    stage: int
    needs: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    orphan_signal: signal.Signals = signal.SIGKILL

    @property
    def is_store(self) -> bool:
        """Whether it speaks Redis, not gRPC."""
        return self.address.startswith("/")

    def forget(self) -> None:
        """Removes the socket of an earlier store, which a new one would not replace."""
        if self.is_store:
            Path(self.address).unlink(missing_ok=True)


@dataclass(frozen=True)
class Machine:
    """What engines share.

    Attributes:
        accelerators: as CUDA_VISIBLE_DEVICES names them.
        threads_chosen: whether the user says how many threads an engine takes.
    """

    cores: int
    accelerators: tuple[str, ...] = ()
    threads_chosen: bool = False


def plan_services(
    options: Options, layout: Layout, machine: Machine, model: str, store_binary: Path | None
) -> list[Service]:
    """Services in the order they are shown.

    Args:
        model: folder or hub id.
        store_binary: the embedded store; None when options.redis names one.
    """
    services = [_store(layout, store_binary)] if store_binary else []
    needs = tuple(service.name for service in services)
    engines = [_engine(number, options, layout, machine, model, needs) for number in range(options.engines)]
    return [*services, _cache(options, layout, needs), *engines, _router(options, layout, engines, needs)]


def public_address(host: str, port: int) -> str:
    """Host and port as gRPC wants them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _module(name: str, **settings: object) -> tuple[str, ...]:
    """Command of a service of ours; a tuple as a setting repeats its flag."""
    flags: list[str] = []
    for key, value in settings.items():
        for single in value if isinstance(value, tuple) else (value,):
            flags += [f"--{key.replace('_', '-')}", str(single)]
    # -P: a folder called cache or engine where the user happens to be is not ours.
    return (sys.executable, "-P", "-m", name, *flags)


def _unix(layout: Layout, name: str) -> str:
    return f"unix:{layout.socket(name)}"


def _store(layout: Layout, binary: Path) -> Service:
    path = layout.socket("store")
    command = (
        str(binary), "--port", "0", "--unixsocket", str(path), "--unixsocketperm", "700", "--dir", str(layout.store),
        "--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--daemonize", "no",
    )  # fmt: skip
    return Service("store", command, str(path), stage=3, orphan_signal=signal.SIGTERM)


def _cache(options: Options, layout: Layout, needs: tuple[str, ...]) -> Service:
    address = _unix(layout, "cache")
    command = _module(
        "cache",
        listen=address,
        redis=options.redis or f"unix://{layout.socket('store')}",
        data_dir=layout.cache,
        host_tier=layout.host_tier,
        adapter_roots=options.adapter_roots,
    )
    return Service("cache", command, address, stage=2, needs=needs)


def _engine(
    number: int, options: Options, layout: Layout, machine: Machine, model: str, needs: tuple[str, ...]
) -> Service:
    name = f"engine-{number}"
    address = _unix(layout, name)
    settings: dict[str, object] = {
        "listen": address,
        "model": model,
        "cache": _unix(layout, "cache"),
        "engine_id": name,
        "host_tier": layout.host_tier,
        "device": options.device,
        "dtype": options.dtype,
    }
    environ = {}
    if options.engines > 1 and machine.accelerators and options.device != "cpu":
        environ["CUDA_VISIBLE_DEVICES"] = machine.accelerators[number % len(machine.accelerators)]
    elif options.engines > 1 and not machine.threads_chosen:
        # Engines that each take all cores spend their time waiting for each other.
        settings["threads"] = max(1, machine.cores // options.engines)
    return Service(name, _module("engine", **settings), address, stage=1, needs=needs, environ=environ)


def _router(options: Options, layout: Layout, engines: Sequence[Service], needs: tuple[str, ...]) -> Service:
    address = public_address(options.host, options.port)
    command = _module(
        "router",
        listen=address,
        cache=_unix(layout, "cache"),
        engines=tuple(engine.address for engine in engines),
        drain_seconds=DRAIN_SECONDS,
    )
    return Service("router", command, address, stage=0, needs=needs)
