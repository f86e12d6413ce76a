"""The `inferflux` command. Subcommands are imported when they are used, so that help and completion answer at once."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import click

from inferflux_core.errors import ConfigError

EXIT_CONFIG = 2
"""Exit code for a wrong configuration; click uses the same for a wrong command line."""

EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells report it."""

# name -> (module, attribute, short help); the help stands here so that showing it imports nothing
COMMANDS: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        "serve": ("inferflux_core.cli.serve", "serve", "Serve models over HTTP."),
        "pull": ("inferflux_core.cli.models", "pull", "Download a model, or check that it is here."),
        "models": ("inferflux_core.cli.models", "models", "List the models on this machine."),
        "plugins": ("inferflux_core.cli.plugins", "plugins", "List what is installed and what is in use."),
        "config": ("inferflux_core.cli.config", "config", "Check or show the configuration."),
        "bench": ("inferflux_core.cli.bench.command", "bench", "Measure a server's speed."),
    }
)


class _ConfigFailure(click.ClickException):
    exit_code = EXIT_CONFIG


class LazyGroup(click.Group):
    """A group that imports a subcommand only to run it, and turns errors in the configuration into exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the subcommand; None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """As in click, with a suggestion for a misspelt name."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(COMMANDS)}"
            ctx.fail(f"there is no command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of subcommands from what is known without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, _, summary) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            raise _ConfigFailure(str(error)) from error
        except KeyboardInterrupt:
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
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
