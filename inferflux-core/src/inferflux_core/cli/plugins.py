"""`inferflux plugins`: what the installed packages offer, and which of it the configuration uses."""

from __future__ import annotations

import json
from pathlib import Path

import click

from inferflux_core.cli.config import config_option
from inferflux_core.cli.table import print_table
from inferflux_core.config import AUTO_BACKEND, load_settings, speculatives
from inferflux_core.plugins import Entry, load_plugins
from inferflux_core.settings import Settings


@click.command()
@config_option
@click.option("--json", "json_form", is_flag=True, help="Print JSON for programs.")
def plugins(config_file: Path | None, json_form: bool) -> None:
    """List what the installed packages offer, and which of it the configuration uses.

    Active is what the configuration names. "auto" stands for a backend that is used if it supports a model's files.
    Model sources are always active: each takes the references that it understands.
    """
    settings = load_settings(config_file).settings
    registry = load_plugins(settings.plugins.blocked)
    if json_form:
        rows = [
            {
                "kind": entry.kind,
                "name": entry.registration.name,
                "distribution": entry.distribution.name,
                "version": entry.distribution.version,
                "active": chosen_by(entry, settings) is not None,
                "chosen_by": chosen_by(entry, settings),
                "summary": entry.registration.summary,
            }
            for entry in registry
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    print_table(
        ("kind", "name", "from", "active", "summary"),
        [
            (
                entry.kind,
                entry.registration.name,
                entry.distribution,
                _active(entry, settings),
                entry.registration.summary,
            )
            for entry in registry
        ],
    )


def chosen_by(entry: Entry, settings: Settings) -> str | None:
    """What makes a registered part active: a setting's key, `auto`, or `always`; None if it is not in use."""
    name = entry.registration.name
    match entry.kind:
        case "scheduler":
            return "engine.scheduler" if settings.engine.scheduler == name else None
        case "backend":
            backends = [model.backend for model in settings.models]
            if name in backends:
                return f"models[{backends.index(name)}].backend"
            return AUTO_BACKEND if AUTO_BACKEND in backends else None
        case "proposer":
            return next((path for path, speculative in speculatives(settings) if speculative.method == name), None)
        case "auth provider":
            return "auth.providers" if name in settings.auth.providers else None
    return "always"


def _active(entry: Entry, settings: Settings) -> str:
    reason = chosen_by(entry, settings)
    if reason is None:
        return "no"
    return AUTO_BACKEND if reason == AUTO_BACKEND else "yes"
