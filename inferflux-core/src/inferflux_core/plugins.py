"""Finds, loads and looks up plugins. Fails closed: anything wrong with an installed plugin stops the start and names it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pluggy
from pydantic import BaseModel, ValidationError

from inferflux_core import hookspecs
from inferflux_core.errors import ConfigError, PluginError
from inferflux_core.interfaces import Registration

# kind of part, as people read it -> the hook that registers it
KINDS: Mapping[str, str] = MappingProxyType(
    {
        "backend": "inferflux_backends",
        "scheduler": "inferflux_schedulers",
        "proposer": "inferflux_proposers",
        "model source": "inferflux_model_sources",
        "auth provider": "inferflux_auth_providers",
    }
)


@dataclass(frozen=True, slots=True)
class Distribution:
    """The installed package that a plugin came from."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One registration and where it came from."""

    kind: str
    registration: Registration[Any]
    distribution: Distribution


@dataclass(slots=True)
class PluginRegistry:
    """Everything that the installed plugins offer, by kind and name."""

    entries: dict[str, dict[str, Entry]] = field(default_factory=lambda: {kind: {} for kind in KINDS})

    def add(self, kind: str, registration: Registration[Any], distribution: Distribution) -> None:
        """Raises PluginError if the name is taken."""
        names = self.entries[kind]
        if (other := names.get(registration.name)) is not None:
            raise PluginError(
                f"two plugins register the {kind} {registration.name!r}: {other.distribution} and {distribution}; "
                f"uninstall one of them, or block it with plugins.blocked in the configuration"
            )
        names[registration.name] = Entry(kind, registration, distribution)

    def get(self, kind: str, name: str) -> Entry:
        """Raises PluginError, with the names there are, if nobody registered this one."""
        try:
            return self.entries[kind][name]
        except KeyError:
            known = ", ".join(sorted(self.entries[kind])) or "none"
            raise PluginError(
                f"no installed plugin registers {_article(kind)} {kind} named {name!r} (there are: {known}); "
                f"correct the name or install the package that provides it"
            ) from None

    def settings(self, kind: str, name: str, values: Mapping[str, Any]) -> BaseModel:
        """The plugin's validated settings. Raises PluginError naming the distribution and each wrong key."""
        entry = self.get(kind, name)
        try:
            return entry.registration.settings.model_validate(dict(values))
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or name}: {e['msg']}" for e in error.errors())
            raise PluginError(f"settings of {kind} {name!r} ({entry.distribution}): {problems}") from error

    def create(self, kind: str, name: str, values: Mapping[str, Any], *args: Any) -> Any:
        """Call the registered factory with its validated settings and `args`.

        Raises:
            PluginError: unknown name, bad settings, or the factory raised something unexpected.
            ConfigError: the factory's own, such as a model file that it cannot use.
        """
        settings = self.settings(kind, name, values)
        entry = self.get(kind, name)
        try:
            return entry.registration.factory(settings, *args)
        except ConfigError:
            raise  # says by itself what is wrong, and what to do
        except Exception as error:
            raise PluginError(
                f"{kind} {name!r} of {entry.distribution} failed to start: {type(error).__name__}: {error}"
            ) from error

    def __iter__(self) -> Iterator[Entry]:
        for names in self.entries.values():
            yield from (names[name] for name in sorted(names))


def load_plugins(blocked: Iterable[str] = ()) -> PluginRegistry:
    """Load every installed plugin except those of `blocked` distributions, and collect what they register.

    Raises:
        PluginError: an import failed, a hook is unknown, a hook raised or returned something else than registrations, or
            two plugins use one name. The message names the distribution.
    """
    blocked_names = {_normalised(name) for name in blocked}
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    registry = PluginRegistry()
    for entry_point in sorted(importlib.metadata.entry_points(group=hookspecs.PROJECT), key=lambda e: e.name):
        distribution = _distribution(entry_point)
        if _normalised(distribution.name) in blocked_names:
            continue
        try:
            plugin = entry_point.load()
        except (Exception, SystemExit) as error:  # a plugin must not end the program either
            raise PluginError(
                f"plugin {entry_point.value!r} of {distribution} cannot be imported: {type(error).__name__}: {error}; "
                f"repair or uninstall {distribution.name}, or block it with plugins.blocked in the configuration"
            ) from error
        _register(manager, registry, plugin, entry_point.name, distribution)
    return registry


def _register(
    manager: pluggy.PluginManager, registry: PluginRegistry, plugin: object, name: str, distribution: Distribution
) -> None:
    try:
        manager.register(plugin, name=f"{distribution.name}:{name}")
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        raise PluginError(f"plugin {name!r} of {distribution} does not fit the hooks: {error}") from error
    for kind, hook in KINDS.items():
        caller = manager.subset_hook_caller(hook, [other for other in manager.get_plugins() if other is not plugin])
        origin = f"hook {hook} of plugin {name!r} ({distribution})"
        try:
            # A hook may be a generator: its body runs only here.
            results = [list(result) if _is_several(result) else result for result in caller()]
        except Exception as error:
            raise PluginError(f"{origin} raised {type(error).__name__}: {error}") from error
        for result in results:
            if not isinstance(result, list):
                raise PluginError(f"{origin} returned {result!r}; it must return Registration objects, in a list")
            for registration in result:
                if problem := _unfit(registration):
                    raise PluginError(f"{origin} returned {registration!r}; {problem}")
                registry.add(kind, registration, distribution)


def _article(kind: str) -> str:
    return "an" if kind[0] in "aeiou" else "a"


def _is_several(result: object) -> bool:
    return isinstance(result, Iterable) and not isinstance(result, str | bytes | Mapping)


def _unfit(registration: object) -> str | None:
    """What is wrong with something that a hook returned; None if it can be used."""
    if not isinstance(registration, Registration):
        return "it must return Registration objects"
    if not isinstance(registration.name, str) or not registration.name:
        return "a registration must have a name, which is a text"
    if not callable(registration.factory):
        return "a registration must have a factory, which is callable"
    if not (isinstance(registration.settings, type) and issubclass(registration.settings, BaseModel)):
        return "the settings of a registration must be a pydantic model"
    return None


def _distribution(entry_point: importlib.metadata.EntryPoint) -> Distribution:
    if entry_point.dist is None:
        return Distribution(entry_point.value, "unknown version")
    return Distribution(entry_point.dist.name, entry_point.dist.version)


def _normalised(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
