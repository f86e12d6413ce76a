"""Log lines: one an event, in both formats, whatever is in them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from inferflux_core.settings import LoggingSettings
from inferflux_core.telemetry.logging import configure_logging, escape, request_id_var

logger = logging.getLogger("inferflux.test")
HOSTILE = 'x\n{"level":"error"}\r\x1b[31m\u202e\u2028\x7f\x00'


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    chatty = {name: logging.getLogger(name).level for name in ("asyncio", "httpcore", "httpx", "huggingface_hub", "urllib3")}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, old in chatty.items():
        logging.getLogger(name).setLevel(old)


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LoggingSettings())
    token = request_id_var.set("rid")
    logger.info("request", extra={"fields": {"status": 200, "model": "a b", "error": ""}})
    request_id_var.reset(token)
    (line,) = capsys.readouterr().err.splitlines()
    time, rest = line.split(" ", 1)
    assert len(time) == len("2026-01-31T12:00:00.000Z")
    assert rest == 'INFO inferflux.test request status=200 model="a b" error="" request_id=rid'


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LoggingSettings(format="json"))
    token = request_id_var.set("rid")
    logger.warning("hello %s", "é", extra={"fields": {"status": 200, "message": "forged", "path": ("a",)}})
    request_id_var.reset(token)
    out, err = capsys.readouterr()
    line = json.loads(err)
    assert out == ""
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning",
        "logger": "inferflux.test",
        "message": "hello é",
        "request_id": "rid",
        "status": 200,
        "path": "('a',)",
    }


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_injection(capsys: pytest.CaptureFixture[str], log_format: str) -> None:
    configure_logging(LoggingSettings.model_validate({"format": log_format}))
    logger.info("agent", extra={"fields": {"agent": HOSTILE}})
    logger.info("%s", HOSTILE)
    logger.info("%s", HOSTILE.partition("\n")[2])
    err = capsys.readouterr().err
    assert not set(err) & set("\r\x1b\u202e\u2028\x7f\x00")
    lines = err.splitlines()
    if log_format == "json":
        assert [json.loads(line)["level"] for line in lines] == ["info"] * 3
        assert json.loads(lines[0])["agent"] == HOSTILE
    else:
        assert "\\x1b" in lines[0]
        assert [line.startswith("    ") for line in lines] == [False, False, True, False]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_exceptions_without_their_messages(capsys: pytest.CaptureFixture[str], log_format: str) -> None:
    configure_logging(LoggingSettings.model_validate({"format": log_format}))
    secret = "what a user wrote"
    try:
        try:
            int(secret)
        except ValueError as error:
            raise KeyError(secret) from error
    except KeyError:
        logger.exception("failed")
    err = capsys.readouterr().err
    for part in ("failed", "KeyError", "caused by", "ValueError", "test_exceptions_without_their_messages"):
        assert part in err
    assert secret not in err


def test_level_and_repetition(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LoggingSettings(level="debug"))
    configure_logging(LoggingSettings(level="warning"))
    logger.info("no")
    logger.warning("once")
    logging.getLogger("httpx").info("no")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["WARNING inferflux.test once"]


def test_libraries_that_talk_too_much(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LoggingSettings(level="info"))
    logging.getLogger("httpx").info("HTTP Request")
    logging.getLogger("httpx").warning("careful")
    assert [line.rsplit(" ", 1)[1] for line in capsys.readouterr().err.splitlines()] == ["careful"]


def test_escape_leaves_ordinary_text_alone() -> None:
    assert escape("Grüße, 世界 😀") == "Grüße, 世界 😀"
