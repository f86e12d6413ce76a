"""Whether a server is up and ready, and what its models are doing."""

from __future__ import annotations

from typing import Any

import msgspec

from inferflux_core.cli.api_client import ApiClient
from inferflux_core.cli.api_errors import ApiError, error_from_response

LACKING = (404, 405, 501)
"""What servers answer for a route that they do not have."""


class ModelStatus(msgspec.Struct, kw_only=True):
    """One model of `/healthz`; None where the server does not say."""

    name: str = "?"
    state: str | None = None
    requests_running: int | None = None
    requests_waiting: int | None = None
    kv_cache_usage_ratio: float | None = None  # 0 to 1
    restarts: int | None = None

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
