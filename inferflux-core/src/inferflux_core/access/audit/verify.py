"""Says whether a log is whole: every record as it was written, none missing, none added, none moved.

With the key of the chain every change is found, whichever byte it is. With the public key and the checkpoints alone,
changes are found in all records that a checkpoint covers. Either way the checkpoints show that the end was cut off. Needs
the same small memory for any size of log.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from inferflux_core.access.audit.chain import GENESIS, MAX_LINE, Record, read_record
from inferflux_core.access.audit.checkpoints import Checkpoint, read_checkpoints
from inferflux_core.access.audit.reader import Line, read_log
from inferflux_core.access.audit.rotation import ROTATE, read_manifest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was found.

    Attributes:
        ok: whether the log is whole, as far as keys and checkpoints given can tell.
        records: how many are in order, up to the first that is not.
        head: number of the last of those; 0 if there is none.
        first_bad: number of the first record that is changed or missing; with the public key alone, the first of those that
            one checkpoint covers. None if there is none.
        reason: what is wrong, with file and line; None if nothing is.
        checkpoints: how many were checked.
        signed_to: number of the last record that a checkpoint covers; 0 if none does.
    """

    ok: bool
    records: int
    head: int
    first_bad: int | None = None
    reason: str | None = None
    checkpoints: int = 0
    signed_to: int = 0


class _Bad(Exception):
    def __init__(self, seq: int, reason: str) -> None:
        super().__init__(reason)
        self.seq = seq
        self.reason = reason


def verify(
    log: Path,
    *,
    key: bytes | None,
    public_key: Ed25519PublicKey | None = None,
    checkpoints: Path | None = None,
    head: int | None = None,
    allow_pruned: bool = False,
    patience_s: float = 1.0,
) -> Verification:
    """Verify a log with all its files; a server may be writing it.

    Args:
        key: of the chain.
        public_key: of the checkpoints; needed to look at them.
        checkpoints: the checkpoint file. One that does not exist is an empty one.
        head: number of a record known to have existed, such as a value of the gauge `inferflux_audit_head`.
        allow_pruned: the oldest files may be missing; the manifest says where the rest begins.
        patience_s: see `read_log`.

    Raises:
        ValueError: neither the key nor checkpoints with the public key are given: nothing could be told.
        OSError: a file cannot be read.
    """
    if key is None and (public_key is None or checkpoints is None):
        raise ValueError("verification needs the audit key, or checkpoints and their public key")
    signed = _Signed(iter(()))
    if public_key is not None and checkpoints is not None and checkpoints.exists():
        # Its size first: what is added while the log is read would be ahead of what was read of it.
        signed = _Signed(read_checkpoints(checkpoints, public_key, checkpoints.stat().st_size))
    walk = _Walk(log, key, signed, allow_pruned)
    bad: _Bad | None = None
    try:
        signed.advance()
        walk.run(patience_s)
        if head is not None and walk.seq < head:
            raise _Bad(walk.seq + 1, f"the log ends with record {walk.seq}, but it had record {head}: the end was cut off")
    except _Bad as found:
        bad = found
    result = Verification(
        ok=bad is None, records=walk.records, head=walk.seq, checkpoints=signed.checked, signed_to=signed.signed_to
    )
    return result if bad is None else replace(result, first_bad=bad.seq, reason=bad.reason)


class _Walk:
    """One passage through the log."""

    def __init__(self, log: Path, key: bytes | None, signed: _Signed, allow_pruned: bool) -> None:
        self._log = log
        self._key = key
        self._signed = signed
        self._allow_pruned = allow_pruned
        self._hash = GENESIS
        self._file: Path | None = None
        self._last_event = ""
        self.seq = 0
        self.records = 0

    def run(self, patience_s: float) -> None:
        """Raises _Bad at the first thing that is wrong."""
        try:
            for line in read_log(self._log, patience_s=patience_s):
                self._take(line)
        except FileNotFoundError:
            raise _Bad(self.seq + 1, f"the file {self._log.name!r} is missing") from None
        if self._file not in (None, self._log) and self._last_event != ROTATE:
            raise _Bad(self.seq + 1, f"{self._file} does not end with {ROTATE!r}: its end is missing")
        self._signed.finish(self.seq)

    def _take(self, line: Line) -> None:
        place = f"line {line.number} of {line.path.name!r}"
        if self.records and line.path != self._file and self._last_event != ROTATE:
            raise _Bad(self.seq + 1, f"the file before {line.path.name!r} does not end with {ROTATE!r}: its end is missing")
        if line.path == self._file and self._last_event == ROTATE:
            raise _Bad(self.seq + 1, f"{place}: the file goes on after {ROTATE!r}")
        self._file = line.path
        record = self._read(line, place)
        if self.records == 0 and record.seq > 1:
            self._begin_pruned(record, place)
        if record.seq != self.seq + 1:
            raise _Bad(self.seq + 1, f"{place}: record {record.seq} follows record {self.seq}")
        if record.prev != self._hash:
            raise _Bad(record.seq, f"{place}: record {record.seq} does not follow the record before: that one was replaced")
        self._signed.check(record, line.text)
        self.seq, self._hash, self._last_event = record.seq, record.hash, record.event
        self.records += 1

    def _read(self, line: Line, place: str) -> Record:
        """The record in a line, authentic if there is a key to tell."""
        if not line.text.endswith(b"\n"):
            what = "longer than any record" if len(line.text) > MAX_LINE else "torn; the next start of the server repairs that"
            raise _Bad(self.seq + 1, f"{place} is {what}")
        try:
            record = read_record(line.text)
        except ValueError as error:
            raise _Bad(self.seq + 1, f"{place}: {error}") from None
        if self._key is not None and not record.is_authentic(self._key):
            raise _Bad(self.seq + 1, f"{place}: record {record.seq} was changed, or written with another key")
        return record

    def _begin_pruned(self, first: Record, place: str) -> None:
        """Begin in the middle of the chain, where the manifest says that the missing part ended."""
        if not self._allow_pruned:
            raise _Bad(1, f"{place}: the log begins with record {first.seq}; the files before it are missing")
        for entry in read_manifest(self._log, self._key):
            if entry.last_seq == first.seq - 1 and entry.hash == first.prev:
                break
        else:
            raise _Bad(1, f"{place}: the log begins with record {first.seq}, where no file of the manifest ended")
        self.seq, self._hash = entry.last_seq, entry.hash
        self._signed.skip(entry.last_seq, entry.hash)


class _Signed:
    """The checkpoints, side by side with the records."""

    def __init__(self, checkpoints: Iterator[Checkpoint]) -> None:
        self._checkpoints = checkpoints
        self._next: Checkpoint | None = None
        self._digest: hashlib._Hash | None = None
        self.checked = 0
        self.signed_to = 0

    def advance(self) -> None:
        """Go on to the next checkpoint."""
        before = 0 if self._next is None else self._next.seq
        self._digest = None
        try:
            self._next = next(self._checkpoints, None)
        except ValueError as error:
            raise _Bad(before + 1, str(error)) from None
        if self._next is not None and not before < self._next.first <= self._next.seq:
            raise _Bad(
                self._next.seq,
                f"the checkpoint of record {self._next.seq} follows that of record {before}: the checkpoints are of two logs",
            )

    def check(self, record: Record, line: bytes) -> None:
        """Compare a record with the checkpoint that covers it."""
        checkpoint = self._next
        if checkpoint is None:
            return
        if record.seq == checkpoint.first:
            self._digest = hashlib.sha256()
        if self._digest is not None:
            self._digest.update(line)
        if record.seq == checkpoint.seq:
            self._compare(checkpoint, record.hash)

    def skip(self, seq: int, last_hash: str) -> None:
        """Pass over the checkpoints of records that are not there, up to `seq`, the last of which has that hash."""
        while self._next is not None and self._next.seq <= seq:
            if self._next.seq == seq:
                self._compare(self._next, last_hash)
            else:
                self.advance()

    def finish(self, seq: int) -> None:
        """The log has ended with record `seq`."""
        if self._next is not None:
            raise _Bad(
                seq + 1,
                f"the log ends with record {seq}, but a checkpoint says that it had {self._next.seq}: the end was cut off",
            )

    def _compare(self, checkpoint: Checkpoint, record_hash: str) -> None:
        if checkpoint.hash != record_hash:
            raise _Bad(checkpoint.seq, f"record {checkpoint.seq} is not the one that was signed: the log was replaced")
        if self._digest is not None and self._digest.hexdigest() != checkpoint.digest:
            raise _Bad(
                checkpoint.first,
                f"among records {checkpoint.first} to {checkpoint.seq} is one that was changed after they were signed",
            )
        self.checked += 1
        self.signed_to = checkpoint.seq
        self.advance()
