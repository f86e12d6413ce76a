"""What administrators set at run time and a restart keeps: a named, versioned document of the access store."""

from __future__ import annotations

from typing import Any

from inferflux_core.access.store import AccessStore
from inferflux_core.errors import UnavailableError


class StoredDocument:
    """One document of a store."""

    def __init__(self, store: AccessStore | None, name: str) -> None:
        self._store = store
        self._name = name

    async def version(self) -> int:
        """0 while the configuration counts, because nobody has written the document."""
        document = await self._opened().get_document(self._name)
        return 0 if document is None else document.version

    async def put(self, value: dict[str, Any], expected_version: int | None) -> int:
        """Replace it; returns the new version.

        Raises:
            PreconditionFailedError: it has another version than the one expected.
            AccessUnavailableError: the store cannot be written.
        """
        return (await self._opened().put_document(self._name, value, expected_version)).version

    def _opened(self) -> AccessStore:
        if self._store is None:
            raise UnavailableError(
                "This server has no store for settings: auth.providers is empty.", code="policy_store_disabled"
            )
        return self._store
