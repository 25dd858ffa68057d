"""The bases that engines have described, and which of them an adapter is for. No I/O, no clock.

A base is in service while an engine that is attached to any node serves it, or an adapter of it is registered. The others
stay known, so that an adapter can be registered before its engines are back, but they have to be named: where nobody
says which base is meant, what was served once and is not any more does not make the answer ambiguous.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from types import MappingProxyType

from cache.artifact import BaseDescription
from cache.errors import AmbiguousBase, BaseUnknown, NoSuchBase
from cache.registry import AdapterRecord

# As many digits of a digest name a base as `loraplex info` and lists show.
SHORTEST_DIGEST = 12


class Bases:
    """See the module.

    Args:
        in_service: digests of the bases in service; may hold some that are not known here yet.
    """

    def __init__(self, in_service: Callable[[], Set[str]]) -> None:
        self._in_service = in_service
        self._known: dict[str, BaseDescription] = {}

    @property
    def known(self) -> Mapping[str, BaseDescription]:
        """digest -> description."""
        return MappingProxyType(self._known)

    def __contains__(self, digest: str) -> bool:
        return digest in self._known

    def __iter__(self) -> Iterator[BaseDescription]:
        return iter(self._known.values())

    def take(self, bases: Iterable[BaseDescription]) -> None:
        """Takes descriptions in; the newest of a base is the one that holds."""
        self._known.update({base.digest: base for base in bases})

    def of(self, record: AdapterRecord) -> BaseDescription | None:
        """The base an adapter was validated against; None when nobody has described it."""
        if not record.base_digest and len(self._known) == 1:
            # Registered when a registry had one base and records did not say it.
            return next(iter(self._known.values()))
        return self._known.get(record.base_digest)

    def named(self, asked: str) -> BaseDescription | None:
        """The base a caller names; None when none is named and there are several, so that the adapter has to say.

        Raises:
            BaseUnknown: no base is known.
            NoSuchBase: none of that name or digest is, but others are. Who was ever described in the cluster is known, so
                it does not help to wait, unless a first engine of it is about to start.
            AmbiguousBase: several have that name.
        """
        if not self._known:
            raise BaseUnknown(asked)
        if asked:
            found = self._matches(asked)
            if not found:
                close = difflib.get_close_matches(asked, [base.name for base in self], n=1)
                raise NoSuchBase(asked, self._shown(self), next(iter(close), ""))
            return self._only(found, f"{asked!r} is the name of several bases; name one by its digest")
        return next(iter(self._known.values())) if len(self._known) == 1 else None

    def for_adapter(self, own: str) -> BaseDescription:
        """The base an adapter is for that names its base itself, or does not: else the only one in service.

        Args:
            own: base_model_name_or_path of the adapter; may be empty.

        Raises:
            AmbiguousBase: that names no known base or several, and several are in service.
        """
        if found := self._matches(own):
            return self._only(found, f"the adapter's own {own!r} is the name of several bases")
        says = f"the adapter's own {own!r} is none of them" if own else "the adapter does not say its own"
        return self._only(list(self._known.values()), f"there are several bases, and {says}")

    def state(self) -> str:
        """What a choice depends on beside the names: another text may mean another choice."""
        return " ".join((*sorted(self._known), "in service:", *sorted(self._in_service())))

    def _matches(self, name: str) -> list[BaseDescription]:
        """The bases of a name or digest; of the last part of the name, when none has all of it."""
        if not name:
            return []
        bases = list(self._known.values())
        by_digest = [base for base in bases if len(name) >= SHORTEST_DIGEST and base.digest.startswith(name)]
        by_name = [base for base in bases if base.name == name]
        # The same model is a hub id to one and a folder to another.
        by_last = [base for base in bases if _last(base.name) == _last(name)] if _last(name) else []
        return by_digest or by_name or by_last

    def _only(self, bases: list[BaseDescription], message: str) -> BaseDescription:
        """The one of them, or the one that is in service."""
        if len(bases) > 1:
            in_service = self._in_service()
            bases = [base for base in bases if base.digest in in_service] or bases
        if len(bases) > 1:
            raise AmbiguousBase(message, self._shown(bases))
        return bases[0]

    def _shown(self, bases: Iterable[BaseDescription]) -> list[str]:
        return sorted(f"{base.name} ({base.digest[:SHORTEST_DIGEST]})" for base in bases)


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]
