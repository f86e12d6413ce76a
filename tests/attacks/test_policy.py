"""Attacks 43 to 45: a policy file that is damaged, exchanged and reloaded all the time under a server that is busy.

What a policy may not look like, row by row, is in core/access/policy/test_traps.py; here it goes through the front door.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from attacks.access_server import BOSS, POLICY, AccessServer, guarded, next_reply
from attacks.raw_http import head

READER = {"tenant": "acme", "scopes": ["generate", "read"]}
KEYS = {"boss": BOSS, "user": {**READER, "roles": ["user"]}, "guest": {**READER, "roles": ["guest"]}}
TESTS = """\
subject,tenant,object,action,expected
role:user,acme,model/secret,generate,deny
role:guest,acme,model/secret,generate,deny
"""
FLIPPED = POLICY.replace("role:user, *, model/**", "role:guest, *, model/**").replace(
    "role:user, *, model/s", "role:guest, *, model/s"
)
DECISIONS = {"user": 200, "guest": 404}  # of GET /v1/models/tiny
WRONG = {"user": 404, "guest": 200}
ADMIN = "/v1/admin/policy"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AccessServer]:
    folder = tmp_path_factory.mktemp("policy")
    (folder / "policy.csv").write_text(POLICY)
    (folder / "tests.csv").write_text(TESTS)
    limit = {"logging": {"level": "error"}}
    with guarded(folder, KEYS, **limit) as running:
        yield running


@pytest.fixture(autouse=True)
def good_again(server: AccessServer) -> Iterator[None]:
    """Each test begins with the first policy, and leaves a server that takes it."""
    yield
    put(server.policy, POLICY)
    assert server.ask("boss", "POST", ADMIN + "/reload").status_code == 200
    assert {name: server.ask(name, "GET", "/v1/models/tiny").status_code for name in DECISIONS} == DECISIONS


# --- a busy server ----------------------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """What clients on several connections were told, one after the other on each.

    Attributes:
        answers: when each request began and ended (monotonic seconds), whose it was, and its status.
    """

    answers: list[tuple[float, float, str, int]] = field(default_factory=list)

    def rate(self) -> float:
        """Answers a second."""
        return len(self.answers) / (self.answers[-1][1] - self.answers[0][0])

    def unlike(self, decisions: dict[str, int]) -> list[tuple[float, float, str, int]]:
        """Answers other than these."""
        return [answer for answer in self.answers if answer[3] != decisions[answer[2]]]


@contextlib.asynccontextmanager
async def traffic(server: AccessServer, connections: int = 4) -> AsyncIterator[Traffic]:
    """Ask on several connections, as fast as the server answers, whether each of the two users may see `tiny`."""
    seen, stop = Traffic(), asyncio.Event()
    tasks = [asyncio.create_task(_client(server, seen, stop, name)) for name in DECISIONS for _ in range(connections // 2)]
    try:
        yield seen
    finally:
        stop.set()
        async with asyncio.timeout(30):
            await asyncio.gather(*tasks)


async def _client(server: AccessServer, seen: Traffic, stop: asyncio.Event, name: str) -> None:
    url = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    secret = server.keys[name].secret
    request = head("GET", "/v1/models/tiny", f"x-api-key: {secret}")
    try:
        while not stop.is_set():
            begun = time.monotonic()
            writer.write(request)
            reply = await next_reply(reader)
            seen.answers.append((begun, time.monotonic(), name, reply.status))
            # About 500 a second from all of them: how many a machine can answer is not the question here.
            await asyncio.sleep(0.004)
    finally:
        writer.close()
        await writer.wait_closed()


@contextlib.asynccontextmanager
async def administrator(server: AccessServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, headers=server.keys["boss"].headers, timeout=20) as client:
        yield client


async def noticed(client: httpx.AsyncClient, words: str | None) -> None:
    """Wait until the server has seen what is wrong with the file now; None for nothing."""
    async with asyncio.timeout(10):
        while True:
            problems = (await client.get(ADMIN)).json()["file_problems"]
            if (words is None) is (problems is None) and (words is None or words in problems[0]["message"]):
                return
            await asyncio.sleep(0.02)


def put(path: Path, text: str) -> None:
    """Exchange a file as editors do, in one moment."""
    new = path.with_name("new.csv")
    new.write_text(text)
    new.replace(path)


# --- 43: bad policies -------------------------------------------------------------------------------------------------


BAD = [
    (POLICY + "P, role:user, *, model/tiny, *, deny\n", 11),
    (POLICY + "p, role:user, *, model/tiny, *, Deny\n", 11),
    (POLICY + "p, role:user, *, model/tiny, generate, deny # as of today\n", 11),
    (POLICY.replace("role, boss\n", "role, boss\np, role:uzer, *, model/tiny, generate, deny\n"), 2),
    (POLICY + "p, role:user, *, model/tiny, generate\n", 11),
    (POLICY + '\n\np, role:user, *, "model/tiny", generate, deny\n', 13),
]


@pytest.mark.parametrize(("text", "line"), BAD)
def test_43_a_bad_policy_is_refused_with_its_line(server: AccessServer, text: str, line: int) -> None:
    with server.client("boss") as client:
        before = client.get(ADMIN)
        tag = {"if-match": before.headers["etag"]}
        reply = client.put(ADMIN, json={"policy": text}, headers=tag)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "policy_invalid")
        assert re.search(rf"line {line}\b", reply.json()["error"]["message"])
        found = client.post(ADMIN + "/check", json={"policy": text}).json()
        assert found["ok"] is False
        assert line in [problem["line"] for problem in found["problems"] if problem["severity"] == "error"]
        assert client.get(ADMIN).json() == before.json()
        assert server.policy.read_text() == POLICY


def test_43_a_policy_that_fails_the_tests_is_refused(server: AccessServer) -> None:
    text = "\n".join(line for line in POLICY.splitlines() if "deny" not in line) + "\n"
    with server.client("boss") as client:
        reply = client.put(ADMIN, json={"policy": text}, headers={"if-match": client.get(ADMIN).headers["etag"]})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "policy_invalid")
        assert "tests.csv" in reply.json()["error"]["message"]
        assert client.post(ADMIN + "/check", json={"policy": text}).json()["ok"] is False
        assert server.ask("user", "GET", "/v1/models/secret").status_code == 404


def test_43_a_write_needs_the_version_it_replaces(server: AccessServer) -> None:
    with server.client("boss") as client:
        body, first = {"policy": FLIPPED}, client.get(ADMIN).headers["etag"]
        assert client.put(ADMIN, json=body).status_code == 428
        assert client.put(ADMIN, json=body, headers={"if-match": f"W/{first}"}).status_code == 412
        assert client.put(ADMIN, json=body, headers={"if-match": '"0123456789abcdef"'}).status_code == 412
        assert server.policy.read_text() == POLICY
        written = client.put(ADMIN, json=body, headers={"if-match": first})
        assert written.status_code == 200
        assert written.headers["etag"] != first
        assert server.policy.read_text() == FLIPPED
        assert {name: server.ask(name, "GET", "/v1/models/tiny").status_code for name in DECISIONS} == WRONG
        assert client.put(ADMIN, json={"policy": POLICY}, headers={"if-match": first}).status_code == 412, "it was read before"
        assert client.put(ADMIN, json={"policy": POLICY}, headers={"if-match": written.headers["etag"]}).status_code == 200


def test_43_only_administrators_of_the_policy_may_touch_it(server: AccessServer) -> None:
    for method, path in [
        ("GET", ""),
        ("PUT", ""),
        ("POST", "/check"),
        ("POST", "/test"),
        ("POST", "/explain"),
        ("POST", "/reload"),
    ]:
        reply = server.ask("user", method, ADMIN + path, json={"policy": "role, x\n"}, headers={"if-match": "*"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "insufficient_scope"), path
    assert server.policy.read_text() == POLICY


# --- 44: what can happen to the file ----------------------------------------------------------------------------------


def delete(file: Path) -> None:
    file.unlink()


def empty(file: Path) -> None:
    file.write_text("")


def half_written(file: Path) -> None:
    """A writer that stopped in the middle of a row."""
    file.write_text(POLICY[: POLICY.index("model/secret") + 5])


def half_written_between_rows(file: Path) -> None:
    """What is there looks good, but a deny is missing; only the tests can tell."""
    file.write_text(POLICY[: POLICY.index("p, role:user, *, model/secret")])


def unreadable(file: Path) -> None:
    """Without permission; a superuser, who needs none, gets a folder in the file's place."""
    if os.geteuid():
        file.chmod(0)
    else:
        file.unlink()
        file.mkdir()


def pipe(file: Path) -> None:
    """Whoever opened it and waited would wait for ever."""
    file.unlink()
    os.mkfifo(file)


def huge(file: Path) -> None:
    file.write_text(POLICY)
    os.truncate(file, 100 * 1024 * 1024)


def link_to_a_broken_one(file: Path) -> None:
    target = file.with_name("broken.csv")
    target.write_text(BAD[0][0])
    swap_link(file, target)


def link_to_itself(file: Path) -> None:
    swap_link(file, file)


def link_to_endless_data(file: Path) -> None:
    swap_link(file, Path("/dev/zero"))


def swap_link(file: Path, target: Path) -> None:
    link = file.with_name("link")
    link.symlink_to(target)
    if file.is_dir():
        file.rmdir()
    link.replace(file)


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (delete, "cannot be read"),
    (empty, "the policy is empty"),
    (half_written, "half-written"),
    (half_written_between_rows, "a test of"),
    (unreadable, "cannot be read"),
    (pipe, "cannot be read"),
    (huge, "more than 1048576 bytes"),
    (link_to_a_broken_one, "begins no row"),
    (link_to_itself, "cannot be read"),
    (link_to_endless_data, "cannot be read"),
]


async def test_44_nothing_that_happens_to_the_file_flips_a_decision(server: AccessServer) -> None:
    async with administrator(server) as boss, traffic(server) as seen:
        for fault, words in FAULTS:
            fault(server.policy)
            await noticed(boss, words)
            restore(server.policy)
            await noticed(boss, None)
        assert seen.unlike(DECISIONS) == []
        written = time.monotonic()
        put(server.policy, FLIPPED)
        async with asyncio.timeout(10):
            while not any(answer[3] != DECISIONS[answer[2]] for answer in seen.answers[-20:]):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
    flipped = seen.unlike(DECISIONS)
    assert flipped == [answer for answer in flipped if answer[3] == WRONG[answer[2]]], "an answer of neither policy"
    assert min(ended for _, ended, _, _ in flipped) > written
    first_new = min(ended for _, ended, _, _ in flipped)
    late = [answer for answer in seen.answers if answer[0] > first_new and answer not in flipped]
    assert late == [], "the old policy answered after the new one had"
    assert len(seen.answers) > 500, "it was not busy"
    print(f"{len(seen.answers)} requests, {seen.rate():.0f} a second")


def restore(file: Path) -> None:
    if file.is_dir() and not file.is_symlink():
        file.rmdir()
    put(file, POLICY)


# --- 45: reload storm -------------------------------------------------------------------------------------------------


async def test_45_a_storm_of_reloads_is_coalesced(server: AccessServer) -> None:
    texts = [POLICY, BAD[0][0]]
    async with administrator(server) as boss, traffic(server) as seen:
        before, begun, posts = await reloads(boss), time.monotonic(), []
        for number in range(100):
            if number % 10 == 0:
                put(server.policy, texts[number // 10 % 2] + f"# change {number}\n")
            if number % 2:
                os.kill(server.served.process.pid, signal.SIGHUP)
            else:
                posts.append(asyncio.create_task(boss.post(ADMIN + "/reload")))
            await asyncio.sleep(0.02)
        replies = await asyncio.gather(*posts)
        seconds = time.monotonic() - begun
        taken = await reloads(boss) - before
    assert seen.unlike(DECISIONS) == []
    codes = {(reply.status_code, (reply.json().get("error") or {}).get("code")) for reply in replies}
    assert codes == {(200, None), (400, "policy_invalid")}
    assert 2 <= taken <= 11, "each change once, however often it was asked for"
    assert seconds < 8, "100 reloads one after the other would have waited 0.1 s each for the file to settle"
    print(f"100 reloads in {seconds:.1f} s, {taken:.0f} were made; {seen.rate():.0f} requests a second beside them")


async def reloads(client: httpx.AsyncClient) -> float:
    """How many policies were taken or rejected so far."""
    page: Any = (await client.get("/metrics")).text
    return sum(float(value) for value in re.findall(r"^inferflux_policy_reloads_total\{.*\} (\S+)$", page, re.MULTILINE))
