"""The `inferflux` command. Subcommands are imported when they are used, so that help and completion answer at once."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import click

from inferflux_core.cli.lazy_group import LazyCommand, LazyGroup
from inferflux_core.errors import ConfigError

EXIT_CONFIG = 2
"""Exit code for a wrong configuration; click uses the same for a wrong command line."""

EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells report it."""

COMMANDS: Mapping[str, LazyCommand] = MappingProxyType(
    {
        "serve": LazyCommand("inferflux_core.cli.serve", "serve", "Serve models over HTTP."),
        "pull": LazyCommand("inferflux_core.cli.models", "pull", "Download a model, or check that it is here."),
        "models": LazyCommand("inferflux_core.cli.models", "models", "List the models on this machine."),
        "plugins": LazyCommand("inferflux_core.cli.plugins", "plugins", "List what is installed and what is in use."),
        "config": LazyCommand("inferflux_core.cli.config", "config", "Check or show the configuration."),
        "bench": LazyCommand("inferflux_core.cli.bench.command", "bench", "Measure a server's speed."),
    }
)


class _ConfigFailure(click.ClickException):
    exit_code = EXIT_CONFIG


class _ConfigGroup(LazyGroup):
    """Turns errors in the configuration into exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            raise _ConfigFailure(str(error)) from error
        except KeyboardInterrupt:
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None


@click.group(cls=_ConfigGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="inferflux-core", prog_name="inferflux", message="%(prog)s %(version)s")
def cli() -> None:
    """InferFlux serves language models through OpenAI's API.

    With no configuration at all, `inferflux serve` serves a demo model on http://127.0.0.1:8080.
    """


def main() -> None:
    """Entry point of the console script. Exits with 2 for a wrong configuration or command line, 130 after Ctrl-C."""
    cli(prog_name="inferflux")


if __name__ == "__main__":
    main()
