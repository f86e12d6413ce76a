"""Tables for people, the same for every command."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from inferflux_core.cli.api_errors import printable

ABSENT = "–"
"""Stands where a server says nothing."""


def cell(value: object) -> str:
    """The value as text; None as ABSENT."""
    return ABSENT if value is None else str(value)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
    """Prints a table to stdout. Numbers stand to the right; nothing in a cell is taken for markup or escape codes."""
    from rich import box  # imported here: rich costs a tenth of a second that --help should not
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for index, column in enumerate(columns):
        numeric = any(isinstance(row[index], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell(value))) for value in row))
    # A pipe has no width of its own: give it what the table needs, so that no line is broken.
    console = Console()
    (console if console.is_terminal else Console(width=1000)).print(table)
