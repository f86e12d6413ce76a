"""`inferflux serve`: the options, and the settings they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from inferflux_core.cli.config import config_option, load_registry
from inferflux_core.config import load_settings
from inferflux_core.setting_file import read_yaml
from inferflux_core.settings import LoggingSettings

Overrides = dict[str, Any]

# option -> the setting it stands for
_SETTINGS = {
    "host": "server.host",
    "port": "server.port",
    "insecure_no_auth": "server.insecure_no_auth",
    "scheduler": "engine.scheduler",
    "max_num_seqs": "engine.max_num_seqs",
    "max_model_len": "engine.max_model_len",
    "max_num_batched_tokens": "engine.max_num_batched_tokens",
    "itl_target_ms": "engine.itl_target_ms",
    "log_level": "logging.level",
    "log_format": "logging.format",
    "offline": "hub.offline",
}


def _number_or_none(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float | None] | None:
    """A number or the word none, in a tuple that tells none from an option not given."""
    if value is None:
        return None
    if value.lower() == "none":
        return (None,)
    try:
        return (float(value),)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor none", ctx, param) from None


def _choice(setting: str) -> click.Choice[str]:
    return click.Choice(get_args(LoggingSettings.model_fields[setting].annotation))


@click.command()
@config_option
@click.option(
    "--model",
    "models",
    metavar="REF",
    multiple=True,
    help="Model to serve: demo, a path, or hf:owner/repo. Repeatable.",
)
@click.option("--name", help="Name clients use for the one --model.")
@click.option("--alias", "aliases", metavar="NAME", multiple=True, help="Further name of the one --model. Repeatable.")
@click.option("--backend", metavar="NAME", help="Backend of every --model. [default: the one that supports it]")
@click.option("--host", help="Address to listen on.")
@click.option("--port", type=int, help="TCP port; 0 takes a free one.")
@click.option("--scheduler", metavar="NAME", help="Who is served first: fcfs, priority, fair, or a plugin's.")
@click.option("--max-num-seqs", type=int, help="Most sequences running at once.")
@click.option("--max-model-len", type=int, help="Most tokens of a sequence, prompt and output.")
@click.option("--max-num-batched-tokens", type=int, help="Most tokens computed in one step.")
@click.option(
    "--itl-target-ms", metavar="NUMBER", callback=_number_or_none, help="Longest step while text is streaming, in ms, or none."
)
@click.option("--log-level", type=_choice("level"), help="Least severe level to write.")
@click.option("--log-format", type=_choice("format"), help="For people or for machines.")
@click.option("--insecure-no-auth", is_flag=True, default=None, help="Listen beyond loopback without authentication.")
@click.option("--offline", is_flag=True, default=None, help="Never download; use what is on this machine.")
@click.option(
    "--set",
    "assignments",
    metavar="KEY=VALUE",
    multiple=True,
    help="Any setting, e.g. server.max_choices=4; the value is YAML. Repeatable; wins over the other options.",
)
def serve(
    config_file: Path | None,
    models: tuple[str, ...],
    name: str | None,
    aliases: tuple[str, ...],
    backend: str | None,
    assignments: tuple[str, ...],
    **options: Any,
) -> None:
    """Serve models over HTTP until SIGTERM or Ctrl-C.

    Options win over INFERFLUX_* environment variables, these over the configuration file, and that over the defaults.
    With none of them it serves a demo model on http://127.0.0.1:8080.
    """
    overrides: Overrides = {}
    if models:
        _assign(overrides, "models", _models(models, name, aliases, backend))
    elif name or aliases or backend:
        raise click.UsageError("--name, --alias and --backend belong to a --model; for the models of a file, set them there")
    for option, value in options.items():
        if value is not None:
            _assign(overrides, _SETTINGS[option], value[0] if isinstance(value, tuple) else value)
    for assignment in assignments:
        _assign(overrides, *_parsed(assignment))

    loaded = load_settings(config_file, overrides)
    registry = load_registry(loaded.settings)

    from inferflux_core.serving.server import run  # not before the configuration is known to be good: it takes a while

    click.get_current_context().exit(run(loaded, registry))


def _models(models: tuple[str, ...], name: str | None, aliases: tuple[str, ...], backend: str | None) -> list[dict[str, Any]]:
    if len(models) > 1 and (name or aliases):
        raise click.UsageError("--name and --alias need exactly one --model; name several models in a configuration file")
    given = {"name": name, "aliases": list(aliases) or None, "backend": backend}
    given = {key: value for key, value in given.items() if value is not None}
    return [{"source": model, **given} for model in models]


def _parsed(assignment: str) -> tuple[str, Any]:
    """Raises click.BadParameter if the text is not KEY=VALUE."""
    key, equals, text = assignment.partition("=")
    if not equals or not all(key.split(".")):
        raise click.BadParameter(f"{assignment!r} is not of the form key.path=value", param_hint="--set")
    document = read_yaml(text, f"--set {key}")
    if document.problems:
        raise click.BadParameter(f"the value of {key} is not valid YAML; put it in quotes if it is text", param_hint="--set")
    return key, document.value


def _assign(overrides: Overrides, key: str, value: Any) -> None:
    *sections, last = key.split(".")
    target = overrides
    for section in sections:
        inner = target.get(section)
        if not isinstance(inner, dict):
            inner = target[section] = {}
        target = inner
    target[last] = value
