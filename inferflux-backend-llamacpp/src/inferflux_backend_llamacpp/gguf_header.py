"""What a checked GGUF file says about itself. Made by `gguf.read_gguf` and `gguf.read_split`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from inferflux_backend_llamacpp.gguf_cursor import open_cursor
from inferflux_backend_llamacpp.gguf_types import BOOL, FILE_TYPE_GUESSED, FILE_TYPES, SCALARS, STRING


@dataclass(frozen=True, slots=True)
class GGUFArray:
    """An array that stays in the file until `read` is called; its bounds are already checked.

    Attributes:
        path: file it lies in.
        offset: bytes from the beginning of the file to its first item.
        item_type: value type of the items: a key of `gguf_types.SCALARS`, or `gguf_types.STRING`.
        length: number of items.
    """

    path: str
    offset: int
    item_type: int
    length: int

    def __len__(self) -> int:
        return self.length

    def read(self) -> list[int | float] | list[bool] | list[str]:
        """The items, read from the file at each call. Invalid UTF-8 in strings becomes U+FFFD.

        Raises:
            ModelFileError: the file is gone or has changed since its header was checked.
        """
        with open_cursor(self.path, self.offset) as cursor:
            if self.item_type == STRING:
                return [text.decode("utf-8", "replace") for text in cursor.strings(self.length, "an array of strings")]
            numbers = cursor.numbers(SCALARS[self.item_type], self.length, "an array")
            return [bool(number) for number in numbers] if self.item_type == BOOL else numbers


Value = int | float | bool | str | GGUFArray


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what it looks like.

    Attributes:
        shape: elements per dimension, the fastest-varying first, as GGUF writes them.
        type: name of the packing, e.g. `Q4_1`.
        offset: bytes from the beginning of its file.
        nbytes: bytes it takes.
        shard: index of its file in the paths given to `read_split`; 0 for a model in one file.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int
    shard: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """A checked header.

    Attributes:
        version: 2 or 3.
        metadata: all keys; arrays are handles that read on demand. After `read_split` those of the first shard.
        tensors: in file order. After `read_split` those of all shards.
    """

    version: int
    metadata: Mapping[str, Value]
    tensors: tuple[TensorInfo, ...]

    @property
    def architecture(self) -> str:
        """Family of the model as llama.cpp calls it, e.g. `llama`."""
        return self.text("general.architecture") or ""

    @property
    def context_length(self) -> int:
        """Tokens that the model was trained for."""
        return self.integer(f"{self.architecture}.context_length") or 0

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        return len(tokens) if isinstance(tokens, GGUFArray) else 0

    @property
    def name(self) -> str | None:
        """The name that its makers gave it."""
        return self.text("general.name")

    @property
    def chat_template(self) -> str | None:
        """The model's own Jinja template: text from a stranger, to be rendered in the sandbox only."""
        return self.text("tokenizer.chat_template")

    @property
    def parameter_count(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def file_type(self) -> str:
        """Name of the quantisation, e.g. `Q4_K_M`; where the file names none, the packing of most of its bytes."""
        number = self.integer("general.file_type")
        if number is not None and (known := FILE_TYPES.get(number & ~FILE_TYPE_GUESSED)) is not None:
            return known
        sizes: dict[str, int] = {}
        for tensor in self.tensors:
            sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.nbytes
        return max(sizes, key=lambda packing: sizes[packing], default="unknown")

    def text(self, key: str) -> str | None:
        """The value of a key that is a string, else None."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    def integer(self, key: str) -> int | None:
        """The value of a key that is an integer, else None."""
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None
