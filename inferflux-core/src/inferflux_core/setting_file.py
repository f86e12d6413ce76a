"""Reads YAML strictly: no object tags, no duplicate keys, keys are text, and every key knows its line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from inferflux_core.errors import ConfigError
from inferflux_core.setting_keys import SettingPath, dotted
from inferflux_core.setting_layers import Layer

_MAPPING, _SEQUENCE = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"


@dataclass(slots=True)
class Document:
    """One YAML document.

    Attributes:
        name: the file's name, for messages.
        value: what it holds; None if it is empty.
        lines: line of each key and list item, counted from 1.
        problems: what is wrong with it, one line each, with the place.
    """

    name: str
    value: Any = None
    lines: dict[SettingPath, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_file(path: Path) -> tuple[Layer, list[str]]:
    """The settings of a file, and what is wrong with it. An unreadable file gives an empty layer and its problem."""
    empty = Layer(label=f"file {path}", values={}, file=str(path))
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        return empty, [f"cannot read the configuration file {str(path)!r}: {error.strerror}; check the path"]
    except UnicodeDecodeError as error:
        return empty, [f"{path}: not UTF-8 text at byte {error.start}; save the file as UTF-8"]
    document = read_yaml(text, str(path))
    if document.value is None:
        return empty, document.problems
    if not isinstance(document.value, dict):
        cure = "write keys and values, such as `server: {port: 8080}`"
        return empty, [*document.problems, f"{path}:1: the file must hold a mapping at its top level; {cure}"]
    layer = Layer(label=f"file {path}", values=document.value, lines=document.lines, file=str(path))
    return layer, document.problems


def read_yaml(text: str, name: str) -> Document:
    """Parse one YAML document; everything wrong with it is in its `problems`."""
    document = Document(name)
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None:
            document.value = _Reader(loader, document).read(node, (), ())
    except yaml.MarkedYAMLError as error:
        # The problem's own words, but not the snippet of the file that comes with it: it may show a secret.
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        document.problems.append(f"{name}:{line}: not valid YAML: {error.problem}")
    except yaml.YAMLError:
        document.problems.append(f"{name}: not valid YAML: it holds control characters; remove them")
    except RecursionError:
        document.problems.append(f"{name}: nested too deeply")
    except _Refused as error:
        document.problems.append(str(error))
    finally:
        if loader is not None:
            loader.dispose()
    return document


class _Refused(ConfigError):
    """The document cannot be read any further."""


@dataclass(slots=True)
class _Reader:
    """Turns nodes into values. Unlike PyYAML's own constructor it sees duplicate keys and keeps the lines."""

    loader: yaml.SafeLoader
    document: Document

    def read(self, node: yaml.Node, path: SettingPath, parents: tuple[yaml.Node, ...]) -> Any:
        if any(node is parent for parent in parents):
            raise _Refused(f"{self._place(node)}: an alias refers to something that contains it")
        self.document.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode) and node.tag == _MAPPING:
            return {key: self.read(value, (*path, key), (*parents, node)) for key, value in self._pairs(node, path)}
        if isinstance(node, yaml.SequenceNode) and node.tag == _SEQUENCE:
            return [self.read(item, (*path, index), (*parents, node)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        raise _Refused(f"{self._place(node)}: the tag {node.tag!r} is not allowed; write plain values, lists and mappings")

    def _pairs(self, node: yaml.MappingNode, path: SettingPath) -> Iterator[tuple[str, yaml.Node]]:
        seen: dict[str, int] = {}
        own_keys = [key for key, _ in node.value]
        # Puts the pairs of `<<: *anchor` in front, where the mapping's own pairs override them.
        self.loader.flatten_mapping(node)
        for key_node, value in node.value:
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                self.document.problems.append(
                    f"{self._place(key_node)}: a key must be text; put it in quotes if it is the name of something"
                )
                continue
            if any(key_node is own for own in own_keys):
                if key in seen:
                    self.document.problems.append(
                        f"{self._place(key_node)}: {dotted((*path, key))!r} is set twice, first in line {seen[key]}; "
                        f"remove one of them"
                    )
                seen[key] = line
            self.document.lines[(*path, key)] = line
            yield key, value

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            return self.loader.construct_object(node)
        except yaml.constructor.ConstructorError:
            raise _Refused(f"{self._place(node)}: the tag {node.tag!r} is not allowed; write plain values") from None
        except ValueError:
            kind = node.tag.rpartition(":")[2]
            raise _Refused(f"{self._place(node)}: not a valid {kind}; put it in quotes if it is text") from None

    def _place(self, node: yaml.Node) -> str:
        return f"{self.document.name}:{node.start_mark.line + 1}"
