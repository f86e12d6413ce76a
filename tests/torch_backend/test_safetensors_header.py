"""The header reader: what it tells of a sound file, and the exact fault of every damaged one."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferflux_backend_torch.safetensors_header import DTYPE_BYTES, read_header
from inferflux_core.errors import ModelFileError
from torch_backend.safetensors_writer import layout, write_raw, write_tensors

PER_EXAMPLE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)

Header = dict[str, Any]


def sound() -> Header:
    return layout({"a": ("F32", (2, 3)), "b": ("BF16", (4,))})


def test_a_sound_file_tells_where_its_tensors_lie(tmp_path: Path) -> None:
    header = {"b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}, "__metadata__": {"format": "pt"}}
    header["a"] = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    text = json.dumps(header).encode() + b"   "
    path = write_raw(tmp_path / "m.safetensors", text, bytes(32))
    read = read_header(path)
    begin = 8 + len(text)
    assert read.path == path
    assert read.metadata == {"format": "pt"}
    assert list(read.tensors) == ["a", "b"]  # by place in the data
    a, b = read.tensors.values()
    assert (a.name, a.dtype, a.shape, a.start, a.end, a.path) == ("a", "F32", (2, 3), begin, begin + 24, path)
    assert (b.name, b.dtype, b.shape, b.start, b.end, b.nbytes) == ("b", "BF16", (4,), begin + 24, begin + 32, 8)


def test_scalars_empty_tensors_and_files_without_tensors_are_sound(tmp_path: Path) -> None:
    read = read_header(write_tensors(tmp_path / "m", {"e": ("I64", (0, 5)), "s": ("F64", ()), "f": ("U8", (0,))}))
    assert {name: (entry.shape, entry.nbytes) for name, entry in read.tensors.items()} == {
        "e": ((0, 5), 0),
        "s": ((), 8),
        "f": ((0,), 0),
    }
    assert read_header(write_raw(tmp_path / "none", b"{}")).tensors == {}


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_every_known_dtype_is_also_known_to_the_reference(tmp_path: Path, dtype: str) -> None:
    safetensors = pytest.importorskip("safetensors")
    size = 3 * DTYPE_BYTES[dtype]
    header = {"x": {"dtype": dtype, "shape": [3], "data_offsets": [0, size]}}
    path = write_raw(tmp_path / "m", json.dumps(header).encode(), bytes(size))
    assert read_header(path).tensors["x"].nbytes == size
    [(name, info)] = safetensors.deserialize(path.read_bytes())
    assert (name, info["dtype"], info["shape"]) == ("x", dtype, [3])


def edit(name: str, field: str, value: object) -> Callable[[Header], None]:
    return lambda header: header[name].update({field: value})


def replace(name: str, value: object) -> Callable[[Header], None]:
    return lambda header: header.update({name: value})


def drop(name: str, field: str) -> Callable[[Header], None]:
    return lambda header: header[name].pop(field) and None


SIZES = "whole numbers from 0 to 9223372036854775807"
FAULTS: list[tuple[Callable[[Header], object], str]] = [
    (replace("a", 3), "tensor 'a' is described by 3 instead of an object"),
    (replace("__metadata__", {"format": 1}), "__metadata__ is not an object of texts"),
    (replace("__metadata__", []), "__metadata__ is not an object of texts"),
    (drop("a", "dtype"), "tensor 'a' has no 'dtype'"),
    (drop("a", "shape"), "tensor 'a' has no 'shape'"),
    (drop("b", "data_offsets"), "tensor 'b' has no 'data_offsets'"),
    (edit("b", "pickle", "x"), "tensor 'b' has the unknown field 'pickle'"),
    (edit("a", "dtype", "F31"), "tensor 'a' has the unknown dtype 'F31'; known are F64, F32, "),
    (edit("a", "dtype", ["F32"]), "tensor 'a' has the unknown dtype ['F32']"),
    (edit("a", "shape", 6), "tensor 'a' has the shape 6, not a list of at most 64 dimensions"),
    (edit("a", "shape", [1] * 65), "tensor 'a' has the shape [1, 1, 1, 1, 1, 1, 1, 1, ...], not a list"),
    (edit("a", "shape", [-2, -3]), f"tensor 'a' has the dimension -2; dimensions are {SIZES}"),
    (edit("a", "shape", [2.0, 3]), f"tensor 'a' has the dimension 2.0; dimensions are {SIZES}"),
    (edit("a", "shape", [True, 6]), "tensor 'a' has the dimension True; "),
    (edit("a", "shape", ["2", 3]), "tensor 'a' has the dimension '2'; "),
    (edit("a", "shape", [2**63]), "tensor 'a' has the dimension 9223372036854775808; "),
    (edit("a", "shape", [2**32, 2**30]), "tensor 'a' has the shape [4294967296, 1073741824], whose number of bytes overflows"),
    (edit("a", "shape", [2**62, 2**62, 0]), "whose number of bytes overflows 64 bits"),
    (edit("a", "shape", [2, 2]), "tensor 'a' takes 24 bytes, but F32 of shape [2, 2] takes 16"),
    (edit("a", "dtype", "F16"), "tensor 'a' takes 24 bytes, but F16 of shape [2, 3] takes 12"),
    (edit("a", "data_offsets", [0]), f"tensor 'a' has the data_offsets [0]; they are two {SIZES}"),
    (edit("a", "data_offsets", [0, 24, 24]), "tensor 'a' has the data_offsets [0, 24, 24]; "),
    (edit("a", "data_offsets", [-24, 0]), "tensor 'a' has the data_offsets [-24, 0]; "),
    (edit("a", "data_offsets", [0, 2**64]), "tensor 'a' has the data_offsets [0, 18446744073709551616]; "),
    (edit("a", "data_offsets", "024"), "tensor 'a' has the data_offsets '024'; "),
    (edit("a", "data_offsets", [24, 0]), "tensor 'a' ends at offset 0, before it begins at 24"),
    (edit("b", "data_offsets", [26, 34]), "truncated: tensor 'b' ends at byte {+34}, but the file ends at byte {+32}"),
    (edit("b", "data_offsets", [16, 24]), "tensor 'b' begins at byte {+16} and overlaps tensor 'a', which ends at byte {+24}"),
    (edit("b", "data_offsets", [0, 8]), "tensor 'a' begins at byte {+0} and overlaps tensor 'b', which ends at byte {+8}"),
    (lambda header: header.pop("a"), "bytes {+0} to {+24}, between the header and tensor 'b', belong to no tensor"),
    (lambda header: header.pop("b"), "bytes {+24} to {+32}, behind tensor 'a', belong to no tensor"),
    (lambda header: header.clear(), "bytes {+0} to {+32}, behind the header, belong to no tensor"),
    (
        lambda header: header.update(b={"dtype": "U8", "shape": [4], "data_offsets": [28, 32]}),
        "bytes {+24} to {+28}, between tensor 'a' and tensor 'b', belong to no tensor",
    ),
]


@pytest.mark.parametrize(("forge", "fault"), FAULTS, ids=[fault[:50] for _, fault in FAULTS])
def test_a_forged_header_is_refused_with_its_fault(tmp_path: Path, forge: Callable[[Header], object], fault: str) -> None:
    header = sound()
    forge(header)
    text = json.dumps(header).encode()
    path = write_raw(tmp_path / "m.safetensors", text, bytes(32))
    for offset in (0, 8, 16, 24, 28, 32, 34):
        fault = fault.replace(f"{{+{offset}}}", str(8 + len(text) + offset))
    with pytest.raises(ModelFileError) as refusal:
        read_header(path)
    assert str(refusal.value).startswith(f"{path}: not a usable safetensors file: ")
    assert fault in str(refusal.value)


RAW: list[tuple[bytes, str]] = [
    (b"", "it has 0 bytes, fewer than the 8 of the header's length"),
    (b"\x02\0\0", "it has 3 bytes, fewer than the 8 of the header's length"),
    ((2**63).to_bytes(8, "little") + b"{}", "its header claims 9223372036854775808 bytes, more than 100000000"),
    ((3).to_bytes(8, "little") + b"{}", "truncated: its header takes 3 bytes, but the file ends at byte 10"),
    (bytes(8), "its header begins with b'' instead of b'{'"),
    ((3).to_bytes(8, "little") + b" {}", "its header begins with b' ' instead of b'{'"),
    ((2).to_bytes(8, "little") + b"[]", "its header begins with b'[' instead of b'{'"),
    ((2).to_bytes(8, "little") + b"{]", "in its header, it is not JSON: "),
    ((4).to_bytes(8, "little") + b'{"\xff"', "in its header, it is not UTF-8 at byte 2"),
    ((2).to_bytes(8, "little") + b"{}x", "bytes 10 to 11, behind the header, belong to no tensor"),
]


@pytest.mark.parametrize(("content", "fault"), RAW)
def test_a_damaged_file_is_refused_with_its_fault(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelFileError) as refusal:
        read_header(path)
    assert fault in str(refusal.value)


def test_the_same_name_twice_is_refused(tmp_path: Path) -> None:
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    for text, key in ((f'{{"a":{entry},"a":{entry}}}', "a"), (f'{{"a":{entry[:-1]},"shape":[1]}}}}', "shape")):
        with pytest.raises(ModelFileError, match=f"in its header, the key '{key}' is there twice"):
            read_header(write_raw(tmp_path / "m", text.encode(), b"\0"))


@pytest.mark.parametrize("depth", [100, 900, 100_000])
def test_deep_nesting_is_refused(tmp_path: Path, depth: int) -> None:
    text = b'{"a":{"dtype":"U8","data_offsets":[0,1],"shape":' + b"[" * depth + b"]" * depth + b"}}"
    with pytest.raises(ModelFileError, match=r"nested (too deeply|more than 64 levels deep)"):
        read_header(write_raw(tmp_path / "m", text, b"\0"))


def test_a_header_that_would_take_much_memory_is_refused_before(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "m", b'{"a":[' + b"[]," * 6_000_000 + b"0]}")
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError, match="its header holds more than 4194304 values"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 80_000_000
    finally:
        tracemalloc.stop()


def test_a_message_stays_short_whatever_the_file_holds(tmp_path: Path) -> None:
    long = "x" * 100_000
    for header in ({long: {"dtype": long, "shape": [], "data_offsets": [0, 0]}}, {long: long}, {"a": {long: long}}):
        with pytest.raises(ModelFileError) as refusal:
            read_header(write_raw(tmp_path / "m", json.dumps(header).encode()))
        assert len(str(refusal.value)) < 1000


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, fault in (
        ("absent", "no such file"),
        (".", "not a regular file"),
        ("pipe", "not a regular file"),
        ("loop", "cannot be opened"),
        ("a\0b", "a path cannot hold a zero character"),
    ):
        with pytest.raises(ModelFileError, match=fault):
            read_header(tmp_path / name)


def accepts(path: Path) -> bool:
    try:
        read_header(path)
    except ModelFileError:
        return False
    return True


def reference_accepts(path: Path) -> bool:
    safetensors = pytest.importorskip("safetensors")
    try:
        safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError:
        return False
    return True


@PER_EXAMPLE
@given(data=st.data())
def test_a_damaged_byte_is_never_accepted_where_the_reference_refuses_it(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(
        write_tensors(tmp_path / "m", {"a": ("F32", (2, 3)), "b": ("BOOL", (4,)), "c": ("I64", ())}).read_bytes()
    )
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789,{}[]"')))
    (tmp_path / "m").write_bytes(content[: data.draw(st.integers(0, len(content))) or None])
    if accepts(tmp_path / "m"):
        assert reference_accepts(tmp_path / "m")


SMALL = st.integers(0, 3)
ENTRY = st.tuples(st.sampled_from(["F32", "U8", "BF16"]), st.lists(SMALL, max_size=2), st.integers(0, 12), st.integers(0, 12))


@PER_EXAMPLE
@given(entries=st.dictionaries(st.sampled_from("abc"), ENTRY, max_size=3), fit=st.booleans(), size=st.integers(0, 16))
def test_a_layout_is_accepted_exactly_where_the_reference_accepts_it(
    tmp_path: Path, entries: dict[str, Any], fit: bool, size: int
) -> None:
    header = {n: {"dtype": d, "shape": s, "data_offsets": [b, e]} for n, (d, s, b, e) in entries.items()}
    if fit:  # else hardly any layout would be sound
        header = layout({n: (entry["dtype"], tuple(entry["shape"])) for n, entry in header.items()})
        size = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    path = write_raw(tmp_path / "m", json.dumps(header).encode(), bytes(size))
    assert accepts(path) == reference_accepts(path)
    assert accepts(path) or not fit
