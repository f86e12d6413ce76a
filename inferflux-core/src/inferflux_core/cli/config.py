"""`inferflux config`: what is configured, where it comes from, and whether it would work."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from inferflux_core.config import bind_problems, load_settings, plugin_problems, problems_error, served_name
from inferflux_core.effective import as_json, as_yaml, effective_values
from inferflux_core.plugins import PluginRegistry, load_plugins
from inferflux_core.settings import PolicySettings, Settings

config_option = click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Configuration file. [default: what INFERFLUX_CONFIG names, else ./inferflux.yaml if it exists]",
)


def load_registry(settings: Settings) -> PluginRegistry:
    """Load the plugins, and check everything about the settings that depends on them, and the address to listen on.

    Raises:
        ConfigError: with every problem.
    """
    registry = load_plugins(settings.plugins.blocked)
    if problems := plugin_problems(settings, registry) + bind_problems(settings):
        raise problems_error(problems)
    return registry


@click.group()
def config() -> None:
    """Check or show the configuration.

    A setting comes from the command line, else from an INFERFLUX_* environment variable, else from the file, else it
    has its default.
    """


@config.command()
@config_option
def check(config_file: Path | None) -> None:
    """Check file, environment, plugins, certificates and the policy without starting anything.

    Prints "ok" and what would be served, or every problem with the place to correct it (exit code 2). Model files are
    not looked for.
    """
    from inferflux_core.serving.edge import check_edge

    loaded = load_settings(config_file)
    settings = loaded.settings
    load_registry(settings)
    check_edge(settings.server)
    if settings.policy.file is not None:
        asyncio.run(_check_policy(settings.policy))
    click.echo(f"ok: {loaded.file or 'no configuration file; environment and defaults only'}")
    click.echo(f"listen on {settings.server.host} port {settings.server.port}")
    click.echo(f"scheduler {settings.engine.scheduler}")
    if settings.auth.providers:
        click.echo(f"access by {', '.join(settings.auth.providers)}")
    if settings.policy.file is not None:
        click.echo(f"policy {settings.policy.file}")
    default = next((model for model in settings.models if model.default), settings.models[0])
    for model in settings.models:
        names = " ".join((f"model {served_name(model)}", *(f"alias {alias}" for alias in model.aliases)))
        click.echo(f"{names} from {model.source}, backend {model.backend}{', default' if model is default else ''}")


async def _check_policy(settings: PolicySettings) -> None:
    from inferflux_core.access.policy.store import PolicyStore

    policy = PolicyStore(settings, lambda event: None)
    await policy.start()
    await policy.close()


@config.command()
@config_option
@click.option("--json", "json_form", is_flag=True, help="Print JSON for programs.")
def show(config_file: Path | None, json_form: bool) -> None:
    """Print every setting with its value and where it comes from.

    The output is a configuration file itself, but for secrets, which are masked.
    """
    loaded = load_settings(config_file)
    values = effective_values(loaded, load_plugins(loaded.settings.plugins.blocked))
    click.echo(as_json(loaded, values) if json_form else as_yaml(values))
