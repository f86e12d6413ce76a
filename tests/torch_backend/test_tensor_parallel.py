"""Models shared by real processes over gloo: they compute what one process does, end together, and leave nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the torch backend needs torch")
pytest.importorskip("transformers", reason="transformers builds the models")

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from inferflux_backend_torch import followers as followers_module
from inferflux_backend_torch import loading
from inferflux_backend_torch.backend import TorchBackend
from inferflux_backend_torch.communicator import DistributedComm
from inferflux_backend_torch.followers import RankDied
from inferflux_backend_torch.settings import TorchSettings
from inferflux_backend_torch.tensor_parallel import TensorParallelRunner
from inferflux_core.engine.types import ModelRunnerOutput, PagedOps, Row, SamplingParams, SchedulerOutput, SequenceInit
from inferflux_core.errors import ConfigError, ModelFileError
from inferflux_core.interfaces import (
    EngineConfig,
    GrammarMask,
    ModelFiles,
    ModelRunner,
    SourceContext,
    Ticket,
)
from inferflux_core.models.sources import PathSource
from inferflux_core.testing.conformance import BackendConformance
from inferflux_core.testing.driver import Answer, EngineDriver, make_request
from torch_backend.draft_case import generate
from torch_backend.tiny_models import VOCAB, tiny_files

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
    # transformers deprecates parts of itself and of torch at its own pace; its warnings say nothing about this code
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

CONFIG = EngineConfig(max_num_seqs=4, max_num_batched_tokens=256, max_model_len=256)
DEADLINE = 30.0  # far below the minutes after which torch itself gives up


def start(files: ModelFiles, size: int = 2, config: EngineConfig = CONFIG, **settings: Any) -> ModelRunner:
    given = {"device": "cpu", "dtype": "float32", "kv_cache_mib": 2, "block_size": 8, "num_threads": 1, **settings}
    return TorchBackend(TorchSettings(tensor_parallel_size=size, **given)).runner(files, config)


def shared(files: ModelFiles, **settings: Any) -> TensorParallelRunner:
    runner = start(files, **settings)
    assert isinstance(runner, TensorParallelRunner)
    return runner


def pids(runner: TensorParallelRunner) -> list[int]:
    return [process.pid for process in runner._followers.processes]


def prompt(length: int, variant: int = 0) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(variant)).tolist()


def is_alive(pid: int) -> bool:
    """Whether there is such a process, be it one that only waits to be reaped."""
    return Path(f"/proc/{pid}").exists()


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def llama(root: Path) -> ModelFiles:
    return tiny_files("llama", root)


@pytest.fixture(scope="module")
def pair(llama: ModelFiles) -> Iterator[TensorParallelRunner]:
    """Two ranks of a model with 9 heads, 3 KV heads and a vocabulary of 131: nothing of it divides by two."""
    runner = shared(llama)
    runner.warm_up()
    yield runner
    runner.close()


class Kept(ModelRunner):
    """A runner that many engines use, one after the other."""

    def __init__(self, runner: ModelRunner) -> None:
        self.model_info = runner.model_info
        self.kv_cache_spec = runner.kv_cache_spec
        self.caps = runner.caps
        self._runner = runner

    def warm_up(self) -> None:
        self._runner.warm_up()

    def launch(self, plan: SchedulerOutput) -> Ticket:
        return self._runner.launch(plan)

    def sample(self, ticket: Ticket, mask: GrammarMask | None) -> None:
        self._runner.sample(ticket, mask)

    def collect(self, ticket: Ticket) -> ModelRunnerOutput:
        return self._runner.collect(ticket)

    def close(self) -> None:
        """It goes on."""


# --- it computes the same ---------------------------------------------------------------------------------------------


class TestConformance(BackendConformance):
    num_seqs = 3
    output_tokens = 8

    @pytest.fixture(autouse=True)
    def _pair(self, pair: TensorParallelRunner) -> None:
        self.pair = pair

    def make_runner(self, config: EngineConfig) -> ModelRunner:
        return Kept(self.pair)

    def prompt(self, length: int, variant: int = 0) -> Sequence[int]:
        return prompt(length, variant)


def answers(runner: ModelRunner) -> list[Answer]:
    """Every kind of sampling, batched, in chunks, with one sequence preempted on its way."""
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=24, max_model_len=256)
    driver = EngineDriver(Kept(runner), config)
    requests = [
        make_request(prompt(33, 1), max_tokens=24),
        make_request(prompt(40, 2), max_tokens=16, temperature=1.0, seed=5, logprobs=3),
        make_request(prompt(9, 3), max_tokens=16, temperature=0.8, seed=6, top_p=0.9, top_k=40, min_p=0.01),
        make_request(
            prompt(20, 4),
            max_tokens=16,
            temperature=0.7,
            seed=7,
            repetition_penalty=1.3,
            frequency_penalty=0.5,
            presence_penalty=0.5,
            logit_bias={3: 2.0, 130: -1.0},
            logprobs=0,
        ),
        make_request(prompt(3, 5), max_tokens=9, min_tokens=9, stop_token_ids=frozenset(range(60))),
    ]
    driver.add(*requests)
    for _ in range(8):
        driver.step()
    driver.preempt(requests[1].request_id)
    driver.run()
    return [driver.answers[request.request_id] for request in requests]


def assert_same(ours: Sequence[Answer], expected: Sequence[Answer]) -> None:
    assert [answer.token_ids for answer in ours] == [answer.token_ids for answer in expected]
    for answer, reference in zip(ours, expected, strict=True):
        assert [[i for i, _ in e.top] for e in answer.logprobs] == [[i for i, _ in e.top] for e in reference.logprobs]
        assert [e.logprob for e in answer.logprobs] == pytest.approx([e.logprob for e in reference.logprobs], abs=1e-4)


def test_two_ranks_answer_as_one(pair: TensorParallelRunner, llama: ModelFiles) -> None:
    ours = answers(pair)
    assert [len(answer.token_ids) for answer in ours] == [24, 16, 16, 16, 9]
    assert [len(answer.logprobs) for answer in ours] == [0, 16, 0, 16, 0]
    assert_same(ours, answers(start(llama, size=1)))


def test_two_ranks_verify_drafts_and_keep_to_masks(pair: TensorParallelRunner, llama: ModelFiles) -> None:
    odd = np.full((5, -(-VOCAB // 32)), 0xAAAAAAAA, dtype=np.uint32).view(np.int32)
    mask = {count: GrammarMask(odd, {0: 0}) for count in range(20)}
    sequences = [
        (prompt(12, 1), SamplingParams(max_tokens=20, temperature=1.0, seed=4, logprobs=1)),
        (prompt(5, 2), SamplingParams(max_tokens=20, temperature=0.0)),
    ]
    alone = generate(start(llama, size=1), sequences, mask=mask)
    ours = generate(pair, sequences, [run.drawn for run in alone], most=4, mask=mask)
    assert [run.drawn for run in ours] == [run.drawn for run in alone]
    assert all(token % 2 for token in ours[0].drawn)
    assert max(ours[1].drafts) == 4


def test_three_ranks_with_norms_and_experts_of_which_each_holds_a_part(root: Path) -> None:
    files = tiny_files("olmoe", root)
    runner = shared(files, size=3)
    ours = answers(runner)
    runner.close()
    assert_same(ours, answers(start(files, size=1)))


def test_it_says_that_it_is_shared_and_keeps_the_cache_that_was_asked_for(
    pair: TensorParallelRunner, llama: ModelFiles
) -> None:
    alone = start(llama, size=1)
    assert pair.caps == alone.caps
    assert pair.model_info.details["tensor_parallel_size"] == "2"
    # A block of either rank has room for 2 of the 3 KV heads, and each gets half of the memory.
    assert (pair.kv_cache_spec.num_blocks, alone.kv_cache_spec.num_blocks) == (204, 273)
    assert pair.model_info.details["kv_cache_tokens"] == str(203 * 8)


@pytest.mark.parametrize(("mib", "blocks", "longest"), [(2.0, 204, 256), (0.1, 20, 19 * 8)])
def test_all_ranks_work_with_what_the_poorest_has(
    llama: ModelFiles, monkeypatch: pytest.MonkeyPatch, mib: float, blocks: int, longest: int
) -> None:
    """Rank 0 has another amount of memory here, its follower one MiB."""
    monkeypatch.setattr(loading, "cache_bytes", lambda settings, device: int(mib * 2**20))
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=256)
    runner = start(llama, config=config)
    try:
        assert runner.kv_cache_spec.num_blocks == blocks
        assert runner.model_info.max_model_len == longest
        driver = EngineDriver(Kept(runner), config)
        many = [make_request(prompt(100, v), max_tokens=2) for v in range(4)]
        assert all(len(answer.token_ids) == 2 for answer in driver.generate(*many))
    finally:
        runner.close()


# --- it ends as it should ---------------------------------------------------------------------------------------------


def test_nobody_else_can_reach_it(pair: TensorParallelRunner) -> None:
    for pid in [os.getpid(), *pids(pair)]:
        mine = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.exists() or fd.is_symlink()}
        sockets = [
            line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        ]
        listening = [fields[1] for fields in sockets if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine]
        assert listening, "gloo listens somewhere"
        assert all(address.startswith("0100007F:") for address in listening), listening


def test_closed_it_leaves_no_process_and_no_file(llama: ModelFiles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    threads = threading.enumerate()
    runner = shared(llama)
    assert list(tmp_path.iterdir()) == [], "nobody needs to meet any more, so there is nothing to tidy up after a crash"
    processes = runner._followers.processes
    assert [process.poll() for process in processes] == [None]
    runner.close()
    assert [process.returncode for process in processes] == [0], "it ended by itself"
    assert not any(is_alive(process.pid) for process in processes)
    assert threading.enumerate() == threads


def running(runner: ModelRunner) -> EngineDriver:
    """An engine in the middle of an answer."""
    driver = EngineDriver(Kept(runner), CONFIG)
    driver.add(make_request(prompt(12), max_tokens=200))
    driver.step()
    driver.step()
    return driver


@pytest.fixture
def doomed(llama: ModelFiles) -> Iterator[TensorParallelRunner]:
    """A runner whose follower dies in the test; it can be closed all the same."""
    runner = shared(llama)
    yield runner
    gone = pids(runner)
    runner.close()
    assert not any(is_alive(pid) for pid in gone)


def test_a_follower_that_dies_between_steps_is_an_error(doomed: TensorParallelRunner) -> None:
    driver = running(doomed)
    os.kill(pids(doomed)[0], signal.SIGKILL)
    with pytest.raises(RankDied, match=r"^tensor parallel rank 1 died of signal SIGKILL; "):
        driver.run()


def test_a_follower_that_dies_within_a_step_is_an_error(doomed: TensorParallelRunner) -> None:
    driver = running(doomed)
    os.kill(pids(doomed)[0], signal.SIGSTOP)
    with ThreadPoolExecutor(1) as engine:
        step = engine.submit(lambda: [driver.step() for _ in range(3)])
        with pytest.raises(TimeoutError):
            step.result(0.5)
        os.kill(pids(doomed)[0], signal.SIGKILL)
        with pytest.raises(RankDied, match="rank 1 died of signal SIGKILL"):
            step.result(DEADLINE)


class OnDevice(Kept):
    """Waits in `collect`, as for a GPU that waits for another one: until it is aborted, when worthless results come back."""

    aborted = threading.Event()

    def collect(self, ticket: Ticket) -> ModelRunnerOutput:
        assert self.aborted.wait(DEADLINE)
        return super().collect(ticket)


def test_what_waits_on_a_device_for_a_dead_follower_is_aborted(llama: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistributedComm, "abort", lambda comm: OnDevice.aborted.set())
    runner = shared(llama)
    runner._runner = OnDevice(runner._runner)
    row = Row(slot=0, start=0, n=1, tokens=(5,), n_draft=0, sample=True, kv=PagedOps((1,)))
    init = SequenceInit(slot=0, params=SamplingParams(max_tokens=1), tokens=[5], num_prompt_tokens=1)
    ticket = runner.launch(SchedulerOutput(step=1, rows=[row], num_tokens=1, start=[init]))
    runner.sample(ticket, None)
    assert not OnDevice.aborted.is_set()
    os.kill(pids(runner)[0], signal.SIGKILL)
    with pytest.raises(RankDied, match="rank 1 died of signal SIGKILL"):
        runner.collect(ticket)
    runner.close()


def test_a_follower_outlives_the_thread_that_started_it(llama: ModelFiles) -> None:
    """The kernel would end it with that thread; an engine within a program loads in one thread and computes in another."""
    with ThreadPoolExecutor(1) as loader:
        runner = loader.submit(shared, llama).result(DEADLINE)
    try:
        running(runner)
    finally:
        runner.close()


# --- it cannot be loaded ----------------------------------------------------------------------------------------------


def assert_refused(files: ModelFiles, message: str, error: type[Exception] = ModelFileError, **settings: Any) -> None:
    """Refused with this message, and no process is left."""
    before = children(os.getpid())
    with pytest.raises(error, match=message):
        start(files, **settings)
    assert children(os.getpid()) == before


def test_a_number_of_ranks_that_does_not_fit_is_refused_before_any_is_started(
    llama: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("it has started one"))
    assert_refused(llama, "can't be shared by 4 processes; set `tensor_parallel_size` to one of 1, 2, 3, 9$", size=4)


def damaged(llama: ModelFiles, folder: Path, damage: Callable[[dict[str, torch.Tensor]], None]) -> ModelFiles:
    for path in Path(llama.paths[0]).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    return PathSource().resolve(str(folder), SourceContext())


@pytest.mark.parametrize(("head", "rank"), [(0, ""), (8, "tensor parallel rank 1: ")])
def test_what_any_rank_finds_wrong_is_the_reason(llama: ModelFiles, tmp_path: Path, head: int, rank: str) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.q_proj.weight"][head * 20, 3] = torch.nan

    assert_refused(damaged(llama, tmp_path, damage), f"^{rank}.*layers.1.self_attn.q_proj.weight")


def test_a_follower_that_dies_while_loading_is_the_reason(llama: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followers_module, "_MODULE", "keyword")  # imports, says nothing, and ends
    assert_refused(llama, f"model {re.escape(repr(llama.ref))} can't be loaded: tensor parallel rank 1 exited with status 0; ")


def test_a_rank_without_a_device_is_refused(llama: ModelFiles) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert_refused(llama, "device 'cuda' is not there", ConfigError, device="cuda")
