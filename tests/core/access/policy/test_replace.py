"""Policies that are written through the store: both the file and the policy in force, or neither."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from core.access.policy.policies import BASE, DENY, Stand
from inferflux_core.access.policy.casbin_policy import Policy, version_of
from inferflux_core.access.policy.file import PolicyError
from inferflux_core.errors import ConflictError, PreconditionFailedError


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[Stand]:
    made = Stand(tmp_path)
    yield made
    await made.store.close()


async def test_a_replacement_is_written_as_it_was_given_and_in_force(stand: Stand, tmp_path: Path) -> None:
    stand.file.chmod(0o640)
    await stand.store.start()
    text = ("# why: see ticket 17\r\n" + DENY).encode()
    in_force = stand.store.current
    before, policy = await stand.store.replace(text, in_force.version)
    assert before is in_force
    assert stand.store.current is policy
    assert (stand.file.read_bytes(), stand.file.stat().st_mode & 0o777) == (text, 0o640)
    assert (await stand.event()).version == version_of(text)
    assert os.listdir(tmp_path) == ["policy.csv"]
    # What was written is no change to the watch.
    assert await stand.store.reload() is policy
    assert stand.events.empty()


async def test_a_replacement_goes_where_the_link_points(stand: Stand, tmp_path: Path) -> None:
    target = tmp_path / "real.csv"
    stand.file.replace(target)
    stand.file.symlink_to("real.csv")
    await stand.store.start()
    await stand.store.replace(DENY.encode(), stand.store.current.version)
    assert stand.file.is_symlink()
    assert target.read_text() == DENY


async def test_a_bad_replacement_changes_nothing(stand: Stand, tmp_path: Path) -> None:
    stand.tests.write_text("key:k1,acme,model/x,generate,allow\n")
    await stand.store.start()
    version = stand.store.current.version
    for text in (b"nonsense\n", DENY.encode()):
        with pytest.raises(PolicyError):
            await stand.store.replace(text, version)
        with pytest.raises(PolicyError):
            await stand.store.dry_run(text)
    assert (stand.file.read_text(), stand.store.current.version, stand.events.empty()) == (BASE, version, True)
    assert sorted(os.listdir(tmp_path)) == ["policy.csv", "tests.csv"]


async def test_a_dry_run_changes_nothing(stand: Stand) -> None:
    await stand.store.start()
    assert (await stand.store.dry_run(DENY.encode())).version == version_of(DENY.encode())
    assert (stand.file.read_text(), stand.allowed()) == (BASE, True)


async def test_a_replacement_of_another_version_is_refused(stand: Stand) -> None:
    await stand.store.start()
    version = stand.store.current.version
    with pytest.raises(PreconditionFailedError, match=r"is at version '.{16}', not '0000'"):
        await stand.store.replace(b"not even a policy\n", "0000")
    # Somebody edits the file, and nobody has looked yet: nothing of theirs is lost.
    edited = "not yet a policy\n"
    stand.file.write_text(edited)
    with pytest.raises(PreconditionFailedError, match=f"is now at '{version_of(edited.encode())}'"):
        await stand.store.replace(DENY.encode(), version)
    assert stand.file.read_text() == edited
    # Who has seen that may overwrite it.
    await stand.store.replace(DENY.encode(), version_of(edited.encode()))
    assert stand.file.read_text() == DENY


async def test_whatever_is_there_can_be_replaced(stand: Stand) -> None:
    await stand.store.start()
    stand.file.write_text("not yet a policy\n")
    await stand.store.replace(DENY.encode(), None)
    assert stand.file.read_text() == DENY
    assert stand.store.current.version == version_of(DENY.encode())


async def test_an_edit_while_a_replacement_is_tested_is_not_lost(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    await stand.store.start()
    version = stand.store.current.version
    compile_policy = Policy.compile

    def meanwhile(text: bytes, source: str) -> Policy:
        stand.file.write_text(BASE + "# by hand\n")
        return compile_policy(text, source)

    monkeypatch.setattr(Policy, "compile", meanwhile)
    with pytest.raises(PreconditionFailedError):
        await stand.store.replace(DENY.encode(), version)
    assert (stand.file.read_text(), stand.store.current.version) == (BASE + "# by hand\n", version)


async def test_of_two_replacements_at_once_one_wins(stand: Stand) -> None:
    await stand.store.start()
    version = stand.store.current.version
    texts = [BASE + f"# {i}\n" for i in range(5)]
    results = await asyncio.gather(*(stand.store.replace(t.encode(), version) for t in texts), return_exceptions=True)
    assert [type(r) for r in results].count(PreconditionFailedError) == 4
    [(before, winner)] = [r for r in results if isinstance(r, tuple)]
    assert before.version == version
    assert stand.file.read_bytes() == winner.text == stand.store.current.text


async def test_a_file_that_cannot_be_written_is_said_to_be_so(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    await stand.store.start()

    def busy(self: Path, target: Path) -> None:
        raise OSError(16, "Device or resource busy")  # as for a file that is a mount point

    monkeypatch.setattr(Path, "replace", busy)
    with pytest.raises(ConflictError) as caught:
        await stand.store.replace(DENY.encode(), stand.store.current.version)
    assert caught.value.code == "policy_read_only"
    assert str(tmp_path) not in caught.value.message
    assert (os.listdir(tmp_path), stand.file.read_text()) == (["policy.csv"], BASE)
    assert stand.allowed()
