"""Where `inferctl login` keeps tokens: a file for each server, which only its owner can read, and the system's keyring.

The refresh token, which is good for weeks, goes into the keyring where the package `keyring` is installed and works. The access
token is good for minutes and too long for some keyrings; it is always in the file, so that a command with a fresh one needs no
keyring.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from inferflux_core.cli.api_errors import ApiError
from inferflux_core.errors import ConfigError
from inferflux_core.private_files import check_private, replace_private

KEYRING_SERVICE = "inferflux"


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """What is kept of a login at one server.

    Attributes:
        server: base URL of the server that the tokens are for, and the only one that they are sent to.
        issuer: the identity provider's URL.
        resource: audience of the access token.
        scope: what was granted, separated by spaces.
        expires_at: Unix seconds at which the access token ends; None if the provider did not say.
        refresh_token: None where there is none, or where it is in the keyring.
        in_keyring: whether the refresh token is in the keyring, under the server's URL.
    """

    server: str
    issuer: str
    client_id: str
    resource: str
    scope: str
    access_token: str = field(repr=False)
    expires_at: float | None
    refresh_token: str | None = field(default=None, repr=False)
    in_keyring: bool = False


class TokenStore:
    """The logins of this user. Every method raises ApiError, and nothing else, where a file or the keyring fails."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made when the first login is saved."""
        self.folder = folder

    @classmethod
    def of_user(cls) -> TokenStore:
        """`$XDG_STATE_HOME/inferflux/logins`, by default under `~/.local/state`."""
        from inferflux_core.state_dir import user_state_dir  # and the settings, which only a command that asks a server needs

        try:
            return cls(user_state_dir() / "logins")
        except ConfigError as error:
            raise ApiError(str(error)) from error

    def load(self, server: str) -> Login | None:
        """The login at a server, its refresh token still in the keyring if it is there; None if there is none."""
        path = self._path(server)
        try:
            check_private(path, "the login")
            login = msgspec.json.decode(path.read_bytes(), type=Login)
        except FileNotFoundError:
            return None
        except ConfigError as error:
            raise ApiError(str(error)) from error
        except OSError as error:
            raise ApiError(f"cannot read {str(path)!r}: {error.strerror}") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ApiError(f"{str(path)!r} is damaged. Delete it, and log in again with: inferctl login") from error
        if login.server != server:
            raise ApiError(f"{str(path)!r} is of the server {login.server!r}. Delete it, and log in again with: inferctl login")
        return login

    def refresh_token(self, login: Login) -> str | None:
        """The refresh token of a login, wherever it is."""
        if not login.in_keyring:
            return login.refresh_token
        keyring = _keyring()
        if keyring is None:
            raise ApiError("the refresh token is in a keyring, but the package 'keyring' is gone. Install it, or log in again")
        try:
            token: str | None = keyring.get_password(KEYRING_SERVICE, login.server)
        except Exception as error:  # a keyring's backend may raise anything
            raise ApiError(f"the keyring cannot be read ({type(error).__name__}). Unlock it, or log in again") from error
        return token

    def save(self, login: Login) -> None:
        """Replaces the login at its server; after a crash there is the old one or the new one.

        A `refresh_token` goes into the keyring if that works, else into the file. For a login with `in_keyring` and no
        `refresh_token`, that in the keyring stays.
        """
        if login.refresh_token is not None:
            stored = self._into_keyring(login.server, login.refresh_token)
            login = dataclasses.replace(login, in_keyring=stored, refresh_token=None if stored else login.refresh_token)
        path = self._path(login.server)
        try:
            self._make_folder()
            replace_private(path, msgspec.json.encode(login))
        except OSError as error:
            raise ApiError(f"cannot write {str(path)!r}: {error.strerror}") from error

    def delete(self, login: Login) -> None:
        """Forgets a login. A keyring that cannot be reached keeps a token that nothing points to any more."""
        path = self._path(login.server)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ApiError(f"cannot delete {str(path)!r}: {error.strerror}") from error
        if login.in_keyring and (keyring := _keyring()) is not None:
            with contextlib.suppress(Exception):
                keyring.delete_password(KEYRING_SERVICE, login.server)

    @contextlib.contextmanager
    def locked(self, server: str) -> Iterator[None]:
        """Keeps every other inferctl of this user from changing the login at a server; waits for one that does."""
        try:
            self._make_folder()
            descriptor = os.open(self._path(server).with_suffix(".lock"), os.O_RDWR | os.O_CREAT | _NOFOLLOW, 0o600)
        except OSError as error:
            raise ApiError(f"cannot make a lock in {str(self.folder)!r}: {error.strerror}") from error
        try:
            _lock(descriptor)
            yield
        finally:
            os.close(descriptor)  # and so unlocks

    def _path(self, server: str) -> Path:
        return self.folder / (hashlib.sha256(server.encode()).hexdigest()[:32] + ".json")

    def _make_folder(self) -> None:
        for folder in (self.folder.parent, self.folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)  # also when it is older than this rule

    def _into_keyring(self, server: str, token: str) -> bool:
        keyring = _keyring()
        if keyring is None:
            return False
        try:
            keyring.set_password(KEYRING_SERVICE, server, token)
        except Exception:  # no backend, locked, no desktop session: the file is there for that
            return False
        return True


_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)


def _keyring() -> Any:
    """The package `keyring`, or None."""
    try:
        return importlib.import_module("keyring")
    except ImportError:
        return None


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX)
