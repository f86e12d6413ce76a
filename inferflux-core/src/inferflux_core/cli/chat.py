"""The interactive part of `inferctl chat`: reads a line, runs a command or asks the model; no error ends it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec

from inferflux_core.cli.api_client import ApiClient, Usage
from inferflux_core.cli.api_errors import ApiError, printable
from inferflux_core.cli.chat_prompt import unfenced
from inferflux_core.cli.conversation import Conversation, ConversationFileError, Message

HELP = '''\
/model [NAME]      show the models, or change to one
/system [TEXT]     show or set the system text; /system "" takes it away
/set [KEY VALUE]   show or set temperature, max_tokens, seed, top_p; the value default leaves it to the server
/retry             ask the last message again (also one that failed)
/clear             forget the conversation; system text and settings stay
/save FILE         write the conversation to a file
/load FILE         go on with a saved conversation
/thoughts [on|off] show or hide what a reasoning model thinks before it answers; it is no part of the conversation
/tokens            tokens used so far
/bye, /exit        leave (also Ctrl-D)
Alt-Enter, a backslash at the end of a line, or """ around a block make longer messages.
Ctrl-C stops an answer, and clears the line at the prompt. A message that begins with / is written with //.'''


class TokenTally(msgspec.Struct):
    """Tokens of all answers since the program began."""

    answers: int = 0
    without_usage: int = 0  # answers for which the server sent no usage, as when they were stopped
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None  # None until a server has said

    def add(self, usage: Usage | None) -> None:
        """Counts one answer."""
        self.answers += 1
        if usage is None:
            self.without_usage += 1
            return
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens
        if usage.cached_tokens is not None:
            self.cached_tokens = (self.cached_tokens or 0) + usage.cached_tokens

    def __str__(self) -> str:
        cached = "" if self.cached_tokens is None else f" ({self.cached_tokens} from the cache)"
        text = f"answers: {self.answers}, prompt tokens: {self.prompt_tokens}{cached}, generated: {self.completion_tokens}"
        return text + (f"; without figures from the server: {self.without_usage}" if self.without_usage else "")


class Chat:
    """One conversation at a terminal. `read_line` gives the next input; KeyboardInterrupt clears, EOFError ends."""

    def __init__(self, client: ApiClient, conversation: Conversation, read_line: Callable[[], str]) -> None:
        self._client = client
        self._conversation = conversation
        self._read_line = read_line
        self._failed: str | None = None  # the message whose answer failed, for /retry
        self._tally = TokenTally()
        self._shows_thoughts = True
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self._say(HELP),
            "/model": self._model,
            "/system": self._system,
            "/set": self._set,
            "/retry": self._retry,
            "/clear": self._clear,
            "/save": self._save,
            "/load": self._load,
            "/thoughts": self._thoughts,
            "/tokens": lambda _: self._say(str(self._tally)),
        }

    def run(self) -> None:
        """Talks until the user leaves."""
        self._say(f"Chat with {self._conversation.model} at {self._client.url}. /help lists the commands, /bye leaves.")
        while True:
            try:
                line = self._read_line()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            try:
                if not self._handle(unfenced(line)):
                    return
            except KeyboardInterrupt:  # between two answers, or during a command that asks the server
                self._say("\n(stopped)")

    def _handle(self, text: str) -> bool:
        if not text:
            return True
        if not text.startswith("/"):
            self._ask(text)
            return True
        if text.startswith("//"):
            self._ask(text[1:])
            return True
        name, _, argument = text.partition(" ")
        if name in ("/bye", "/exit"):
            return False
        command = self._commands.get(name)
        if command is None:
            self._say(f"unknown command {name}. /help lists them; write // for a message that begins with /")
            return True
        try:
            command(argument.strip())
        except (ApiError, ConversationFileError, ValueError) as error:
            self._say(f"error: {error}")
        return True

    def _ask(self, text: str) -> bool:
        """Adds a turn and streams its answer. Returns whether the turn is part of the conversation now."""
        text = text.encode(errors="replace").decode()  # a terminal in another encoding can send lone surrogates
        conversation = self._conversation
        question = Message("user", text)
        answer: list[str] = []
        shown = False  # anything of thoughts or answer
        thinking = False  # thoughts were written, and no answer behind them
        usage: Usage | None = None
        reason: str | None = None
        try:
            messages = [*conversation.to_wire(), {"role": "user", "content": text}]
            settings = conversation.settings.as_dict()
            with closing(self._client.chat(conversation.model, messages, **settings)) as parts:
                for part in parts:
                    if part.reasoning and self._shows_thoughts:
                        thinking = shown = True
                        self._write_dim(part.reasoning)
                    if part.text:
                        answer.append(part.text)
                        if thinking:
                            self._write("\n\n")
                        thinking, shown = False, True
                        self._write(part.text)
                    usage = part.usage or usage
                    reason = part.finish_reason or reason
        except ApiError as error:
            self._failed = text
            self._say(("\n" if shown else "") + f"error: {error}")
            return False
        except KeyboardInterrupt:  # leaving the stream closed the connection: the server stops too
            reason = "stopped"
        self._failed = None
        self._tally.add(usage)
        content = "".join(answer)
        if not content and reason == "stopped":
            self._say(("\n" if shown else "") + "(stopped before the answer began; the message is not kept)")
            return False
        conversation.messages += [question, Message("assistant", content)]
        note = {"stopped": "(stopped)", "length": "(the limit of tokens is reached; /set max_tokens changes it)"}
        self._say("\n" + note[reason] if reason in note else "")
        return True

    def _retry(self, _: str) -> None:
        messages = self._conversation.messages
        if self._failed is not None:
            self._ask(self._failed)
        elif messages:
            last = messages[-2:]
            del messages[-2:]
            if not self._ask(last[0].content):
                messages += last  # a failed retry does not cost the answer that was there
        else:
            self._say("there is no message to ask again")

    def _model(self, name: str) -> None:
        cards = self._client.models()
        if not name:
            for card in cards:
                mark = "*" if card.answers_to(self._conversation.model) else " "
                self._say(f"{mark} {' '.join([card.id, *card.aliases])}")
        elif any(card.answers_to(name) for card in cards):
            self._conversation.model = name
            self._say(f"model {name}")
        else:
            known = ", ".join(card.id for card in cards) or "none"
            self._say(f"error: the server has no model {name!r}. It has: {known}")

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = None if text == '""' else text
        self._say(f"system: {self._conversation.system or '(none)'}")

    def _set(self, argument: str) -> None:
        key, _, value = argument.partition(" ")
        if value:
            self._conversation.settings.set(key, value.strip())
        elif key:
            raise ValueError(f"give a value too: /set {key} VALUE")
        for name, setting in self._conversation.settings.as_dict().items():
            self._say(f"{name} = {'default' if setting is None else setting}")

    def _thoughts(self, argument: str) -> None:
        if argument not in ("", "on", "off"):
            raise ValueError(f"/thoughts cannot be {argument!r}. It is on or off")
        if argument:
            self._shows_thoughts = argument == "on"
        self._say(f"thoughts are {'shown' if self._shows_thoughts else 'hidden'}")

    def _clear(self, _: str) -> None:
        self._conversation.messages.clear()
        self._failed = None
        self._say("the conversation is empty")

    def _save(self, name: str) -> None:
        path = _file_argument("/save", name)
        self._conversation.save(path)
        self._say(f"saved {len(self._conversation.messages)} messages to {path}")

    def _load(self, name: str) -> None:
        path = _file_argument("/load", name)
        model = self._conversation.load(path)
        self._failed = None
        hint = "" if model == self._conversation.model else f"; it was held with {model} (/model {model} changes to it)"
        self._say(f"loaded {len(self._conversation.messages)} messages from {path}{hint}")

    def _say(self, text: str) -> None:
        self._write(text + "\n")

    def _write_dim(self, text: str) -> None:
        """Writes thoughts: at a terminal in faint letters. Each piece is whole, so that Ctrl-C leaves no faint terminal."""
        text = printable(text)
        sys.stdout.write(f"\x1b[2m{text}\x1b[22m" if sys.stdout.isatty() else text)
        sys.stdout.flush()

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(printable(text))
        sys.stdout.flush()


def _file_argument(command: str, name: str) -> Path:
    if not name:
        raise ValueError(f"give a file: {command} FILE")
    return Path(name).expanduser()


COMMANDS = ("/help", "/model", "/system", "/set", "/retry", "/clear", "/save", "/load", "/thoughts", "/tokens", "/bye", "/exit")
"""Every command, for completion at the prompt."""
