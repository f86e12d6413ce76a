"""Which settings there are: their keys, their types, and which one a misspelt key was meant to be.

A path is a tuple of what stands between the dots: `("models", 0, "source")` is written `models[0].source`.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from inferflux_core.settings import Settings

SettingPath = tuple[str | int, ...]

VARIABLE_PREFIX = "INFERFLUX_"


@dataclass(frozen=True, slots=True)
class SettingKey:
    """One setting that has a value of its own; in a list of groups, the part of the path for the item is `"[]"`."""

    path: tuple[str, ...]
    field: FieldInfo

    @property
    def name(self) -> str:
        """The key as people write it, e.g. `models[].source`."""
        return ".".join(self.path).replace(".[]", "[]")

    @property
    def variable(self) -> str | None:
        """The environment variable that sets it; None within a list, which is set as a whole."""
        return None if "[]" in self.path else variable_of(self.path)


def variable_of(path: tuple[str, ...]) -> str:
    """The environment variable of a path, e.g. `INFERFLUX_SERVER__PORT`."""
    return VARIABLE_PREFIX + "__".join(path).upper()


def dotted(path: SettingPath) -> str:
    """The path as people write it, e.g. `models[0].source`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def setting_keys(group: type[BaseModel] = Settings, parent: tuple[str, ...] = ()) -> Iterator[SettingKey]:
    """Every setting in the order of declaration; a list of groups comes before the settings of its items."""
    for name, field in group.model_fields.items():
        path = (*parent, name)
        subgroup = as_group(field.annotation)
        if subgroup is not None:
            yield from setting_keys(subgroup, path)
            continue
        yield SettingKey(path, field)
        item = as_group(item_type(field.annotation))
        if item is not None:
            yield from setting_keys(item, (*path, "[]"))


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union without None; anything else is its only member."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(member for member in get_args(annotation) if member is not type(None))
    return (annotation,)


def accepts_none(annotation: Any) -> bool:
    """Whether null is a value of this type."""
    return annotation is Any or annotation is None or type(None) in get_args(annotation)


def as_group(annotation: Any) -> type[BaseModel] | None:
    """The settings group that the type is, or None."""
    for member in alternatives(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            return member
    return None


def item_type(annotation: Any) -> Any:
    """The type of a list's items; None if the type is not a list."""
    for member in alternatives(annotation):
        if get_origin(member) in (tuple, list, frozenset, set):
            return get_args(member)[0]
    return None


def value_type(annotation: Any) -> Any:
    """The type of a mapping's values; None if the type is not a mapping."""
    for member in alternatives(annotation):
        if get_origin(member) is dict:
            return get_args(member)[1]
    return None


def is_secret(annotation: Any) -> bool:
    """Whether values of this type are never shown."""
    return SecretStr in alternatives(annotation)


def type_at(path: SettingPath, group: type[BaseModel] = Settings) -> Any:
    """The type of the value at a path; None if there is no such setting. Below a free-form mapping it is Any."""
    annotation: Any = group
    for part in path:
        subgroup = as_group(annotation)
        if annotation is Any:
            return Any
        if subgroup is not None:
            field = subgroup.model_fields.get(str(part))
            annotation = None if field is None else field.annotation
        elif isinstance(part, int):
            annotation = item_type(annotation)
        else:
            annotation = value_type(annotation)
        if annotation is None:
            return None
    return annotation


def suggestion(path: SettingPath) -> str:
    """What an unknown key may have been meant to be, as the end of an error message."""
    wanted = str(path[-1])
    group = as_group(type_at(path[:-1]))
    siblings = list(group.model_fields) if group is not None else []
    if close := difflib.get_close_matches(wanted, siblings, n=1):
        return f"did you mean {dotted((*path[:-1], close[0]))!r}?"
    # Settings of the whole server first: they are meant more often than those of one item of a list.
    names = {key.name: key.path[-1] for key in sorted(setting_keys(), key=lambda key: "[]" in key.path)}
    elsewhere = [name for name, last in names.items() if last == wanted]
    if not elsewhere:
        near = difflib.get_close_matches(wanted, set(names.values()), n=1, cutoff=0.8)
        elsewhere = [name for name, last in names.items() if last in near]
    if elsewhere:
        return f"did you mean {' or '.join(map(repr, elsewhere))}?"
    return f"there are: {', '.join(siblings)}"


def suggested_variable(variable: str) -> str:
    """What an unknown `INFERFLUX_*` variable may have been meant to be, as the end of an error message."""
    known = {key.variable.replace("__", "_"): key.variable for key in setting_keys() if key.variable is not None}
    wanted = variable.upper().replace("__", "_")
    close = difflib.get_close_matches(wanted, known, n=1, cutoff=0.8)
    if not close:
        last = wanted.removeprefix(VARIABLE_PREFIX)
        close = [name for name in known if name.endswith(f"_{last}")]
    if close:
        return f"did you mean {' or '.join(known[name] for name in close)}?"
    return "`inferflux config show` lists the settings; for server.port the variable is INFERFLUX_SERVER__PORT"
