"""A chat as the client keeps it: its messages and settings, and its file on disk."""

from __future__ import annotations

import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

MAX_FILE_BYTES = 64 * 1024 * 1024  # a larger file is no saved chat


class ConversationFileError(Exception):
    """A chat that could not be saved or loaded; the message names the file, the cause and the cure."""


class Message(msgspec.Struct, frozen=True):
    """One turn of the chat."""

    role: Literal["user", "assistant"]
    content: str


class ChatSettings(msgspec.Struct, omit_defaults=True):
    """Generation settings that the user has set; None leaves one to the server."""

    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    top_p: float | None = None

    def set(self, key: str, text: str) -> None:
        """Sets one from what the user wrote; `default` gives it back to the server.

        Raises:
            ValueError: unknown key or a value outside its range; the message says what is allowed.
        """
        if key not in _LIMITS:
            raise ValueError(f"unknown setting {key!r}. There are: {', '.join(_LIMITS)}")
        kind, low, high, meaning = _LIMITS[key]
        if text == "default":
            setattr(self, key, None)
            return
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise ValueError(f"{key} cannot be {text!r}. It is {meaning}, or default")
        setattr(self, key, value)

    def as_dict(self) -> dict[str, Any]:
        """Every setting by name; None where the server decides."""
        return msgspec.structs.asdict(self)


_LIMITS: dict[str, tuple[type[int] | type[float], float, float, str]] = {
    "temperature": (float, 0, 2, "a number from 0 (always the likeliest token) to 2"),
    "max_tokens": (int, 1, 2**31, "the most tokens of one answer, at least 1"),
    "seed": (int, -(2**63), 2**63 - 1, "a whole number; the same one gives the same answer again"),
    "top_p": (float, 1e-6, 1, "a number above 0, at most 1"),
}


class Conversation(msgspec.Struct, kw_only=True):
    """A chat. `messages` alternate, user first, and end with an assistant's unless a turn is under way."""

    model: str
    system: str | None = None
    settings: ChatSettings = msgspec.field(default_factory=ChatSettings)
    messages: list[Message] = msgspec.field(default_factory=list)

    def to_wire(self) -> list[dict[str, str]]:
        """The messages as the API wants them, the system text first."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + [{"role": message.role, "content": message.content} for message in self.messages]

    def save(self, path: Path) -> None:
        """Writes the chat as JSON, readable by its owner only: all of it or, when that fails, nothing.

        Raises:
            ConversationFileError: the directory is missing, the file is something other than a saved chat, or the
                disk refuses.
        """
        path = Path(os.path.realpath(path))
        if not path.parent.is_dir():
            raise ConversationFileError(f"cannot save to {path}: there is no directory {path.parent}. Make it first")
        if path.exists():
            try:
                _read(path)
            except ConversationFileError:
                message = f"cannot save to {path}: it exists and is not a saved chat. Choose another name"
                raise ConversationFileError(message) from None
        document = _SavedChat(
            saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
            model=self.model,
            system=self.system,
            settings=self.settings,
            messages=self.messages,
        )
        content = msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"
        try:
            _replace(path, content)
        except OSError as error:
            raise ConversationFileError(f"cannot save to {path}: {error.strerror}") from error

    def load(self, path: Path) -> str:
        """Replaces system text, settings and messages by those of a saved chat; the model stays.

        Returns:
            The name of the model that the saved chat was held with.

        Raises:
            ConversationFileError: the file is missing, unreadable or not a saved chat; this chat is then unchanged.
        """
        saved = _read(path)
        self.system, self.settings, self.messages = saved.system, saved.settings, saved.messages
        return saved.model


class _SavedChat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    format: Literal["inferctl-chat"] = "inferctl-chat"
    version: Literal[1] = 1
    saved_at: str
    model: str
    system: str | None
    settings: ChatSettings
    messages: list[Message]


def _read(path: Path) -> _SavedChat:
    try:
        if path.stat().st_size > MAX_FILE_BYTES or not path.is_file():
            raise ConversationFileError(f"cannot load {path}: it is not a saved chat")
        content = path.read_bytes()
    except OSError as error:
        raise ConversationFileError(f"cannot load {path}: {error.strerror}") from error
    try:
        saved = msgspec.json.decode(content, type=_SavedChat)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConversationFileError(f"cannot load {path}: it is not a saved chat ({error})") from error
    if any(message.role != ("user", "assistant")[index % 2] for index, message in enumerate(saved.messages)):
        raise ConversationFileError(f"cannot load {path}: its messages do not alternate between user and assistant")
    if len(saved.messages) % 2:
        raise ConversationFileError(f"cannot load {path}: its last message has no answer")
    return saved


def _replace(path: Path, content: bytes) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
