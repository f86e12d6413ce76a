"""`inferctl audit`: verify and read the audit log on this machine. Needs its files, not a running server."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import click

from inferflux_core.errors import ConfigError

if TYPE_CHECKING:
    from inferflux_core.access.audit.key_files import AuditPaths

P = ParamSpec("P")
_POLL_S = 0.2
_file = click.Path(path_type=Path, dir_okay=False)
_HIDDEN = ("actor", "address", "boot_id", "event", "hash", "prev", "seq", "ts")


class _ConfigFailure(click.ClickException):
    exit_code = 2


def _local_command(function: Callable[P, None]) -> Callable[P, None]:
    """Turns errors of configuration and of reading files into a message and exit code 2, Ctrl-C into 130."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except ConfigError as error:
            raise _ConfigFailure(str(error)) from error
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _ConfigFailure(f"{error.filename or 'a file'} cannot be read: {error.strerror}") from error
        except KeyboardInterrupt:
            sys.exit(130)  # what shells expect of a program that Ctrl-C has ended

    return wrapper


def _place_options(function: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option(
            "--state-dir", type=click.Path(path_type=Path, file_okay=False), help="State folder. [default: the configured one]"
        ),
        click.option(
            "--config",
            "config_file",
            metavar="FILE",
            type=_file,
            help="The server's configuration file. [default: what INFERFLUX_CONFIG names, else ./inferflux.yaml if it exists]",
        ),
        click.argument("log", required=False, type=_file),
    ):
        function = option(function)
    return function


@click.group()
def audit() -> None:
    """Verify or read the audit log on this machine.

    LOG is the log's open file, by default the one the configuration names; its closed files are found beside it.
    """


@audit.command()
@_place_options
@click.option("--key", "key_file", type=_file, help="Key of the chain. [default: audit.key in the state folder, if it exists]")
@click.option("--public-key", type=_file, help="Public key of the checkpoints. [default: audit-checkpoint.pub there]")
@click.option("--checkpoint", "checkpoint_file", type=_file, help="Checkpoint file. [default: the configured one]")
@click.option("--head", type=click.IntRange(min=0), help="A record that must be there: a value of inferflux_audit_head.")
@click.option("--allow-pruned", is_flag=True, help="The oldest files may have been deleted.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@_local_command
def verify(
    log: Path | None,
    config_file: Path | None,
    state_dir: Path | None,
    key_file: Path | None,
    public_key: Path | None,
    checkpoint_file: Path | None,
    head: int | None,
    allow_pruned: bool,
    as_json: bool,
) -> None:
    """Say whether the log is whole. Exit code 0 if it is, 1 with the number of the first bad record if not.

    With the key every change is found. Without it, changes are found in what the checkpoints cover; for that, the public
    key and the checkpoints are enough. Only the checkpoints (or --head) show that the end was cut off.
    """
    from inferflux_core.access.audit.checkpoints import load_public_key
    from inferflux_core.access.audit.key_files import read_key
    from inferflux_core.access.audit.verify import verify as verify_log

    paths = _paths(log, config_file, state_dir)
    key_file = key_file or _if_there(paths.key)
    public_key = public_key or _if_there(paths.public_key)
    if key_file is None and public_key is None:
        raise ConfigError(
            f"there is neither {str(paths.key)!r} nor {str(paths.public_key)!r}; name the state folder with --state-dir, or "
            f"the keys with --key and --public-key"
        )
    checkpoints = checkpoint_file or paths.checkpoints
    if not checkpoints.exists() and (checkpoint_file is not None or key_file is None):
        raise ConfigError(f"there is no checkpoint file {str(checkpoints)!r}; name it with --checkpoint")
    found = verify_log(
        paths.log,
        key=read_key(key_file, any_owner=True) if key_file else None,
        public_key=load_public_key(public_key) if public_key else None,
        checkpoints=checkpoints,
        head=head,
        allow_pruned=allow_pruned,
    )
    if as_json:
        click.echo(json.dumps({"log": str(paths.log), "with_key": key_file is not None, **asdict(found)}))
    elif found.ok:
        by = "the key of the chain" if key_file else "the checkpoints alone"
        click.echo(f"ok: {found.records} records, up to record {found.head}, verified with {by}")
        if found.signed_to < found.head or not found.checkpoints:
            click.echo(
                f"{found.checkpoints} checkpoints, up to record {found.signed_to}; a cut after that would not be noticed"
            )
        else:
            click.echo(f"{found.checkpoints} checkpoints, up to the last record")
    else:
        click.echo(_printable(f"BAD at record {found.first_bad}: {found.reason}"))
        click.echo(f"{found.records} records before it are in order")
    if not found.ok:
        sys.exit(1)


@audit.command()
@_place_options
@click.option("-n", "--lines", type=click.IntRange(min=0), default=10, show_default=True, help="How many of the last records.")
@click.option("-f", "--follow", is_flag=True, help="Go on with those that are added, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as they stand in the log, one a line.")
@_local_command
def tail(log: Path | None, config_file: Path | None, state_dir: Path | None, lines: int, follow: bool, as_json: bool) -> None:
    """Print the last records. They are not verified."""
    from inferflux_core.access.audit.reader import follow_log, last_lines

    path = _paths(log, config_file, state_dir).log
    if not path.exists() and not follow:
        raise ConfigError(f"there is no audit log {str(path)!r}; name it, or the state folder with --state-dir")
    form = _raw if as_json else describe
    # Opened first, so that nothing is added unseen between the two; what both saw is shown once.
    following = follow_log(path, lambda: time.sleep(_POLL_S)) if follow else iter(())
    shown = 0
    for line in last_lines(path, lines) if lines else ():
        click.echo(form(line))
        shown = max(shown, _seq(line))
    for line in following:
        if not 0 < _seq(line) <= shown:
            click.echo(form(line))


def describe(line: bytes) -> str:
    """A record on one line for people, whatever is in it: `time #seq event actor address field=value ...`."""
    try:
        record = json.loads(line)
        shown = [f"{record['ts'][:23]}Z", f"#{int(record['seq'])}", str(record["event"])]
        if actor := record.get("actor"):
            shown.append(f"{actor['kind']}:{actor['id']}@{actor['tenant']}")
        if address := record.get("address"):
            shown.append(str(address))
        shown += [f"{key}={_value(value)}" for key, value in record.items() if key not in _HIDDEN]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "not a record: " + _raw(line)
    return _printable(" ".join(shown))


def _seq(line: bytes) -> int:
    """Number of a record; 0 for what is none."""
    try:
        return int(json.loads(line)["seq"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return 0


def _value(value: Any) -> str:
    if isinstance(value, str) and value and not set(value) & set(' "='):
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _raw(line: bytes) -> str:
    return _printable(line.rstrip(b"\n").decode("utf-8", "backslashreplace"))


def _printable(text: str) -> str:
    from inferflux_core.telemetry.logging import escape

    return escape(text)


def _paths(log: Path | None, config_file: Path | None, folder: Path | None) -> AuditPaths:
    """The files of the log that is meant. Nothing is created."""
    from inferflux_core.access.audit.key_files import AuditPaths
    from inferflux_core.config import load_settings
    from inferflux_core.state_dir import state_dir_path

    settings = load_settings(config_file).settings
    chosen = settings.audit if log is None else settings.audit.model_copy(update={"file": log})
    return AuditPaths.of(chosen, folder or state_dir_path(settings))


def _if_there(path: Path) -> Path | None:
    return path if path.exists() else None
