"""Checkpoints: signed statements "record `seq` has hash `hash`", in another file, best on another disk.

A chain does not show that its end was cut off; a checkpoint does. It is a line of canonical JSON; `sig` is the Ed25519
signature, in hexadecimal, of the line without it. `digest` is the SHA-256 of the lines of records `first` to `seq`, so that
who has only the public key can tell that these were not changed either. A checkpoint is written after the records are on
disk, never before: a log that ends before its newest checkpoint was cut.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from inferflux_core.access.audit.chain import canonical, rfc3339
from inferflux_core.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_MAX_LINE = 4096


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How far the log had come: see the module."""

    seq: int
    hash: str
    first: int
    digest: str
    boot_id: str
    ts: str


class CheckpointWriter:
    """Writes checkpoints. Used by the writer thread only.

    Attributes:
        pending: records since the last checkpoint.
    """

    def __init__(self, path: Path, key: Ed25519PrivateKey, boot_id: str) -> None:
        self._path = path
        self._key = key
        self._boot_id = boot_id
        self._digest = hashlib.sha256()
        self._failed_at: int | None = None  # length of the file before a write that failed
        self.pending = 0

    def add(self, lines: bytes, records: int) -> None:
        """Note lines that were appended to the log."""
        self._digest.update(lines)
        self.pending += records

    def write(self, seq: int, last_hash: str, time_ns: int) -> None:
        """Sign how far the log has come. Everything noted must be on disk.

        Raises:
            OSError: there is no new checkpoint; the next one will cover these records too.
        """
        checkpoint = Checkpoint(
            seq, last_hash, seq - self.pending + 1, self._digest.hexdigest(), self._boot_id, rfc3339(time_ns)
        )
        body = _body(checkpoint)
        line = canonical({**body, "sig": self._key.sign(canonical(body)).hex()}) + b"\n"
        descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            # What a crash or a full disk has torn is no checkpoint, and would spoil the line that follows it. What failed to
            # reach the disk is taken back: the next checkpoint covers the same records, and two may not.
            size = os.fstat(descriptor).st_size
            end = _whole_length(descriptor) if self._failed_at is None else min(self._failed_at, size)
            if end != size:
                os.ftruncate(descriptor, end)
            self._failed_at = end
            if os.write(descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
            self._failed_at = None
        finally:
            os.close(descriptor)
        self._digest = hashlib.sha256()
        self.pending = 0


def last_checkpoint(path: Path, public_key: Ed25519PublicKey) -> Checkpoint | None:
    """The newest checkpoint of a file; None if it has none.

    Raises:
        ConfigError: it cannot be read, or its last line is not a checkpoint signed with this key.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"the checkpoint file {str(path)!r} cannot be read: {error.strerror}") from error
    try:
        end = _whole_length(descriptor)
        tail = os.pread(descriptor, min(end, _MAX_LINE), max(0, end - _MAX_LINE))
    finally:
        os.close(descriptor)
    if not tail:
        return None
    line = tail[tail.rfind(b"\n", 0, -1) + 1 :]
    try:
        return read_checkpoint(line, public_key)
    except ValueError as error:
        raise ConfigError(
            f"the checkpoint file {str(path)!r} was changed, or is of another server: {error}; move it away together with the "
            f"audit log to begin a new one"
        ) from error


def read_checkpoints(path: Path, public_key: Ed25519PublicKey, size: int) -> Iterator[Checkpoint]:
    """The checkpoints in the first `size` bytes of a file. A last line without an end is skipped.

    Raises:
        ValueError: a line that is not a checkpoint signed with this key; names the line.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(min(_MAX_LINE, size)):
            size -= len(line)
            number += 1
            if not line.endswith(b"\n") and len(line) < _MAX_LINE:
                return
            try:
                yield read_checkpoint(line, public_key)
            except ValueError as error:
                raise ValueError(f"line {number} of the checkpoint file: {error}") from error


def read_checkpoint(line: bytes, public_key: Ed25519PublicKey) -> Checkpoint:
    """Read a line of a checkpoint file, newline included.

    Raises:
        ValueError: it is not a checkpoint signed with this key.
    """
    from cryptography.exceptions import InvalidSignature

    try:
        body = json.loads(line)
        signature = bytes.fromhex(body.pop("sig"))
        checkpoint = Checkpoint(**body)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        raise ValueError("it is not a checkpoint") from None
    if type(checkpoint.seq) is not int or type(checkpoint.first) is not int:
        raise ValueError("it is not a checkpoint")
    try:
        public_key.verify(signature, canonical(body))
    except InvalidSignature:
        raise ValueError("it was not signed with this key, or was changed") from None
    return checkpoint


def load_public_key(path: Path) -> Ed25519PublicKey:
    """The public half of the key that signs checkpoints.

    Raises:
        ConfigError: it cannot be read, or is not an Ed25519 key in PEM form.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"the public key {str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} is not a public key in PEM form") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{str(path)!r} is not an Ed25519 key")
    return key


def _body(checkpoint: Checkpoint) -> dict[str, str | int]:
    return {name: getattr(checkpoint, name) for name in Checkpoint.__slots__}


def _whole_length(descriptor: int) -> int:
    """Length of a file up to and with its last newline."""
    size = os.fstat(descriptor).st_size
    tail = os.pread(descriptor, min(size, _MAX_LINE), max(0, size - _MAX_LINE))
    newline = tail.rfind(b"\n")
    return size - len(tail) + newline + 1 if newline >= 0 else 0
