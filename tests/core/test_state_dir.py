"""The state folder: where it is, and that nobody else may look into it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from prompt_toolkit.history import InMemoryHistory

from inferflux_core.cli.api_errors import ApiError
from inferflux_core.cli.chat_prompt import history_path, open_history
from inferflux_core.cli.token_store import TokenStore
from inferflux_core.errors import ConfigError
from inferflux_core.settings import Settings
from inferflux_core.state_dir import state_dir, state_dir_path, user_state_dir


def test_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert state_dir_path(Settings()) == Path("/home/ann/.local/state/inferflux")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert state_dir_path(Settings()) == Path("/state/inferflux")
    monkeypatch.setenv("XDG_STATE_HOME", "state")  # to be ignored, says the specification
    assert state_dir_path(Settings()) == Path("/home/ann/.local/state/inferflux")
    assert state_dir_path(Settings(state_dir=Path("/srv/x"))) == Path("/srv/x")


def test_is_created_private(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    old = os.umask(0)
    try:
        assert state_dir(Settings(state_dir=path)) == path
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert state_dir(Settings(state_dir=path)) == path


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o750, 0o755, 0o777])
def test_others_may_enter(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(ConfigError, match=f"others may enter the folder .*{mode:o}.*chmod 700"):
        state_dir(Settings(state_dir=tmp_path))


def test_another_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        state_dir(Settings(state_dir=tmp_path))


def test_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(ConfigError, match="cannot be created"):
        state_dir(Settings(state_dir=tmp_path / "f"))
    with pytest.raises(ConfigError, match="cannot be created"):
        state_dir(Settings(state_dir=tmp_path / "f" / "g"))


def test_what_the_user_keeps_is_in_the_same_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ann"))
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert user_state_dir() == Path("/state/inferflux")
    assert TokenStore.of_user().folder == Path("/state/inferflux/logins")
    assert history_path() == Path("/state/inferflux/inferctl_history")
    monkeypatch.setenv("XDG_STATE_HOME", "~/state")  # not absolute either
    assert user_state_dir() == Path("/home/ann/.local/state/inferflux")


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ConfigError, match=r"state_dir: this user has no home folder; .*set state_dir"):
        state_dir_path(Settings())
    with pytest.raises(ApiError, match="no home folder; set XDG_STATE_HOME"):
        TokenStore.of_user()
    assert history_path() is None
    assert isinstance(open_history(None), InMemoryHistory)
