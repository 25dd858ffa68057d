"""From a URL to a Redis client: one server, or the master that Sentinels name.

    redis://[user:password@]host:port/db     rediss://...     unix:///path
    redis+sentinel://[user:password@]sentinel1:26379,sentinel2:26379/master[/db]     rediss+sentinel://...

User and password are those of the Redis servers; Sentinels are asked without. On a cluster the keys of one registry lie on one
server, which is what to name here.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from servicekit.errors import StartupError

_SENTINEL = re.compile(
    r"(?P<scheme>rediss?)\+sentinel://(?:(?P<user>[^:@/]*):(?P<password>[^@/]*)@)?"
    r"(?P<hosts>[^@/]+)/(?P<master>[^/?#]+)(?:/(?P<db>\d+))?"
)


def connect(url: str, timeout_seconds: float) -> Any:
    """A redis.asyncio client; connects when it is first used. Raises StartupError for a malformed URL."""
    options: dict[str, Any] = {
        "decode_responses": True,
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": timeout_seconds,
        "retry": Retry(NoBackoff(), 1),
    }
    try:
        if "+sentinel://" in url:
            return _behind_sentinels(url, options)
        return redis.asyncio.Redis.from_url(url, **options)
    except ValueError as error:
        raise StartupError(f"--redis {without_password(url)}: {error}") from None


async def disconnect(client: Any) -> None:
    """Closes a client's connections, those to its Sentinels too."""
    found = getattr(client.connection_pool, "sentinel_manager", None)
    for sentinel in found.sentinels if found is not None else ():
        await sentinel.aclose()
    await client.aclose()


def without_password(url: str) -> str:
    """A URL as it may be shown."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _behind_sentinels(url: str, options: dict[str, Any]) -> Any:
    match = _SENTINEL.fullmatch(url)
    if match is None:
        raise ValueError("must be redis+sentinel://sentinel:port,.../master[/db]")
    sentinels = [_address(each) for each in match["hosts"].split(",")]
    own = {
        name: unquote(match[group]) for name, group in (("username", "user"), ("password", "password")) if match[group]
    }
    asking = {name: options[name] for name in ("socket_timeout", "socket_connect_timeout", "retry")}
    # A master that has changed shows as a broken connection, and the next one asks the Sentinels again.
    make: Any = Sentinel
    found = make(sentinels, sentinel_kwargs=asking, **options, **own)
    return found.master_for(match["master"], db=int(match["db"] or 0), ssl=match["scheme"] == "rediss")


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not host:
        raise ValueError(f"{text} is not a sentinel's host:port")
    return host.strip("[]"), int(port)
