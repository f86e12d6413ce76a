"""A chat under test: keys typed into it, what it printed, what it asked; also at a real terminal."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import History, InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from core.cli.stub_server import Exchange, StubServer, chat_chunk, usage_chunk
from inferflux_core.cli.api_client import ApiClient
from inferflux_core.cli.chat import COMMANDS, Chat
from inferflux_core.cli.chat_prompt import make_prompt
from inferflux_core.cli.conversation import Conversation
from inferflux_core.cli.endpoint import Endpoint

CHAT = "/v1/chat/completions"
ENTER, ALT_ENTER, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x03", "\x04"
INTRO = "Chat with demo at {url}. /help lists the commands, /bye leaves.\n"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def talk(server: StubServer, *keys: str, conversation: Conversation | None = None, history: History | None = None) -> None:
    """Types the keys into a chat with the server, until it ends; the keys end it with Ctrl-D if nothing else does."""
    with (
        create_pipe_input() as pipe,
        create_app_session(input=pipe, output=DummyOutput()),
        ApiClient(Endpoint.parse(server.url)) as client,
    ):
        pipe.send_text("".join(keys) + CTRL_D)
        prompt = make_prompt(history or InMemoryHistory(), COMMANDS)
        Chat(client, conversation or Conversation(model="demo"), prompt.prompt).run()


def said(capsys: pytest.CaptureFixture[str], server: StubServer) -> str:
    """What the chat printed after its first line."""
    printed = capsys.readouterr().out
    assert printed.startswith(INTRO.format(url=server.url))
    return printed.removeprefix(INTRO.format(url=server.url))


def asked(server: StubServer) -> list[list[dict[str, str]]]:
    """The messages of each request."""
    return [request.json["messages"] for request in server.posts()]


async def echo(exchange: Exchange) -> None:
    """Answers with the last message in capitals."""
    text = exchange.json["messages"][-1]["content"].upper()
    await exchange.begin()
    await exchange.event(chat_chunk(text))
    await exchange.event(chat_chunk(finish="stop"))
    await exchange.event(usage_chunk(10, 2, 4))
    await exchange.end()


class Terminal:
    """The installed inferctl on a pseudo-terminal of its own, so that Ctrl-C is a signal as it is for a user."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process = process
        self._master = master
        self._shown = ""

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_for(self, text: str) -> str:
        """Reads until the text has been shown, and returns what stood before it."""
        deadline = time.monotonic() + 10
        while text not in self._shown:
            ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} was not shown within 10 s, but {self._shown!r}"
            self._shown += os.read(self._master, 65536).decode()
        before, _, self._shown = self._shown.partition(text)
        return before


@contextmanager
def terminal(server: StubServer, state: Path) -> Iterator[Terminal]:
    master, slave = os.openpty()
    # login_tty makes the terminal the controlling one of a new session; it cannot be done from outside the process.
    # A test run in the background hands its children an ignored SIGINT, which a terminal does not.
    script = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        f"os.login_tty({slave}); os.execv(sys.argv[1], sys.argv[1:])"
    )
    inferctl = str(Path(sys.executable).parent / "inferctl")
    environment: dict[str, Any] = {**os.environ, "XDG_STATE_HOME": str(state), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, inferctl, "--url", server.url, "chat"], pass_fds=[slave], env=environment
    )
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        process.kill()
        process.wait()
        os.close(master)
