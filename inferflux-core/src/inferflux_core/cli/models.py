"""`inferflux pull` and `inferflux models`: fetch a model, and list those that are here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from inferflux_core.cli.config import config_option

if TYPE_CHECKING:
    from inferflux_core.interfaces import ModelFiles, SourceContext
    from inferflux_core.plugins import PluginRegistry
    from inferflux_core.settings import Settings

_json_option = click.option("--json", "json_form", is_flag=True, help="Print JSON for programs.")


@click.command()
@click.argument("ref")
@config_option
@_json_option
def pull(ref: str, config_file: Path | None, json_form: bool) -> None:
    """Download the model REF, or check that it is here.

    REF is what `source` of a model may be: hf:owner/repo[:file-or-quantisation][@revision], a path, or demo. Progress is
    shown on standard error; a download that was interrupted is simply repeated.
    """
    from inferflux_core.config import load_settings
    from inferflux_core.models.sources import resolve_model
    from inferflux_core.plugins import load_plugins

    settings = load_settings(config_file).settings
    registry = load_plugins(settings.plugins.blocked)
    row = _row(ref, resolve_model(registry, ref, source_context(settings, show_progress=True)))
    if json_form:
        click.echo(json.dumps(row, indent=2))
        return
    click.echo(row["path"])
    size = f"{row['bytes'] / 1e6:,.1f} MB"
    parts = f"{row['files']} files" if row["files"] > 1 else None
    click.echo(", ".join(filter(None, (row["format"], row["quantisation"], size, parts))))


@click.command()
@config_option
@_json_option
def models(config_file: Path | None, json_form: bool) -> None:
    """List the models on this machine: those of the configuration, those in the hub's cache, and the demo model.

    Nothing is downloaded. `served` says whether the configuration names the model.
    """
    from inferflux_core.config import load_settings
    from inferflux_core.plugins import load_plugins

    settings = load_settings(config_file).settings
    registry = load_plugins(settings.plugins.blocked)
    context = source_context(settings, offline=True)
    served = [model.source for model in settings.models]
    rows = [_listed(ref, registry, context, served=True) for ref in served]
    for ref in _found(settings):
        row = _listed(ref, registry, context, served=False)
        known = {path for other in rows if (path := other["path"]) is not None}
        if row["problem"] is None and row["path"] not in known:
            rows.append(row)
    if json_form:
        click.echo(json.dumps(rows, indent=2))
        return
    _print(rows)


def source_context(settings: Settings, *, show_progress: bool = False, offline: bool = False) -> SourceContext:
    """What the settings allow a model source to do.

    Args:
        offline: stay away from the network even if the settings allow it.
    """
    from inferflux_core.interfaces import SourceContext

    return SourceContext(
        allowed_roots=settings.model_roots,
        cache_dir=settings.hub.cache_dir,
        token=settings.hub.token.get_secret_value() if settings.hub.token is not None else None,
        offline=offline or settings.hub.offline,
        show_progress=show_progress,
    )


def _found(settings: Settings) -> list[str]:
    from inferflux_core.models.hub_cache import cached_references
    from inferflux_core.models.sources import DEMO_REF

    return [DEMO_REF, *cached_references(settings.hub.cache_dir)]


def _listed(ref: str, registry: PluginRegistry, context: SourceContext, *, served: bool) -> dict[str, Any]:
    """A row of the list; `problem` says why the model is not here."""
    from inferflux_core.errors import ModelFileError
    from inferflux_core.models.sources import resolve_model

    try:
        row = _row(ref, resolve_model(registry, ref, context))
    except ModelFileError as error:
        empty = dict.fromkeys(("format", "quantisation", "bytes", "files", "path", "revision"))
        return {"ref": ref, **empty, "served": served, "problem": str(error)}
    return {**row, "served": served, "problem": None}


def _row(ref: str, files: ModelFiles) -> dict[str, Any]:
    from inferflux_core.models.hub_choice import quantisation

    paths = [Path(path) for path in files.paths]
    real = [path for path in paths if path.is_file()]
    return {
        "ref": ref,
        "format": files.format,
        "quantisation": quantisation(paths[0].name) if paths else None,
        "bytes": sum(path.stat().st_size for path in real),
        "files": len(real),
        "path": files.paths[0] if files.paths else None,
        "revision": files.revision,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    from inferflux_core.cli.table import cell, print_table

    print_table(
        ("model", "served", "format", "quantisation", "MB", "path"),
        [
            (
                row["ref"],
                "yes" if row["served"] else "no",
                cell(row["format"]),
                cell(row["quantisation"]),
                None if row["bytes"] is None else round(row["bytes"] / 1e6, 1),
                cell(row["path"] if row["problem"] is None else "not here"),
            )
            for row in rows
        ],
    )
    for row in rows:
        if row["problem"] is not None:
            click.echo(row["problem"], err=True)
