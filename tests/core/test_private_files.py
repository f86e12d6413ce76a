"""Files of this user alone: whose may be read, and that a file is there whole or as it was."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from inferflux_core import private_files
from inferflux_core.errors import ConfigError
from inferflux_core.private_files import check_private, create_private, read_private, replace_private, temporary_beside

US, OTHER = 1000, 1001


def seen_as(monkeypatch: pytest.MonkeyPatch, owner: int, mode: int, us: int) -> None:
    """Every file has this owner and mode, and this process runs as `us`."""
    status = os.stat_result((stat.S_IFREG | mode, 1, 1, 1, owner, 0, 0, 0, 0, 0))
    monkeypatch.setattr(Path, "stat", lambda path: status)
    monkeypatch.setattr(os, "geteuid", lambda: us)


@pytest.mark.parametrize(
    ("owner", "mode", "us", "refusal"),
    [
        (US, 0o600, US, None),
        (US, 0o400, US, None),
        (US, 0o700, US, None),
        (US, 0o640, US, "chmod 600"),
        (US, 0o604, US, "chmod 600"),
        (US, 0o620, US, "chmod 600"),
        (0, 0o640, US, None),  # root gave it to a group that we are in
        (0, 0o440, US, None),
        (0, 0o660, US, "chmod 640"),
        (0, 0o644, US, "chmod 640"),
        (0, 0o640, 0, "chmod 600"),
        (OTHER, 0o600, US, "belongs to another user .uid 1001."),
        (OTHER, 0o600, 0, "belongs to another user"),
    ],
)
def test_whose_files_are_private(monkeypatch: pytest.MonkeyPatch, owner: int, mode: int, us: int, refusal: str | None) -> None:
    seen_as(monkeypatch, owner, mode, us)
    if refusal is None:
        check_private(Path("/secret"), "the pepper")
    else:
        with pytest.raises(ConfigError, match=f"the pepper '/secret' .*{refusal}"):
            check_private(Path("/secret"), "the pepper")


def test_root_may_look_after_the_files_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    seen_as(monkeypatch, OTHER, 0o600, 0)
    check_private(Path("/secret"), "the key", any_owner=True)
    seen_as(monkeypatch, OTHER, 0o604, 0)
    with pytest.raises(ConfigError, match="by others"):
        check_private(Path("/secret"), "the key", any_owner=True)


def test_windows_has_no_such_rights(monkeypatch: pytest.MonkeyPatch) -> None:
    seen_as(monkeypatch, OTHER, 0o666, US)
    monkeypatch.setattr(private_files.sys, "platform", "win32")
    check_private(Path("/secret"), "the key")


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("pipe", "."):
        with pytest.raises(ConfigError, match="is not a regular file"):
            read_private(tmp_path / name, "the key")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_private(tmp_path / "none", "the key")


def test_the_first_to_make_a_file_makes_it(tmp_path: Path) -> None:
    path = tmp_path / "key"
    assert create_private(path, b"one")
    assert not create_private(path, b"two")
    assert (read_private(path, "the key"), stat.S_IMODE(path.stat().st_mode)) == (b"one", 0o600)
    assert os.listdir(tmp_path) == ["key"]


def test_a_replacement_is_private_whatever_was_there(tmp_path: Path) -> None:
    path = tmp_path / "login"
    path.write_bytes(b"old")
    path.chmod(0o644)
    replace_private(path, b"new")
    assert (read_private(path, "the login"), os.listdir(tmp_path)) == (b"new", ["login"])


def test_a_replacement_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "login"
    replace_private(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_private(path, b"new")
    with pytest.raises(ConfigError, match="cannot be written: No space left"):
        create_private(tmp_path / "other", b"new")
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"old", ["login"])


def test_a_temporary_file_is_whole_private_and_gone_after_use(tmp_path: Path) -> None:
    with temporary_beside(tmp_path / "policy.csv", b"p") as temporary:
        assert (temporary.parent, temporary.read_bytes()) == (tmp_path, b"p")
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == []
