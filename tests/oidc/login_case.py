"""What the tests of `inferctl login` share: a server that takes the tokens, a clock without waiting, and a fake keyring."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from core.cli.stub_server import Exchange, Handler, StubServer
from inferflux_core.cli.inferctl import inferctl

METADATA = "/.well-known/oauth-protected-resource"


def replying(document: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Handler:
    async def handler(exchange: Exchange) -> None:
        await exchange.reply(status, document, headers)

    return handler


def resource_server(issuer: str, path: str = "", **changes: object) -> StubServer:
    """A server at `path` of its host whose tokens this issuer makes."""
    server = StubServer()

    async def metadata(exchange: Exchange) -> None:
        document = {"resource": server.url + path, "authorization_servers": [issuer], "bearer_methods_supported": ["header"]}
        await exchange.reply(200, document | changes)

    server.routes[METADATA + path] = metadata
    server.routes[f"{path}/v1/models"] = server.routes["/v1/models"]
    return server


def private_state(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Keeps the test away from this user's logins and keyring; returns where logins are kept."""
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))
    monkeypatch.delenv("INFERCTL_API_KEY", raising=False)
    monkeypatch.setitem(sys.modules, "keyring", None)  # cannot be imported
    return folder / "inferflux" / "logins"


class FakeClock:
    """Stands for the module `time` of a login: sleeping takes no time, and lets `on_sleep` do something instead."""

    def __init__(self, on_sleep: Callable[[int], None] = lambda count: None) -> None:
        self.slept: list[float] = []
        self._on_sleep = on_sleep

    def monotonic(self) -> float:
        return sum(self.slept)

    def time(self) -> float:
        import time

        return time.time()

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self._on_sleep(len(self.slept))


def log_in(
    monkeypatch: pytest.MonkeyPatch, url: str, on_sleep: Callable[[int, str], None], *arguments: str
) -> tuple[Result, FakeClock]:
    """Runs `inferctl login`; `on_sleep` gets the number of the pause and the address that a browser was opened with."""
    opened: list[str] = []
    clock = FakeClock(lambda count: on_sleep(count, opened[0] if opened else ""))
    monkeypatch.setattr("inferflux_core.cli.login.time", clock)
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setenv("DISPLAY", ":0")
    return CliRunner().invoke(inferctl, ["--url", url, "login", *arguments]), clock


def fake_keyring(monkeypatch: pytest.MonkeyPatch, failing: bool = False) -> dict[tuple[str, str], str]:
    """Installs a package `keyring`; returns what is in it."""
    kept: dict[tuple[str, str], str] = {}
    module: Any = types.ModuleType("keyring")

    def set_password(service: str, name: str, password: str) -> None:
        if failing:
            raise RuntimeError("no backend")
        kept[service, name] = password

    def get_password(service: str, name: str) -> str | None:
        if failing:
            raise RuntimeError("locked")
        return kept.get((service, name))

    def delete_password(service: str, name: str) -> None:
        del kept[service, name]

    module.set_password, module.get_password, module.delete_password = set_password, get_password, delete_password
    monkeypatch.setitem(sys.modules, "keyring", module)
    return kept
