"""Attacks 71 and 77: what tenants can learn of each other, and how much of the server's memory strangers can fill."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from attacks.access_server import BOSS, USER, AccessServer, burst, guarded
from attacks.raw_http import head
from inferflux_core.access.keys.form import new_key

KEYS = {
    "boss": BOSS,
    "acme": USER,
    "acme-too": USER,
    "globex": {**USER, "tenant": "globex"},
}
BLOCK = 16  # tokens of a block of the fake model's cache
TEMPLATE = 19  # tokens that its chat template adds to a message
MANY = 1000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AccessServer]:
    settings = {"auth": {"max_failures_per_minute": MANY // 2}, "logging": {"level": "error"}}
    with guarded(tmp_path_factory.mktemp("tenants"), KEYS, models=[{"source": "fake", "name": "tiny"}], **settings) as found:
        yield found


# --- 77: the prefix cache ---------------------------------------------------------------------------------------------


def cached(server: AccessServer, name: str, text: str, **fields: object) -> int:
    """Tokens of a prompt that were in the cache."""
    reply = server.chat(name, messages=[{"role": "user", "content": text}], **fields)
    assert reply.status_code == 200
    usage = reply.json()["usage"]
    assert usage["prompt_tokens"] == len(text) + TEMPLATE
    found = usage["prompt_tokens_details"]["cached_tokens"]
    assert server.record_of(reply.headers["x-request-id"])["tokens_cached"] == found
    return int(found)


def test_77_a_prefix_is_shared_within_a_tenant_and_not_beyond(server: AccessServer) -> None:
    text = "the quarterly figures of a company that nobody else may know of. " * 10
    whole = (len(text) + TEMPLATE - 1) // BLOCK * BLOCK
    assert cached(server, "acme", text) == 0
    assert cached(server, "globex", text) == 0, "another tenant would learn that somebody asked this"
    assert cached(server, "acme", text) == whole
    assert cached(server, "globex", text) == whole, "its own"
    assert cached(server, "acme-too", text) == whole, "another key of the same tenant"


def test_77_nobody_gets_into_another_tenants_prefixes_by_a_salt(server: AccessServer) -> None:
    text = "the plans of a company for the year to come, which are nobody's business. " * 10
    assert cached(server, "acme", text) == 0
    assert cached(server, "acme", text, cache_salt="globex") == 0, "a salt of one's own keeps apart"
    for salt in ("acme", "acme\0", "\0", "\0acme\0", "globex\0acme"):
        assert cached(server, "globex", text, cache_salt=salt) == 0, salt
    assert cached(server, "globex", text, user="acme") == 0
    assert cached(server, "acme", text, cache_salt="globex") > 0


def test_the_limits_of_one_tenant_say_nothing_of_another(server: AccessServer) -> None:
    table = server.ask("boss", "GET", "/v1/admin/limits")
    limits = {"default": {}, "tenants": {"*": {"rpm": 1000, "daily_tokens": 100_000}}, "models": {}}
    tag = {"if-match": table.headers["etag"]}
    changed = server.ask("boss", "PUT", "/v1/admin/limits", json=limits, headers=tag)
    assert changed.status_code == 200, changed.text
    first = server.chat("acme").headers["x-ratelimit-remaining-tokens"]
    for _ in range(3):
        assert server.chat("globex").status_code == 200
    assert int(server.chat("acme-too").headers["x-ratelimit-remaining-tokens"]) == int(first) - 25, "its tenant's, not globex's"


# --- 71: metrics ------------------------------------------------------------------------------------------------------


def series(server: AccessServer) -> set[str]:
    """Name and labels of each sample."""
    page = server.ask("boss", "GET", "/metrics").text
    return {line.rpartition(" ")[0] for line in page.splitlines() if line and not line.startswith("#")}


async def test_71_what_strangers_name_makes_no_metric(server: AccessServer) -> None:
    """Model names, keys, URLs and request ids: the second 500 of each add nothing."""
    secret = f"X-API-Key: {server.keys['acme'].secret}"
    as_json = "Content-Type: application/json"

    def requests(numbers: range) -> list[bytes]:
        found = []
        for number in numbers:
            body = b'{"model":"model-%d","messages":[{"role":"user","content":"x"}]}' % number
            found += [
                head("POST", "/v1/chat/completions", secret, as_json, f"Content-Length: {len(body)}") + body,
                head("GET", f"/v1/models/model-{number}", secret),
                head("GET", f"/no/such/url/{number}", secret),
                head("PATCH", f"/v1/models?{number}", secret),
                head("GET", "/v1/models", f"Authorization: Bearer {new_key()[1]}"),
                head("GET", "/v1/models", f"Authorization: Bearer stranger-{number}", f"X-Request-Id: id-{number}"),
            ]
        return found

    async def send(numbers: range) -> set[int]:
        pieces = requests(numbers)
        return {reply.status for reply in await burst(server.url, pieces, 8)}

    # 429: more have failed from this address than may; that has its series as well.
    assert await send(range(MANY // 2)) == {401, 404, 405, 429}
    before = series(server)
    assert await send(range(MANY // 2, MANY)) >= {404, 405, 429}
    after = series(server)
    assert after == before
    assert not [sample for sample in after if re.search(r"model-\d|stranger|no/such|ifx_", sample)]
    assert len(after) < 2000
