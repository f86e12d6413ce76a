"""The interactive chat: what is typed, what is shown, what the server is asked, and what stays in the conversation."""

from __future__ import annotations

import json
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.history import InMemoryHistory

from core.cli.chat_session import ALT_ENTER, CHAT, CTRL_C, CTRL_D, ENTER, asked, assistant, echo, said, talk, terminal, user
from core.cli.stub_server import Exchange, StubServer, answering, chat_chunk, models_document
from inferflux_core.cli.chat import COMMANDS
from inferflux_core.cli.chat_prompt import history_path, open_history
from inferflux_core.cli.conversation import ChatSettings, Conversation, ConversationFileError, Message


def test_a_conversation_grows_turn_by_turn(capsys: pytest.CaptureFixture[str]) -> None:
    with StubServer({CHAT: echo}) as server:
        talk(server, "one", ENTER, "two", ENTER, "/tokens", ENTER)
    assert said(capsys, server) == ("ONE\nTWO\nanswers: 2, prompt tokens: 20 (8 from the cache), generated: 4\n")
    assert asked(server) == [[user("one")], [user("one"), assistant("ONE"), user("two")]]


def test_multi_line_input() -> None:
    with StubServer({CHAT: echo}) as server:
        talk(
            server,
            *("a", ALT_ENTER, "b", ENTER),
            *("c\\", ENTER, "d", ENTER),
            *('"""e', ENTER, ENTER, 'f"""', ENTER),
            *("//not a command", ENTER),
            *("   ", ENTER),
        )
    assert [messages[-1]["content"] for messages in asked(server)] == ["a\nb", "c\nd", "e\n\nf", "/not a command"]


def test_ctrl_c_at_the_prompt_clears_the_line() -> None:
    with StubServer({CHAT: echo}) as server:
        talk(server, "wrong", CTRL_C, "right", ENTER)
    assert asked(server) == [[user("right")]]


@pytest.mark.parametrize("command", ["/bye", "/exit"])
def test_leaving(command: str) -> None:
    with StubServer({CHAT: echo}) as server:
        talk(server, command, ENTER, "never sent", ENTER)
    assert server.requests == []


def test_commands_that_change_the_request(capsys: pytest.CaptureFixture[str]) -> None:
    with StubServer({CHAT: echo}) as server:
        talk(
            server,
            *("/system Be brief", ENTER, "/set temperature 0.5", ENTER, "/set seed -3", ENTER, "one", ENTER),
            *('/system ""', ENTER, "/set temperature default", ENTER, "/clear", ENTER, "two", ENTER),
        )
    first, second = (request.json for request in server.posts())
    assert first["messages"] == [{"role": "system", "content": "Be brief"}, user("one")]
    assert (first["temperature"], first["seed"]) == (0.5, -3)
    assert second["messages"] == [user("two")]
    assert "temperature" not in second
    printed = said(capsys, server)
    assert printed.startswith("system: Be brief\ntemperature = 0.5\nmax_tokens = default\nseed = default\n")
    assert "system: (none)\n" in printed
    assert "the conversation is empty\n" in printed


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/nope", "unknown command /nope. /help lists them; write // for a message that begins with /"),
        ("/set", "temperature = default\nmax_tokens = default\nseed = default\ntop_p = default"),
        ("/set seed", "error: give a value too: /set seed VALUE"),
        ("/set heat 1", "error: unknown setting 'heat'. There are: temperature, max_tokens, seed, top_p"),
        (
            "/set temperature nan",
            "error: temperature cannot be 'nan'. It is a number from 0 (always the likeliest token) to 2, or default",
        ),
        ("/set max_tokens 0", "error: max_tokens cannot be '0'. It is the most tokens of one answer, at least 1, or default"),
        ("/retry", "there is no message to ask again"),
        ("/save", "error: give a file: /save FILE"),
        ("/load", "error: give a file: /load FILE"),
        ("/system", "system: (none)"),
        ("/tokens", "answers: 0, prompt tokens: 0, generated: 0"),
        ("/model", "* demo small\n  other"),
        ("/thoughts", "thoughts are shown"),
        ("/thoughts maybe", "error: /thoughts cannot be 'maybe'. It is on or off"),
        ("/model other", "model other"),
        ("/model small", "model small"),
        ("/model zip", "error: the server has no model 'zip'. It has: demo, other"),
    ],
)
def test_what_commands_answer(line: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def models(exchange: Exchange) -> None:
        await exchange.reply(200, models_document({"id": "demo", "inferflux": {"aliases": ["small"]}}, {"id": "other"}))

    with StubServer({"/v1/models": models}) as server:
        talk(server, line, ENTER)
    assert said(capsys, server) == answer + "\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with StubServer() as server:
        talk(server, "/help", ENTER)
    printed = said(capsys, server)
    assert [command for command in COMMANDS if command not in printed] == ["/help"]


def test_a_failed_turn_is_not_kept_and_can_be_retried(capsys: pytest.CaptureFixture[str]) -> None:
    async def flaky(exchange: Exchange) -> None:
        match len(server.posts()):
            case 2:
                await exchange.reply(503, {"error": {"message": "overloaded"}})
            case 3:
                await exchange.begin()
                await exchange.event(chat_chunk("hal"))
                await exchange.event({"error": {"message": "engine died"}})
                await exchange.end(done=False)
            case _:
                await echo(exchange)

    with StubServer({CHAT: flaky}) as server:
        talk(server, "one", ENTER, "two", ENTER, "three", ENTER, "/retry", ENTER, "four", ENTER)
    assert said(capsys, server) == ("ONE\nerror: overloaded (HTTP 503)\nhal\nerror: engine died\nTHREE\nFOUR\n")
    kept = [user("one"), assistant("ONE")]
    assert asked(server) == [
        [user("one")],
        [*kept, user("two")],
        [*kept, user("three")],
        [*kept, user("three")],
        [*kept, user("three"), assistant("THREE"), user("four")],
    ]


def test_retry_replaces_the_last_answer_and_a_failed_one_does_not() -> None:
    async def numbered(exchange: Exchange) -> None:
        number = len(server.posts())
        if number == 3:
            await exchange.reply(500, {"error": {"message": "no"}})
        else:
            await answering(f"answer {number}")(exchange)

    conversation = Conversation(model="demo")
    with StubServer({CHAT: numbered}) as server:
        talk(server, "one", ENTER, "/retry", ENTER, conversation=conversation)
        assert conversation.messages == [Message("user", "one"), Message("assistant", "answer 2")]
        talk(server, "/retry", ENTER, conversation=conversation)
    assert conversation.messages == [Message("user", "one"), Message("assistant", "answer 2")]
    assert asked(server) == [[user("one")]] * 3


def test_a_server_that_goes_away_does_not_end_the_chat(capsys: pytest.CaptureFixture[str]) -> None:
    with StubServer() as server:
        pass  # it is gone again
    talk(server, "one", ENTER, "/model", ENTER)
    error = f"error: cannot reach {server.url}: connection refused. Is the server running? Start it with: inferflux serve\n"
    assert said(capsys, server) == error * 2


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(model="demo")
    with StubServer({CHAT: answering("a\x1b[2Jb\u009bc\n\tok")}) as server:
        talk(server, "x", ENTER, conversation=conversation)
    assert said(capsys, server) == "a[2Jbc\n\tok\n"
    assert conversation.messages[1].content == "a\x1b[2Jb\u009bc\n\tok"  # the model sees what it said


def test_an_answer_at_its_limit_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    async def limited(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.event(chat_chunk("cut"))
        await exchange.event(chat_chunk(finish="length"))
        await exchange.end()

    with StubServer({CHAT: limited}) as server:
        talk(server, "x", ENTER, "/tokens", ENTER)
    assert said(capsys, server) == (
        "cut\n(the limit of tokens is reached; /set max_tokens changes it)\n"
        "answers: 1, prompt tokens: 0, generated: 0; without figures from the server: 1\n"
    )


# files


def test_save_and_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my chat.json"
    with StubServer({CHAT: echo}) as server:
        talk(server, "/system Be brief", ENTER, "/set seed 1", ENTER, "one", ENTER, f"/save {path}", ENTER)
        other = Conversation(model="other")
        talk(server, f"/load {path}", ENTER, "two", ENTER, f"/save {path}", ENTER, conversation=other)
    saved = json.loads(path.read_bytes())
    assert saved.pop("saved_at").endswith("+00:00")
    assert saved == {
        "format": "inferctl-chat",
        "version": 1,
        "model": "other",
        "system": "Be brief",
        "settings": {"seed": 1},
        "messages": [user("one"), assistant("ONE"), user("two"), assistant("TWO")],
    }
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]  # no temporary file stays behind
    hint = "it was held with demo (/model demo changes to it)"
    assert f"loaded 2 messages from {path}; {hint}\n" in capsys.readouterr().out


def test_save_refuses_what_would_do_harm(tmp_path: Path) -> None:
    conversation = Conversation(model="demo")
    with pytest.raises(ConversationFileError, match=r"there is no directory .*/missing\. Make it first$"):
        conversation.save(tmp_path / "missing" / "chat.json")
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    with pytest.raises(ConversationFileError, match=r"it exists and is not a saved chat\. Choose another name$"):
        conversation.save(other)
    with pytest.raises(ConversationFileError, match=r"it exists and is not a saved chat"):
        conversation.save(tmp_path)
    assert other.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        (b"{", "it is not a saved chat (Input data was truncated)"),
        (b"\xff", "it is not a saved chat"),
        (b'{"model":"m"}', "it is not a saved chat (Object missing required field `saved_at`)"),
        (b'[["user","hi"]]', "its last message has no answer"),
        (b'[["assistant","hi"]]', "its messages do not alternate between user and assistant"),
    ],
)
def test_load_says_what_is_wrong_and_changes_nothing(content: bytes | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    if content is not None:
        if content.startswith(b"[["):
            messages = [{"role": role, "content": text} for role, text in json.loads(content)]
            document: dict[str, Any] = {"saved_at": "x", "model": "m", "system": None, "settings": {}, "messages": messages}
            content = json.dumps(document).encode()
        path.write_bytes(content)
    conversation = Conversation(model="demo", system="keep", settings=ChatSettings(seed=1))
    with pytest.raises(ConversationFileError) as caught:
        conversation.load(path)
    assert str(caught.value).startswith(f"cannot load {path}: {reason}")
    assert conversation == Conversation(model="demo", system="keep", settings=ChatSettings(seed=1))


def test_history_is_private_and_outlives_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = history_path()
    assert path == tmp_path / "inferflux" / "inferctl_history"
    with StubServer({CHAT: echo}) as server:
        talk(server, "remember me", ENTER, history=open_history(path))
    assert list(open_history(path).load_history_strings()) == ["remember me"]
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_history_that_cannot_be_written_is_kept_in_memory(tmp_path: Path) -> None:
    (tmp_path / "inferflux").write_text("a file where the directory should be")
    assert isinstance(open_history(tmp_path / "inferflux" / "history"), InMemoryHistory)


# at a real terminal


def test_ctrl_c_during_an_answer_stops_only_the_answer(tmp_path: Path) -> None:
    gone = threading.Event()

    async def endless(exchange: Exchange) -> None:
        if len(server.posts()) > 1:
            await echo(exchange)
            return
        await exchange.begin()
        await exchange.event(chat_chunk("Paris is"))
        await exchange.wait_for_disconnect()
        gone.set()

    with StubServer({CHAT: endless}) as server, terminal(server, tmp_path) as tty:
        tty.wait_for(">>>")
        tty.press("Hi" + ENTER)
        tty.wait_for("Paris is")
        tty.press(CTRL_C)
        tty.wait_for("(stopped)")
        assert gone.wait(5)  # the connection is closed, so the server stops too
        tty.wait_for(">>>")
        tty.press("next" + ENTER)
        tty.wait_for("NEXT")
        tty.wait_for(">>>")
        tty.press(CTRL_D)
        assert tty.process.wait(10) == 0
    assert asked(server) == [[user("Hi")], [user("Hi"), assistant("Paris is"), user("next")]]


def test_ctrl_c_before_an_answer_begins_leaves_no_trace(tmp_path: Path) -> None:
    waiting = threading.Event()

    async def silent(exchange: Exchange) -> None:
        if len(server.posts()) > 1:
            await echo(exchange)
            return
        waiting.set()
        await exchange.wait_for_disconnect()

    with StubServer({CHAT: silent}) as server, terminal(server, tmp_path) as tty:
        tty.wait_for(">>>")
        tty.press("Hi" + ENTER)
        assert waiting.wait(10)
        tty.press(CTRL_C)
        tty.wait_for("(stopped before the answer began; the message is not kept)")
        tty.wait_for(">>>")
        tty.press("next" + ENTER)
        tty.wait_for("NEXT")
    assert asked(server) == [[user("Hi")], [user("next")]]
