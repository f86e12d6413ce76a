"""Thoughts of reasoning models in the interactive chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core.cli.chat_session import CHAT, ENTER, asked, assistant, said, talk, terminal, user
from core.cli.stub_server import Exchange, StubServer, chat_chunk
from inferflux_core.cli.conversation import Conversation, Message


def thinking(*events: tuple[str, str], finish: str = "stop") -> Any:
    """A handler whose answer has these (field, text) deltas."""

    async def handler(exchange: Exchange) -> None:
        await exchange.begin()
        for name, text in events:
            await exchange.event({"choices": [{"index": 0, "delta": {name: text}, "finish_reason": None}]})
        await exchange.event(chat_chunk(finish=finish))
        await exchange.end()

    return handler


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_are_shown_and_are_no_part_of_the_conversation(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(model="demo")
    with StubServer({CHAT: thinking((name, "Hm"), (name, "m."), ("content", "Yes"), ("content", "."))}) as server:
        talk(server, "one", ENTER, "/thoughts off", ENTER, "two", ENTER, "/thoughts", ENTER, conversation=conversation)
    assert said(capsys, server) == "Hmm.\n\nYes.\nthoughts are hidden\nYes.\nthoughts are hidden\n"
    assert asked(server) == [[user("one")], [user("one"), assistant("Yes."), user("two")]]
    assert conversation.messages[-1] == Message("assistant", "Yes.")


def test_an_answer_that_ends_within_its_thoughts(capsys: pytest.CaptureFixture[str]) -> None:
    with StubServer({CHAT: thinking(("reasoning", "Hmm\x1b[2J"), finish="length")}) as server:
        talk(server, "one", ENTER)
    assert said(capsys, server) == "Hmm[2J\n(the limit of tokens is reached; /set max_tokens changes it)\n"


def test_thoughts_are_faint_at_a_terminal(tmp_path: Path) -> None:
    with (
        StubServer({CHAT: thinking(("reasoning_content", "Hm."), ("content", "Yes."))}) as server,
        terminal(server, tmp_path) as tty,
    ):
        tty.wait_for(">>>")
        tty.press("Hi" + ENTER)
        tty.wait_for("\x1b[2mHm.\x1b[22m\r\n\r\nYes.")
        tty.wait_for(">>>")
