"""Where in a grammar's text something is wrong."""

from __future__ import annotations


class GrammarTextError(ValueError):
    """The grammar is malformed, or asks for what no client may have. The message names line and column.

    Args:
        at: index into `text`.
    """

    def __init__(self, message: str, text: str, at: int) -> None:
        line = text.count("\n", 0, at) + 1
        column = at - text.rfind("\n", 0, at)
        super().__init__(f"line {line}, column {column}: {message}")
