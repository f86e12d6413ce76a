"""The folder of the server's own files: keys, audit log, the secrets of both. Nobody but this user may look into it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from inferflux_core.errors import ConfigError
from inferflux_core.settings import Settings


def state_dir_path(settings: Settings) -> Path:
    """Where the folder is, without looking at the disk: `state_dir`, else below `$XDG_STATE_HOME` or `~/.local/state`.

    Raises:
        ConfigError: it is not configured, and this user has no home folder.
    """
    if settings.state_dir is not None:
        return settings.state_dir.absolute()
    try:
        return user_state_dir()
    except ConfigError as error:
        raise ConfigError(f"state_dir: {error}; or set state_dir to a folder of its own") from error


def user_state_dir() -> Path:
    """The folder in which programs of this user keep what is InferFlux's: below `$XDG_STATE_HOME` or `~/.local/state`.

    Raises:
        ConfigError: this user has no home folder.
    """
    base = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(base):  # the XDG specification: a relative path is to be ignored
        return Path(base) / "inferflux"
    try:
        home = Path.home()
    except RuntimeError as error:
        raise ConfigError("this user has no home folder; set XDG_STATE_HOME to an absolute path") from error
    return home / ".local" / "state" / "inferflux"


def state_dir(settings: Settings) -> Path:
    """The folder, created if it does not exist; only this user can read it.

    Raises:
        ConfigError: it cannot be created, is not a folder, belongs to another user, or others may enter it.
    """
    path = state_dir_path(settings)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.stat()
    except OSError as error:
        raise ConfigError(
            f"state_dir: the folder {str(path)!r} cannot be created ({error.strerror}); set state_dir to one that can"
        ) from error
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"state_dir: {str(path)!r} is not a folder; set state_dir to one")
    if hasattr(os, "geteuid"):
        if found.st_uid != os.geteuid():
            raise ConfigError(
                f"state_dir: the folder {str(path)!r} belongs to another user (uid {found.st_uid}); "
                f"change its owner, or set state_dir to a folder that does not exist yet"
            )
        if found.st_mode & 0o077:
            raise ConfigError(
                f"state_dir: others may enter the folder {str(path)!r} (mode {found.st_mode & 0o777:03o}), which holds "
                f"secrets; run 'chmod 700 {path}', or set state_dir to a folder below it that does not exist yet"
            )
    return path
