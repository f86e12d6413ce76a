"""All weight files of a model together: against each other, the index, the configuration, and as numbers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferflux_backend_torch.checkpoint import Checkpoint, refuse_not_finite
from inferflux_core.errors import ModelFileError
from inferflux_core.interfaces import ModelFiles, SourceContext
from inferflux_core.models.sources import PathSource
from torch_backend.safetensors_writer import write_raw, write_tensors

torch = pytest.importorskip("torch", reason="the weights are torch tensors")

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
TENSORS = ({"embed": ("BF16", (4, 2)), "norm": ("F32", (2,))}, {"head": ("BF16", (4, 2)), "step": ("I64", ())})
WEIGHT_MAP = {"embed": SHARDS[0], "norm": SHARDS[0], "head": SHARDS[1], "step": SHARDS[1]}


def sharded(folder: Path, weight_map: object = WEIGHT_MAP) -> ModelFiles:
    (folder / "config.json").write_text("{}")
    for name, tensors in zip(SHARDS, TENSORS, strict=True):
        write_tensors(folder / name, tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return PathSource().resolve(str(folder), SourceContext())


def single(folder: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Checkpoint:
    (folder / "config.json").write_text("{}")
    write_tensors(folder / "model.safetensors", tensors)
    return Checkpoint.open(PathSource().resolve(str(folder), SourceContext()))


def test_shards_are_one_set_of_tensors(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(sharded(tmp_path))
    assert checkpoint.ref == str(tmp_path)
    assert checkpoint.folder == tmp_path
    assert [shard.path.name for shard in checkpoint.shards] == list(SHARDS)
    assert {name: (e.path, e.dtype, e.shape) for name, e in checkpoint.tensors.items()} == {
        "embed": (tmp_path / SHARDS[0], "BF16", (4, 2)),
        "norm": (tmp_path / SHARDS[0], "F32", (2,)),
        "head": (tmp_path / SHARDS[1], "BF16", (4, 2)),
        "step": (tmp_path / SHARDS[1], "I64", ()),
    }
    assert checkpoint.num_bytes == 16 + 8 + 16 + 8
    assert checkpoint.dtype == "BF16"


def test_the_dtype_is_that_of_most_bytes(tmp_path: Path) -> None:
    assert single(tmp_path, {"a": ("F16", (3,)), "b": ("F32", (1,)), "c": ("F32", (1,))}).dtype == "F32"


def test_only_weights_and_index_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sharded(tmp_path)
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "training_args.bin"):
        (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n.")
    opened: list[str] = []
    original = os.open

    def recorded(path: str, flags: int) -> int:
        opened.append(path)
        return original(path, flags)

    monkeypatch.setattr(os, "open", recorded)
    Checkpoint.open(files)
    assert sorted(Path(path).name for path in opened) == [*SHARDS, "model.safetensors.index.json"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    path = write_tensors(tmp_path / name, {"a": ("F32", (1,))})
    with pytest.raises(
        ModelFileError, match=r"not a \.safetensors file; other formats are refused, some because they can run code"
    ):
        Checkpoint.open(ModelFiles(ref="m", format="safetensors", paths=(str(tmp_path), str(path))))


def test_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="'m' has no weight files"):
        Checkpoint.open(ModelFiles(ref="m", format="safetensors", paths=(str(tmp_path),)))
    write_raw(tmp_path / "model.safetensors", b"{}")
    with pytest.raises(ModelFileError, match="'m': its weight files hold no tensors"):
        Checkpoint.open(ModelFiles(ref="m", format="safetensors", paths=(str(tmp_path), str(tmp_path / "model.safetensors"))))


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    files = sharded(tmp_path)
    with open(tmp_path / SHARDS[1], "r+b") as file:
        file.truncate(100)
    with pytest.raises(ModelFileError, match=f"{SHARDS[1]}: not a usable safetensors file: truncated"):
        Checkpoint.open(files)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    files = sharded(tmp_path)
    write_tensors(tmp_path / SHARDS[1], {"head": ("BF16", (4, 2)), "norm": ("F32", (2,))})
    with pytest.raises(ModelFileError) as refusal:
        Checkpoint.open(files)
    assert f"tensor 'norm' is in two files, {SHARDS[0]!r} and {SHARDS[1]!r}" in str(refusal.value)


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in WEIGHT_MAP.items() if key != name}


NOT_A_NAME = "which is not the name of a file in the same folder"


@pytest.mark.parametrize(
    ("weight_map", "fault"),
    [
        (None, "not a usable index: it has no object 'weight_map'"),
        ([], "not a usable index: it has no object 'weight_map'"),
        (WEIGHT_MAP | {"norm": "../secret.safetensors"}, f"maps tensor 'norm' to '../secret.safetensors', {NOT_A_NAME}"),
        (WEIGHT_MAP | {"norm": "/etc/passwd"}, f"maps tensor 'norm' to '/etc/passwd', {NOT_A_NAME}"),
        (WEIGHT_MAP | {"norm": "..\\x"}, f"maps tensor 'norm' to '..\\\\x', {NOT_A_NAME}"),
        (WEIGHT_MAP | {"norm": ""}, f"maps tensor 'norm' to '', {NOT_A_NAME}"),
        (WEIGHT_MAP | {"norm": 1}, f"maps tensor 'norm' to 1, {NOT_A_NAME}"),
        (WEIGHT_MAP | {"norm": "model.bin"}, "maps tensor 'norm' to 'model.bin', which is not among the files of the model"),
        (WEIGHT_MAP | {"more": SHARDS[0]}, f"maps tensor 'more' to {SHARDS[0]!r}, but no file holds such a tensor"),
        (WEIGHT_MAP | {"norm": SHARDS[1]}, f"maps tensor 'norm' to {SHARDS[1]!r}, but {SHARDS[0]!r} holds it"),
        (without("head"), "contradicts the weights: 1 tensor is not in it: 'head'"),
        ({}, "4 tensors are not in it: 'embed', 'norm', 'head', 'step'"),
    ],
)
def test_an_index_that_contradicts_the_shards_is_refused(tmp_path: Path, weight_map: object, fault: str) -> None:
    files = sharded(tmp_path, weight_map)
    with pytest.raises(ModelFileError) as refusal:
        Checkpoint.open(files)
    assert str(refusal.value).startswith(f"{tmp_path / 'model.safetensors.index.json'}: ")
    assert fault in str(refusal.value)


def test_shards_need_no_index(tmp_path: Path) -> None:
    files = sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert set(Checkpoint.open(files).tensors) == set(WEIGHT_MAP)


def test_an_index_beside_a_single_file_is_a_leftover(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": WEIGHT_MAP}))
    assert set(single(tmp_path, {"a": ("F32", (1,))}).tensors) == {"a"}


SIX: dict[str, tuple[str, tuple[int, ...]]] = {f"w{i}": ("F32", (i, 2)) for i in range(6)}


def shapes(names: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (_, shape) in names.items()}


def test_tensors_that_fit_pass(tmp_path: Path) -> None:
    checkpoint = single(tmp_path, SIX | {"layers.0.rotary_emb.inv_freq": ("F32", (4,))})
    ignored = [re.compile(r"layers\.\d+\.rotary_emb\.inv_freq")]
    checkpoint.check(shapes(SIX), ignored=ignored)
    checkpoint.check(shapes(SIX) | {"lm_head": (9, 9)}, optional=["lm_head"], ignored=ignored)


Change = Callable[[dict[str, tuple[int, ...]]], object]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda e: e.update(more=(1,)), "1 tensor is missing: 'more'."),
        (
            lambda e: e.update({f"m{i}": (1,) for i in range(7)}),
            "7 tensors are missing: 'm0', 'm1', 'm2', 'm3', 'm4' and 2 more.",
        ),
        (lambda e: e.pop("w3"), "1 tensor is unexpected: 'w3'."),
        (lambda e: e.clear(), "6 tensors are unexpected: 'w0', 'w1', 'w2', 'w3', 'w4' and 1 more."),
        (lambda e: e.update(w1=(2, 1)), "1 tensor contradicts config.json in its shape: 'w1' is (1, 2) instead of (2, 1)."),
        (
            lambda e: e.update(w1=(2,), w2=(5,)),
            "2 tensors contradict config.json in their shapes: 'w1' is (1, 2) instead of (2,), 'w2' is (2, 2) instead of (5,).",
        ),
        (
            lambda e: (e.pop("w1"), e.update(x=(1,))),
            "1 tensor is missing: 'x'; 1 tensor is unexpected: 'w1'.",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_listed(tmp_path: Path, change: Change, fault: str) -> None:
    checkpoint = single(tmp_path, SIX)
    expected = shapes(SIX)
    change(expected)
    with pytest.raises(ModelFileError) as refusal:
        checkpoint.check(expected)
    assert f"the weights do not fit config.json: {fault}" in str(refusal.value)


def test_an_optional_tensor_that_is_there_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"'w1' is \(1, 2\) instead of \(3,\)"):
        single(tmp_path, SIX).check(shapes(SIX) | {"w1": (3,)}, optional=["w1"])


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {"q": ("U8", (4,)), "f": ("F8_E4M3", (4,)), "n": ("I32", ())}
    with pytest.raises(ModelFileError, match="2 tensors are not of floating point: 'q' is U8, 'n' is I32"):
        single(tmp_path, tensors).check(shapes(tensors))


FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
BAD: list[tuple[str, float]] = [(d, v) for d in FLOATS for v in (float("nan"), float("inf"), float("-inf"))]


@settings(deadline=None, max_examples=60)
@given(shape=st.lists(st.integers(1, 5), max_size=3), bad=st.sampled_from(BAD), data=st.data())
def test_one_number_that_is_none_is_found(shape: list[int], bad: tuple[str, float], data: st.DataObject) -> None:
    dtype, value = bad
    if dtype == "float8_e4m3fn" and value in (float("inf"), float("-inf")):
        value = float("nan")  # the type has no infinity
    at = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    tensor = torch.ones(shape)
    tensor[at] = value
    with pytest.raises(ModelFileError) as refusal:
        refuse_not_finite("w", tensor.to(getattr(torch, dtype)))
    assert f"tensor 'w' is {value} at {list(at)}; " in str(refusal.value)


def test_it_is_found_in_tensors_that_do_not_lie_in_order_and_behind_the_first_chunk() -> None:
    tensor = torch.zeros(3, 1 << 20, dtype=torch.bfloat16)
    tensor[2, 5] = float("inf")
    tensor[2, 6] = -float("inf")
    with pytest.raises(ModelFileError, match=re.escape("tensor 'w' is inf at [2, 5]")):
        refuse_not_finite("w", tensor)
    with pytest.raises(ModelFileError, match=re.escape("tensor 'w' is inf at [5, 2]")):
        refuse_not_finite("w", tensor.T)


@pytest.mark.parametrize("dtype", FLOATS)
def test_finite_numbers_pass_even_where_their_sum_overflows(dtype: str) -> None:
    kind = getattr(torch, dtype)
    refuse_not_finite("w", torch.full((100,), torch.finfo(kind).max, dtype=torch.float64).to(kind))
    refuse_not_finite("w", torch.empty(0, 4, dtype=kind))


def test_whole_numbers_are_always_finite() -> None:
    refuse_not_finite("w", torch.tensor([True, False]))
    refuse_not_finite("w", torch.full((3,), 2**62))


def test_the_demo_s_weights_are_sound() -> None:
    from torch_backend.twin import twin_files

    checkpoint = Checkpoint.open(twin_files())
    config: dict[str, Any] = json.loads((checkpoint.folder / "config.json").read_text())
    assert checkpoint.dtype == "BF16"
    assert checkpoint.tensors["model.embed_tokens.weight"].shape == (config["vocab_size"], config["hidden_size"])
    assert len(checkpoint.tensors) == 2 + 9 * config["num_hidden_layers"]
