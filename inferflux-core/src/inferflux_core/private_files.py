"""Files that only the server's own user may read, and files that are there whole or not at all.

    check_private, read_private     refuse a secret that others could have read or written
    make_private_folder             for the files below
    create_private                  a new file, which is nobody's but the first's who makes it
    temporary_beside                a new content for a file, to be renamed over it
    sync_folder                     so that a new name outlives a power cut

Windows has no such permissions; there, nothing is refused.
"""

from __future__ import annotations

import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inferflux_core.errors import ConfigError


def make_private_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, with mode 0700; leave one that exists as it is.

    Raises:
        ConfigError: it cannot be made, is no folder, or others may put files into it.
    """
    try:
        for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise ConfigError(
            f"the folder {str(folder)!r} cannot be made: {error.strerror}; make it, or name another one"
        ) from error
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"{str(folder)!r} is not a folder; remove it, or name another folder")
    # With the sticky bit nobody can replace a file of ours, as in /tmp.
    if sys.platform != "win32" and status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        raise ConfigError(f"others may put files into {str(folder)!r}, where secrets are kept; run: chmod go-w {str(folder)!r}")


def check_private(path: Path, what: str, *, any_owner: bool = False) -> None:
    """See that a file is ours or root's, and that nobody else may read or write it.

    What belongs to root a group may read: root gave it to this user in that way.

    Args:
        what: the file holds, for the message: `the pepper`.
        any_owner: do not ask whose it is: for root, who looks after the files of a server that runs as another user.

    Raises:
        ConfigError: others may, it belongs to somebody else, or it is no regular file.
        OSError: it cannot be looked at, FileNotFoundError among them.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{what} {str(path)!r} is not a regular file; name another file")
    if sys.platform == "win32":
        return
    if not any_owner and status.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"{what} {str(path)!r} belongs to another user (uid {status.st_uid}); run this as that user, or change its owner"
        )
    wanted = 0o640 if status.st_uid == 0 and os.geteuid() != 0 else 0o600
    if status.st_mode & 0o077 & ~wanted:
        raise ConfigError(
            f"{what} {str(path)!r} can be read or written by others (mode {stat.S_IMODE(status.st_mode):03o}); "
            f"run: chmod {wanted:03o} {str(path)!r}"
        )


def read_private(path: Path, what: str, *, any_owner: bool = False) -> bytes:
    """The bytes of a file that only we may read.

    Raises:
        ConfigError: as `check_private`, or it cannot be read.
    """
    try:
        check_private(path, what, any_owner=any_owner)
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{what} {str(path)!r} cannot be read: {error.strerror}; correct the path or the file") from error


def create_private(path: Path, content: bytes) -> bool:
    """Make a file with mode 0600 that has all of its content from its first moment on. Returns False if there is one already.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        with temporary_beside(path, content) as temporary:
            os.link(temporary, path)  # unlike a rename, it fails if another process was faster
        sync_folder(path.parent)
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be written: {error.strerror}; name another folder") from error
    return True


def replace_private(path: Path, content: bytes) -> None:
    """Give a file a new content, or make it, with mode 0600; after a crash it has the old content or the new one.

    Raises:
        OSError: it cannot be written, and is as it was.
    """
    with temporary_beside(path, content) as temporary:
        temporary.replace(path)
    sync_folder(path.parent)


@contextmanager
def temporary_beside(path: Path, content: bytes) -> Iterator[Path]:
    """A file in the folder of `path`, mode 0600, whose content is on disk. It is deleted at the end, unless it was renamed.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk.

    Raises:
        OSError: they may not be.
    """
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
