"""Where adapters come from: one file per kind of source, one protocol."""

from cache.sources.file import FileSource
from cache.sources.source import Source, scheme_of

__all__ = ["FileSource", "Source", "scheme_of"]
