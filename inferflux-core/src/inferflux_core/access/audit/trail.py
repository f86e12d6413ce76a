"""AuditTrail: where the server puts what happened, whether or not it is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod

from inferflux_core.access.audit.events import AuditEvent, Json


class AuditTrail(ABC):
    """What the rest of the server knows of the audit log."""

    @property
    @abstractmethod
    def enabled(self) -> bool:
        """Whether anything is kept at all."""

    @property
    @abstractmethod
    def healthy(self) -> bool:
        """Whether what is to be kept reaches the disk, as far as is known."""

    @property
    @abstractmethod
    def head(self) -> int:
        """Number of the last record in the log; 0 for none, and while the log is not open."""

    @property
    @abstractmethod
    def keeps_content(self) -> bool:
        """Whether `content` keeps anything."""

    @abstractmethod
    async def start(self) -> None:
        """Begin to record.

        Raises:
            ConfigError: that is not possible.
        """

    @abstractmethod
    async def close(self, last: AuditEvent | None = None) -> None:
        """Write everything that was recorded, then `last` as the last record, and end. May be called again."""

    @abstractmethod
    async def record(self, event: AuditEvent, *, important: bool = False) -> None:
        """Record an event.

        Args:
            important: never dropped or refused, however full the queue is; for what administrators do and failed
                authentication.

        Raises:
            AccessUnavailableError: it was not taken.
            ValueError, TypeError: see `record_fields`.
        """

    @abstractmethod
    def record_soon(self, event: AuditEvent) -> None:
        """Record an event from code that cannot wait, in any thread."""

    @abstractmethod
    def check(self) -> None:
        """Whether a new request may be begun.

        Raises:
            AccessUnavailableError: `audit_unavailable`.
        """

    @abstractmethod
    def content(self, text: str) -> dict[str, Json]:
        """What is kept of a prompt, to be put among the fields of its event."""
