"""The line editor of the interactive chat: multi-line input, key bindings, and a history that outlives the program."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import is_searching
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from inferflux_core.errors import ConfigError
from inferflux_core.state_dir import user_state_dir

FENCE = '"""'
"""Opens and closes a block in which Enter is an ordinary line break."""


class ChatHistory(FileHistory):
    """Input history in a file. When the file can no longer be written, the chat goes on without it."""

    def store_string(self, string: str) -> None:
        """Appends one entry; a full disk costs the entry, not the chat."""
        try:
            super().store_string(string)
        except OSError:
            return


def history_path() -> Path | None:
    """Where the history lies: in the user's state folder; None for a user who can have none."""
    try:
        return user_state_dir() / "inferctl_history"
    except ConfigError:
        return None


def open_history(path: Path | None) -> History:
    """The history in `path`, which only its owner can read (directory 0700, file 0600); in memory where that fails."""
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
        path.chmod(0o600)  # also when the file is older than this rule
    except OSError:
        return InMemoryHistory()
    return ChatHistory(path)


def make_prompt(history: History, commands: Iterable[str]) -> PromptSession[str]:
    """The line editor. Enter sends, unless the line ends in a backslash or a block is open; Alt-Enter breaks the line;
    Ctrl-C clears; Ctrl-D on an empty line raises EOFError; Tab completes `commands`."""
    return PromptSession(
        ">>> ",
        multiline=True,
        prompt_continuation="... ",
        history=history,
        key_bindings=_key_bindings(),
        completer=WordCompleter(sorted(commands), sentence=True),
        complete_while_typing=False,
        enable_open_in_editor=False,
    )


def unfenced(text: str) -> str:
    """The input without white space around it and without the marks of a block."""
    text = text.strip()
    if len(text) >= 2 * len(FENCE) and text.startswith(FENCE) and text.endswith(FENCE):
        return text[len(FENCE) : -len(FENCE)].strip("\n")
    return text


def _block_is_open(text: str) -> bool:
    text = text.strip()
    return text.startswith(FENCE) and (len(text) < 2 * len(FENCE) or not text.endswith(FENCE))


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter", filter=~is_searching)
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif _block_is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _break_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c", filter=~is_searching)
    def _clear(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    return bindings
