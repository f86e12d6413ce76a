"""Whether a server is up and ready, and what its models are doing."""

from __future__ import annotations

from typing import Any

import msgspec

from inferflux_core.cli.api_client import ApiClient
from inferflux_core.cli.api_errors import ApiError, error_from_response

LACKING = (404, 405, 501)
"""What servers answer for a route that they do not have."""

SINGLE_POSITIONS = 4
"""Positions of a draft that are shown one by one."""


class SpeculationStatus(msgspec.Struct, kw_only=True):
    """What speculative decoding has brought a model, as `/healthz` says it; None where it does not say."""

    method: str | None = None
    drafts: int | None = None
    draft_tokens: int | None = None
    accepted_tokens: int | None = None
    acceptance_ratio: float | None = None  # 0 to 1; before the first draft there is none
    mean_accepted_tokens: float | None = None  # of a draft
    draft_tokens_per_position: list[int] = msgspec.field(default_factory=list)
    accepted_tokens_per_position: list[int] = msgspec.field(default_factory=list)

    def acceptance_percent(self) -> str | None:
        """Which share of the draft tokens held, for people."""
        return None if self.acceptance_ratio is None else f"{self.acceptance_ratio:.0%}"

    def mean_accepted(self) -> str | None:
        """Accepted tokens of a draft, for people."""
        return None if self.mean_accepted_tokens is None else f"{self.mean_accepted_tokens:.1f}"

    def by_position(self) -> list[tuple[str, int, int, str | None]]:
        """Positions from the first to the last, as `1` or `5-8`, with their drafted and accepted tokens and the share.

        The first four stand alone, then come ranges that double: a draft may be hundreds of tokens long.
        """
        pairs = list(zip(self.draft_tokens_per_position, self.accepted_tokens_per_position, strict=False))
        rows = []
        start, width = 0, 1
        while start < len(pairs):
            part = pairs[start : start + width]
            drafted, accepted = sum(pair[0] for pair in part), sum(pair[1] for pair in part)
            share = f"{accepted / drafted:.0%}" if drafted else None
            end = start + len(part)
            rows.append((str(end) if len(part) == 1 else f"{start + 1}-{end}", drafted, accepted, share))
            start = end
            width = start if start >= SINGLE_POSITIONS else 1
        return rows


class ModelStatus(msgspec.Struct, kw_only=True):
    """One model of `/healthz`; None where the server does not say."""

    name: str = "?"
    state: str | None = None
    requests_running: int | None = None
    requests_waiting: int | None = None
    kv_cache_usage_ratio: float | None = None  # 0 to 1
    restarts: int | None = None
    speculation: SpeculationStatus | None = None

    def kv_cache_percent(self) -> str | None:
        """How full the KV cache is, for people."""
        return None if self.kv_cache_usage_ratio is None else f"{self.kv_cache_usage_ratio:.0%}"


class ServerStatus(msgspec.Struct, kw_only=True):
    """The state of one server. `notes` say what could not be found out, and why it is not ready."""

    url: str
    reachable: bool = False
    ready: bool = False
    status: str | None = None
    version: str | None = None
    models: list[ModelStatus] = msgspec.field(default_factory=list)
    notes: list[str] = msgspec.field(default_factory=list)


def ask_status(client: ApiClient) -> ServerStatus:
    """Asks `/readyz` and `/healthz`; a server without them is judged by whether it lists its models."""
    status = ServerStatus(url=client.url)
    try:
        code, body = client.get("/readyz")
        status.reachable = True
        path = "/readyz"
        if code in LACKING:
            status.notes.append("the server has no /readyz: judged by whether it lists its models")
            path = "/v1/models"
            code, body = client.get(path)
        status.ready = code == 200
        if not status.ready:
            document = _object(body)
            reason = document.get("status") if "error" not in document else None
            status.notes.append(str(reason or error_from_response(client.url, path, code, body)))
        _read_health(status, *client.get("/healthz"))
    except ApiError as error:
        status.ready = False
        status.notes.append(str(error))
    return status


def _read_health(status: ServerStatus, code: int, body: bytes) -> None:
    document = _object(body)
    if code in LACKING or not document or "error" in document:
        status.notes.append("the server has no /healthz: no version and no figures")
        return
    status.status = _text(document.get("status"))
    status.version = _text(document.get("version"))
    entries = document.get("models")
    for entry in entries if isinstance(entries, list) else []:
        try:
            status.models.append(msgspec.convert(entry, ModelStatus))
        except msgspec.ValidationError as error:
            status.notes.append(f"/healthz describes a model in an unknown way: {error}")


def _object(body: bytes) -> dict[str, Any]:
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return document if isinstance(document, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
