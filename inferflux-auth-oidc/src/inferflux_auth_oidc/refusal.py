"""Why a token is refused."""

from __future__ import annotations


class Refusal(Exception):
    """A token that proves nothing. Becomes a 401 that does not say why.

    Attributes:
        reason: a short fixed word, for the audit log and a metric.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Unavailable(Exception):
    """It cannot be found out now. Becomes a 503.

    Attributes:
        retry_after: seconds until another try makes sense.
    """

    def __init__(self, retry_after: float) -> None:
        super().__init__(retry_after)
        self.retry_after = max(1.0, retry_after)
