"""Power switches: a process killed at every statement of a migration and of a key's creation; two processes on one file."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from inferflux_core.access.keys.pepper import Pepper
from inferflux_core.access.keys.provider import ApiKeyProvider
from inferflux_core.access.keys.ring import open_keys
from inferflux_core.access.keys.settings import ApiKeySettings
from inferflux_core.access.store_file import connect
from inferflux_core.identity import AuthContext

# Forks a child for each point, which kills itself before its n-th statement; prints how many points there are. A folder each.
KILLED_AT_EACH_STATEMENT = """
import asyncio, os, signal, sys
from pathlib import Path
from inferflux_core.access import store_file
from inferflux_core.access.keys.settings import ApiKeySettings
from inferflux_core.access.keys.records import NewKey
from inferflux_core.access.keys.ring import open_keys

def work(folder, left):
    plain = store_file.connect
    def count(statement):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    def watched(*args):
        connection = plain(*args)
        connection.set_trace_callback(count)
        return connection
    store_file.connect = watched
    keys = open_keys(ApiKeySettings(pepper="p" * 32), folder)
    record, key = asyncio.run(keys.create(NewKey(name="k")))
    (folder / "made").write_text(key)
    keys.close()

for n in range(1, 200):
    folder = Path(sys.argv[1]) / str(n)
    folder.mkdir(mode=0o700)
    child = os.fork()
    if child == 0:
        try:
            work(folder, n)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        print(n, os.WEXITSTATUS(status))
        break
"""

CREATES_FOR_EVER = """
import asyncio, sys
from pathlib import Path
from inferflux_core.access.keys.settings import ApiKeySettings
from inferflux_core.access.keys.records import NewKey
from inferflux_core.access.keys.ring import open_keys

async def main():
    keys = open_keys(ApiKeySettings(pepper="p" * 32), Path(sys.argv[1]))
    for _ in range(int(sys.argv[2])):
        print((await keys.create(NewKey(name=sys.argv[3])))[1], flush=True)
    keys.close()

asyncio.run(main())
"""

SETTINGS = ApiKeySettings.model_validate({"pepper": "p" * 32})


async def usable(folder: Path, keys: list[str]) -> None:
    """All these keys work, and the store holds no half keys."""
    with closing(connect(folder / "access.db", 1)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    provider = ApiKeyProvider(SETTINGS, AuthContext(state_dir=folder, resource=None, count=lambda event: None))
    try:
        for key in keys:
            assert (await provider.authenticate(key, None)).name != ""
        halves = "SELECT id FROM keys LEFT JOIN key_hashes ON key_id = id WHERE hash IS NULL OR length(hash) != 32"
        assert provider.keys.store.read(halves) == []
        assert len(await provider.keys.list()) >= len(keys)
    finally:
        await provider.close()


async def test_killed_at_every_statement(tmp_path: Path) -> None:
    run = subprocess.run(  # noqa: ASYNC221  # a test has the event loop to itself
        [sys.executable, "-c", KILLED_AT_EACH_STATEMENT, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    last, status = map(int, run.stdout.split())
    assert status == 0, run.stderr
    assert last > 20  # opening, migration, peppers, creation
    created = []
    for n in range(1, last + 1):
        folder = tmp_path / str(n)
        made = [(folder / "made").read_text()] if (folder / "made").exists() else []
        keys = open_keys(SETTINGS, folder)  # goes on where the dead one stopped
        records = await keys.list()
        keys.close()
        assert len(records) >= len(made)
        await usable(folder, made)
        created.append(len(records))
    assert created == sorted(created)  # absent up to the commit, there from then on
    assert (created[0], created[-1]) == (0, 1)


async def test_killed_at_any_time(tmp_path: Path) -> None:
    """What was handed out works, whenever the process that made it died."""
    handed_out: list[str] = []
    for seed in range(3):
        with subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-c", CREATES_FOR_EVER, str(tmp_path), "100000", "k"], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            for _ in range(random.Random(seed).randrange(1, 20)):
                handed_out.append(child.stdout.readline().strip())
            child.kill()
            handed_out += [line.strip() for line in child.stdout if line.endswith("\n")]
        assert child.returncode == -signal.SIGKILL
    await usable(tmp_path, handed_out)


async def test_two_processes_on_one_file(tmp_path: Path) -> None:
    """They start together, on no file at all, and both write."""
    command = [sys.executable, "-c", CREATES_FOR_EVER, str(tmp_path), "25"]
    children = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "ab"]  # noqa: ASYNC220
    made = [line for child in children for line in child.communicate(timeout=30)[0].split()]
    assert [child.returncode for child in children] == [0, 0]
    assert len(made) == len(set(made)) == 50
    await usable(tmp_path, made)
    keys = open_keys(SETTINGS, tmp_path)
    assert sorted(record.name for record in await keys.list()) == ["a"] * 25 + ["b"] * 25
    hashes = {bytes(row[0]) for row in keys.store.read("SELECT hash FROM key_hashes")}
    assert hashes == {Pepper("p1", b"p" * 32).hash(key).hash for key in made}
    keys.close()
