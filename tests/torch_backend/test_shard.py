"""Ranks that share a model compute what one alone computes."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("torch", reason="the torch backend needs torch")
pytest.importorskip("transformers", reason="transformers builds the models")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inferflux_backend_torch.shard import Shard
from inferflux_core.errors import ModelFileError
from torch_backend.reference_step import ReferenceRunner, load, read_config
from torch_backend.tiny_models import RECIPES, VOCAB, TinyModel, tiny_model

pytestmark = [
    # transformers deprecates parts of itself and of torch at its own pace; its warnings say nothing about this code
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Board:
    """Where ranks that run as threads lay down their tensors for the others."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=60)
        self._tensors = [torch.empty(0)] * size

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self._tensors[rank] = x.clone()
        self._barrier.wait()
        tensors = list(self._tensors)
        self._barrier.wait()
        return tensors


class ThreadComm:
    def __init__(self, board: Board, rank: int) -> None:
        self._board = board
        self._rank = rank

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self._board.exchange(self._rank, x)).sum(0))

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._board.exchange(self._rank, x), -1)


def on_ranks(size: int, work: Callable[[Shard, ThreadComm], list[Tensor]]) -> list[list[Tensor]]:
    board = Board(size)
    with ThreadPoolExecutor(size) as pool:
        jobs = [pool.submit(work, Shard(rank, size), ThreadComm(board, rank)) for rank in range(size)]
        return [job.result(timeout=60) for job in jobs]


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def steps(runner: ReferenceRunner) -> list[Tensor]:
    """A prompt, then another one beside a decode."""
    first = runner.step({"a": tokens(12, 1)}, all_tokens=True)["a"]
    second = runner.step({"a": tokens(1, 2), "b": tokens(5, 3)})
    return [first, second["a"], second["b"]]


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(request.param, tmp_path_factory.getbasetemp() / "tiny")


# Nine query heads and three KV heads, so two ranks get unequal parts and nine ranks hold each KV head three times.
SIZES: dict[str, Sequence[int]] = dict.fromkeys(RECIPES, (2,)) | {"gemma": (3,), "olmo2": (2, 9), "llama-bias": (4,)}


@pytest.mark.parametrize(("tiny", "size"), [(n, size) for n in RECIPES for size in SIZES[n]], indirect=["tiny"])
def test_the_ranks_of_a_shared_model_compute_what_one_alone_does(tiny: TinyModel, size: int) -> None:
    whole = steps(ReferenceRunner(load(tiny.folder)))
    shared = on_ranks(size, lambda shard, comm: steps(ReferenceRunner(load(tiny.folder, shard=shard, comm=comm))))
    for ours in shared:
        for part, expected in zip(ours, whole, strict=True):
            assert part.shape == expected.shape
            assert float((part - expected).abs().max() / expected.std()) < 1e-4


@pytest.mark.parametrize("tiny", ["llama"], indirect=True)
def test_ranks_hold_whole_kv_heads_with_their_query_heads(tiny: TinyModel) -> None:
    layers = [load(tiny.folder, shard=Shard(rank, 2), comm=ThreadComm(Board(1), 0)).layers[0] for rank in range(2)]
    assert [(layer.num_heads, layer.num_kv_heads) for layer in layers] == [(3, 1), (6, 2)]


@pytest.mark.parametrize(("tiny", "size", "fitting"), [("llama", 4, "1, 2, 3, 9"), ("gemma", 2, "1, 3, 9")], indirect=["tiny"])
def test_a_number_of_ranks_that_cuts_heads_apart_is_refused_with_those_that_do_not(
    tiny: TinyModel, size: int, fitting: str
) -> None:
    with pytest.raises(
        ModelFileError, match=re.escape(f"{size} processes; set `tensor_parallel_size` to one of {fitting}") + "$"
    ):
        load(tiny.folder, shard=Shard(0, size), comm=ThreadComm(Board(1), 0))


@pytest.mark.parametrize("tiny", ["llama"], indirect=True)
def test_more_ranks_than_heads_are_refused(tiny: TinyModel) -> None:
    with pytest.raises(ModelFileError, match="can't be shared by 18 processes"):
        Shard(0, 18).check(read_config(tiny.folder))


@settings(deadline=None)
@given(total=st.integers(1, 10_000), size=st.integers(1, 64))
def test_cuts_cover_everything_once_and_differ_by_one_at_most(total: int, size: int) -> None:
    cuts = [Shard(rank, size).cut(total) for rank in range(size)]
    assert [row for cut in cuts for row in range(cut.start, cut.stop)] == list(range(total))
    sizes = [cut.stop - cut.start for cut in cuts]
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(vocab_size=st.integers(1, 10_000), size=st.integers(1, 64))
def test_ranks_hold_equally_many_rows_of_the_vocabulary(vocab_size: int, size: int) -> None:
    cuts = [Shard(rank, size).vocabulary(vocab_size) for rank in range(size)]
    assert len({cut.stop - cut.start for cut in cuts}) == 1
    assert cuts[0].start == 0
    assert cuts[-1].stop >= vocab_size
    assert all(left.stop == right.start for left, right in itertools.pairwise(cuts))
