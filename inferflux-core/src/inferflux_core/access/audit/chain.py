"""The chain: each line holds the hash of the one before, and a keyed hash of itself.

A line is a JSON object in canonical form: keys sorted, no spaces, ASCII only, no floating-point numbers; then a newline.

    hash = HMAC-SHA256(key, prev + the line without its member "hash" and without the newline)

`prev` is the hash of the line before in hexadecimal, 64 zeros for the first. Nothing a client sends can end a line or be
read as a key, since JSON escapes quotes and control characters, and everything beyond ASCII is escaped too.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from inferflux_core.access.audit.events import Json

GENESIS = "0" * 64
"""`prev` of the first record."""

MAX_LINE = 512 * 1024
"""Most bytes of a line. An event that needs more is recorded without its fields."""

_encode = json.JSONEncoder(ensure_ascii=True, sort_keys=True, separators=(",", ":"), allow_nan=False).encode


def canonical(value: Mapping[str, Any]) -> bytes:
    """The one spelling of an object. DEL is ASCII and legal in JSON, but not to be sent to a terminal."""
    return _encode(value).replace("\x7f", "\\u007f").encode("ascii")


def record_hash(key: bytes, prev: str, body: bytes) -> str:
    """The hash of a record whose line, without the hash, is `body`."""
    return hmac.digest(key, prev.encode("ascii") + body, "sha256").hex()


def keyed_hash(key: bytes, purpose: str, data: bytes) -> str:
    """A keyed hash for something else than a record. A purpose is no hexadecimal number, so that the two never meet."""
    return hmac.digest(key, purpose.encode("ascii") + b"\n" + data, "sha256").hex()


class Chain:
    """The end of a chain, to which records are added.

    Attributes:
        seq: number of the last record; the first is 1.
        hash: of the last record.
    """

    __slots__ = ("_key", "hash", "seq")

    def __init__(self, key: bytes, seq: int = 0, last_hash: str = GENESIS) -> None:
        self._key = key
        self.seq = seq
        self.hash = last_hash

    def append(self, fields: Mapping[str, Json], boot_id: str, time_ns: int) -> bytes:
        """The line of the next record, newline included. `fields` has `event` and none of the chain's own keys."""
        line, digest = self._line(fields, boot_id, time_ns)
        if len(line) > MAX_LINE:
            kept = {key: value for key, value in fields.items() if key in ("event", "request_id", "address", "actor")}
            line, digest = self._line({**kept, "omitted_bytes": len(line)}, boot_id, time_ns)
        self.seq += 1
        self.hash = digest
        return line

    def _line(self, fields: Mapping[str, Json], boot_id: str, time_ns: int) -> tuple[bytes, str]:
        # Encoded in two halves, between which the hash belongs: it is computed without and then put in its place.
        before: dict[str, Json] = {"boot_id": boot_id}
        after: dict[str, Json] = {"prev": self.hash, "seq": self.seq + 1, "ts": rfc3339(time_ns)}
        for key, value in fields.items():
            (before if key < "hash" else after)[key] = value
        head, tail = canonical(before)[:-1], canonical(after)[1:]
        digest = record_hash(self._key, self.hash, head + b"," + tail)
        return b'%b,"hash":"%b",%b\n' % (head, digest.encode("ascii"), tail), digest


@dataclass(frozen=True, slots=True)
class Record:
    """A line that was read.

    Attributes:
        body: the line without hash and newline, over which the hash is computed.
        fields: everything in the line.
    """

    seq: int
    prev: str
    hash: str
    event: str
    body: bytes
    fields: dict[str, Any]

    def is_authentic(self, key: bytes) -> bool:
        """Whether the holder of the key wrote it. Its place in the chain is another question."""
        return hmac.compare_digest(record_hash(key, self.prev, self.body), self.hash)


def read_record(line: bytes) -> Record:
    """Read a line, newline included.

    Raises:
        ValueError: it is not the canonical form of a record; says why.
    """
    if not line.endswith(b"\n"):
        raise ValueError("the line has no end")
    try:
        fields = json.loads(line)
        if not isinstance(fields, dict):
            raise ValueError("the line is not a JSON object")
        if canonical(fields) != line[:-1]:
            raise ValueError("the line is not in canonical form")
    except RecursionError:
        raise ValueError("the line is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("the line is not text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"the line is not JSON ({error.msg})") from None
    seq, prev, digest, event = (fields.get(name) for name in ("seq", "prev", "hash", "event"))
    if type(seq) is not int or not (isinstance(prev, str) and isinstance(digest, str) and isinstance(event, str)):
        raise ValueError("the line is not an audit record")
    if not _is_hash(prev) or not _is_hash(digest):
        raise ValueError("the record has a hash that is none")
    body = canonical({key: value for key, value in fields.items() if key != "hash"})
    return Record(seq, prev, digest, event, body, fields)


def rfc3339(time_ns: int) -> str:
    """Nanoseconds since 1970 as `2026-01-31T12:00:00.123456789Z`."""
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}Z"


def _is_hash(text: str) -> bool:
    return len(text) == 64 and text.isascii() and all(character in "0123456789abcdef" for character in text)
