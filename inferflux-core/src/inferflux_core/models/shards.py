"""Names of files that are parts of one model: `name-00001-of-00003.gguf`, and the same for safetensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

GGUF_SUFFIX = ".gguf"
SAFETENSORS_SUFFIX = ".safetensors"

_SHARD = re.compile(
    r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf|\.safetensors)", re.IGNORECASE | re.DOTALL
)


@dataclass(frozen=True, slots=True)
class ShardName:
    """The name of one part.

    Attributes:
        stem: what all parts have in common, with folders if there are any.
        number: 1 for the first part.
        count: number of parts.
        suffix: with its dot.
    """

    stem: str
    number: int
    count: int
    suffix: str = GGUF_SUFFIX

    @classmethod
    def parse(cls, name: str) -> ShardName | None:
        """None if the name is not that of a part."""
        match = _SHARD.fullmatch(name)
        if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
            return None
        return cls(match["stem"], int(match["number"]), int(match["count"]), match["suffix"])

    @property
    def all(self) -> tuple[str, ...]:
        """The names of all parts, the first one first."""
        return tuple(f"{self.stem}-{number:05d}-of-{self.count:05d}{self.suffix}" for number in range(1, self.count + 1))


def gguf_models(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The models among file names: name of the file to open -> names of all files it should have, in order.

    Projectors for images and importance matrices are GGUF files too, but no models; they are left out.
    """
    models: dict[str, tuple[str, ...]] = {}
    for name in sorted(names):
        base = name.rpartition("/")[2].lower()
        if not base.endswith(GGUF_SUFFIX) or "mmproj" in base or "imatrix" in base:
            continue
        shard = ShardName.parse(name)
        files = (name,) if shard is None else shard.all
        models[files[0]] = files
    return models


def safetensors_weights(names: Iterable[str]) -> tuple[str, ...]:
    """The files that the weights among these names should have. Some repositories hold the same weights under two names."""
    weights = sorted(name for name in names if name.endswith(SAFETENSORS_SUFFIX))
    files: dict[str, None] = {}
    for name in [name for name in weights if name.startswith("model")] or weights:
        shard = ShardName.parse(name)
        files.update(dict.fromkeys((name,) if shard is None else shard.all))
    return tuple(files)


def model_stem(name: str) -> str:
    """A file's name without folders, part number and suffix."""
    shard = ShardName.parse(name)
    stem = shard.stem if shard is not None else name[: -len(GGUF_SUFFIX)] if name.lower().endswith(GGUF_SUFFIX) else name
    return stem.replace("\\", "/").rpartition("/")[2]
