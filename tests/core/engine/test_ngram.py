"""Looking up what followed the same tokens before."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from inferflux_core.engine.ngram import NgramProposer, NgramSettings
from inferflux_core.engine.request import Request
from inferflux_core.testing.driver import make_request


def proposer(n: int = 3) -> NgramProposer:
    return NgramProposer(NgramSettings(prompt_lookup_min=n))


def known(tokens: Sequence[int], name: str = "a") -> Request:
    return Request.of(make_request(tokens, request_id=name))


def draft(ngram: NgramProposer, sequence: Request, count: int) -> list[int]:
    if ngram.outlook(sequence) is None:
        return []
    return list(ngram.propose([(sequence, count)])[0])


def test_what_followed_the_same_words_is_proposed() -> None:
    assert draft(proposer(), known([1, 2, 3, 4, 5, 6, 9, 1, 2, 3]), 3) == [4, 5, 6]


def test_the_last_of_several_places_counts() -> None:
    assert draft(proposer(), known([1, 2, 3, 4, 1, 2, 3, 5, 7, 1, 2, 3]), 2) == [5, 7]


def test_fewer_equal_tokens_than_asked_for_are_no_place() -> None:
    tokens = [1, 2, 3, 4, 5, 9, 2, 3]
    assert draft(proposer(3), known(tokens), 4) == []
    assert draft(proposer(2), known(tokens), 2) == [4, 5]


def test_copying_goes_on_where_it_agreed_although_a_later_place_looks_alike() -> None:
    """The text being copied says `7 8 9` twice; having copied the first, the second time is not taken for it."""
    source = [1, 2, 3, 7, 8, 9, 4, 5, 6, 7, 8, 9, 10, 11]
    ngram, sequence = proposer(), known([*source, 0, 1, 2, 3])
    assert draft(ngram, sequence, 2) == [7, 8]
    sequence.tokens += [7, 8, 9]
    assert draft(ngram, sequence, 3) == [4, 5, 6]


def test_after_a_difference_copying_is_found_again() -> None:
    source = list(range(10, 30))
    ngram, sequence = proposer(), known([*source, 0, 10, 11, 12])
    assert draft(ngram, sequence, 1) == [13]
    sequence.tokens += [99]
    assert draft(ngram, sequence, 1) == []
    sequence.tokens += [14, 15, 16]
    assert draft(ngram, sequence, 2) == [17, 18]


def test_a_text_that_repeats_itself_is_continued_beyond_its_end() -> None:
    assert draft(proposer(), known([5, 6, 7, 5, 6, 7]), 7) == [5, 6, 7, 5, 6, 7, 5]


def test_longer_agreement_is_a_better_kind() -> None:
    ngram, sequence = proposer(), known([*range(50), 99, 0, 1, 2])
    kinds = []
    for token in range(3, 45):
        outlook = ngram.outlook(sequence)
        assert outlook is not None
        kinds.append(outlook.kind)
        sequence.tokens.append(token)
    assert kinds == sorted(kinds)
    assert (kinds[0], kinds[-1]) == (0, ngram.num_kinds - 1)
    priors = [ngram.prior(kind) for kind in range(ngram.num_kinds)]
    assert priors == sorted(priors)


def test_an_agreement_found_late_is_counted_backwards() -> None:
    outlook = proposer().outlook(known([*range(40), 99, *range(20)]))
    assert outlook is not None
    assert outlook.kind == 3, "16 to 31 tokens agree"


def test_a_forgotten_sequence_starts_over() -> None:
    ngram = proposer()
    assert draft(ngram, known([1, 2, 3, 4, 1, 2, 3]), 1) == [4]
    ngram.forget("a")
    assert draft(ngram, known([1, 2, 3, 5, 1, 2, 3]), 1) == [5]
    ngram.forget("never seen")


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    cuts=st.lists(st.integers(1, 60), max_size=6),
    n=st.integers(1, 4),
    count=st.integers(1, 20),
)
def test_proposals_depend_on_the_tokens_only_and_follow_equal_ones(
    tokens: list[int], cuts: list[int], n: int, count: int
) -> None:
    grown = known(tokens[:1])
    ngram = proposer(n)
    for cut in [*sorted(cuts), len(tokens)]:
        ngram.outlook(grown)
        grown.tokens += tokens[len(grown.tokens) : cut]
    got = draft(ngram, grown, count)
    assert got == draft(proposer(n), known(tokens), count)
    seen = any(tokens[i : i + n] == tokens[-n:] for i in range(len(tokens) - n)) if len(tokens) >= n else False
    assert bool(got) == seen
    if got:
        assert len(got) == count
        # What is proposed did follow the last n tokens somewhere before, text and draft taken together.
        whole = tokens + got
        end = len(tokens)
        places = [i for i in range(n, end) if whole[i - n : i] == whole[end - n : end]]
        assert any(whole[i : i + count] == got for i in places)
