"""What the benchmark asks a server besides the load: its model, its version, and what speculation has brought it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import msgspec

from inferflux_core.cli.api_errors import ApiError, error_from_response
from inferflux_core.cli.bench.connection import Answer, Connection
from inferflux_core.cli.endpoint import Endpoint

TIMEOUT_S = 30

_DRAFTED = ("inferflux_spec_draft_tokens_total", "vllm:spec_decode_num_draft_tokens_total")
_ACCEPTED = ("inferflux_spec_accepted_tokens_total", "vllm:spec_decode_num_accepted_tokens_total")


@dataclass(frozen=True, slots=True)
class Speculated:
    """Draft tokens that a server verified, and those of them that held."""

    drafted: int
    accepted: int

    def since(self, before: Speculated) -> Speculated | None:
        """What was counted after `before`; None if nothing was drafted, or the server has begun to count anew."""
        drafted, accepted = self.drafted - before.drafted, self.accepted - before.accepted
        return Speculated(drafted, accepted) if drafted > 0 and accepted >= 0 else None


async def find_model(endpoint: Endpoint) -> str:
    """The default model of a server, else its first.

    Raises:
        ApiError: the server cannot be reached, does not list its models, or has none.
    """
    answer = await _get(endpoint, "/v1/models")
    if answer.status != 200:
        raise error_from_response(endpoint.url, "/v1/models", answer.status, answer.body)
    entries = _json(answer.body).get("data")
    cards = [card for card in entries if isinstance(card, dict)] if isinstance(entries, list) else []
    names = [str(card["id"]) for card in cards if card.get("id")]
    defaults = [str(card["id"]) for card in cards if isinstance(ours := card.get("inferflux"), dict) and ours.get("default")]
    if not names:
        raise ApiError(f"{endpoint.url} lists no model. Name one with --model")
    return (defaults or names)[0]


async def find_version(endpoint: Endpoint) -> str | None:
    """What a server says of its version: InferFlux, vLLM and llama-server each have a place for it."""
    for path, key in (("/healthz", "version"), ("/version", "version"), ("/props", "build_info")):
        try:
            answer = await _get(endpoint, path)
        except ApiError:
            return None
        version = _json(answer.body).get(key) if answer.status == 200 else None
        if isinstance(version, str):
            return version
    return None


async def find_speculated(endpoint: Endpoint) -> Speculated | None:
    """What a server's metrics page says of speculation since its start, all its models together; None where it says nothing.
    InferFlux and vLLM do."""
    try:
        answer = await _get(endpoint, "/metrics")
    except ApiError:
        return None
    if answer.status != 200:
        return None
    drafted = accepted = None
    for line in answer.body.decode("utf-8", "replace").splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name not in _DRAFTED and name not in _ACCEPTED:
            continue
        try:
            value = round(float(line.rpartition(" ")[2]))
        except (ValueError, OverflowError):
            return None
        if name in _DRAFTED:
            drafted = (drafted or 0) + value
        else:
            accepted = (accepted or 0) + value
    return None if drafted is None or accepted is None else Speculated(drafted, accepted)


async def _get(endpoint: Endpoint, path: str) -> Answer:
    connection = await Connection.open(endpoint)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await connection.get(path)
    except TimeoutError as error:
        raise ApiError(f"{endpoint.url}{path} did not answer within {TIMEOUT_S} s") from error
    finally:
        connection.close()


def _json(body: bytes) -> dict[str, Any]:
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return document if isinstance(document, dict) else {}
