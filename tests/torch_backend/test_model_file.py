"""Reading JSON of a model's folder: limits, and faults that name the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferflux_backend_torch.model_file import parse_object, read_json, read_optional_json
from inferflux_core.errors import ModelFileError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)


@given(value=st.dictionaries(st.text(), JSON, max_size=5))
def test_objects_come_back_as_they_were_written(value: dict[str, Any]) -> None:
    assert parse_object(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "it is not JSON: Expecting value at character 0"),
        (b"{", "it is not JSON: "),
        (b"[1]", "it is not a JSON object"),
        (b"3", "it is not a JSON object"),
        (b'{"a": "\xff"}', "it is not UTF-8 at byte 7"),
        (b'{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}', "the key 'c' is there twice"),
        (b'{"a":' * 63 + b"{}" + b"}" * 63, None),
        (b'{"a":' * 64 + b"{}" + b"}" * 64, "its JSON is nested more than 64 levels deep"),
        (b'{"a":' + b"[" * 100_000, "its JSON is nested too deeply"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "integer string conversion"),
        (b'{"a": "' + b"x" * 10_000_000 + b'"}', "it has 10000009 bytes, more than 10000000"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_bad_file_is_refused_with_its_fault(tmp_path: Path, content: bytes, fault: str | None) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    if fault is None:
        assert read_json(path, "model configuration")
        return
    with pytest.raises(ModelFileError) as refusal:
        read_json(path, "model configuration")
    assert str(refusal.value).startswith(f"{path}: not a usable model configuration: ")
    assert fault in str(refusal.value)


def test_the_limit_can_be_raised(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b'{"a": 12}')
    with pytest.raises(ModelFileError, match="it has 9 bytes, more than 8"):
        read_json(tmp_path / "tokenizer.json", "tokenizer", max_bytes=8)
    assert read_json(tmp_path / "tokenizer.json", "tokenizer", max_bytes=9) == {"a": 12}


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nothing")
    for name, fault in (("absent", "no such file"), ("pipe", "not a regular file"), ("dangling", "no such file")):
        with pytest.raises(ModelFileError, match=fault):
            read_json(tmp_path / name, "model configuration")


def test_an_optional_file_may_be_missing_but_not_broken(tmp_path: Path) -> None:
    assert read_optional_json(tmp_path / "absent", "map") == {}
    (tmp_path / "dangling").symlink_to("nothing")
    with pytest.raises(ModelFileError, match="no such file"):
        read_optional_json(tmp_path / "dangling", "map")
