"""Makes audit logs for the tests, through the public door."""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from inferflux_core.access.audit.checkpoints import load_public_key
from inferflux_core.access.audit.events import AuditEvent
from inferflux_core.access.audit.log import AuditLog
from inferflux_core.access.audit.verify import Verification, verify
from inferflux_core.settings import AuditSettings


class Counted(Counter[str]):
    """An `on_count` that can be asked."""

    def __call__(self, event: str) -> None:
        self[event] += 1


@asynccontextmanager
async def open_log(folder: Path, counts: Counted | None = None, **settings: Any) -> AsyncIterator[AuditLog]:
    log = AuditLog(AuditSettings(**settings), folder, counts if counts is not None else Counted())
    await log.start()
    try:
        yield log
    finally:
        await log.close()


async def write_log(folder: Path, count: int = 5, **settings: Any) -> None:
    """A log with the records `thing` 0 to count - 1, closed properly."""
    async with open_log(folder, **settings) as log:
        for number in range(count):
            await log.record(AuditEvent(event="thing", fields={"n": number}))


def modes(folder: Path) -> dict[str, int]:
    """The permissions of all files, by name."""
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of the open file."""
    return [json.loads(line) for line in (folder / "audit.jsonl").read_bytes().splitlines()]


def things(folder: Path) -> list[int]:
    """The numbers of the records `thing` in all files."""
    found = []
    for path in [*sorted(folder.glob("audit.0*.jsonl")), folder / "audit.jsonl"]:
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        found += [line["n"] for line in lines if line["event"] == "thing"]
    return found


def check(folder: Path, *, with_key: bool = True, checkpoints: bool = True, **options: Any) -> Verification:
    return verify(
        folder / "audit.jsonl",
        key=(folder / "audit.key").read_bytes() if with_key else None,
        public_key=load_public_key(folder / "audit-checkpoint.pub"),
        checkpoints=folder / "audit-checkpoints.jsonl" if checkpoints else None,
        **{"patience_s": 0.0, **options},
    )
