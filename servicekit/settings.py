"""Settings of a service: a frozen dataclass, filled once from flags and environment variables.

    @dataclass(frozen=True)
    class Settings:
        listen: str = setting("127.0.0.1:50051", "Address to listen on.")
        adapter_roots: tuple[str, ...] = setting((), "Folder file:// sources may lie in; may be repeated.")

    settings = read_settings(Settings, "cache", sys.argv[1:], os.environ)

The field `adapter_roots` is the flag `--adapter-roots` and the variable LORAPLEX_CACHE_ADAPTER_ROOTS (a tuple is a
flag that may be repeated and a variable separated by ",": addresses contain ":"). A flag wins over the variable, the
variable over the default; an empty variable is as good as none. Types: str, int, float, bool and tuple[str, ...].
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from servicekit.errors import StartupError

T = TypeVar("T")


def setting(default: Any, description: str) -> Any:
    """A field of a settings dataclass."""
    return dataclasses.field(default=default, metadata={"description": description})


def variable(service: str, name: str) -> str:
    """Environment variable of a field: LORAPLEX_<SERVICE>_<NAME>."""
    return f"LORAPLEX_{service}_{name}".upper()


def read_settings(cls: type[T], service: str, argv: Sequence[str], environ: Mapping[str, str]) -> T:
    """Builds the settings; raises StartupError naming the flag or the variable when its value is malformed."""
    parser = _Parser(prog=f"python -m {service}", description=(cls.__doc__ or "").split("\n")[0], allow_abbrev=False)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name = variable(service, field.name)
        flag = "--" + field.name.replace("_", "-")
        text = f"{field.metadata['description']} [{name}] (default: {_shown(field.default)})"
        kind = _kind(field.default)
        if kind is tuple:
            parser.add_argument(flag, action="append", default=None, metavar="VALUE", help=text)
        elif kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            parser.add_argument(flag, type=kind, default=None, metavar=kind.__name__.upper(), help=text)
    given = vars(parser.parse_args(list(argv)))
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        value = given[field.name]
        if value is None and (raw := environ.get(variable(service, field.name))):
            value = _parse(raw, _kind(field.default), variable(service, field.name))
        if value is not None:
            values[field.name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**values)
    except ValueError as error:
        raise StartupError(str(error)) from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise StartupError(message)


def _kind(default: Any) -> Any:
    return tuple if isinstance(default, tuple) else type(default)


def _shown(default: Any) -> str:
    return ",".join(default) or "none" if isinstance(default, tuple) else str(default) or "none"


def _parse(raw: str, kind: Any, name: str) -> Any:
    if kind is tuple:
        return tuple(part for part in raw.split(",") if part)
    if kind is bool:
        if raw.lower() in ("1", "true", "yes", "0", "false", "no"):
            return raw.lower() in ("1", "true", "yes")
        raise StartupError(f"{name}: {raw!r} is neither true nor false")
    try:
        return kind(raw)
    except ValueError:
        raise StartupError(f"{name}: {raw!r} is not a {kind.__name__}") from None
