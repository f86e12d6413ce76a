"""Drafts and masks in the device sampler against the reference: several positions of a slot, and what may be drawn there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from dataclasses import replace as replace_fields

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch", reason="the torch backend's tests need torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inferflux_backend_torch import host_draw
from inferflux_backend_torch.permitted import few_ids, permitted_words, without
from inferflux_backend_torch.sampler import DeviceSampler
from inferflux_core.engine.sampling import Logits, Sampler
from inferflux_core.engine.types import GrammarMask, PagedOps, Row, SequenceInit
from torch_backend.sampler_case import (
    EOS,
    INF,
    Make,
    both,
    check_logprobs,
    device_sampler,
    host_sampler,
    params_of,
    random_logits,
)
from torch_backend.test_sampler import near_tie, sequences

Allowed = npt.NDArray[np.bool_]


def packed(allowed: Allowed) -> npt.NDArray[np.int32]:
    """[N, V] as the words of a mask."""
    padded = np.zeros((len(allowed), -(-allowed.shape[1] // 32) * 32), dtype=bool)
    padded[:, : allowed.shape[1]] = allowed
    return np.packbits(padded, axis=1, bitorder="little").view("<i4").astype(np.int32)


def row_of(slot: int, position: int, drafts: list[int]) -> Row:
    """A row whose first sampled token is at `position`."""
    n = 1 + len(drafts)
    return Row(slot, position - 1, n, [0, *drafts], len(drafts), True, PagedOps())


# --- against the reference --------------------------------------------------------------------------------------------


@dataclass
class Verified:
    """One sequence of a step: its draft, and the logits and permitted tokens of each position."""

    init: SequenceInit
    logits: Logits
    allowed: Allowed | None
    wrong: int | None
    shift: int

    @property
    def count(self) -> int:
        return len(self.logits)


@st.composite
def masks(draw: st.DrawFn, count: int, size: int) -> Allowed | None:
    share = draw(st.sampled_from([None, 0.0, 0.001, 0.2, 0.9, 0.9999, "eos"]))
    if share is None:
        return None
    chance = np.random.default_rng(draw(st.integers(0, 2**31)))
    allowed = np.zeros((count, size), dtype=bool) if share == "eos" else chance.random((count, size)) < share
    allowed[np.arange(count), EOS if share == "eos" else chance.integers(0, size, count)] = True
    return allowed


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Verified], torch.dtype]:
    size = draw(st.sampled_from((7, 101, 4099, 4099)))
    chance = np.random.default_rng(draw(st.integers(0, 2**31)))
    work = []
    for slot in draw(st.lists(st.integers(0, 63), min_size=1, max_size=4, unique=True)):
        init = draw(sequences(size, slot))
        count = 1 if init.params.is_penalised else draw(st.integers(1, 5))
        logits = (chance.standard_normal((count, size)) * draw(st.sampled_from([0.1, 3.0, 8.0]))).astype(np.float32)
        for broken in draw(st.lists(st.sampled_from([math.nan, INF, -INF]), max_size=1)):
            logits[chance.integers(count), chance.random(size) < draw(st.sampled_from([0.3, 1.0]))] = broken
        wrong = draw(st.none() | st.integers(0, count))
        work.append(Verified(init, logits, draw(masks(count, size)), wrong, draw(st.integers(1, size - 1))))
    return work, draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))


def check_step(make: Make, work: list[Verified], dtype: torch.dtype, exact: bool) -> None:
    """What is sampled at all positions is the draft here, with one wrong token or none: so some hold, and some do not."""
    size = work[0].logits.shape[1]
    sampler, reference = make(size), Sampler(size, frozenset({EOS}))
    rows, bits, first = [], [np.zeros((0, -(-size // 32)), np.int32)], {}
    for one in work:
        sampler.start(one.init)
        reference.start(one.init)
        rows.append(row_of(one.init.slot, len(one.init.tokens), [0] * (one.count - 1)))
        if one.allowed is not None:
            first[one.init.slot] = sum(map(len, bits))
            bits.append(packed(one.allowed))
    mask = GrammarMask(np.concatenate(bits), first)
    logits = torch.from_numpy(np.concatenate([one.logits for one in work])).to(dtype)
    slots = [one.init.slot for one in work for _ in range(one.count)]
    positions = [len(one.init.tokens) + i for one in work for i in range(one.count)]
    tokens, entries = sampler.sample(logits, slots, positions, permitted_words(mask, rows, size)).collect()
    place = 0
    for one in work:
        ours, logprobs = tokens[place : place + one.count], entries[place : place + one.count]
        values = logits[place : place + one.count].float().numpy()
        place += one.count
        if one.allowed is not None:
            assert one.allowed[np.arange(one.count), ours].all()
        draft = ours[:-1]
        if one.wrong is not None and one.wrong < len(draft):
            draft[one.wrong] = (draft[one.wrong] + one.shift) % size
        slot, position = one.init.slot, len(one.init.tokens)
        words = None if one.allowed is None else packed(one.allowed)
        expected, expected_logprobs = reference.sample_row(slot, position, list(values), draft, words)
        assert exact or len(expected) <= one.count
        for i, token in enumerate(expected):
            if ours[i] != token:
                known = replace_fields(one.init, tokens=[*one.init.tokens, *draft[:i]])
                row = values[i] if one.allowed is None else np.where(one.allowed[i], values[i], np.float32(-INF))
                assert not exact, f"drew {ours[i]}, the reference {token}, with {known}"
                assert near_tie(known, size, row, position + i, ours[i], token), f"{ours[i]} != {token}: {known}"
                break
            check_logprobs(logprobs[i], None if expected_logprobs is None else expected_logprobs[i])
        else:
            held = next((i for i, d in enumerate(draft) if ours[i] != d), len(draft))
            assert len(expected) == held + 1


@given(steps())
@settings(max_examples=150, deadline=None)
def test_on_the_host_every_draw_is_the_references(case: tuple[list[Verified], torch.dtype]) -> None:
    check_step(host_sampler, *case, exact=True)


@given(steps())
@settings(max_examples=80, deadline=None)
def test_on_a_device_every_draw_is_the_references_up_to_rounding(case: tuple[list[Verified], torch.dtype]) -> None:
    check_step(device_sampler, *case, exact=False)


# --- the mask wins ----------------------------------------------------------------------------------------------------


def drawn(make: Make, row: list[float], allowed: list[int], **params: object) -> set[int]:
    """Tokens drawn at position 7 with 40 seeds, all from this row."""
    size = len(row)
    sampler = make(size)
    for slot in range(40):
        sampler.start(SequenceInit(slot, params_of(seed=slot, **params), [0] * 7, 7))
    mask = np.zeros((1, size), dtype=bool)
    mask[0, allowed] = True
    rows = [row_of(slot, 7, []) for slot in range(40)]
    words = permitted_words(GrammarMask(packed(mask), dict.fromkeys(range(40), 0)), rows, size)
    logits = torch.tensor(row).expand(40, -1).contiguous()
    return set(sampler.sample(logits, range(40), [7] * 40, words).collect()[0])


@both
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [math.nan, -INF])
def test_where_nothing_is_possible_all_that_is_permitted_is_equal(make: Make, temperature: float, broken: float) -> None:
    found = drawn(make, [9.0, broken, INF, 5.0, broken, broken], [1, 4, 5], temperature=temperature)
    assert found == ({1} if temperature == 0.0 else {1, 4, 5})


@both
@pytest.mark.parametrize("broken", [math.nan, -INF])
def test_so_it_is_where_many_tokens_are_permitted(make: Make, broken: float) -> None:
    found = drawn(make, [3.0, broken] * 2500, list(range(1, 5000, 2)))
    assert len(found) > 30
    assert all(token % 2 for token in found)


@both
def test_a_certain_token_that_is_not_permitted_is_not_drawn(make: Make) -> None:
    assert drawn(make, [1.0, INF, 1.0, INF, INF], [0, 3, 4]) == {3, 4}
    assert drawn(make, [1.0, INF, 1.0, 0.0, INF], [0, 2]) == {0, 2}


@both
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bias_moves_no_token_past_the_mask(make: Make, temperature: float) -> None:
    values = {"temperature": temperature, "logit_bias": {0: 100.0, 3: -100.0, 4: 50.0}}
    assert drawn(make, [0.0] * 6, [3, 5], **values) == {5}
    assert drawn(make, [0.0] * 6, [3], **values) == {3}
    assert drawn(make, [0.0] * 6, [1, 3, 4], **values) == {4}


@both
@pytest.mark.parametrize("penalised", [{}, {"presence_penalty": 0.5}])
@pytest.mark.parametrize("ban", [{"ignore_eos": True}, {"min_tokens": 5}])
def test_a_ban_gives_way_only_if_nothing_else_is_permitted(
    make: Make, ban: dict[str, int], penalised: dict[str, float]
) -> None:
    row = [0.0, 0.0, 0.0, 90.0, 0.0]
    assert drawn(make, row, [1, EOS], **ban, **penalised) == {1}
    assert drawn(make, row, [EOS], **ban, **penalised) == {EOS}
    stop = {"stop_token_ids": frozenset({2}), "min_tokens": 5}
    assert drawn(make, row, [2, EOS], **stop, **penalised) == {EOS}, "as likely as they are without the ban"


@both
def test_logprobs_are_those_of_the_raw_distribution(make: Make) -> None:
    sampler = make(4)
    sampler.start(SequenceInit(0, params_of(temperature=0.0, logprobs=2), [0], 1))
    mask = GrammarMask(np.array([[0b1000]], dtype=np.int32), {0: 0})
    words = permitted_words(mask, [row_of(0, 1, [])], 4)
    raw = torch.log(torch.tensor([[0.5, 0.3, 0.1, 0.1]]))
    tokens, entries = sampler.sample(raw, [0], [1], words).collect()
    assert tokens == [3]
    assert entries[0] is not None
    assert entries[0].logprob == pytest.approx(math.log(0.1), abs=1e-5)
    assert [token for token, _ in entries[0].top] == [0, 1]


@both
def test_a_masked_row_changes_nothing_for_its_company(make: Make) -> None:
    """Greedy and drawn, changed and not, some of them masked: each draws what it draws alone."""
    kinds = [{"temperature": 0.0}, {}, {"logit_bias": {5: 2.0}}, {"temperature": 0.0, "ignore_eos": True}, {"top_k": 4}]
    logits = torch.stack([torch.from_numpy(random_logits(i, 300)) for i in range(10)])
    before = logits.clone()
    allowed = np.random.default_rng(1).random((5, 300)) < 0.5
    sampler = make(300)
    for slot in range(10):
        sampler.start(SequenceInit(slot, params_of(seed=slot, **kinds[slot % 5]), [1] * 4, 4))
    mask = GrammarMask(packed(allowed), {slot: slot for slot in range(5)})
    words = permitted_words(mask, [row_of(slot, 4, []) for slot in range(10)], 300)
    together = sampler.sample(logits, range(10), [4] * 10, words).collect()[0]
    alone = [
        sampler.sample(logits[i : i + 1], [i], [4], {0: words[i]} if i in words else {}).collect()[0][0] for i in range(10)
    ]
    assert together == alone
    assert all(allowed[i, together[i]] for i in range(5))
    assert torch.equal(logits, before)


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_a_choice_of_one_looks_at_no_logit() -> None:
    sampler = host_sampler(49152)
    sampler.start(SequenceInit(0, params_of(), [0], 1))
    words = permitted_words(GrammarMask(packed(np.arange(49152)[None] == 40001), {0: 0}), [row_of(0, 1, [])], 49152)
    nothing = torch.empty(1, 49152, device="meta")
    assert sampler.sample(nothing, [0], [1], words).collect()[0] == [40001]


def test_where_nearly_all_is_permitted_the_most_likely_token_is_looked_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = host_sampler(49152)
    sampler.start(SequenceInit(0, params_of(temperature=0.0), [0], 1))
    row = random_logits(3, 49152)
    allowed = np.ones((1, 49152), dtype=bool)
    words = permitted_words(GrammarMask(packed(allowed), {0: 0}), [row_of(0, 1, [])], 49152)
    allowed[0, row.argmax()] = False
    other = permitted_words(GrammarMask(packed(allowed), {0: 0}), [row_of(0, 1, [])], 49152)
    logits = torch.from_numpy(row)[None]
    assert sampler.sample(logits, [0], [1], other).collect()[0] == [int(np.argsort(row)[-2])]
    monkeypatch.setattr(host_draw, "all_tokens", None)
    assert sampler.sample(logits, [0], [1], words).collect()[0] == [int(row.argmax())]


def test_masks_never_wait_for_the_device() -> None:
    meta = torch.device("meta")
    sampler = DeviceSampler(300, frozenset({EOS}), 8, meta)
    for slot, temperature in enumerate((0.0, 1.0)):
        sampler.start(SequenceInit(slot, params_of(temperature=temperature, ignore_eos=True), [1], 1))
    mask = GrammarMask(packed(np.ones((2, 300), dtype=bool)), {0: 0, 1: 1})
    words = permitted_words(mask, [row_of(0, 1, []), row_of(1, 1, [])], 300)
    assert sampler.sample(torch.empty(2, 300, device=meta), [0, 1], [1, 1], words).token_ids.shape == (2,)


# --- words ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.sampled_from([0.0, 0.001, 0.5]), st.integers(0, 2**31))
def test_words_are_bits(size: int, share: float, seed: int) -> None:
    chance = np.random.default_rng(seed)
    allowed = chance.random((1, size)) < share
    allowed[0, chance.integers(size)] = True
    bits = packed(allowed)
    if size % 32:  # what a mask says past the vocabulary does not count
        bits[0, -1] |= np.array(0xFFFFFFFF << size % 32 & 0xFFFFFFFF, dtype=np.uint32).view(np.int32)
    (words,) = permitted_words(GrammarMask(bits, {3: 0}), [row_of(3, 1, [])], size).values()
    ids = np.flatnonzero(allowed[0])
    found = few_ids(words)
    if found is None:
        assert len(ids) > 64
    else:
        assert found.tolist() == ids.tolist()
    some = ids[: len(ids) // 2].tolist()
    left = few_ids(without(words, some))
    assert left is None or left.tolist() == ids[len(some) :].tolist()
    assert without(words, ids.tolist()) is words, "unless nothing is left"


def test_a_mask_that_does_not_fit_is_not_ignored() -> None:
    mask = GrammarMask(np.ones((1, 2), dtype=np.int32), {0: 0})
    with pytest.raises(AssertionError, match="mask has rows for all drafts"):
        permitted_words(mask, [row_of(0, 1, [5])], 64)
    with pytest.raises(AssertionError, match="something may be drawn"):
        permitted_words(GrammarMask(np.zeros((1, 2), dtype=np.int32), {0: 0}), [row_of(0, 1, [])], 64)
