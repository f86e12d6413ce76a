"""Drafts and masks by hand, step by step through the runner: exact tokens, and what is left in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from inferflux_backend_llamacpp.backend import LlamaCppBackend
from inferflux_backend_llamacpp.settings import LlamaCppSettings
from inferflux_core.engine.draft_model import DraftModelProposer
from inferflux_core.engine.request import Request
from inferflux_core.engine.shared_vocabulary import share_vocabulary
from inferflux_core.engine.types import (
    EngineRequest,
    GrammarMask,
    ModelRunnerOutput,
    Row,
    SamplingParams,
    SchedulerOutput,
    SequenceInit,
    SequenceOps,
)
from inferflux_core.interfaces import EngineConfig, ModelFiles, ModelRunner
from inferflux_core.testing.driver import EngineDriver, make_request
from llamacpp.demo_model import demo_files
from llamacpp.tiny_gguf import FIRST_BYTE, VOCABULARY, write_tiny

demo_files()  # skips where llama-cpp-python is absent
CONFIG = EngineConfig(max_num_seqs=4, max_num_batched_tokens=256, max_model_len=256)
GREEDY = SamplingParams(max_tokens=99, temperature=0.0, ignore_eos=True, logprobs=0)
WINDOW = 16
NOISE = 0.01  # of a log-probability: seen, up to 0.002 between a row of one token and one of six


@pytest.fixture(scope="module", params=[None, WINDOW], ids=["full attention", "sliding window"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    path: Path = tmp_path_factory.mktemp("drafts") / "tiny.gguf"
    return write_tiny(path, sliding_window=request.param)


@pytest.fixture(params=["per_stream", "unified"])
def runner(request: pytest.FixtureRequest, files: ModelFiles) -> Iterator[ModelRunner]:
    made = LlamaCppBackend(LlamaCppSettings(n_threads=1, kv_layout=request.param)).runner(files, CONFIG)
    yield made
    made.close()


def prompt(length: int, variant: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(variant).integers(FIRST_BYTE, len(VOCABULARY), length).tolist()
    return tokens


def run(
    runner: ModelRunner, *rows: Row, start: Sequence[SequenceInit] = (), mask: GrammarMask | None = None
) -> ModelRunnerOutput:
    plan = SchedulerOutput(step=0, rows=list(rows), num_tokens=sum(row.n for row in rows), start=list(start))
    ticket = runner.launch(plan)
    runner.sample(ticket, mask)
    return runner.collect(ticket)


def row(
    slot: int, start: int, tokens: Sequence[int], n_draft: int = 0, *, keep_len: int | None = None, sample: bool = True
) -> Row:
    return Row(slot, start, len(tokens), tokens, n_draft, sample, SequenceOps(slot, keep_len=keep_len))


def init(slot: int, tokens: Sequence[int], params: SamplingParams = GREEDY) -> SequenceInit:
    return SequenceInit(slot, params, tokens, len(tokens))


def straight(
    runner: ModelRunner, tokens: Sequence[int], count: int, params: SamplingParams = GREEDY
) -> tuple[list[int], list[float]]:
    """The answer token by token, with its log-probabilities."""
    output = run(runner, row(3, 0, tokens, keep_len=0), start=[init(3, tokens, params)])
    said, logprobs = [output.tokens[0][0]], [output.logprobs[0][0].logprob]  # type: ignore[index]  # asked for
    while len(said) < count:
        output = run(runner, row(3, len(tokens) + len(said) - 1, said[-1:]))
        said += output.tokens[0]
        logprobs.append(output.logprobs[0][0].logprob)  # type: ignore[index]  # asked for
    return said, logprobs


def logprobs_of(output: ModelRunnerOutput, index: int) -> list[float]:
    return [entry.logprob for entry in output.logprobs[index] or []]


def test_drafts_are_cut_where_they_are_wrong_and_leave_no_trace(runner: ModelRunner) -> None:
    tokens = prompt(60)
    said, expected = straight(runner, tokens, 16)
    first = run(runner, row(0, 0, tokens, keep_len=0), start=[init(0, tokens)])
    assert first.tokens == [said[:1]]
    right = run(runner, row(0, 60, said[:6], 5))
    assert right.tokens == [said[1:7]], "all drafts hold, and one token more"
    assert logprobs_of(right, 0) == pytest.approx(expected[1:7], abs=NOISE)
    wrong = [*said[6:9], said[9] ^ 1, *said[10:12]]
    cut = run(runner, row(0, 66, wrong, 5))
    assert cut.tokens == [said[7:10]], "two drafts hold, and what is drawn instead of the third"
    again = run(runner, row(0, 69, said[9:10], keep_len=69))
    assert again.tokens == [said[10:11]]
    assert logprobs_of(again, 0) == pytest.approx(expected[10:11], abs=NOISE)
    none = run(runner, row(0, 70, [said[10], said[11] ^ 1, said[12]], 2))
    assert none.tokens == [said[11:12]], "the first draft is wrong"
    last = run(runner, row(0, 71, said[11:14], 2, keep_len=71))
    assert last.tokens == [said[12:15]]
    assert logprobs_of(last, 0) == pytest.approx(expected[12:15], abs=NOISE)


def test_drafts_beside_decodes_and_prefill(runner: ModelRunner) -> None:
    prompts = [prompt(n, n) for n in (20, 35, 70)]
    answers = [straight(runner, p, 8)[0] for p in prompts]
    start = [init(slot, p) for slot, p in enumerate(prompts[:2])]
    both = run(runner, *(row(slot, 0, p, keep_len=0) for slot, p in enumerate(prompts[:2])), start=start)
    assert both.tokens == [answers[0][:1], answers[1][:1]]
    mixed = run(
        runner,
        row(2, 0, prompts[2][:40], keep_len=0, sample=False),
        row(1, 35, [*answers[1][:3], answers[1][3] ^ 1], 3),
        row(0, 20, answers[0][:1]),
        start=[init(2, prompts[2])],
    )
    assert mixed.tokens == [answers[1][1:4], answers[0][1:2]]
    later = run(
        runner,
        row(0, 21, answers[0][1:5], 3),
        row(1, 38, answers[1][3:4], keep_len=38),
        row(2, 40, prompts[2][40:]),
    )
    assert later.tokens == [answers[0][2:6], answers[1][4:5], answers[2][:1]]


def test_a_seed_draws_the_same_with_drafts(runner: ModelRunner) -> None:
    params = SamplingParams(max_tokens=99, temperature=1.0, top_p=0.9, seed=3, ignore_eos=True, logprobs=2)
    tokens = prompt(24, 5)
    said, _ = straight(runner, tokens, 8, params)
    assert run(runner, row(0, 0, tokens, keep_len=0), start=[init(0, tokens, params)]).tokens == [said[:1]]
    assert run(runner, row(0, 24, [*said[:4], said[4] ^ 1], 4)).tokens == [said[1:5]]
    assert run(runner, row(0, 28, said[4:7], 2, keep_len=28)).tokens == [said[5:8]]


def mask_of(permitted: Sequence[set[int]], first: dict[int, int]) -> GrammarMask:
    bits = np.zeros((len(permitted), (len(VOCABULARY) + 31) // 32), dtype=np.uint32)
    for i, tokens in enumerate(permitted):
        for token in tokens:
            bits[i, token // 32] |= np.uint32(1 << token % 32)
    return GrammarMask(bits.view(np.int32), first)


def test_masks_along_a_draft(runner: ModelRunner) -> None:
    tokens, other = prompt(20), prompt(12, 1)
    free = straight(runner, other, 3)[0]
    start = [init(0, tokens), init(1, other)]
    mask = mask_of([{1}, {50}], {0: 1})
    prefill = run(runner, row(1, 0, other, keep_len=0), row(0, 0, tokens, keep_len=0), start=start, mask=mask)
    assert prefill.tokens == [free[:1], [50]], "only the constrained row is masked, by its own row of the mask"
    mask = mask_of([{60, 61}, {70}, {80}, {90}], {0: 0})
    best = max((60, 61), key=lambda token: -_rank(runner, [*tokens, 50], token))
    drafted = run(runner, row(0, 20, [50, best, 70, 81], 3), row(1, 12, free[:2], 1), mask=mask)
    assert drafted.tokens == [[best, 70, 80], free[1:3]]
    after = run(runner, row(0, 23, [80], keep_len=23), mask=None)
    assert after.tokens[0] == straight(runner, [*tokens, 50, best, 70, 80], 1)[0]


def _rank(runner: ModelRunner, tokens: Sequence[int], wanted: int) -> int:
    """Place of a token among the likely ones."""
    params = SamplingParams(max_tokens=9, temperature=0.0, logprobs=len(VOCABULARY))
    output = run(runner, row(2, 0, tokens, keep_len=0), start=[init(2, tokens, params)])
    assert output.logprobs[0] is not None
    return [token for token, _ in output.logprobs[0][0].top].index(wanted)


def test_a_cache_that_forgets_cannot_verify(tmp_path: Path) -> None:
    windowed = write_tiny(tmp_path / "windowed.gguf", sliding_window=WINDOW)
    made = LlamaCppBackend(LlamaCppSettings(n_threads=1, swa_full=False)).runner(windowed, CONFIG)
    small = LlamaCppBackend(LlamaCppSettings(n_threads=1)).runner(
        windowed, EngineConfig(max_num_seqs=1, max_num_batched_tokens=16)
    )
    try:
        assert (made.caps.max_draft, made.kv_cache_spec.can_trim, made.caps.grammar) == (0, False, True)
        assert small.caps.max_draft == 15
    finally:
        made.close()
        small.close()


def test_it_drafts_for_itself(runner: ModelRunner, files: ModelFiles) -> None:
    backend = LlamaCppBackend(LlamaCppSettings(n_threads=1))
    tokenizer = backend.tokenizer(files)
    shared = share_vocabulary(tokenizer, tokenizer, draft_name="tiny", target_name="tiny")
    assert not shared.foreign
    driver = EngineDriver(backend.runner(files, CONFIG), CONFIG)
    prompts = [prompt(20, 1), prompt(28, 2)]
    answers = driver.generate(*(make_request(p, max_tokens=30, ignore_eos=True) for p in prompts))
    driver.core.close()
    sequences = [Request.of(EngineRequest(request_id=str(i), prompt_token_ids=p, params=GREEDY)) for i, p in enumerate(prompts)]
    proposer = DraftModelProposer(runner, shared, runner.model_info.eos_token_ids)
    for accepted in (5, 0, 3):
        drafts = proposer.propose([(sequence, 5) for sequence in sequences])
        proposer.check_integrity()
        for sequence, draft, answer in zip(sequences, drafts, answers, strict=True):
            at = sequence.num_output_tokens
            assert draft == answer.token_ids[at : at + 5]
            sequence.tokens += answer.token_ids[at : at + accepted + 1]
    sequences[0].tokens += [FIRST_BYTE, FIRST_BYTE + 1]  # not what was guessed
    (draft,) = proposer.propose([(sequences[0], 4)])
    assert draft == straight(runner, sequences[0].tokens, 4)[0]
