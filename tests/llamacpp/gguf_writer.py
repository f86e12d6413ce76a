"""Writes tiny GGUF files, sound ones and, on request, damaged ones."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_LAYOUTS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}

# packing -> (number, elements of a block, bytes of a block)
PACKINGS = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q8_0": (8, 32, 34)}


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


@dataclass
class Array:
    """A typed array as a value."""

    item_type: int
    items: Sequence[Any]


@dataclass
class Raw:
    """Bytes to put in place of a value, under a type number of one's choice."""

    type_number: int
    data: bytes


@dataclass
class Tensor:
    """One tensor; `offset` None puts it behind the one before, `type_number` None is the packing's, `data` None is zeros."""

    name: str | bytes
    shape: tuple[int, ...]
    packing: str = "F32"
    offset: int | None = None
    type_number: int | None = None
    data: bytes | None = None

    @property
    def nbytes(self) -> int:
        _, block, size = PACKINGS[self.packing]
        count = 1
        for dimension in self.shape:
            count *= dimension
        return count // block * size


VOCABULARY = ("<s>", "</s>", "a", "b")

METADATA: dict[str, tuple[int, Any]] = {
    "general.architecture": (STRING, "llama"),
    "general.name": (STRING, "Tiny"),
    "general.file_type": (U32, 2),
    "llama.context_length": (U32, 128),
    "llama.rope.freq_base": (F32, 10000.0),
    "tokenizer.ggml.model": (STRING, "gpt2"),
    "tokenizer.ggml.add_bos_token": (BOOL, True),
    "tokenizer.ggml.tokens": (ARRAY, Array(STRING, VOCABULARY)),
    "tokenizer.ggml.token_type": (ARRAY, Array(I32, (3, 3, 1, 1))),
    "tokenizer.ggml.scores": (ARRAY, Array(F32, (0.0, 0.0, -1.0, -2.0))),
    "tokenizer.chat_template": (STRING, "{{ messages[0].content }}"),
}

TENSORS = (
    Tensor("token_embd.weight", (32, 4), "Q4_0"),
    Tensor("blk.0.attn_q.weight", (32, 2), "F16"),
    Tensor("output_norm.weight", (32,), "F32"),
)


@dataclass
class Model:
    """A GGUF file to be: change what the test is about, then `write` it."""

    metadata: dict[Any, tuple[int, Any]] = field(default_factory=lambda: dict(METADATA))
    tensors: list[Tensor] = field(default_factory=lambda: list(TENSORS))
    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_keys: int | None = None
    extra_keys: list[tuple[str, int, Any]] = field(default_factory=list)
    alignment: int = 32

    def encode(self) -> bytes:
        keys = [(key, kind, value) for key, (kind, value) in self.metadata.items()] + self.extra_keys
        head = self.magic + struct.pack(
            "<IQQ",
            self.version,
            len(self.tensors) if self.n_tensors is None else self.n_tensors,
            len(keys) if self.n_keys is None else self.n_keys,
        )
        head += b"".join(text(key) + _value(kind, value) for key, kind, value in keys)
        data = b""
        for tensor in self.tensors:
            offset = len(data) if tensor.offset is None else tensor.offset
            number = PACKINGS[tensor.packing][0] if tensor.type_number is None else tensor.type_number
            head += text(tensor.name) + struct.pack("<I", len(tensor.shape))
            head += b"".join(struct.pack("<Q", dimension) for dimension in tensor.shape)
            head += struct.pack("<IQ", number, offset)
            if tensor.offset is None:
                data += self._pad(bytes(min(tensor.nbytes, 1 << 20)) if tensor.data is None else tensor.data)
        return self._pad(head) + data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.encode())
        return path

    def _pad(self, data: bytes) -> bytes:
        return data + bytes(-len(data) % self.alignment)


def _value(kind: int, value: Any) -> bytes:
    if isinstance(value, Raw):
        return struct.pack("<I", value.type_number) + value.data
    if kind == ARRAY:
        items = b"".join(_item(value.item_type, item) for item in value.items)
        return struct.pack("<IIQ", ARRAY, value.item_type, len(value.items)) + items
    return struct.pack("<I", kind) + _item(kind, value)


def _item(kind: int, value: Any) -> bytes:
    return text(value) if kind == STRING else struct.pack("<" + _LAYOUTS[kind], value)


def write_split(folder: Path, name: str, shards: Sequence[Sequence[Tensor]], **changes: Any) -> list[Path]:
    """Write a split model: all keys in the first shard, as llama.cpp's gguf-split does.

    Args:
        changes: `count`, `numbers` or `total` to write into the split keys instead of the right ones.
    """
    paths = []
    total = changes.get("total", sum(map(len, shards)))
    for index, tensors in enumerate(shards):
        numbers = changes.get("numbers", range(len(shards)))
        split = {
            "split.no": (U16, numbers[index]),
            "split.count": (U16, changes.get("count", len(shards))),
            "split.tensors.count": (I32, total),
        }
        model = Model(metadata={**(METADATA if index == 0 else {}), **split}, tensors=list(tensors))
        paths.append(model.write(folder / f"{name}-{index + 1:05d}-of-{len(shards):05d}.gguf"))
    return paths
