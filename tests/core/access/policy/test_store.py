"""The policy in force while its file is edited, broken and exchanged."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from core.access.policy.policies import BASE, DENY, NEVER_S, Stand, rename_into, who
from inferflux_core.access.policy import store as policy_store
from inferflux_core.access.policy.casbin_policy import Policy, version_of
from inferflux_core.access.policy.file import MAX_POLICY_BYTES, PolicyError
from inferflux_core.access.policy.store import PolicyEvent, PolicyStore


@pytest.fixture(autouse=True)
def _settles_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_store, "SETTLE_S", 0.01)


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[Stand]:
    made = Stand(tmp_path)
    yield made
    await made.store.close()


# --- start ------------------------------------------------------------------------------------------------------------


async def test_the_first_policy_is_in_force_after_start(stand: Stand) -> None:
    await stand.store.start()
    assert stand.allowed()
    assert (stand.store.text, stand.store.last_error, stand.events.empty()) == (BASE.encode(), None, True)


@pytest.mark.parametrize("text", [None, "", "nonsense\n"])
async def test_without_a_good_policy_there_is_no_start(stand: Stand, text: str | None) -> None:
    stand.file.unlink()
    if text is not None:
        stand.file.write_text(text)
    with pytest.raises(PolicyError, match=r"policy\.csv"):
        await stand.store.start()


async def test_a_policy_that_fails_its_tests_is_no_start(stand: Stand) -> None:
    stand.tests.write_text("key:k1,acme,model/x,generate,deny\n")
    with pytest.raises(PolicyError) as caught:
        await stand.store.start()
    assert str(caught.value.problems[0]).startswith(
        "a test of 'tests.csv' fails: line 1: 'key:k1' of 'acme': generate on 'model/x'"
    )


async def test_a_test_file_that_is_configured_must_exist(stand: Stand, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="the test file is missing"):
        await stand.make(NEVER_S, tmp_path / "mine.csv").start()


# --- reload -----------------------------------------------------------------------------------------------------------


async def test_a_reload_without_a_change_keeps_the_policy_and_says_nothing(stand: Stand) -> None:
    await stand.store.start()
    before = stand.store.current
    assert await stand.store.reload() is before
    os.utime(stand.file)
    rename_into(stand.file, BASE)
    assert await stand.store.reload() is before
    assert stand.events.empty()


async def test_a_reload_takes_the_new_policy_and_reports_its_warnings(stand: Stand) -> None:
    await stand.store.start()
    stand.file.write_text(DENY.replace("deny", "deny\np, role:user, *, model/x, admin, deny"))
    assert (await stand.store.reload()).version == version_of(stand.file.read_bytes())
    event = await stand.event()
    assert (event.kind, event.version) == ("reloaded", stand.store.current.version)
    assert [p.line for p in event.problems if "a deny of 'admin'" in p.message] == [5]
    assert not stand.allowed()


def _delete(file: Path) -> None:
    file.unlink()


def _truncate(file: Path) -> None:
    os.truncate(file, 0)


def _half(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 4)


def _hundred_mebibytes(file: Path) -> None:
    os.truncate(file, 100 * 1024 * 1024)


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


def _nonsense(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    ("harm", "cause"),
    [
        (_delete, "it cannot be read: No such file or directory"),
        (_truncate, "the policy is empty"),
        (_half, "line 3: the last line does not end"),
        (_hundred_mebibytes, f"it has more than {MAX_POLICY_BYTES} bytes"),
        (_pipe, "it cannot be read: it is not a regular file"),
        (_folder, "it cannot be read: "),
        (_loop, "it cannot be read: Too many levels of symbolic links"),
        (_nonsense, "line 1: it has a byte that is not UTF-8"),
    ],
)
async def test_a_file_that_went_bad_leaves_the_last_good_policy(stand: Stand, harm: Callable[[Path], None], cause: str) -> None:
    await stand.store.start()
    good = stand.store.current
    harm(stand.file)
    [problem] = await stand.refused()
    assert problem.startswith(cause)
    assert stand.store.current is good
    # The same is not reported twice, and a good file heals it.
    with pytest.raises(PolicyError):
        await stand.store.reload()
    assert stand.events.empty()
    if stand.file.is_dir():
        stand.file.rmdir()
    rename_into(stand.file, BASE)
    assert await stand.store.reload() is good
    assert ((await stand.event()).kind, stand.store.last_error) == ("reloaded", None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
async def test_a_file_that_may_not_be_read_leaves_the_last_good_policy(stand: Stand) -> None:
    await stand.store.start()
    stand.file.chmod(0)
    assert await stand.refused() == ["it cannot be read: Permission denied"]


async def test_a_changed_policy_must_pass_the_tests(stand: Stand) -> None:
    stand.tests.write_text("key:k1,acme,model/x,generate,allow\n")
    await stand.store.start()
    stand.file.write_text(DENY)
    [problem] = await stand.refused()
    assert problem.endswith("is denied by the policy's line 4: p, role:user, *, model/x, generate, deny; expected allow")
    assert stand.allowed()
    # When the tests follow, the policy is taken.
    stand.tests.write_text("key:k1,acme,model/x,generate,deny\n")
    await stand.store.reload()
    assert not stand.allowed()


async def test_changed_tests_alone_test_the_policy_again(stand: Stand) -> None:
    await stand.store.start()
    stand.tests.write_text("key:k1,acme,model/x,generate,deny\n")
    assert len(await stand.refused()) == 1
    stand.tests.write_text("key:k1,acme,model/x,generate,allow\n")
    await stand.store.reload()
    assert (await stand.event()).kind == "reloaded"
    stand.tests.unlink()
    assert await stand.refused() == ["the test file is missing; restore it, or restart without it"]


async def test_a_policy_that_cannot_be_compiled_is_refused(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    await stand.store.start()

    def broken(text: bytes, source: str) -> Policy:
        raise RuntimeError("role:user")

    monkeypatch.setattr(Policy, "compile", broken)
    stand.file.write_text(DENY)
    assert await stand.refused() == ["it cannot be compiled, through no fault of its own: RuntimeError"]
    assert stand.allowed()


async def test_a_storm_of_reloads_is_one_or_two(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    await stand.store.start()
    compile_policy = Policy.compile
    compiled: list[bytes] = []

    def counting(text: bytes, source: str) -> Policy:
        compiled.append(text)
        return compile_policy(text, source)

    monkeypatch.setattr(Policy, "compile", counting)
    stand.file.write_text(DENY)
    policies = await asyncio.gather(*(stand.store.reload() for _ in range(200)))
    assert {policy.version for policy in policies} == {version_of(DENY.encode())}
    assert compiled == [DENY.encode()]


async def test_who_asks_for_a_reload_gets_what_was_in_the_file_then(stand: Stand) -> None:
    await stand.store.start()
    stand.file.write_text(DENY)
    first = asyncio.create_task(stand.store.reload())
    assert (await stand.event()).version == version_of(DENY.encode())
    rename_into(stand.file, DENY + "# later\n")
    assert (await stand.store.reload()).text == DENY.encode() + b"# later\n"
    await first


async def test_whoever_stops_waiting_for_a_reload_does_not_stop_it(stand: Stand) -> None:
    await stand.store.start()
    stand.file.write_text(DENY)
    waiting = [asyncio.create_task(stand.store.reload()) for _ in range(2)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    assert (await waiting[1]).text == DENY.encode()


# --- watching ---------------------------------------------------------------------------------------------------------


async def test_changes_are_noticed_however_they_are_made(stand: Stand, tmp_path: Path) -> None:
    """Written in place; renamed over it; a link switched, as Kubernetes does."""
    await stand.make(0.01).start()
    stand.file.write_text(DENY)
    assert (await stand.event()).kind == "reloaded"
    assert not stand.allowed()
    rename_into(stand.file, BASE)
    assert (await stand.event()).kind == "reloaded"
    assert stand.allowed()

    for name, text in (("one", BASE + "# one\n"), ("two", DENY)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "policy.csv").write_text(text)
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "link").symlink_to("..data/policy.csv")
    (tmp_path / "link").replace(stand.file)
    assert (await stand.event()).version == version_of((BASE + "# one\n").encode())
    (tmp_path / "..next").symlink_to("two")
    (tmp_path / "..next").replace(tmp_path / "..data")
    assert (await stand.event()).version == version_of(DENY.encode())
    assert not stand.allowed()


async def test_a_bad_change_is_reported_once_and_the_watch_goes_on(stand: Stand) -> None:
    await stand.make(0.01).start()
    stand.file.unlink()
    assert (await stand.event()).kind == "rejected"
    for _ in range(20):
        await asyncio.to_thread(stand.store._look)
    stand.file.write_text(DENY)
    assert (await stand.event()).kind == "reloaded"
    assert stand.events.empty()


async def test_a_file_that_could_not_be_read_is_read_again_though_it_did_not_change(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stand.make(0.01).start()
    content = policy_store._content

    def broken(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(policy_store, "_content", broken)
    rename_into(stand.file, DENY)
    assert str((await stand.event()).problems[0]) == "it cannot be read: Input/output error"
    assert stand.allowed()
    monkeypatch.setattr(policy_store, "_content", content)
    assert (await stand.event()).kind == "reloaded"
    assert not stand.allowed()


async def test_what_is_still_being_written_is_not_taken(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part is a policy by itself, and the first ones lack the deny."""
    await stand.store.start()
    parts = ["# one\n", "# two\n", "# three\n", "p, role:user, *, model/x, generate, deny\n"]
    stand.file.write_text(BASE + parts.pop(0))
    look = PolicyStore._look

    def slowly(store: PolicyStore) -> object:
        seen = look(store)
        if parts:
            with stand.file.open("a") as file:
                file.write(parts.pop(0))
        return seen

    monkeypatch.setattr(PolicyStore, "_look", slowly)
    assert (await stand.store.reload()).text == stand.file.read_bytes()
    assert stand.events.qsize() == 1
    assert not stand.allowed()


async def test_decisions_never_flip_while_the_file_is_maltreated(stand: Stand) -> None:
    """Whatever happens to the file, what all its good versions say holds at every moment."""
    await stand.make(0.002).start()
    done = asyncio.Event()
    asked = 0

    async def ask() -> None:
        nonlocal asked
        while not done.is_set():
            assert stand.allowed(f"m{asked % 50}")
            assert not stand.store.current.decide(who("key:k2"), "model/x", "generate").allowed
            asked += 1
            await asyncio.sleep(0)

    asking = [asyncio.create_task(ask()) for _ in range(4)]
    for harm in (_truncate, _half, _delete, _hundred_mebibytes, _nonsense, _loop):
        before = asked
        harm(stand.file)
        assert (await stand.event()).kind == "rejected"
        for text in (DENY, BASE):
            rename_into(stand.file, text)
            assert (await stand.event()).kind == "reloaded"
        assert asked > before
    done.set()
    await asyncio.gather(*asking)


async def test_an_accident_of_whoever_listens_does_not_end_the_watch(stand: Stand) -> None:
    await stand.make(0.01).start()
    heard: asyncio.Queue[PolicyEvent] = asyncio.Queue()

    def broken(event: PolicyEvent) -> None:
        heard.put_nowait(event)
        raise RuntimeError("the listener is broken")

    stand.store._on_event = broken
    stand.file.write_text(DENY)
    await asyncio.wait_for(heard.get(), 10)
    rename_into(stand.file, BASE)
    await asyncio.wait_for(heard.get(), 10)
    assert stand.allowed()


async def test_closing_twice_or_unstarted_is_fine(stand: Stand) -> None:
    await stand.store.close()
    await stand.make(0.01).start()
    await stand.store.close()
    await stand.store.close()
    assert [task for task in asyncio.all_tasks() if task.get_name().startswith("policy-")] == []
