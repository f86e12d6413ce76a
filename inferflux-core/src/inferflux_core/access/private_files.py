"""Files that only the server's own user may read: how they are made, and when they are refused."""

from __future__ import annotations

import os
import secrets
import stat
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
    if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        raise ConfigError(f"others may put files into {str(folder)!r}, where secrets are kept; run: chmod go-w {str(folder)!r}")


def check_private(path: Path, what: str) -> os.stat_result:
    """See that a file is ours and nobody else may read or write it. Returns its status.

    Args:
        what: the file holds, for the message: `the pepper`.

    Raises:
        ConfigError: others may, it belongs to somebody else, or it is no regular file.
        OSError: it cannot be looked at, FileNotFoundError among them.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{what} {str(path)!r} is not a regular file; name another file")
    if status.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"{what} {str(path)!r} belongs to another user; run: chown {os.geteuid()} {str(path)!r}")
    if status.st_mode & 0o077:
        raise ConfigError(
            f"{what} {str(path)!r} can be read or written by others (mode {stat.S_IMODE(status.st_mode):04o}); "
            f"run: chmod 600 {str(path)!r}"
        )
    return status


def read_private(path: Path, what: str) -> bytes:
    """The bytes of a file that only we may read.

    Raises:
        ConfigError: as `check_private`, or it cannot be read.
    """
    try:
        check_private(path, what)
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{what} {str(path)!r} cannot be read: {error.strerror}; correct the path or the file") from error


def create_private(path: Path, content: bytes) -> bool:
    """Make a file with mode 0600 that has all of its content from its first moment on. Returns False if there is one already.

    Raises:
        ConfigError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)  # unlike a rename, it fails if another process was faster
            _sync_folder(path.parent)
        finally:
            temporary.unlink()
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be written: {error.strerror}; name another folder") from error
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
