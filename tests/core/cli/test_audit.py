"""`inferctl audit` as its user sees it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from core.access.audit.audit_logs import write_log
from inferflux_core.access.audit.chain import Chain
from inferflux_core.access.audit.reader import follow_log, last_lines
from inferflux_core.access.audit.rotation import ROTATE, closed_name
from inferflux_core.cli.audit import audit, describe


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for variable in [name for name in os.environ if name.startswith("INFERFLUX_")]:
        monkeypatch.delenv(variable)
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    asyncio.run(write_log(folder, 3))
    return folder


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(audit, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_verify(state: Path) -> None:
    result = run("verify", "--state-dir", state)
    assert (result.exit_code, result.output) == (
        0,
        "ok: 3 records, up to record 3, verified with the key of the chain\n1 checkpoints, up to the last record\n",
    )
    (state / "audit-checkpoints.jsonl").unlink()
    result = run("verify", "--state-dir", state)
    assert result.output.splitlines()[1] == "0 checkpoints, up to record 0; a cut after that would not be noticed"


def test_verify_says_which_record_is_bad(state: Path) -> None:
    log = state / "audit.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"n":1', b'"n":7'))
    result = run("verify", "--state-dir", state)
    assert result.exit_code == 1
    assert result.output == (
        "BAD at record 2: line 2 of 'audit.jsonl': record 2 was changed, or written with another key\n"
        "1 records before it are in order\n"
    )
    result = run("verify", "--state-dir", state, "--json")
    assert result.exit_code == 1
    found = json.loads(result.output)
    assert (found["ok"], found["first_bad"], found["with_key"], found["log"]) == (False, 2, True, str(log))


def test_verify_by_configuration_and_elsewhere(state: Path, tmp_path: Path) -> None:
    (tmp_path / "inferflux.yaml").write_text("state_dir: state\naudit:\n  checkpoint_file: cp/c.jsonl\n")
    (tmp_path / "cp").mkdir()
    (state / "audit-checkpoints.jsonl").rename(tmp_path / "cp/c.jsonl")
    result = run("verify")
    assert (result.exit_code, "1 checkpoints, up to the last record" in result.output) == (0, True)
    # An auditor has a copy of the log, the checkpoints and the public key.
    auditor = tmp_path / "auditor"
    auditor.mkdir()
    (state / "audit.jsonl").rename(auditor / "copy.jsonl")
    (state / "audit.key").unlink()
    options = ("--checkpoint", tmp_path / "cp/c.jsonl", "--public-key", state / "audit-checkpoint.pub")
    result = run("verify", auditor / "copy.jsonl", *options)
    assert result.output == (
        "ok: 3 records, up to record 3, verified with the checkpoints alone\n1 checkpoints, up to the last record\n"
    )
    assert run("verify", auditor / "copy.jsonl", *options, "--head", "4").exit_code == 1
    (auditor / "copy.jsonl").unlink()
    assert run("verify", auditor / "copy.jsonl", *options).exit_code == 1


def test_what_is_missing_is_named(state: Path, tmp_path: Path) -> None:
    result = run("verify", "--state-dir", tmp_path / "none")
    assert (result.exit_code, "there is neither" in result.output) == (2, True)
    result = run("verify", "--state-dir", state, "--checkpoint", tmp_path / "none")
    assert (result.exit_code, "there is no checkpoint file" in result.output) == (2, True)
    result = run("tail", "--state-dir", tmp_path / "none")
    assert (result.exit_code, "there is no audit log" in result.output) == (2, True)
    assert not (tmp_path / "none").exists()
    (state / "audit.key").chmod(0o644)
    result = run("verify", "--state-dir", state)
    assert (result.exit_code, "chmod 600" in result.output) == (2, True)


def test_the_log_of_a_server_that_runs_as_another_user(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        for path in state.iterdir():
            os.chown(path, 1001, -1)
    else:
        us = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: us + 1)
    result = run("verify", "--state-dir", state)
    assert (result.exit_code, "ok: 3 records" in result.output) == (0, True)


def test_tail(state: Path) -> None:
    result = run("tail", "--state-dir", state, "-n", "2")
    assert result.exit_code == 0
    assert [line.split(" ", 1)[1] for line in result.output.splitlines()] == ["#2 thing n=1", "#3 thing n=2"]
    result = run("tail", state / "audit.jsonl", "--json")
    assert result.output.encode() == (state / "audit.jsonl").read_bytes()
    assert run("tail", "--state-dir", state, "-n", "0").output == ""


def test_tail_goes_back_into_closed_files(state: Path) -> None:
    asyncio.run(write_log(state, 40, max_file_bytes=4096))
    log = state / "audit.jsonl"
    lines = last_lines(log, 30)
    assert [json.loads(line)["seq"] for line in lines] == list(
        range(json.loads(lines[0])["seq"], json.loads(lines[-1])["seq"] + 1)
    )
    assert len(lines) == 30
    assert json.loads(last_lines(log, 1000)[0])["seq"] == 1


def test_one_line_for_people() -> None:
    chain = Chain(b"k" * 32)
    fields = {
        "event": "e\n\x1b[31m",
        "actor": {"kind": "key", "id": "a\u202eb", "tenant": "t"},
        "address": "::1",
        "request_id": "r 1",
        "decision": {"rule": None},
    }
    line = describe(chain.append(fields, "0" * 32, 1_700_000_000_123_456_789))
    assert line == ('2023-11-14T22:13:20.123Z #1 e\\n\\x1b[31m key:a\\u202eb@t ::1 decision={"rule":null} request_id="r 1"')
    for text in (b"\x1b[31mhello\xff\n", b"[]\n", b'{"ts":1,"seq":"x","event":1}\n', b'{"actor":1}\n', b"[" * 100_000):
        assert describe(text).startswith("not a record: ")
        assert "\x1b" not in describe(text)


def test_following(tmp_path: Path) -> None:
    """Lines that come later, through rotations, of which several may happen between two looks."""
    log = tmp_path / "audit.jsonl"
    chain = Chain(b"k" * 32)

    def add(end: bytes = b"\n", event: str = "thing") -> bytes:
        line = chain.append({"event": event}, "0" * 32, 0)
        with log.open("ab") as file:
            file.write(line[:-1] + end)
        return line

    def rotate(number: int) -> bytes:
        line = add(event=ROTATE)
        log.rename(closed_name(log, number))
        return line

    add()
    waited = 0

    def wait() -> None:
        nonlocal waited
        waited += 1
        actions[waited - 1]()

    expected: list[bytes] = []

    def half() -> None:
        expected.append(add(end=b""))

    def rest() -> None:
        with log.open("ab") as file:
            file.write(b"\n")

    def rotations() -> None:
        expected.extend([add(), rotate(1), add(), add(), rotate(2), add(), rotate(3)])

    def begin() -> None:
        expected.append(add())

    actions = [lambda: expected.append(add()), half, rest, rotations, begin]
    following = follow_log(log, wait)
    assert [next(following) for _ in range(10)] == expected
    following.close()
    assert [json.loads(line)["seq"] for line in expected] == list(range(2, 12))


def test_tail_follow_in_a_process(state: Path) -> None:
    command = f"from inferflux_core.cli.audit import audit; audit(['tail', '-f', '-n', '1', {str(state / 'audit.jsonl')!r}])"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # Where the tests run in the background of a shell, SIGINT is ignored, and a child inherits that. Its own session keeps a
    # Ctrl-C that is for the tests from it.
    command = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {command}"
    process = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, env=environment, start_new_session=True)
    with process:  # closes the pipe and waits
        try:
            assert process.stdout is not None
            assert process.stdout.readline().endswith(b" #3 thing n=2\n")
            asyncio.run(write_log(state, 1))
            assert process.stdout.readline().endswith(b" #4 thing n=0\n")
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 130
        finally:
            process.kill()  # does nothing to one that has ended
