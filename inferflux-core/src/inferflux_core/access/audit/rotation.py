"""Closed files of a log: `audit.jsonl` becomes `audit.000001.jsonl` when it is full, and a new `audit.jsonl` goes on.

The last record of a closed file is `log.rotate`, and the first of the next file carries its hash as `prev`: the chain runs
through all of them. `audit.manifest.jsonl` has a line for each closed file, with a keyed hash (`mac`), so that old files can be
archived and deleted and what follows them can still be verified.
"""

from __future__ import annotations

import hmac
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from inferflux_core.access.audit.chain import canonical, keyed_hash

ROTATE = "log.rotate"
_PURPOSE = "manifest"


@dataclass(frozen=True, slots=True)
class ClosedFile:
    """An entry of the manifest.

    Attributes:
        file: name without folder.
        first_seq, last_seq: the records in it.
        hash: of the last one, `log.rotate`.
        bytes: its size.
    """

    file: str
    first_seq: int
    last_seq: int
    hash: str
    bytes: int


def closed_name(log: Path, number: int) -> Path:
    """The path of the closed file of that number; the first is 1."""
    return log.with_name(f"{log.stem}.{number:06d}{log.suffix}")


def closed_files(log: Path) -> list[tuple[int, Path]]:
    """The closed files that are there, oldest first, with their numbers."""
    pattern = re.compile(re.escape(log.stem) + r"\.(\d{6,})" + re.escape(log.suffix))
    found = []
    with os.scandir(log.parent) as entries:
        for entry in entries:
            if match := pattern.fullmatch(entry.name):
                found.append((int(match[1]), log.with_name(entry.name)))
    return sorted(found)


def manifest_path(log: Path) -> Path:
    """Where the manifest of a log is."""
    return log.with_name(f"{log.stem}.manifest{log.suffix}")


def add_to_manifest(log: Path, key: bytes, entry: ClosedFile) -> None:
    """Add an entry and force it to disk. A line that a crash has torn is ended first; nobody reads it.

    Raises:
        OSError: it may be incomplete; adding it again does no harm.
    """
    body = asdict(entry)
    line = canonical({**body, "mac": keyed_hash(key, _PURPOSE, canonical(body))}) + b"\n"
    descriptor = os.open(manifest_path(log), os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(log: Path, key: bytes | None) -> Iterator[ClosedFile]:
    """The entries that are whole and, where the key is given, authentic. None if there is no manifest."""
    try:
        file = manifest_path(log).open("rb")
    except FileNotFoundError:
        return
    with file:
        while line := file.readline(64 * 1024):
            try:
                body = json.loads(line)
                mac = body.pop("mac")
                entry = ClosedFile(**body)
                authentic = key is None or hmac.compare_digest(mac, keyed_hash(key, _PURPOSE, canonical(body)))
            except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
                continue
            if authentic:
                yield entry
