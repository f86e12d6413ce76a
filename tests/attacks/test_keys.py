"""Attacks on authentication with API keys, through the front door: items 39 to 42 of reference/security.md, 7.3. What the
provider does by itself is in core/access/test_api_keys.py, and the forms of headers in core/serving/test_gate.py.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from attacks.api_server import CHAT, UNAUTHORIZED, ApiServer, api_server, refusal
from attacks.raw_http import Reply, ask, head
from inferflux_core.access.keys.form import checksum, new_key
from inferflux_core.access.keys.pepper import load_pepper
from inferflux_core.access.keys.records import KeyChange
from inferflux_core.access.keys.settings import ApiKeySettings
from inferflux_core.access.store_file import connect
from served import events

TTL_S = 1.0  # what a server may remember of a key


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with api_server(tmp_path_factory.mktemp("server"), fake={"step_ms": 10, "max_model_len": 4096}) as there:
        yield there


def models(server: ApiServer, *headers: str | bytes) -> Reply:
    """The list of models, asked for with exactly these header lines."""
    lines = b"".join((line.encode("latin-1") if isinstance(line, str) else line) + b"\r\n" for line in headers)
    return ask(server.url, head("GET", "/v1/models")[:-2] + lines + b"\r\n")


def until_refused(server: ApiServer, key: str, change: Callable[[], None]) -> float:
    """Make a change that ends a key, and ask with it until it is refused.

    Returns:
        Seconds from the change to the last request that was still let in, as it was sent; 0 if none was.
    """
    assert server.ask("GET", "/v1/models", key=key).status_code == 200
    change()
    changed, last = time.monotonic(), 0.0
    while True:
        sent = time.monotonic() - changed
        reply = server.ask("GET", "/v1/models", key=key)
        if reply.status_code == 401:
            assert reply.json() == UNAUTHORIZED
            return last
        assert reply.status_code == 200
        last = sent
        assert last < 10, "it is never refused"


# --- 39: keys that end ----------------------------------------------------------------------------------------------------


def test_39_a_key_that_another_process_revokes_is_refused_within_a_second_and_its_stream_finishes(server: ApiServer) -> None:
    record, key = server.new_key("user")
    usage = {"include_usage": True}
    body = {**CHAT, "stream": True, "stream_options": usage, "max_tokens": 150, "ignore_eos": True}
    headers = {"authorization": f"Bearer {key}"}
    with server.client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as stream:
        chunks = events(stream.iter_lines())
        next(chunks)
        assert until_refused(server, key, lambda: server.revoke(record.id)) < TTL_S
        rest = list(chunks)
    assert rest[-2]["choices"][0]["finish_reason"] == "length"
    assert rest[-1]["usage"]["completion_tokens"] == 150
    assert refusal(server.chat(key)) == (401, "invalid_api_key", None)


def test_39_revoked_by_the_server_itself_it_is_refused_at_once(server: ApiServer) -> None:
    record, key = server.new_key("user")
    assert server.ask("GET", "/v1/models", key=key).status_code == 200
    assert server.ask("DELETE", f"/v1/admin/api-keys/{record.id}", key=server.admin).status_code == 200
    assert server.ask("GET", "/v1/models", key=key).json() == UNAUTHORIZED


def test_39_an_expired_key(server: ApiServer) -> None:
    begun = time.time()
    key = server.new_key("user", expires_in_s=1.0)[1]
    assert until_refused(server, key, lambda: None) < 1.0
    assert time.time() >= begun + 1.0


def test_39_a_key_whose_end_is_moved_up_by_another_process(server: ApiServer) -> None:
    record, key = server.new_key("user")

    def shorten() -> None:
        with server.ring() as keys:
            asyncio.run(keys.update(record.id, KeyChange(expires_in_s=0.05), record.version))

    assert until_refused(server, key, shorten) < TTL_S + 0.05


def test_39_a_rotated_key(server: ApiServer) -> None:
    record, old = server.new_key("user")
    new = ""

    def rotate() -> None:
        nonlocal new
        with server.ring() as keys:
            _, new = asyncio.run(keys.rotate(record.id, 0, None))

    assert until_refused(server, old, rotate) < TTL_S
    assert server.ask("GET", "/v1/models", key=new).status_code == 200


# --- 40: what is no key ---------------------------------------------------------------------------------------------------


def stored_hashes(server: ApiServer, key_id: str) -> tuple[str, bytes]:
    with closing(connect(server.state / "access.db", 1)) as connection:
        row = connection.execute("SELECT pepper_id, hash FROM key_hashes WHERE key_id = ?", (key_id,)).fetchone()
    return row[0], bytes(row[1])


def swapped_case(key: str) -> str:
    return key[:-1] + (key[-1].swapcase() if key[-1].isalpha() else chr(ord(key[-1]) ^ 1))


def test_40_what_is_kept_of_a_key_is_no_key(server: ApiServer) -> None:
    record, key = server.new_key("user")
    pepper_id, digest = stored_hashes(server, record.id)
    assert load_pepper(ApiKeySettings(), server.state).hash(key).hash == digest, "this is what is kept"
    body = f"ifx_live_{record.id}_{digest.hex()[:43]}"
    for credential in (
        digest.hex(),
        f"hmac-sha256:{pepper_id}:{record.id}:{digest.hex()}",
        f"ifx_live_{record.id}_{digest.hex()}",
        body + checksum(body),
        record.id,
        f"key:{record.id}",
        (server.state / "pepper").read_bytes().hex(),
    ):
        reply = models(server, f"Authorization: Bearer {credential}")
        assert (reply.status, reply.error) == (401, UNAUTHORIZED["error"])


@pytest.mark.parametrize(
    "line",
    [
        "Authorization: Bearer ' OR 1=1 --",
        "Authorization: Bearer '/**/OR/**/1=1--",
        "Authorization: Bearer ifx_live_'/**/OR/**/1=1--_x",
        "Authorization: Bearer ifx_live_%_%",
        "Authorization: Bearer ifx_",
        "Authorization: Bearer ifx_live____",
        "Authorization: Bearer ifx_live_" + "0" * 12 + "_" + "0" * 49,
        "Authorization: Bearer " + "ifx_live_" * 1000,
        "Authorization: Bearer null",
        "Authorization: Bearer undefined",
        "Authorization: Bearer Bearer",
        "Authorization: Bearer anonymous",
        "Authorization: Bearer \xb2\xb3",
        "X-API-Key: ' OR 1=1 --",
    ],
    ids=lambda line: line[:50],
)
def test_40_strings_of_the_trade(server: ApiServer, line: str) -> None:
    reply = models(server, line)
    assert (reply.status, reply.error) == (401, UNAUTHORIZED["error"])
    assert reply.headers["www-authenticate"] == 'Bearer error="invalid_token"'


def test_40_digits_of_other_scripts(server: ApiServer) -> None:
    """Digits of the key, as bytes of UTF-8 of digits that Python takes for digits as well."""
    for zero in ("\u0660", "\uff10", "\U0001d7ce"):
        spelt = "".join(chr(ord(zero) + int(c)) if c.isdigit() else c for c in server.user)
        assert spelt != server.user
        assert models(server, b"Authorization: Bearer " + spelt.encode()).status == 401


def test_40_control_characters_never_reach_a_credential(server: ApiServer) -> None:
    for byte in (0x00, 0x01, 0x0B, 0x7F):
        line = b"Authorization: Bearer " + server.user.encode() + bytes([byte])
        assert models(server, line).status in (400, 401)
    cut = b"Authorization: Bearer " + server.user[:20].encode() + b"\x00" + server.user[20:].encode()
    assert models(server, cut).status in (400, 401)


def test_40_a_mebibyte(server: ApiServer) -> None:
    assert models(server, "Authorization: Bearer ifx_live_" + "x" * 2**20).status == 431
    assert models(server, "Authorization: Bearer ifx_live_" + "x" * 30_000).status == 401


def test_40_only_a_whole_key_with_its_checksum_costs_a_look_into_the_store(server: ApiServer) -> None:
    def reads() -> float:
        return server.metrics().get('inferflux_auth_events_total{event="store_read",provider="api_keys"}', 0.0)

    before = reads()
    for _ in range(10):
        key = new_key()[1]
        for credential in (swapped_case(key), key[:-1], key + "0", key.replace("ifx_live", "ifx_lifE"), key.upper()):
            assert models(server, f"Authorization: Bearer {credential}").status == 401
    # Those of the administrator who asks for the metrics are made at most once a second.
    assert (after := reads()) - before <= 5, "a key with a wrong checksum was looked up"
    for _ in range(10):
        assert models(server, f"Authorization: Bearer {new_key()[1]}").status == 401
    assert reads() - after >= 10


def test_40_another_secret_for_an_id_that_exists_is_told_as_an_id_that_does_not(server: ApiServer) -> None:
    record, _ = server.new_key("user")
    guessed, stranger = (models(server, f"Authorization: Bearer {key}") for key in (new_key(key_id=record.id)[1], new_key()[1]))
    assert guessed.status == stranger.status == 401
    assert guessed.body == stranger.body
    own = {"x-request-id", "openai-processing-ms", "date"}
    assert {k: v for k, v in guessed.headers.items() if k not in own} == {
        k: v for k, v in stranger.headers.items() if k not in own
    }


# --- 41: which credential -------------------------------------------------------------------------------------------------


def test_41_two_credentials_are_refused_whichever_is_good(server: ApiServer) -> None:
    good, bad = server.user, new_key()[1]
    for first in (good, bad):
        for second in (good, bad):
            for names in (("Authorization: Bearer", "Authorization: Bearer"), ("Authorization: Bearer", "X-API-Key:")):
                reply = models(server, f"{names[0]} {first}", f"{names[1]} {second}")
                assert (reply.status, reply.error["code"]) == (400, "multiple_credentials")


@pytest.mark.parametrize(
    ("form", "status"),
    [
        ("Authorization: bearer {}", 200),
        ("AUTHORIZATION: BEARER {}", 200),
        ("Authorization:Bearer   {}  ", 200),
        ("x-api-key:{}", 200),
        ("Authorization: Bearer\t{}", 401),
        ("Authorization: Basic {}", 401),
        ("Authorization: {}", 401),
        ("Authorization: Bearer{}", 401),
        ("Authorization: Bearer {},{}", 401),
        ('Authorization: Bearer "{}"', 401),
        ("X-API-Key: Bearer {}", 401),
        ("Proxy-Authorization: Bearer {}", 401),
        ("Cookie: x-api-key={}", 401),
        ("X-Forwarded-Authorization: Bearer {}", 401),
    ],
)
def test_41_forms_of_the_header(server: ApiServer, form: str, status: int) -> None:
    assert models(server, form.replace("{}", server.user)).status == status


def test_41_a_key_in_the_url_or_the_body_is_none(server: ApiServer) -> None:
    for query in ("api_key", "key", "access_token", "token"):
        assert ask(server.url, head("GET", f"/v1/models?{query}={server.user}")).status == 401
    body = {**CHAT, "api_key": server.user, "user": server.user}
    assert httpx.post(server.url + "/v1/chat/completions", json=body).status_code == 401
    assert not any(server.user in line for line in server.served.log)
    assert server.user.encode() not in (server.state / "audit.jsonl").read_bytes()


# --- 42: a store that cannot be used ---------------------------------------------------------------------------------------

STORE = ("access.db", "access.db-wal", "access.db-shm")


@contextmanager
def store_away(server: ApiServer, folder: Path) -> Iterator[None]:
    """The store's files are elsewhere, and come back afterwards."""
    present = [name for name in STORE if (server.state / name).exists()]
    for name in present:
        (server.state / name).rename(folder / name)
    try:
        yield
    finally:
        for name in STORE:
            (server.state / name).unlink(missing_ok=True)
        for name in reversed(present):
            (folder / name).rename(server.state / name)


def assert_nobody_gets_in(server: ApiServer, *unknown_keys: str) -> None:
    """Keys that the server does not remember are answered 503 at once, those that it does after a second at most; what has
    not the form of a key is refused as ever."""
    for key in unknown_keys:
        reply = server.ask("GET", "/v1/models", key=key)
        assert refusal(reply) == (503, "auth_unavailable", None)
        assert int(reply.headers["retry-after"]) >= 1
        assert str(server.state) not in reply.text
        assert refusal(server.chat(key)) == (503, "auth_unavailable", None)
    begun = time.monotonic()
    while True:
        sent = time.monotonic() - begun
        reply = server.ask("GET", "/v1/models")
        if reply.status_code == 503:
            break
        assert reply.status_code == 200
        assert sent < TTL_S
    assert server.ask("GET", "/v1/models", key="ifx_nonsense").status_code == 401
    assert ask(server.url, head("GET", "/livez")).status == 200


def test_42_a_store_that_is_missing_lets_nobody_in_until_it_is_back(server: ApiServer, tmp_path: Path) -> None:
    _, fresh = server.new_key("user")
    with store_away(server, tmp_path):
        assert_nobody_gets_in(server, fresh, new_key()[1])
        assert not (server.state / "access.db").exists(), "a running server begins no new store"
    for key in (fresh, server.user):
        assert server.chat(key).status_code == 200
    assert refusal(server.chat(new_key()[1])) == (401, "invalid_api_key", None)


def test_42_rubbish_in_its_place(server: ApiServer, tmp_path: Path) -> None:
    _, fresh = server.new_key("user")
    for rubbish in (b"", b"x" * 10_000, b"SQLite format 3\x00" + b"\xff" * 10_000):
        with store_away(server, tmp_path):
            (server.state / "access.db").touch(0o600)
            (server.state / "access.db").write_bytes(rubbish)
            assert refusal(server.chat(fresh)) == (503, "auth_unavailable", None)
            assert refusal(server.chat(new_key()[1])) == (503, "auth_unavailable", None)
        assert server.ask("GET", "/v1/models", key=fresh).status_code == 200
        fresh = server.new_key("user")[1]


def test_42_an_empty_store_in_its_place_knows_nobody(server: ApiServer, tmp_path: Path) -> None:
    """Whoever can put a file there could put their own keys in; but keys are worth nothing without the pepper."""
    _, fresh = server.new_key("user")
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    (other / "pepper").write_bytes(b"another pepper of 32 bytes or more")
    (other / "pepper").chmod(0o600)
    theirs = ApiServer(server.served, server.client, other).new_key("boss", scopes=frozenset({"admin"}))[1]
    away = tmp_path / "away"
    away.mkdir()
    with store_away(server, away):
        shutil.copy(other / "access.db", server.state / "access.db")
        (server.state / "access.db").chmod(0o600)
        for key in (theirs, fresh):
            assert refusal(server.chat(key)) == (401, "invalid_api_key", None)
    assert server.chat(server.new_key("user")[1]).status_code == 200


def test_42_locked_by_another_process(server: ApiServer, tmp_path: Path) -> None:
    """In WAL mode only one who has the file for himself keeps readers out: a copy of it, restored and still in work."""
    _, fresh = server.new_key("user")
    with closing(connect(server.state / "access.db", 1)) as source, closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
        source.backup(copy)
    away = tmp_path / "away"
    away.mkdir()
    with store_away(server, away):
        (tmp_path / "copy.db").chmod(0o600)
        (tmp_path / "copy.db").rename(server.state / "access.db")
        with closing(connect(server.state / "access.db", 1)) as other:
            other.execute("PRAGMA locking_mode=EXCLUSIVE")
            other.execute("BEGIN EXCLUSIVE")
            assert_nobody_gets_in(server, fresh, new_key()[1])
        assert server.chat(fresh).status_code == 200, "the lock is gone"
    assert server.chat(fresh).status_code == 200


def test_42_while_another_process_writes_keys_are_checked_and_writes_wait(server: ApiServer) -> None:
    """What happens when the lock stays is in core/access/keys/test_ring.py; it takes five seconds."""
    _, fresh = server.new_key("user")
    replies: list[httpx.Response] = []
    with closing(connect(server.state / "access.db", 1)) as other:
        other.execute("BEGIN IMMEDIATE")
        writing = threading.Thread(
            target=lambda: replies.append(
                httpx.post(
                    server.url + "/v1/admin/api-keys", json={"name": "x"}, headers={"authorization": f"Bearer {server.admin}"}
                )
            )
        )
        writing.start()
        assert server.chat(fresh).status_code == 200
        assert refusal(server.chat(new_key()[1])) == (401, "invalid_api_key", None)
        assert not replies
        other.execute("ROLLBACK")
    writing.join()
    assert replies[0].status_code == 200
    assert server.ask("GET", "/v1/models", key=replies[0].json()["key"]).status_code == 200
