"""Reads and checks the header of a GGUF file in pure Python, before any native code sees it.

    magic "GGUF" | version u32 | number of tensors u64 | number of keys u64
    keys          name, type, value
    tensors       name, number of dimensions, dimensions, type, offset into the data
    padding       up to a multiple of general.alignment
    data

What llama.cpp would stumble over is refused here with the exact fault.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from types import MappingProxyType

from inferflux_backend_llamacpp.gguf_cursor import Cursor, fail, open_cursor
from inferflux_backend_llamacpp.gguf_header import GGUFArray, GGUFHeader, TensorInfo, Value
from inferflux_backend_llamacpp.gguf_types import ARRAY, BOOL, REMOVED_TENSOR_TYPES, SCALARS, STRING, TENSOR_TYPES
from inferflux_core.errors import ModelFileError

__all__ = ["GGUFArray", "GGUFHeader", "TensorInfo", "read_gguf", "read_split"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_ENTRIES = 65_536  # keys, and tensors; the largest published models have a few thousand
_MAX_ARRAY_STRINGS = 1 << 23  # vocabularies end at about a million; more would only cost time
_MAX_KEY_BYTES = 65_535  # the specification's limit
_MAX_TENSOR_NAME_BYTES = 63  # GGML_MAX_NAME less its final zero
_MAX_DIMENSIONS = 4
_MAX_ELEMENTS = 2**63 - 1  # ggml counts them in an int64
_DEFAULT_ALIGNMENT = 32
_MIN_KEY_BYTES = 8 + 1 + 4 + 1  # length, one letter, type, one byte
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # length, number of dimensions, one dimension, type, offset


def read_gguf(path: str | os.PathLike[str]) -> GGUFHeader:
    """Read and check the header of a model in one file, or of the first shard of a split one.

    Raises:
        ModelFileError: missing or unreadable; not GGUF, another version or byte order; counts, lengths or offsets that
            the file is too short for; unknown types, nested arrays; duplicate names; bad shapes, alignment or overlap;
            required keys missing or of another type. The message names the exact fault.
    """
    path = os.fspath(path)
    header = _parse(path, shard=0)
    if number := header.integer("split.no"):
        fail(path, f"it is part {number + 1} of a split model; name the first part, which ends in -00001-of-N.gguf")
    _check_model(path, header)
    if not header.tensors and (header.integer("split.count") or 1) == 1:
        fail(path, "it holds no tensors: it is a vocabulary, not a model")
    return header


def read_adapter(path: str | os.PathLike[str]) -> GGUFHeader:
    """Read and check the header of a LoRA adapter.

    Raises:
        ModelFileError: as `read_gguf`, and when the file is something else than a LoRA adapter.
    """
    path = os.fspath(path)
    header = _parse(path, shard=0)
    if header.text("general.type") != "adapter" or header.text("adapter.type") != "lora":
        fail(path, "it is not a LoRA adapter: keys 'general.type' and 'adapter.type' do not say so")
    if not header.architecture:
        fail(path, "key 'general.architecture' is missing")
    if not header.tensors:
        fail(path, "it holds no tensors")
    return header


def read_split(paths: Sequence[str | os.PathLike[str]]) -> GGUFHeader:
    """Read and check all shards of a model, in order. A model in one file is a single shard.

    Returns:
        the first shard's header, with the tensors of all.

    Raises:
        ModelFileError: as `read_gguf`; or shards are missing, in another order, or do not belong together.
    """
    if not paths:
        raise ModelFileError("the model has no files; name a .gguf file")
    first = read_gguf(paths[0])
    tensors: dict[str, TensorInfo] = {}
    for index, path in enumerate([os.fspath(path) for path in paths]):
        shard = first if index == 0 else _parse(path, shard=index)
        _check_shard(path, shard, index, len(paths))
        for tensor in shard.tensors:
            if tensor.name in tensors:
                fail(path, f"tensor {tensor.name!r} is in part {tensors[tensor.name].shard + 1} as well")
            tensors[tensor.name] = tensor
    expected = first.integer("split.tensors.count")
    if expected is not None and expected != len(tensors):
        fail(
            os.fspath(paths[0]),
            f"split.tensors.count is {expected}, but the {len(paths)} parts hold {len(tensors)} tensors; "
            f"fetch all parts again from one place",
        )
    return GGUFHeader(first.version, first.metadata, tuple(tensors.values()))


def _check_shard(path: str, header: GGUFHeader, index: int, count: int) -> None:
    stated_count = header.metadata.get("split.count", 1)
    if stated_count != count:
        fail(
            path,
            f"split.count is {stated_count!r}, but {count} parts were given; name the first part and keep all together",
        )
    stated = header.metadata.get("split.no", 0)
    if stated != index:
        fail(path, f"split.no is {stated!r}, but it was given as part {index} (from 0); the parts are mixed up")


def _parse(path: str, *, shard: int) -> GGUFHeader:
    with open_cursor(path) as cursor:
        if cursor.size == 0:
            cursor.fail("it is empty; fetch the file again")
        if (magic := cursor.take(4, "the magic")) != _MAGIC:
            cursor.fail(f"it begins with {magic!r} instead of {_MAGIC!r}")
        _check_version(cursor, version := cursor.u32("the version"))
        n_tensors = cursor.u64("the number of tensors")
        n_keys = cursor.u64("the number of keys")
        for count, smallest, noun in ((n_tensors, _MIN_TENSOR_BYTES, "tensors"), (n_keys, _MIN_KEY_BYTES, "keys")):
            if count > min(_MAX_ENTRIES, cursor.size // smallest):
                cursor.fail(f"it claims {count} {noun}, more than {cursor.size} bytes can hold or any model has")
        metadata: dict[str, Value] = {}
        for _ in range(n_keys):
            key, value = _key(cursor)
            if key in metadata:
                cursor.fail(f"key {key!r} is there twice")
            metadata[key] = value
        alignment = _alignment(cursor, metadata)
        tensors = [_tensor(cursor, shard) for _ in range(n_tensors)]
        data = -(-cursor.position // alignment) * alignment
        return GGUFHeader(version, MappingProxyType(metadata), _place(cursor, tensors, data, alignment))


def _check_version(cursor: Cursor, version: int) -> None:
    if version in _VERSIONS:
        return
    if version & 0xFFFF == 0 and version != 0:
        cursor.fail("it is big-endian, and this build reads little-endian files; convert the model again on this machine")
    if version == 1:
        cursor.fail("version 1 is no longer supported; convert the model again with a current llama.cpp")
    cursor.fail(f"version {version} is unknown, 2 and 3 are supported")


def _key(cursor: Cursor) -> tuple[str, Value]:
    raw = cursor.string("a key", limit=_MAX_KEY_BYTES)
    if not raw:
        cursor.fail(f"a key before byte {cursor.position} is empty")
    try:
        key = raw.decode("utf-8")
    except UnicodeDecodeError:
        cursor.fail(f"key {raw[:80]!r} is not UTF-8")
    return key, _value(cursor, key)


def _value(cursor: Cursor, key: str) -> Value:
    value_type = cursor.u32(f"the type of key {key!r}")
    if value_type == STRING:
        return cursor.string(f"the value of key {key!r}").decode("utf-8", "replace")
    if value_type == ARRAY:
        return _array(cursor, key)
    if (layout := SCALARS.get(value_type)) is None:
        cursor.fail(f"key {key!r} has the unknown value type {value_type}")
    value = cursor.unpack(layout, f"the value of key {key!r}")
    if value_type == BOOL:
        if value not in (0, 1):
            cursor.fail(f"key {key!r} is a bool of value {value}")
        return bool(value)
    return value


def _array(cursor: Cursor, key: str) -> GGUFArray:
    item_type = cursor.u32(f"the item type of array {key!r}")
    length = cursor.u64(f"the length of array {key!r}")
    array = GGUFArray(cursor.path, cursor.position, item_type, length)
    what = f"array {key!r} of {length} items"
    if item_type == ARRAY:
        cursor.fail(f"array {key!r} holds arrays; nested arrays are not supported")
    if item_type == STRING:
        if length > _MAX_ARRAY_STRINGS:
            cursor.fail(f"array {key!r} claims {length} strings, more than {_MAX_ARRAY_STRINGS}")
        cursor.skip_strings(length, what)
    elif (layout := SCALARS.get(item_type)) is not None:
        cursor.skip(length * layout.size, what)
    else:
        cursor.fail(f"array {key!r} has the unknown item type {item_type}")
    return array


def _alignment(cursor: Cursor, metadata: dict[str, Value]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or isinstance(alignment, bool):
        cursor.fail("general.alignment is not an integer")
    if alignment <= 0 or alignment & (alignment - 1):
        cursor.fail(f"general.alignment is {alignment}, not a power of two")
    return alignment


def _tensor(cursor: Cursor, shard: int) -> TensorInfo:
    """The description of one tensor; its offset still counts from the beginning of the data."""
    raw = cursor.string("a tensor's name", limit=_MAX_TENSOR_NAME_BYTES)
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        cursor.fail(f"tensor name {raw!r} is not UTF-8")
    what = f"tensor {name!r}"
    n_dims = cursor.u32(f"the number of dimensions of {what}")
    if not 1 <= n_dims <= _MAX_DIMENSIONS:
        cursor.fail(f"{what} has {n_dims} dimensions, allowed are 1 to {_MAX_DIMENSIONS}")
    shape = tuple(cursor.u64(f"the shape of {what}") for _ in range(n_dims))
    number = cursor.u32(f"the type of {what}")
    offset = cursor.u64(f"the offset of {what}")
    if 0 in shape:
        cursor.fail(f"{what} has shape {shape}; no dimension may be 0")
    if (elements := math.prod(shape)) > _MAX_ELEMENTS:
        cursor.fail(f"{what} has shape {shape}, whose number of elements overflows 64 bits")
    if number in REMOVED_TENSOR_TYPES:
        cursor.fail(f"{what} has type {number}, which llama.cpp has removed; quantise the model again")
    if (packing := TENSOR_TYPES.get(number)) is None:
        cursor.fail(f"{what} has the unknown type {number}; the file is damaged or newer than this llama.cpp")
    if shape[0] % packing.block_size:
        cursor.fail(f"{what} has rows of {shape[0]} elements, no multiple of the {packing.block_size} of {packing.name}")
    return TensorInfo(name, shape, packing.name, offset, elements // packing.block_size * packing.block_bytes, shard)


def _place(cursor: Cursor, tensors: list[TensorInfo], data: int, alignment: int) -> tuple[TensorInfo, ...]:
    """Check that the tensors lie apart inside the file; make offsets count from its beginning instead of byte `data`."""
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            cursor.fail(f"tensor {tensor.name!r} is there twice")
        names.add(tensor.name)
        if tensor.offset % alignment:
            cursor.fail(f"tensor {tensor.name!r} has offset {tensor.offset}, no multiple of the alignment {alignment}")
        end = data + tensor.offset + tensor.nbytes
        if end > cursor.size:
            cursor.fail(
                f"tensor {tensor.name!r} ends at byte {end}, but the file ends at byte {cursor.size}; "
                f"it is damaged or truncated, fetch it again"
            )
    by_offset = sorted(tensors, key=lambda tensor: tensor.offset)
    for left, right in itertools.pairwise(by_offset):
        if left.offset + left.nbytes > right.offset:
            cursor.fail(f"tensors {left.name!r} and {right.name!r} overlap")
    return tuple(TensorInfo(t.name, t.shape, t.type, data + t.offset, t.nbytes, t.shard) for t in tensors)


def _check_model(path: str, header: GGUFHeader) -> None:
    """The keys without which llama.cpp cannot load, and the sizes that must agree with the vocabulary."""
    architecture = header.metadata.get("general.architecture")
    if architecture is None:
        fail(path, "key 'general.architecture' is missing")
    if not isinstance(architecture, str) or not architecture:
        fail(path, "key 'general.architecture' is not a text")
    length_key = f"{architecture}.context_length"
    if length_key not in header.metadata:
        fail(path, f"key {length_key!r} is missing")
    if (header.integer(length_key) or 0) <= 0:
        fail(path, f"key {length_key!r} is not a positive integer")
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        fail(path, "key 'tokenizer.ggml.tokens' is missing: the file has no vocabulary")
    if not isinstance(tokens, GGUFArray) or tokens.item_type != STRING or not tokens.length:
        fail(path, "key 'tokenizer.ggml.tokens' is not an array of texts")
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        values = header.metadata.get(key)
        if values is None:
            continue
        if not isinstance(values, GGUFArray) or values.item_type == STRING:
            fail(path, f"key {key!r} is not an array of numbers")
        if values.length != tokens.length:
            fail(path, f"key {key!r} has {values.length} items for {tokens.length} tokens")
    # <architecture>.vocab_size is not compared: llama.cpp goes by the tokens, and published files differ harmlessly
    for tensor in header.tensors:
        if tensor.name == "token_embd.weight" and tensor.shape[-1] != tokens.length:
            fail(path, f"tensor 'token_embd.weight' has shape {tensor.shape} for {tokens.length} tokens")
    for key in ("split.no", "split.count", "split.tensors.count"):
        if key in header.metadata and header.integer(key) is None:
            fail(path, f"key {key!r} is not an integer")
    if header.text("tokenizer.chat_template") is None and "tokenizer.chat_template" in header.metadata:
        fail(path, "key 'tokenizer.chat_template' is not a text")
