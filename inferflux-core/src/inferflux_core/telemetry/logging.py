"""Logs: one event a line on standard error, for people or for machines, with the id of the request they belong to.

Prompt and output text never appear in them; whoever logs passes names, numbers and codes only. What came from outside is
escaped, so that it can neither begin a line of its own nor move a terminal's cursor.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime

from inferflux_core.settings import LoggingSettings

request_id_var: ContextVar[str | None] = ContextVar("inferflux_request_id", default=None)

# C0 and C1 controls, DEL, line and paragraph separators, and the bidirectional controls that reorder what is displayed.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_CHATTY = ("asyncio", "httpcore", "httpx", "huggingface_hub", "urllib3")


def escape(text: str) -> str:
    """The text with every character that could forge a log line or steer a terminal written as a Python escape."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def frames_of(error: BaseException) -> str:
    """The traceback of an error and its causes without the messages of the exceptions, which may quote user text."""
    parts = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        parts.append("".join(traceback.format_tb(current.__traceback__)) + type(current).__qualname__)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "\ncaused by\n".join(parts)


class _Event:
    """What a log record says, whatever the format."""

    __slots__ = ("details", "fields", "message", "request_id", "time")

    def __init__(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self.message, _, details = text.partition("\n")
        if record.exc_info and record.exc_info[1] is not None:
            details = f"{details}\n{frames_of(record.exc_info[1])}".strip("\n")
        self.details = details
        fields = getattr(record, "fields", None)
        self.fields: dict[str, object] = fields if isinstance(fields, dict) else {}
        self.request_id = request_id_var.get()
        self.time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO inferflux.access request method=POST status=200`; details follow, indented."""

    def format(self, record: logging.LogRecord) -> str:
        event = _Event(record)
        parts = [event.time, record.levelname, record.name, escape(event.message)]
        parts += [f"{key}={_text_value(value)}" for key, value in event.fields.items()]
        if event.request_id is not None:
            parts.append(f"request_id={event.request_id}")
        lines = [" ".join(parts), *("    " + escape(line) for line in event.details.split("\n") if line)]
        return "\n".join(lines)


def _text_value(value: object) -> str:
    text = escape(str(value))
    return json.dumps(text, ensure_ascii=False) if text == "" or " " in text or '"' in text else text


class JsonFormatter(logging.Formatter):
    """One ASCII-only JSON object a line: `time`, `level`, `logger`, `message`, `request_id`, the fields, `details`."""

    def format(self, record: logging.LogRecord) -> str:
        event = _Event(record)
        line: dict[str, object] = {
            "time": event.time,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": event.message,
        }
        if event.request_id is not None:
            line["request_id"] = event.request_id
        for key, value in event.fields.items():
            line.setdefault(key, value if isinstance(value, str | int | float | bool | None) else str(value))
        if event.details:
            line["details"] = event.details
        # ensure_ascii escapes every control but DEL, which is ASCII and legal in JSON.
        return json.dumps(line, ensure_ascii=True).replace("\x7f", "\\u007f")


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]  # generic in the stubs only, not at run time
    """Looks standard error up for each record, so that a redirected stream is honoured; also marks our own handler."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def configure_logging(settings: LoggingSettings) -> None:
    """Send all logs of the process to standard error in the chosen format. Calling it again replaces the choice."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, _StderrHandler):
            root.removeHandler(handler)
    handler = _StderrHandler()
    handler.setFormatter(JsonFormatter() if settings.format == "json" else TextFormatter())
    root.addHandler(handler)
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    root.setLevel(level)
    for name in _CHATTY:
        # At `info` these report every connection they make; that is of interest only when debugging.
        logging.getLogger(name).setLevel(level if level == logging.DEBUG else max(level, logging.WARNING))
