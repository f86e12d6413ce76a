"""Drafts from a second, smaller model (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from inferflux_core.engine.kv.manager import NO_MATCH, make_kv_cache_manager
from inferflux_core.engine.request import BlockHash, Request, root_hash
from inferflux_core.engine.shared_vocabulary import SharedVocabulary, share_vocabulary
from inferflux_core.engine.types import Row, SamplingParams, SchedulerOutput, SequenceInit
from inferflux_core.errors import ModelFileError
from inferflux_core.interfaces import KnownSequence, ModelRunner, NoSettings, Outlook, Proposer, ProposerContext

# A sequence of which the draft misses more tokens than this only has them read: what a call takes that brings a draft for each
# sequence it was asked for is then the price of drafting, and of nothing else.
_MOST_MISSING = 32


def make(settings: NoSettings, context: ProposerContext) -> Proposer:
    """Load the draft model that the configuration names.

    Raises:
        ConfigError: none is named.
        ModelFileError: it cannot be loaded, has another vocabulary than the target, or cannot take tokens back.
    """
    draft = context.load_draft()
    try:
        if not draft.runner.kv_cache_spec.can_trim:
            raise ModelFileError(
                f"draft model {draft.name!r} cannot draft: the end of a sequence cannot be removed from its cache, because its "
                f"memory is recurrent or it has a sliding window and swa_full is false; name another model, or set swa_full to "
                f"true"
            )
        info = draft.runner.model_info
        vocabulary = share_vocabulary(
            draft.tokenizer,
            context.tokenizer(),
            draft_name=draft.name,
            target_name=context.target,
            sizes=(info.vocab_size, context.model_info.vocab_size),
        )
    except BaseException:
        draft.runner.close()
        raise
    return DraftModelProposer(draft.runner, vocabulary, context.model_info.eos_token_ids)


@dataclass(slots=True, eq=False)
class _Follower:
    """What the draft has of one sequence.

        |------------ request.tokens -------------|
        |-- num_computed_tokens --|-- rejected --|
                                  beyond: what the cache holds after the computed tokens

    Attributes:
        request: the sequence as the draft reads it. Holds known tokens only, so that it grows at its end only.
        params: how the draft draws for it.
        beyond: tokens whose KV lies after the computed ones: guesses, of which those that turn out right are not computed
            again.
        last_used: number of the last call that wanted it.
    """

    request: Request
    params: SamplingParams
    beyond: list[int] = field(default_factory=list)
    last_used: int = 0

    @property
    def num_cells(self) -> int:
        """Positions that the cache holds, valid or not."""
        return self.request.num_computed_tokens + len(self.beyond)

    @property
    def num_missing(self) -> int:
        """Known tokens that are not computed."""
        return len(self.request.tokens) - self.request.num_computed_tokens

    @property
    def start(self) -> int:
        """Position to go on from: one token must be computed to draw from, even if nothing was learnt since the last time."""
        return min(self.request.num_computed_tokens, len(self.request.tokens) - 1)

    def learn(self, tokens: Sequence[int]) -> None:
        """These tokens follow; guesses that agree with them count as computed."""
        request = self.request
        request.tokens += tokens
        first = request.num_computed_tokens
        agreed = 0
        for guess, token in zip(self.beyond, request.tokens[first : first + len(self.beyond)], strict=False):
            if guess != token:
                break
            agreed += 1
        request.num_computed_tokens += agreed
        del self.beyond[:agreed]


@dataclass(slots=True, eq=False)
class _Draft:
    """One sequence's proposal in the making."""

    follower: _Follower
    num_wanted: int
    num_output: int
    tokens: list[int] = field(default_factory=list)


class DraftModelProposer(Proposer):
    """Lets a draft model go on from every sequence, all of them in one batch.

    It draws as the target would: with the request's seed, temperature and filters, and with the noise of the same positions.
    So where both models agree on a distribution they draw the same token, at any temperature (coupled noise).

    The draft reads a sequence when it is first asked for a proposal, and then `max_num_batched_tokens` of its tokens a call at
    most, all sequences together and the shortest first. So for a prompt of n tokens it is silent for
    n / max_num_batched_tokens calls and one, in which its proposals are empty; `outlook` is not None meanwhile, so that it is
    asked. Prompts with a common beginning that arrive together are read one after the other, and the beginning once.

    A sequence that gets no slot or no cache, because the draft has less of them than the target, gets no proposals; what was
    not wanted for longest makes room.
    """

    def __init__(self, runner: ModelRunner, vocabulary: SharedVocabulary, eos_token_ids: frozenset[int]) -> None:
        """
        Args:
            runner: the draft model, warmed up; closed with the proposer. Its cache can be trimmed.
            vocabulary: what it shares with the target.
            eos_token_ids: of the target.
        """
        self._runner = runner
        self._vocabulary = vocabulary
        self._eos = eos_token_ids
        self._max_model_len = runner.model_info.max_model_len
        self._max_tokens = runner.caps.max_num_batched_tokens
        self._kv = make_kv_cache_manager(runner.kv_cache_spec, enable_prefix_caching=True)
        self._slots = list(range(runner.caps.max_num_seqs))
        self._freed: list[int] = []
        self._followers: dict[str, _Follower] = {}
        self._calls = 0
        self._steps = 0

    def prior(self, kind: int) -> float:
        return 0.6

    def outlook(self, sequence: KnownSequence) -> Outlook | None:
        room = self._room(sequence)
        return Outlook(room) if room > 0 else None

    def _room(self, sequence: KnownSequence) -> int:
        """Most tokens that the draft can draw: the last of them needs no place in its cache."""
        return 0 if sequence.params.is_penalised else self._max_model_len - len(sequence.tokens) + 1

    def propose(self, wanted: Sequence[tuple[KnownSequence, int]]) -> list[Sequence[int]]:
        self._calls += 1
        drafts: list[_Draft | None] = []
        for sequence, at_most in wanted:
            num_wanted = min(at_most, self._room(sequence))
            num_output = len(sequence.tokens) - sequence.num_prompt_tokens
            drafts.append(_Draft(self._follow(sequence), num_wanted, num_output) if num_wanted > 0 else None)
        going = self._catch_up([draft for draft in drafts if draft is not None])
        while going:
            going = self._go_on(going)
        return [draft.tokens if draft is not None else [] for draft in drafts]

    def forget(self, request_id: str) -> None:
        follower = self._followers.pop(request_id, None)
        if follower is not None:
            self._release(follower)

    def close(self) -> None:
        self._runner.close()

    # --- the steps of one call ----------------------------------------------------------------------------------------

    def _catch_up(self, drafts: Sequence[_Draft]) -> list[_Draft]:
        """Compute what the draft has not read yet, as far as one step goes; those that want more than the token it brings."""
        plan = self._plan()
        rows: list[_Draft] = []
        reading: set[BlockHash] = set()  # blocks that a row of this step computes, and so the next call finds
        for draft in sorted(drafts, key=lambda draft: draft.follower.num_missing):
            if plan.num_tokens < self._max_tokens and self._add_row(plan, draft.follower, reading):
                rows.append(draft)
        drawn = iter(self._compute(plan))
        going = []
        for draft, row in zip(rows, plan.rows, strict=True):
            request = draft.follower.request
            request.num_computed_tokens = row.start + row.n
            draft.follower.beyond.clear()
            self._kv.cache_blocks(request, draft.follower.start)
            if row.sample and self._take(draft, next(drawn)):
                going.append(draft)
        return going

    def _add_row(self, plan: SchedulerOutput, follower: _Follower, reading: set[BlockHash]) -> bool:
        """A row of what is missing, or of the beginning of it. False if the sequence has to wait, for room or for another."""
        request = follower.request
        num_tokens = len(request.tokens)
        match = NO_MATCH
        if request.slot is None:
            while not self._slots or num_tokens - self._kv.get_computed_blocks(request).num_held > self._kv.free_tokens():
                if not self._make_room():
                    return False
            match = self._kv.get_computed_blocks(request)
        start = match.num_tokens if request.slot is None else follower.start
        n = min(num_tokens - start, self._max_tokens - plan.num_tokens)
        size = self._kv.block_size
        if num_tokens - start >= size:
            block = request.block_hashes(size)[start // size]
            if block in reading:
                return False
            reading.add(block)
        if request.slot is not None:
            self._cut(follower)
        ops = self._kv.allocate_slots(request, start + n, match)
        while ops is None:
            if request.slot is None or not self._make_room():
                self.forget(request.request_id)  # others may have its room; it starts over when there is enough for all of it
                return False
            ops = self._kv.allocate_slots(request, start + n)
        if request.slot is None:
            request.slot = heapq.heappop(self._slots)
            plan.start.append(SequenceInit(request.slot, follower.params, request.tokens[:], request.num_prompt_tokens))
        tokens = request.tokens[start : start + n]
        is_draft = start + n == num_tokens and n <= _MOST_MISSING
        plan.rows.append(Row(request.slot, start, n, tokens, n_draft=0, sample=is_draft, kv=ops))
        plan.num_tokens += n
        return True

    def _go_on(self, drafts: Sequence[_Draft]) -> list[_Draft]:
        """Draw one token more for each; those that want yet more."""
        plan = self._plan()
        rows: list[_Draft] = []
        for draft in drafts:
            request, token = draft.follower.request, draft.tokens[-1]
            start = draft.follower.num_cells
            ops = self._kv.allocate_slots(request, start + 1)
            while ops is None and self._make_room():
                ops = self._kv.allocate_slots(request, start + 1)
            if ops is not None:
                assert request.slot is not None
                plan.rows.append(Row(request.slot, start, 1, [token], n_draft=0, sample=True, kv=ops))
                plan.num_tokens += 1
                rows.append(draft)
        drawn = self._compute(plan)
        for draft in rows:
            draft.follower.beyond.append(draft.tokens[-1])
        return [draft for draft, token in zip(rows, drawn, strict=True) if self._take(draft, token)]

    def _plan(self) -> SchedulerOutput:
        self._steps += 1
        return SchedulerOutput(step=self._steps, rows=[], num_tokens=0)

    def _compute(self, plan: SchedulerOutput) -> list[int]:
        """The tokens drawn, one for each row that samples."""
        if not plan.rows:
            return []
        plan.free, self._freed = self._freed, []
        ticket = self._runner.launch(plan)
        self._runner.sample(ticket, None)
        return [tokens[0] for tokens in self._runner.collect(ticket).tokens]

    def _take(self, draft: _Draft, token: int) -> bool:
        """Propose a token that was drawn, if the target may draw it too; whether to go on."""
        params = draft.follower.request.params
        if not self._vocabulary.is_shared(token):
            return False
        if token in self._eos and (params.ignore_eos or draft.num_output + len(draft.tokens) < params.min_tokens):
            return False
        draft.tokens.append(token)
        return len(draft.tokens) < draft.num_wanted and token not in self._eos and token not in params.stop_token_ids

    # --- sequences ----------------------------------------------------------------------------------------------------

    def _follow(self, sequence: KnownSequence) -> _Follower:
        """The draft's own record of a sequence, brought up to date."""
        follower = self._followers.get(sequence.request_id)
        if follower is None:
            request = Request(
                request_id=sequence.request_id,
                params=sequence.params,
                tokens=[],
                num_prompt_tokens=sequence.num_prompt_tokens,
                # Prefixes are shared under the same rule as the target's; of a sequence that does not tell its own, with none.
                root=sequence.root if isinstance(sequence, Request) else root_hash(f"\0{sequence.request_id}"),
                tenant="",
                priority=0,
                arrival_time=0.0,
            )
            follower = _Follower(request, _drawing(sequence.params, self._vocabulary))
            self._followers[sequence.request_id] = follower
        follower.last_used = self._calls
        follower.learn(self._vocabulary.for_draft(sequence.tokens[len(follower.request.tokens) :]))
        return follower

    def _make_room(self) -> bool:
        """Let go of the sequence that was not wanted for longest; False if this call wants all that hold something."""
        idle = [f for f in self._followers.values() if f.last_used < self._calls and f.request.slot is not None]
        if not idle:
            return False
        self.forget(min(idle, key=lambda follower: follower.last_used).request.request_id)
        return True

    def _cut(self, follower: _Follower) -> None:
        """Right guesses are for others to find; what lies after them in the cache does not count."""
        self._kv.cache_blocks(follower.request, follower.start)
        if follower.num_cells > follower.start:
            self._kv.trim(follower.request, follower.start)

    def _release(self, follower: _Follower) -> None:
        request = follower.request
        if request.slot is not None:
            self._cut(follower)
            self._kv.free(request, keep=True)
            heapq.heappush(self._slots, request.slot)
            self._freed.append(request.slot)
            request.slot = None

    # --- books --------------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Verify slots, and what the cache is said to hold of each sequence. For tests, after every call.

        Raises:
            AssertionError: what does not add up.
        """
        self._kv.check_integrity()
        used = [f.request.slot for f in self._followers.values() if f.request.slot is not None]
        assert sorted([*self._slots, *used]) == list(range(self._runner.caps.max_num_seqs)), "slots leaked"
        for request_id, follower in self._followers.items():
            request = follower.request
            assert request.request_id == request_id, "a sequence is kept under another's name"
            assert request.num_computed_tokens <= len(request.tokens), "more was computed than is known"
            assert (
                not follower.beyond
                or request.num_computed_tokens == len(request.tokens)
                or (follower.beyond[0] != request.tokens[request.num_computed_tokens])
            ), "a right guess counts as wrong"
            assert follower.num_cells <= self._max_model_len, "a sequence outgrew the draft's context"
            assert request.slot is not None or follower.num_cells == 0, "a sequence without a slot holds cache"


def _drawing(params: SamplingParams, vocabulary: SharedVocabulary) -> SamplingParams:
    """How the draft draws: as the target, but for what concerns its own tokens only, or when to stop."""
    return SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        logit_bias={token: bias for token, bias in params.logit_bias.items() if vocabulary.is_shared(token)},
        seed=params.seed,
        ignore_eos=params.ignore_eos,
    )
