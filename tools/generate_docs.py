"""Writes the reference pages docs/settings.md, docs/plugins.md and docs/metrics.md from the code.

python tools/generate_docs.py            write the pages
python tools/generate_docs.py --check    exit with 1 if a page differs from the code
python tools/generate_docs.py metrics    one page only
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args, get_origin

import click
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from inferflux_core import hookspecs
from inferflux_core.errors import ConfigError
from inferflux_core.plugins import KINDS, Entry, PluginRegistry, load_plugins
from inferflux_core.setting_keys import SettingKey, accepts_none, alternatives, as_group, item_type, setting_keys, value_type
from inferflux_core.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
GENERATED = "<!-- Made from the code by `python tools/generate_docs.py`. Edit the code instead. -->"

_WORDS = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "Path": "path",
    "SecretStr": "secret",
    "AwareDatetime": "time with its zone",
}

SETTINGS_INTRO = """\
A setting comes from the command line (`inferflux serve --port 9000`, or `--set server.port=9000` for any setting), else
from the environment (`INFERFLUX_SERVER__PORT=9000`), else from the file, else it has its default. Mappings are merged key
by key; lists are replaced as a whole.

The file is the one that `--config` names, else the one that `INFERFLUX_CONFIG` names, else `./inferflux.yaml` if it
exists. Relative paths in it are relative to its folder, elsewhere to the current folder; `~` is the home folder. Among
the settings of plugins, texts that begin with `./`, `../` or `~/` are paths. In the environment, lists and whole sections
are JSON, e.g. `INFERFLUX_MODELS='[{"source": "demo"}]'`.

Unknown keys and unknown `INFERFLUX_*` variables are errors. `inferflux config check` finds them without starting
anything, and `inferflux config show` prints every value with the place it comes from."""

PLUGINS_INTRO = """\
A plugin is a Python package that registers parts of InferFlux under names. Installing it activates nothing: the
configuration chooses by name. `inferflux plugins` lists what is installed and what is in use.

## How to write one

1. Write a module that implements one of the hooks below. It must import nothing heavy: the factory does that.
2. Name the module in the package's `pyproject.toml`, in the entry-point group `inferflux`:

   ```toml
   [project.entry-points.inferflux]
   shortest = "inferflux_scheduler_shortest"
   ```

3. Install the package next to `inferflux-core` and choose its name in the configuration, e.g. `engine.scheduler: shortest`.

A `Registration` has a `name`, a `factory`, a pydantic model of the plugin's `settings` (with `extra="forbid"`; none by
default) and a one-line `summary`. The factory gets the validated settings first. Settings of type `SecretStr` are never
shown.

`examples/inferflux-scheduler-shortest/` is a complete package. Start-up stops, and names the package, if a plugin cannot
be imported, implements an unknown hook, returns something else than registrations, or uses a name that is taken.
`plugins.blocked` keeps the plugins of a package from being imported."""


def settings_page() -> str:
    """docs/settings.md."""
    parts = ["# Settings", GENERATED, SETTINGS_INTRO]
    single = [key for key in setting_keys() if len(key.path) == 1 and as_group(item_type(key.field.annotation)) is None]
    parts += ["## Top level", inspect.getdoc(Settings) or "", _settings_table((k.name, k.variable, k.field) for k in single)]
    for name, field in Settings.model_fields.items():
        group = as_group(field.annotation) or as_group(item_type(field.annotation))
        if group is not None:
            keys = [key for key in setting_keys() if key.path[0] == name]
            rows = _settings_table((key.name, key.variable, key.field) for key in keys)
            parts += [f"## {name}", inspect.getdoc(group) or "", rows]
    parts.append("## Settings of plugins")
    for entry in _workspace_plugins():
        model = entry.registration.settings
        if model.model_fields:
            plugin_keys = setting_keys(model, _plugin_path(entry))
            rows = _settings_table((key.name, _plugin_variable(key), key.field) for key in plugin_keys)
            title = f"### {entry.kind} `{entry.registration.name}` of {entry.distribution.name}"
            parts += [title, inspect.getdoc(model) or "", rows]
    return _page(parts)


def plugins_page() -> str:
    """docs/plugins.md."""
    parts = ["# Plugins", GENERATED, PLUGINS_INTRO, "## The hooks"]
    for kind, hook in KINDS.items():
        parts += [f"### `{hook}`", f"Registers parts of the kind *{kind}*.", _with_fences(_doc(getattr(hookspecs, hook)))]
    rows = [
        (entry.kind, f"`{entry.registration.name}`", entry.distribution.name, entry.registration.summary)
        for entry in _workspace_plugins()
    ]
    parts += ["## What the packages of this project register", _table(("Kind", "Name", "Package", "Summary"), rows)]
    return _page(parts)


def metrics_page() -> str:
    """docs/metrics.md."""
    from inferflux_core.telemetry.catalogue import CATALOGUE

    rows = [
        (f"`{metric.name}`", metric.type, ", ".join(f"`{label}`" for label in metric.labels) or "–", metric.description)
        for metric in CATALOGUE
    ]
    intro = "`GET /metrics` serves these in Prometheus' text format, unless `metrics.enabled` is false."
    return _page(["# Metrics", GENERATED, intro, _table(("Name", "Type", "Labels", "Meaning"), rows)])


PAGES: Mapping[str, Callable[[], str]] = MappingProxyType(
    {"settings": settings_page, "plugins": plugins_page, "metrics": metrics_page}
)


@click.command()
@click.argument("pages", nargs=-1, type=click.Choice(list(PAGES)))
@click.option("--check", is_flag=True, help="Compare instead of writing; exit with 1 if a page is out of date.")
def main(pages: tuple[str, ...], check: bool) -> None:
    """Write the reference pages from the code, or check that they are current."""
    outdated = [name for name in pages or PAGES if not _update(name, check=check)]
    if outdated:
        raise click.ClickException(f"out of date: {', '.join(outdated)}; run python tools/generate_docs.py")


def _update(name: str, *, check: bool) -> bool:
    """Write or check one page; False if it differs and was only checked."""
    try:
        new = PAGES[name]()
    except (ImportError, ConfigError) as error:
        raise click.ClickException(f"cannot make docs/{name}.md: {error}") from error
    path = DOCS / f"{name}.md"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if not check:
        path.write_text(new, encoding="utf-8")
    elif old != new:
        for line in difflib.unified_diff(old.splitlines(), new.splitlines(), f"docs/{name}.md", "code", lineterm="", n=0):
            click.echo(line)
        return False
    return True


def _workspace_plugins() -> Iterator[Entry]:
    """What this repository's own packages register; whatever else is installed here does not belong into its pages."""
    registry: PluginRegistry = load_plugins()
    ours = {file.parent.name for file in ROOT.glob("inferflux-*/pyproject.toml")}
    missing = ours - {entry.distribution.name for entry in registry}
    if missing:
        raise ConfigError(f"not installed, or nothing registered by: {', '.join(sorted(missing))}; run `make`")
    return (entry for entry in registry if entry.distribution.name in ours)


def _plugin_path(entry: Entry) -> tuple[str, ...]:
    """Where the configuration has the settings of a plugin."""
    match entry.kind:
        case "backend":
            return ("backends", entry.registration.name)
        case "scheduler":
            return ("engine", "scheduler_settings")
        case "proposer":
            return ("engine", "speculative", "settings")
        case "auth provider":
            return ("auth", "settings", entry.registration.name)
    raise ConfigError(
        f"plugins of the kind {entry.kind!r} have no place for settings in the configuration; {entry.distribution} has one"
    )


def _plugin_variable(key: SettingKey) -> str | None:
    """Environment variables reach only names in small letters, without the separator."""
    reachable = all(part == part.lower() and part.isidentifier() and "__" not in part for part in key.path)
    return key.variable if reachable else None


def _settings_table(settings: Iterable[tuple[str, str | None, FieldInfo]]) -> str:
    rows = [
        (f"`{key}`", _type_text(field), _default_text(field), f"`{variable}`" if variable else "–", field.description or "")
        for key, variable, field in settings
    ]
    return _table(("Key", "Type", "Default", "Environment", "Meaning"), rows)


def _type_text(field: FieldInfo) -> str:
    text = " or ".join(_words(member) for member in alternatives(field.annotation))
    limits = [limit for constraint in field.metadata if (limit := _limit(constraint))]
    if limits:
        text += f" {' and '.join(limits)}"
    return f"{text}, or null" if accepts_none(field.annotation) and field.annotation is not Any else text


def _limit(constraint: object) -> str | None:
    match constraint:
        case Ge(ge=value):
            return f"≥ {value}"
        case Gt(gt=value):
            return f"> {value}"
        case Le(le=value):
            return f"≤ {value}"
        case Lt(lt=value):
            return f"< {value}"
    return None


def _words(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _words(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if item_type(annotation) is not None:
        return f"list of {_words(item_type(annotation))}"
    if value_type(annotation) is not None:
        return "mapping"
    if as_group(annotation) is not None:
        return "mappings"
    name = getattr(annotation, "__name__", str(annotation))
    return _WORDS.get(name, name)


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return f"`{_plain(field.get_default(call_default_factory=True))}`"


def _plain(value: Any) -> str:
    if isinstance(value, BaseModel):
        changed = ", ".join(f"{name}: {_plain(item)}" for name, item in value if name in value.model_fields_set)
        return f"{{{changed}}}"
    if isinstance(value, frozenset):
        value = sorted(value)  # a set has no order, and the page must be the same each time
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_plain, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _doc(function: Callable[..., Any]) -> str:
    text = inspect.getdoc(function)
    if not text:
        raise ConfigError(f"the hook {function.__name__} has no docstring; write one that is a complete small plugin")
    return text


def _with_fences(docstring: str) -> str:
    """The docstring as Markdown: its indented part, which is last, becomes a code block."""
    prose, _, code = docstring.partition("\n\n    ")
    return f"{prose}\n\n```python\n{inspect.cleandoc(code)}\n```" if code else prose


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *(map(_cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(text: str) -> str:
    """The text without what would end the cell or begin an HTML tag; code between backticks stays as it is."""
    return re.sub(r"`[^`]*`|<", lambda match: "&lt;" if match[0] == "<" else match[0], text).replace("|", "\\|")


def _page(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    main()
