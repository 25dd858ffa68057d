"""The sources a cache serves, made from its settings."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from urllib.parse import urlsplit

from cache.config import Settings
from cache.sources.credentials import read_credentials
from cache.sources.download import Downloads
from cache.sources.file import FileSource
from cache.sources.http import Network
from cache.sources.hub import HubSource
from cache.sources.s3 import S3Source
from cache.sources.source import Limits, Source
from cache.sources.sources import Sources
from cache.sources.web import WebSource
from servicekit.errors import StartupError

_MIB = 1024 * 1024


def make_sources(settings: Settings) -> Sources:
    """All sources of the settings. Raises StartupError."""
    limits = Limits(
        settings.source_connect_seconds,
        settings.source_idle_seconds,
        settings.source_seconds,
        settings.max_adapter_mib * _MIB,
        settings.source_readers,
    )
    downloads = Downloads(Path(settings.data_dir) / "downloads")
    networks = [_network(each) for each in settings.source_networks]
    served: dict[str, Source] = {}
    for kind in dict.fromkeys(settings.sources):
        if kind == "file":
            roots = [_root(root) for root in settings.adapter_roots]
            served[kind] = FileSource(roots, limits.weights_bytes, limits)
        elif kind == "hf":
            endpoint = _endpoint("hub_endpoint", settings.hub_endpoint)
            served[kind] = HubSource(downloads, limits, networks, endpoint)
        elif kind == "s3":
            endpoint = _endpoint("s3_endpoint", settings.s3_endpoint)
            served[kind] = S3Source(downloads, limits, networks, endpoint, settings.s3_region)
        else:
            served["https"] = served["http"] = WebSource(downloads, limits, networks)
    return Sources(served, limits, read_credentials(settings.source_credentials))


def _root(name: str) -> Path:
    root = Path(name).expanduser()
    if not root.is_dir():
        raise StartupError(f"the adapter root {name} is not a folder")
    return root


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise StartupError(f"source_networks: {error}") from None


def _endpoint(name: str, url: str) -> str:
    try:
        parts = urlsplit(url)
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0 or "@" in parts.netloc
    except ValueError:
        wrong = True
    if url and (wrong or parts.query or parts.fragment):
        raise StartupError(f"{name} must be http:// or https:// with a host, without user, query or fragment")
    return url
