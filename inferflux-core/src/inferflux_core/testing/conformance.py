"""The contract of a backend in executable form.

Derive a test class from `BackendConformance`, say how to make a runner, and pytest runs the contract against it:

    class TestMyBackend(BackendConformance):
        def make_runner(self, config):
            return MyBackend(MySettings()).runner(files, config)

        def prompt(self, length, variant=0):
            return [1 + (7 * i + variant) % 100 for i in range(length)]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from inferflux_core.engine.speculation import Speculation
from inferflux_core.engine.types import FinishReason
from inferflux_core.interfaces import EngineConfig, ModelRunner
from inferflux_core.testing.driver import Answer, EngineDriver, make_request
from inferflux_core.testing.scripted_drafts import ScriptedDrafts
from inferflux_core.testing.token_sets import TokenSets, only


class BackendConformance(ABC):
    """What every backend must hold to, each rule one test.

    Attributes:
        num_seqs: sequences that a test runs at once.
        output_tokens: tokens that a test generates for each; more finds more, and takes longer.
        logprob_noise: how far batching may move a log-probability, because the same sums are grouped differently. Where two
            answers part, the other token must have been this close to the most likely one. 0 asks for equal tokens.
    """

    num_seqs = 4
    output_tokens = 12
    logprob_noise = 0.0

    @abstractmethod
    def make_runner(self, config: EngineConfig) -> ModelRunner:
        """A fresh runner."""

    @abstractmethod
    def prompt(self, length: int, variant: int = 0) -> Sequence[int]:
        """Token ids of a prompt that the model has something to say to; different variants differ early."""

    # --- how a test runs ----------------------------------------------------------------------------------------------

    def config(self, **changes: object) -> EngineConfig:
        defaults: dict[str, object] = {"max_num_seqs": self.num_seqs, "max_num_batched_tokens": 256, "max_model_len": 256}
        return EngineConfig(**{**defaults, **changes})  # type: ignore[arg-type]  # keywords of the dataclass

    def driver(self, **changes: object) -> EngineDriver:
        return self.speculating(None, **changes)

    def speculating(self, speculation: Speculation | None, **changes: object) -> EngineDriver:
        config = self.config(**changes)
        runner = self.make_runner(config)
        constraints = TokenSets(runner.model_info.vocab_size) if runner.caps.grammar else None
        return EngineDriver(runner, config, constraints=constraints, speculation=speculation)

    def one_by_one(self, prompts: Sequence[Sequence[int]], **params: Any) -> list[Answer]:
        """Each prompt alone on a cache that shares nothing: what everything else must equal."""
        driver = self.driver(enable_prefix_caching=False)
        alternatives = 5 if self.logprob_noise else None
        params = {"max_tokens": self.output_tokens, "logprobs": alternatives, **params}
        try:
            return [driver.generate(make_request(p, **params))[0] for p in prompts]
        finally:
            driver.core.close()

    def together(self, prompts: Sequence[Sequence[int]], **changes: object) -> list[Answer]:
        driver = self.driver(**changes)
        try:
            return driver.generate(*(make_request(p, max_tokens=self.output_tokens) for p in prompts))
        finally:
            driver.core.close()

    def assert_same(self, answers: Sequence[Answer], expected: Sequence[Answer]) -> None:
        """Equal texts, or texts that part where the reference was undecided."""
        for answer, reference in zip(answers, expected, strict=True):
            pairs = zip(answer.token_ids, reference.token_ids, strict=False)
            parted = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
            if parted is None:
                assert len(answer.token_ids) == len(reference.token_ids)
                assert answer.finish_reason == reference.finish_reason
                continue
            assert self.logprob_noise, f"{answer.token_ids} is not {reference.token_ids}"
            alternatives = dict(reference.logprobs[parted].top)
            behind = reference.logprobs[parted].logprob - alternatives.get(answer.token_ids[parted], -math.inf)
            assert behind <= self.logprob_noise, f"token {parted} differs, and was {behind:.2f} behind the most likely one"

    # --- the rules ----------------------------------------------------------------------------------------------------

    def test_batched_equals_one_by_one(self) -> None:
        prompts = [self.prompt(n, variant) for variant, n in enumerate((3, 17, 40, 65, 9, 33))]
        self.assert_same(self.together(prompts), self.one_by_one(prompts))

    def test_chunked_prefill_equals_whole(self) -> None:
        prompts = [self.prompt(70, 1), self.prompt(50, 2)]
        self.assert_same(self.together(prompts, max_num_batched_tokens=16), self.one_by_one(prompts))

    def test_prefix_hit_equals_miss(self) -> None:
        shared = list(self.prompt(64, 1))
        prompts = [shared + list(self.prompt(9, 2)), shared + list(self.prompt(9, 3))]
        expected = self.one_by_one(prompts)
        driver = self.driver()
        hits = [driver.generate(make_request(p, max_tokens=self.output_tokens))[0] for p in prompts]
        driver.core.close()
        self.assert_same(hits, expected)
        if driver.core.runner.kv_cache_spec.can_trim:
            assert hits[1].num_cached_tokens >= 48

    def test_prefix_of_a_running_sequence_is_shared(self) -> None:
        shared = list(self.prompt(64, 1))
        prompts = [shared + list(self.prompt(5, v)) for v in range(2, 2 + self.num_seqs)]
        expected = self.one_by_one(prompts)
        driver = self.driver()
        answers = driver.generate(*(make_request(p, max_tokens=self.output_tokens) for p in prompts))
        computed = driver.core.stats().prompt_tokens
        can_trim = driver.core.runner.kv_cache_spec.can_trim
        driver.core.close()
        self.assert_same(answers, expected)
        if can_trim:
            assert computed < 2 * 69, "sequences that arrived together each computed their common prefix"

    def test_next_turn_goes_on_from_the_last(self) -> None:
        first = list(self.prompt(40, 1))
        driver = self.driver()
        answer = driver.generate(make_request(first, max_tokens=self.output_tokens, ignore_eos=True))[0]
        turn = first + answer.token_ids + list(self.prompt(12, 2))
        again = driver.generate(make_request(turn, max_tokens=self.output_tokens))[0]
        driver.core.close()
        self.assert_same([again], self.one_by_one([turn]))
        assert again.num_cached_tokens >= 32

    def test_salts_share_nothing(self) -> None:
        prompt = self.prompt(64, 1)
        driver = self.driver()
        driver.generate(make_request(prompt, max_tokens=2, salt="a"))
        assert driver.generate(make_request(prompt, max_tokens=2, salt="b"))[0].num_cached_tokens == 0
        driver.core.close()

    def test_preempted_equals_undisturbed(self) -> None:
        prompts = [self.prompt(30, v) for v in range(3)]
        expected = self.one_by_one(prompts)
        driver = self.driver()
        requests = [make_request(p, max_tokens=self.output_tokens) for p in prompts]
        driver.add(*requests)
        for _ in range(4):
            driver.step()
        driver.preempt(requests[1].request_id)
        driver.run()
        driver.core.close()
        self.assert_same([driver.answers[r.request_id] for r in requests], expected)

    def test_a_seed_reproduces_in_any_company(self) -> None:
        prompt, others = self.prompt(20, 1), [self.prompt(25, v) for v in (2, 3, 4)]
        params: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_tokens": self.output_tokens}
        driver = self.driver()
        alone = driver.generate(make_request(prompt, **params))[0]
        company = [make_request(p, temperature=1.0, seed=v, max_tokens=20) for v, p in enumerate(others)]
        together = driver.generate(*company, make_request(prompt, **params))[-1]
        driver.core.close()
        assert together.token_ids == alone.token_ids

    def test_logprobs_are_of_the_tokens_drawn(self) -> None:
        driver = self.driver()
        if driver.core.runner.caps.logprobs:
            answer = driver.generate(make_request(self.prompt(20, 1), max_tokens=5, ignore_eos=True, logprobs=3))[0]
            assert len(answer.logprobs) == 5
            for token, entry in zip(answer.token_ids, answer.logprobs, strict=True):
                assert entry.top[0] == (token, entry.logprob), "greedy draws the most likely token"
                assert entry.logprob <= 0
                assert [lp for _, lp in entry.top] == sorted((lp for _, lp in entry.top), reverse=True)
        driver.core.close()

    def test_abort_at_any_moment_frees_everything(self) -> None:
        prompts = [self.prompt(40, v) for v in range(self.num_seqs + 2)]
        expected = self.one_by_one(prompts[:1])[0]
        driver = self.driver(max_num_batched_tokens=24)
        for steps in range(1, 8):
            doomed = [make_request(p, max_tokens=self.output_tokens) for p in prompts]
            driver.add(*doomed)
            for _ in range(steps):
                driver.step()
            driver.abort(*(r.request_id for r in doomed))
            assert not driver.core.has_requests()
            assert driver.core.stats().kv_cache_usage == 0
        survivor = driver.generate(make_request(prompts[0], max_tokens=self.output_tokens))[0]
        driver.core.close()
        self.assert_same([survivor], [expected])

    def test_lengths_end_where_they_should(self) -> None:
        driver = self.driver()
        limit = driver.core.model_info.max_model_len
        full = make_request(self.prompt(limit - 3, 1), max_tokens=3, ignore_eos=True)
        over = make_request(self.prompt(limit - 3, 1), max_tokens=4)
        answers = driver.generate(full, over)
        driver.core.close()
        assert (len(answers[0].token_ids), answers[0].finish_reason) == (3, FinishReason.LENGTH)
        assert (answers[1].token_ids, answers[1].finish_reason) == ([], FinishReason.ERROR)

    # --- drafts and masks ---------------------------------------------------------------------------------------------

    def drafted(
        self, prompts: Sequence[Sequence[int]], expected: Sequence[Answer], *, wrong_every: int = 0, **params: Any
    ) -> list[Answer]:
        """The prompts together, with drafts of the expected answers, some of their tokens wrong."""
        known = [(prompt, answer.token_ids) for prompt, answer in zip(prompts, expected, strict=True)]
        proposer = ScriptedDrafts(known, wrong_every=wrong_every, length=5)
        driver = self.speculating(proposer.always())
        params = {"max_tokens": self.output_tokens, "logprobs": 5 if self.logprob_noise else None, **params}
        try:
            answers = driver.generate(*(make_request(p, **params) for p in prompts))
            stats = driver.core.stats()
        finally:
            driver.core.close()
        assert stats.spec_draft_tokens == (proposer.proposed if driver.core.runner.caps.max_draft else 0)
        if proposer.proposed and not self.logprob_noise:
            assert (stats.spec_accepted_tokens < stats.spec_draft_tokens) == bool(wrong_every)
        return answers

    def test_drafts_that_hold_change_nothing(self) -> None:
        prompts = [self.prompt(n, variant) for variant, n in enumerate((33, 9, 64))]
        expected = self.one_by_one(prompts, ignore_eos=True)
        self.assert_same(self.drafted(prompts, expected, ignore_eos=True), expected)

    def test_rejected_drafts_leave_no_trace(self) -> None:
        prompts = [self.prompt(n, variant) for variant, n in enumerate((33, 9, 64, 16))]
        expected = self.one_by_one(prompts, ignore_eos=True)
        for wrong_every in (1, 2, 3):
            self.assert_same(self.drafted(prompts, expected, wrong_every=wrong_every, ignore_eos=True), expected)

    def test_a_turn_after_rejected_drafts_goes_on_from_what_held(self) -> None:
        prompt = list(self.prompt(40, 1))
        expected = self.one_by_one([prompt], ignore_eos=True)[0]
        drafts = ScriptedDrafts([(prompt, expected.token_ids)], wrong_every=2)
        driver = self.speculating(drafts.always())
        answer = driver.generate(make_request(prompt, max_tokens=self.output_tokens, ignore_eos=True))[0]
        turn = prompt + answer.token_ids + list(self.prompt(12, 2))
        again = driver.generate(make_request(turn, max_tokens=self.output_tokens))[0]
        driver.core.close()
        self.assert_same([again], self.one_by_one([turn]))

    def test_drafts_do_not_change_what_a_seed_draws(self) -> None:
        prompts = [self.prompt(20, 1)]
        params: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 11, "ignore_eos": True, "logprobs": 2}
        (expected,) = self.one_by_one(prompts, **params)
        for wrong_every in (0, 3):
            (answer,) = self.drafted(prompts, [expected], wrong_every=wrong_every, **params)
            pairs = list(zip(answer.token_ids, expected.token_ids, strict=True))
            parted = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
            # A draw between two tokens may turn on how sums are grouped, where that makes a difference at all.
            assert parted == len(pairs) or (self.logprob_noise and parted)
            for ours, theirs in zip(answer.logprobs[:parted], expected.logprobs[:parted], strict=True):
                assert abs(ours.logprob - theirs.logprob) <= max(self.logprob_noise, 1e-4)
                assert len(ours.top) == 2

    def test_masks_hold_whatever_the_model_wants(self) -> None:
        driver = self.driver()
        if driver.core.runner.caps.grammar:
            prompts = [self.prompt(20, v) for v in range(3)]
            free = self.one_by_one(prompts[:1], ignore_eos=True)[0].token_ids
            few, one = {1 + max(free), free[0] ^ 1, 2}, {free[0] ^ 1}
            most = set(range(driver.core.model_info.vocab_size)) - {*free}
            extras: list[dict[str, Any]] = [{}, {"logprobs": 1}, {"temperature": 1.0, "seed": 3}]
            requests = [
                make_request(p, max_tokens=6, ignore_eos=True, constraint=only(permitted), **extra)
                for p, permitted, extra in zip(prompts, (few, one, most), extras, strict=True)
            ]
            plain = make_request(prompts[0], max_tokens=self.output_tokens, ignore_eos=True)
            answers = driver.generate(*requests, plain)
            for answer, permitted in zip(answers, (few, one, most), strict=False):
                assert len(answer.token_ids) == 6
                assert permitted.issuperset(answer.token_ids)
            assert answers[3].token_ids[0] == free[0], "a mask of others changed what an unconstrained sequence draws"
        driver.core.close()

    def test_forced_tokens_are_computed_together(self) -> None:
        driver = self.driver()
        caps = driver.core.runner.caps
        if caps.grammar and caps.max_draft:
            token = self.prompt(1, 1)[0]
            request = make_request(self.prompt(20, 1), max_tokens=8, ignore_eos=True, constraint=only({token}))
            assert driver.generate(request)[0].token_ids == [token] * 8
            # All but the first, which the prompt brings, and the last. One step ahead nobody knows what to go on from.
            assert driver.core.stats().forced_tokens == (6 if caps.depth == 1 else 0)
        driver.core.close()
