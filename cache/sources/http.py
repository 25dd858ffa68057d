"""HTTP for sources: addresses are checked where connections are made, redirects are few, and secrets stay with their origin.

A name is resolved once, every address it has is checked, and one of those checked is what is connected to: a name server
that answers differently the second time gains nothing. Sent in the clear is only what goes to a network the operator named.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore2
from httpcore2 import AnyIOBackend, AsyncNetworkBackend, AsyncNetworkStream

from cache.errors import shown
from cache.sources.source import Limits
from servicekit.errors import InvalidField

MAX_REDIRECTS = 5
REDIRECTS = frozenset({301, 302, 303, 307, 308})
# What a server of another origin must not see.
SECRETS = frozenset({"authorization", "cookie", "x-amz-security-token"})

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Response:
    """Status, headers with lower-case names, and the body as it arrives."""

    def __init__(self, raw: httpcore2.Response) -> None:
        self.status = raw.status
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in raw.headers}
        self._raw = raw

    def body(self) -> AsyncIterator[bytes]:
        """The body, in pieces. Raises what httpcore raises when the connection breaks."""
        return self._raw.aiter_stream()


class HttpClient:
    """See the module.

    Args:
        networks: private networks that may be reached, also in the clear.
        origin: "scheme://host:port" of a server the operator named; may be reached wherever it is. May be empty.
    """

    def __init__(self, limits: Limits, networks: Iterable[Network] = (), origin: str = "") -> None:
        self._origin = origin_of(origin) if origin else ""
        self._timeout = {
            "connect": limits.connect_seconds,
            "read": limits.idle_seconds,
            "write": limits.idle_seconds,
            "pool": limits.connect_seconds,
        }
        allowed = tuple(networks)
        named = [urlsplit(self._origin)] if self._origin else []
        trusted = {(each.hostname or "", _port(each.scheme, each.port)) for each in named}
        self._pools = {
            scheme: httpcore2.AsyncConnectionPool(
                max_connections=None, network_backend=_GuardedBackend(allowed, trusted, public=scheme == "https")
            )
            for scheme in ("https", "http")
        }

    @asynccontextmanager
    async def open(
        self, method: str, url: str, headers: Mapping[str, str], *, redirects: bool = True
    ) -> AsyncIterator[Response]:
        """Sends a request and follows redirects; the connection ends with the block.

        Raises:
            InvalidField: an address or a scheme that must not be asked; or more redirects than MAX_REDIRECTS.
            what httpcore raises when a connection cannot be made or breaks.
        """
        for _ in range(MAX_REDIRECTS + 1):
            async with self._send(method, url, headers) as response:
                location = response.headers.get("location")
                if not redirects or response.status not in REDIRECTS or location is None:
                    yield response
                    return
            target = urljoin(url, location)
            if origin_of(target) != origin_of(url):
                headers = {name: value for name, value in headers.items() if name.lower() not in SECRETS}
            url = target
        raise InvalidField("source_uri", f"leads to more than {MAX_REDIRECTS} redirects", "TOO_MANY_REDIRECTS")

    @asynccontextmanager
    async def _send(self, method: str, url: str, headers: Mapping[str, str]) -> AsyncIterator[Response]:
        pool = self._pools.get(urlsplit(url).scheme)
        if pool is None:
            raise InvalidField("source_uri", "leads to a scheme other than https://", "SCHEME_REFUSED")
        sent = list({"accept-encoding": "identity", "user-agent": "loraplex", **headers}.items())
        async with pool.stream(method, url, headers=sent, extensions={"timeout": self._timeout}) as raw:
            yield Response(raw)

    async def close(self) -> None:
        """Closes the connections."""
        for pool in self._pools.values():
            await pool.aclose()


class _GuardedBackend(AsyncNetworkBackend):
    """Connects to addresses that may be reached, and to no others."""

    def __init__(self, networks: tuple[Network, ...], trusted: set[tuple[str, int]], *, public: bool) -> None:
        self._networks, self._trusted, self._public = networks, trusted, public
        self._backend = AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> AsyncNetworkStream:
        try:
            addresses = await asyncio.wait_for(_resolve(host, port), timeout)
        except TimeoutError:
            raise httpcore2.ConnectTimeout("the name server does not answer") from None
        if (host, port) not in self._trusted and not all(map(self._allowed, addresses)):
            raise InvalidField(
                "source_uri",
                f"leads to {shown(host)}, which has an address that sources must not be read from"
                + ("" if self._public else " without TLS"),
                "ADDRESS_REFUSED",
                host=shown(host),
            )
        return _Stream(await self._backend.connect_tcp(str(addresses[0]), port, timeout, local_address, socket_options))

    def _allowed(self, address: Address) -> bool:
        inner = getattr(address, "ipv4_mapped", None) or address
        if any(inner in network for network in self._networks if network.version == inner.version):
            return True
        return self._public and inner.is_global and not inner.is_multicast


class _Stream(AsyncNetworkStream):
    """A connection that is closed when a deadline ends its TLS handshake; httpcore leaves that to the garbage collector."""

    def __init__(self, stream: AsyncNetworkStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return await self._stream.read(max_bytes, timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> AsyncNetworkStream:
        try:
            return await self._stream.start_tls(ssl_context, server_hostname, timeout)
        except BaseException:
            await self._stream.aclose()
            raise

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


async def _resolve(host: str, port: int) -> list[Address]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise httpcore2.ConnectError(f"the name {shown(host)} cannot be resolved ({error.strerror})") from None
    addresses = [ipaddress.ip_address(str(each[4][0]).partition("%")[0]) for each in found]
    # IPv4 first: a machine without a route for IPv6 may still be told such an address.
    return sorted(dict.fromkeys(addresses), key=lambda address: address.version)


def origin_of(url: str) -> str:
    """scheme://host:port of a URL. Raises InvalidField."""
    try:
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.hostname or ''}:{_port(parts.scheme, parts.port)}"
    except ValueError:
        raise InvalidField("source_uri", "leads to a malformed URL", "MALFORMED_URI") from None


def _port(scheme: str, port: int | None) -> int:
    return port if port is not None else {"https": 443}.get(scheme, 80)
