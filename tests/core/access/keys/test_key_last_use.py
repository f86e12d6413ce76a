"""When a key was last used: written seldom, by the store's thread, and never in a request's way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from core.access.keys.key_stand import NOW, Stand
from inferflux_core.access.keys.form import new_key
from inferflux_core.access.keys.records import NewKey, key_principal
from inferflux_core.access.keys.ring import open_keys
from inferflux_core.access.keys.settings import ApiKeySettings
from inferflux_core.access.store_file import connect


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[Stand]:
    stand = Stand(tmp_path)
    await stand.provider.start()
    yield stand
    await stand.provider.close()


async def test_the_last_use_is_written_once_a_minute(stand: Stand) -> None:
    record, key = await stand.keys.create(NewKey(name="k"))
    await stand.keys.create(NewKey(name="k"))
    written = []
    for stand.time in (10, 10.1, 30, 69.9, 70, 71):
        await stand.who(key)
        await stand.who(new_key("live", record.id)[1])
        pending = stand.provider._flush
        if pending is not None:
            pending.cancel()
            stand.provider._write_used()
        times = {r.id: r.last_used_at for r in await stand.keys.list()}  # queued behind the write
        written.append((pending is not None, times.pop(record.id), *times.values()))
    assert written == [
        (True, NOW + 10, None),
        (False, NOW + 10, None),
        (False, NOW + 10, None),
        (False, NOW + 10, None),
        (True, NOW + 70, None),
        (False, NOW + 70, None),
    ]
    assert (await stand.keys.get(record.id)).version == 1


async def test_the_last_use_is_written_at_the_end(tmp_path: Path) -> None:
    stand = Stand(tmp_path)
    record, key = await stand.keys.create(NewKey(name="k"))
    stand.time = 5
    await stand.who(key)
    await stand.provider.close()
    keys = open_keys(ApiKeySettings(), tmp_path)
    assert (await keys.get(record.id)).last_used_at == NOW + 5
    keys.close()


async def test_a_last_use_that_cannot_be_written_harms_nobody(stand: Stand) -> None:
    record, key = await stand.keys.create(NewKey(name="k"))
    with closing(connect(stand.path, 1)) as locker:
        locker.execute("BEGIN IMMEDIATE")
        stand.keys.store._writer.get().execute("PRAGMA busy_timeout=10")
        assert await stand.who(key) == key_principal(record)
        stand.provider._write_used()
        await stand.keys.list()
    assert stand.counts["last_used_error"] == 1
