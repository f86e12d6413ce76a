"""What administrators set at run time and a restart keeps: a named, versioned document of the access store."""

from __future__ import annotations

from typing import Generic, TypeVar

from pydantic import BaseModel

from inferflux_core.access.store import AccessStore
from inferflux_core.errors import UnavailableError

ValueT = TypeVar("ValueT", bound=BaseModel)


class StoredDocument(Generic[ValueT]):
    """One document of a store, which holds one kind of value."""

    def __init__(self, store: AccessStore | None, name: str, kind: type[ValueT]) -> None:
        self._store = store
        self._name = name
        self._kind = kind

    async def read(self, configured: ValueT) -> tuple[ValueT, int]:
        """The value and its version, which belong together whoever writes meanwhile.

        Args:
            configured: the value while nobody has written the document; its version is 0.

        Raises:
            AccessUnavailableError: the store cannot be read, or holds something else under this name.
        """
        store = self._opened()
        document = await store.get_document(self._name)
        if document is None:
            return configured, 0
        return store.decoded(self._kind.model_validate, document.value), document.version

    async def write(self, value: ValueT, expected_version: int | None) -> int:
        """Replace it; returns the new version.

        Raises:
            PreconditionFailedError: it has another version than the one expected.
            AccessUnavailableError: the store cannot be written.
        """
        return (await self._opened().put_document(self._name, value.model_dump(mode="json"), expected_version)).version

    def _opened(self) -> AccessStore:
        if self._store is None:
            raise UnavailableError(
                "This server has no store for settings: auth.providers is empty.", code="policy_store_disabled"
            )
        return self._store
