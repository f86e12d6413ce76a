"""Which draft models share a target's vocabulary, and what becomes of the tokens that they do not share."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import pytest

from inferflux_core.engine.shared_vocabulary import SharedVocabulary, share_vocabulary
from inferflux_core.errors import ModelFileError
from inferflux_core.interfaces import Tokenizer

WORDS = ["a", "b", " the", "é", "ing"]


class ListedTokenizer(Tokenizer):
    """A vocabulary by its texts; those in angle brackets are control tokens."""

    bos_token = eos_token = ""
    chat_template = None

    def __init__(self, texts: Sequence[str], ends: Sequence[str] = ("<end>",)) -> None:
        self._texts = texts
        self.vocab_size = len(texts)
        self.special_tokens = frozenset(text for text in texts if text.startswith("<"))
        self.eos_token_ids = frozenset(texts.index(end) for end in ends if end in texts)

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        raise NotImplementedError

    def token_bytes(self, token_id: int, *, special: bool = False) -> bytes:
        text = self._texts[token_id]
        return b"" if text in self.special_tokens and not special else text.encode()


def share(draft: Sequence[str], target: Sequence[str], sizes: tuple[int, int] | None = None) -> SharedVocabulary:
    return share_vocabulary(
        ListedTokenizer(draft), ListedTokenizer(target), draft_name="small", target_name="large", sizes=sizes
    )


def test_equal_vocabularies_share_everything() -> None:
    shared = share([*WORDS, "<end>"], [*WORDS, "<end>"])
    assert shared == SharedVocabulary(6, frozenset(), 5)
    assert shared.for_draft(range(6)) == [0, 1, 2, 3, 4, 5]
    assert all(map(shared.is_shared, range(6)))


def test_control_tokens_may_differ() -> None:
    shared = share([*WORDS, "<end>", "<pad>", "<bos>"], [*WORDS, "<end>", "<tool>", "<bos>"])
    assert shared.foreign == {6}
    assert shared.for_draft([0, 6, 7, 5]) == [0, 5, 7, 5]
    assert [shared.is_shared(token) for token in (5, 6, 7)] == [True, False, True]


@pytest.mark.parametrize("more", ["<tool>", "ordinary"])
def test_ids_beyond_the_smaller_vocabulary(more: str) -> None:
    target_has_more = share([*WORDS, "<end>"], [*WORDS, "<end>", more])
    assert target_has_more.for_draft([6, 1]) == [5, 1]
    draft_has_more = share([*WORDS, "<end>", more], [*WORDS, "<end>"])
    assert not draft_has_more.is_shared(6)


def test_padding_is_nothing_to_differ_in() -> None:
    """Conversions fill a vocabulary up with ids that have no text, where another model of the family has tokens."""
    shared = share([*WORDS, "<end>", "", "", "x"], [*WORDS, "<end>", "think", "", "x"])
    assert shared.foreign == {6, 7}
    assert shared.is_shared(8)


def test_a_model_may_be_smaller_than_its_tokenizer() -> None:
    shared = share([*WORDS, "<end>"], [*WORDS, "<end>"], sizes=(6, 3))
    assert [shared.is_shared(token) for token in range(6)] == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("draft", "target", "fault"),
    [
        (["a", "x", " the"], ["a", "b", " the"], r"1 of their first 3 tokens differ, the first of them 1, which is 'x' .* 'b'"),
        (["b", "a", "<end>"], ["a", "b", "<end>"], r"2 of their first 3 tokens differ, the first of them 0,"),
        (
            ["a", "b", "<end>"],
            ["a", "b", "c"],
            r"1 of their first 3 tokens differ, the first of them 2, which is '<end>' .* 'c'",
        ),
        (["a", "b", "c"], ["a", "b", "<end>"], r"1 of their first 3 tokens differ"),
    ],
    ids=["a text", "the order", "control here", "control there"],
)
def test_another_vocabulary_is_refused(draft: list[str], target: list[str], fault: str) -> None:
    with pytest.raises(ModelFileError, match=rf"draft model 'small' cannot draft for 'large': {fault}.*of the same family"):
        share(draft, target)


def test_a_draft_without_an_end_reads_its_first_token_instead() -> None:
    assert share(WORDS, [*WORDS, "<end>"]).for_draft([5]) == [0]


def test_large_vocabularies_are_compared_quickly() -> None:
    tokenizer = ListedTokenizer([f"t{i}" for i in range(150_000)])
    texts: Mapping[int, bytes] = {i: tokenizer.token_bytes(i) for i in range(150_000)}
    tokenizer.token_bytes = lambda token_id, *, special=False: texts[token_id]  # type: ignore[method-assign]  # no cost of its own
    began = time.process_time()
    share_vocabulary(tokenizer, tokenizer, draft_name="", target_name="")
    assert time.process_time() - began < 1.0
