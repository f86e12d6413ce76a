"""Values that people write on the command line: durations, lists, limits."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import click

from inferflux_core.settings import Limits

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([smhdw]?)")

LIMITS = tuple(Limits.model_fields)


class Duration(click.ParamType[float]):
    """Seconds, written as `90`, `90s`, `15m`, `12h`, `30d` or `4w`."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Raises click.BadParameter if it is none."""
        if isinstance(value, float):
            return value
        match = _DURATION.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is no duration such as 90s, 15m, 12h or 30d", param, ctx)
        return float(match[1]) * _UNITS[match[2] or "s"]


class LimitValue(click.ParamType[int]):
    """A positive number, or `none` for no limit (0 here)."""

    name = "number|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Raises click.BadParameter if it is neither."""
        if isinstance(value, int):
            return value
        if str(value).lower() == "none":
            return 0
        if not re.fullmatch(r"[0-9]{1,15}", str(value)) or int(value) == 0:
            self.fail(f"{value!r} is neither a number above 0 nor none", param, ctx)
        return int(value)


def limit_options(function: Callable[..., None]) -> Callable[..., None]:
    """Adds an option for each limit."""
    for name in reversed(LIMITS):
        option, meaning = f"--{name.replace('_', '-')}", (Limits.model_fields[name].description or "").rstrip(".")
        function = click.option(option, name, type=LimitValue(), help=f"{meaning}; none for no limit.")(function)
    return function


def given_limits(options: Mapping[str, Any]) -> dict[str, int | None]:
    """The limits that were given, as JSON has them."""
    return {name: options[name] or None for name in LIMITS if options[name] is not None}


def words(values: tuple[str, ...]) -> list[str]:
    """Values given by repeating an option, by commas, or both."""
    return [word for value in values for part in value.split(",") if (word := part.strip())]
