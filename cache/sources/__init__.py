"""Where adapters come from: one file per kind of source, one protocol."""

from cache.sources.credentials import GivenCredentials, read_credentials
from cache.sources.file import FileSource
from cache.sources.source import NO_CREDENTIALS, Credentials, Limits, Source, scheme_of
from cache.sources.sources import Sources

__all__ = [
    "NO_CREDENTIALS",
    "Credentials",
    "FileSource",
    "GivenCredentials",
    "Limits",
    "Source",
    "Sources",
    "read_credentials",
    "scheme_of",
]
