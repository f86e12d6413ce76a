"""The policy in force: read from its file, replaced when the file changes, kept when the new file is not good.

A change is seen by times, inode and size of the file that the path leads to, so that bind mounts, symbolic links that are
switched and editors that write a new file are all noticed. What has changed is read once it has stayed the same for a moment,
then checked, compiled and tested in a thread, and put in force by exchanging one reference. Decisions wait for none of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inferflux_core.access.policy.casbin_policy import Policy, version_of
from inferflux_core.access.policy.cases import read_cases, run_cases
from inferflux_core.access.policy.file import MAX_POLICY_BYTES, PolicyError, Problem
from inferflux_core.errors import ConflictError, PreconditionFailedError
from inferflux_core.private_files import sync_folder, temporary_beside
from inferflux_core.settings import PolicySettings
from inferflux_core.telemetry.logging import frames_of

logger = logging.getLogger("inferflux.access")

SETTLE_S = 0.1  # a file that changed is read after it stayed the same for so long: whoever writes it may not be done
_SETTLE_LOOKS = 50  # after so many looks at a file that changes all the time it counts as unreadable


@dataclass(frozen=True, slots=True)
class PolicyEvent:
    """A policy was taken or refused.

    Attributes:
        version: of the policy now in force.
        problems: warnings about the policy taken, or what is wrong with the one refused, errors first.
    """

    kind: Literal["reloaded", "rejected"]
    version: str
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class _Look:
    """What a look at the policy file and its tests shows without reading them; equal looks mean no change."""

    policy: tuple[int, ...] | None
    tests: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A policy that passed, and the tests it passed; None if there are none."""

    policy: Policy
    tests: bytes | None


class _UnreadableError(PolicyError):
    """The file could not be read; the next time it may, though nothing seems to have changed."""


class PolicyStore:
    """The current policy of one file.

    Attributes:
        last_error: why the file as it is now is not in force; None if it is.
    """

    def __init__(self, settings: PolicySettings, on_event: Callable[[PolicyEvent], None]) -> None:
        """
        Args:
            on_event: called in the event loop after each change of `current` but the first, and for each file refused.
        """
        if settings.file is None:
            raise ValueError("policy.file is not set")
        self._file = settings.file
        self._tests = settings.tests
        self._interval_s = settings.reload_interval_s
        self._on_event = on_event
        self._loaded: _Candidate | None = None
        self._seen: _Look | None = None
        self._read_failed = False
        self.last_error: tuple[Problem, ...] | None = None
        self._lock = asyncio.Lock()
        self._next: asyncio.Task[Policy] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._reloads: set[asyncio.Task[Policy]] = set()

    @property
    def current(self) -> Policy:
        """The policy in force. One object answers a request throughout; ask again for the next."""
        assert self._loaded is not None, "start() comes first"
        return self._loaded.policy

    @property
    def text(self) -> bytes:
        """The file of the policy in force, as it was read."""
        return self.current.text

    async def start(self) -> None:
        """Load the policy and begin to watch its file.

        Raises:
            PolicyError: the policy cannot be used.
        """
        self._seen = await asyncio.to_thread(self._look)
        self._loaded = await asyncio.to_thread(lambda: self._candidate(*self._read()))
        for warning in self.current.warnings:
            logger.warning("policy %s: %s", self.current.version, warning)
        self._watcher = asyncio.create_task(self._watch(), name="policy-watch")

    async def close(self) -> None:
        """Stop watching. Safe to call at any time, and again."""
        tasks = [*self._reloads, *([] if self._watcher is None else [self._watcher])]
        self._watcher = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def reload(self) -> Policy:
        """Look at the file now, and take what it holds. Calls that come while one is at work share the next.

        Raises:
            PolicyError: the file is not good; the policy in force stays.
        """
        if self._next is None:
            self._next = asyncio.create_task(self._reload(), name="policy-reload")
            self._reloads.add(self._next)
            self._next.add_done_callback(self._reload_done)
        return await asyncio.shield(self._next)

    async def replace(self, text: bytes, expected_version: str | None) -> tuple[Policy, Policy]:
        """Write a new policy to the file, as it was given, and take it; both or neither.

        Args:
            expected_version: version that the writer has seen: of the policy in force, or of the file if that was refused;
                None replaces whatever is there.

        Returns:
            The policy that was in force, and the one that is now.

        Raises:
            PolicyError: the text is not good, or a test fails.
            PreconditionFailedError: file or policy have changed since.
            ConflictError: the file cannot be written.
        """
        async with self._lock:
            await asyncio.to_thread(self._check_version, expected_version)
            candidate = await asyncio.to_thread(lambda: self._candidate(text, self._read_tests()))
            await asyncio.to_thread(self._write, text, expected_version)
            before = self.current
            self._take(candidate, None)  # the next look reads the file again, whoever wrote it
            return before, self.current

    async def dry_run(self, text: bytes) -> Policy:
        """Compile a policy and run the tests, and change nothing.

        Raises:
            PolicyError: the text is not good, or a test fails.
        """
        return (await asyncio.to_thread(lambda: self._candidate(text, self._read_tests()))).policy

    # --- in the event loop --------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                if self._read_failed or await asyncio.to_thread(self._look) != self._seen:
                    await self.reload()
            except PolicyError:
                pass  # reported where it was found
            except Exception as error:
                logger.error("looking at the policy file failed: %s\n%s", type(error).__name__, frames_of(error))

    async def _reload(self) -> Policy:
        async with self._lock:
            self._next = None  # who asks from here on may mean a later change
            look = await asyncio.to_thread(self._look)
            if look == self._seen and not self._read_failed:
                if self.last_error is not None:
                    raise PolicyError(str(self._file), self.last_error)
                return self.current
            look, read = await self._read_settled(look)
            try:
                if isinstance(read, PolicyError):
                    raise read
                candidate = await asyncio.to_thread(self._candidate, *read)
            except PolicyError as error:
                self._seen, self._read_failed = look, isinstance(error, _UnreadableError)
                self._reject(error.problems)
                raise
            self._take(candidate, look)
            return self.current

    async def _read_settled(self, look: _Look) -> tuple[_Look, tuple[bytes, bytes | None] | _UnreadableError]:
        """Policy and tests, or why they cannot be read, once they stay the same from `SETTLE_S` before until after reading."""
        read: tuple[bytes, bytes | None] | _UnreadableError
        for _ in range(_SETTLE_LOOKS):
            await asyncio.sleep(SETTLE_S)
            try:
                read = await asyncio.to_thread(self._read)
            except _UnreadableError as error:
                read = error
            before, look = look, await asyncio.to_thread(self._look)
            if look == before:
                return look, read
        return look, _UnreadableError(str(self._file), [Problem(None, "it cannot be read: it changes all the time")])

    def _take(self, candidate: _Candidate, look: _Look | None) -> None:
        before = self._loaded
        recovered = self.last_error is not None
        self._seen, self._read_failed, self.last_error = look, False, None
        if before is not None and before.policy.version == candidate.policy.version:
            # The same policy in another file, or other tests: decisions already made stay right.
            self._loaded = _Candidate(before.policy, candidate.tests)
            if before.tests == candidate.tests and not recovered:
                return
        else:
            self._loaded = candidate
        self._on_event(PolicyEvent("reloaded", self.current.version, self.current.warnings))

    def _reject(self, problems: tuple[Problem, ...]) -> None:
        problems = tuple(sorted(problems, key=lambda p: p.severity == "warning"))
        if problems != self.last_error:
            self.last_error = problems
            self._on_event(PolicyEvent("rejected", self.current.version, problems))

    def _reload_done(self, task: asyncio.Task[Policy]) -> None:
        self._reloads.discard(task)
        if not task.cancelled():
            task.exception()  # seen here, for nobody may be waiting any more; it was reported

    # --- in a thread --------------------------------------------------------------------------------------------------

    def _tests_file(self) -> Path:
        return self._tests if self._tests is not None else self._file.with_name("tests.csv")

    def _look(self) -> _Look:
        return _Look(_identity(self._file), _identity(self._tests_file()))

    def _read(self) -> tuple[bytes, bytes | None]:
        """The policy and its tests, None where there are none. Raises _UnreadableError."""
        try:
            text = _content(self._file)
        except OSError as error:
            raise _unreadable(self._file, f"it cannot be read: {error.strerror or error}") from None
        return text, self._read_tests()

    def _read_tests(self) -> bytes | None:
        """Raises _UnreadableError."""
        file = self._tests_file()
        try:
            return _content(file)
        except FileNotFoundError:
            if self._tests is None and (self._loaded is None or self._loaded.tests is None):
                return None
            raise _unreadable(file, "the test file is missing; restore it, or restart without it") from None
        except OSError as error:
            raise _unreadable(file, f"the test file cannot be read: {error.strerror or error}") from None

    def _candidate(self, text: bytes, tests: bytes | None) -> _Candidate:
        """A policy that is good and passes its tests. Raises PolicyError."""
        try:
            policy = Policy.compile(text, str(self._file))
        except PolicyError:
            raise
        except Exception as error:
            logger.error("compiling the policy failed: %s\n%s", type(error).__name__, frames_of(error))
            cause = Problem(None, f"it cannot be compiled, through no fault of its own: {type(error).__name__}")
            raise PolicyError(str(self._file), [cause]) from None
        file = self._tests_file()
        failures = [] if tests is None else run_cases(policy, read_cases(tests, str(file)))
        if failures:
            raise PolicyError(str(self._file), [Problem(None, f"a test of {file.name!r} fails: {f}") for f in failures])
        return _Candidate(policy, tests)

    def _check_version(self, expected_version: str | None) -> None:
        """Raises PreconditionFailedError."""
        if expected_version is None:
            return
        try:
            on_disk = version_of(_content(self._file))
        except OSError:
            on_disk = self.current.version  # nothing there that could be lost
        if expected_version == on_disk:
            return
        if expected_version == self.current.version:
            message = (
                f"The policy file was edited and is now at {on_disk!r}, not in force. Read it, then write with that version."
            )
        else:
            message = f"The policy is at version {self.current.version!r}, not {expected_version!r}. Read it again, then write."
        raise PreconditionFailedError(message)

    def _write(self, text: bytes, expected_version: str | None) -> None:
        """Exchange the file that the path leads to by a new one with the same mode and owner."""
        target = Path(os.path.realpath(self._file))
        try:
            with temporary_beside(target, text) as temporary:
                with contextlib.suppress(FileNotFoundError):
                    _copy_rights(target.stat(), temporary)
                self._check_version(expected_version)  # checking and testing took a while, in which people edit files
                temporary.replace(target)
            sync_folder(target.parent)
        except OSError as error:
            raise ConflictError(
                f"The policy file cannot be written ({error.strerror}). Change it where it comes from.", code="policy_read_only"
            ) from error


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_mode)


def _content(path: Path) -> bytes:
    """The content of a regular file, and at most one byte more than a policy may have. Raises OSError."""
    # Without waiting, so that a pipe in the file's place does not hold this thread for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is not a regular file")
        return file.read(MAX_POLICY_BYTES + 1)


def _copy_rights(of: os.stat_result, path: Path) -> None:
    """Give a file the owner, if that may be done, and the mode of another."""
    if (of.st_uid, of.st_gid) != (os.geteuid(), os.getegid()):
        with contextlib.suppress(PermissionError):
            os.chown(path, of.st_uid, of.st_gid)
    path.chmod(stat.S_IMODE(of.st_mode))


def _unreadable(path: Path, message: str) -> _UnreadableError:
    return _UnreadableError(str(path), [Problem(None, message)])
