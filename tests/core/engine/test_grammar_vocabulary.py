"""Vocabularies as grammars see them: odd ones, and those of the demo model in both of its formats."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import pytest

from core.engine.constrained import FLAG_SCHEMA, compact, feed, ids_of, permitted, state_of
from inferflux_core.engine.grammar import Grammars
from inferflux_core.engine.types import Thinking
from inferflux_core.engine.vocabulary import Vocabulary
from inferflux_core.interfaces import Tokenizer
from inferflux_core.plugins import load_plugins
from inferflux_core.testing.fake_backend import EOS, IM_END, FakeTokenizer
from llamacpp.demo_model import demo_files


class Listed(Tokenizer):
    """These tokens; a text is spelled greedily, and with a space in front, as SentencePiece does."""

    bos_token = eos_token = ""
    chat_template = None
    special_tokens = frozenset()
    eos_token_ids = frozenset({0})

    def __init__(self, tokens: Sequence[bytes | None], space: bytes = b"") -> None:
        self.tokens = tokens
        self.vocab_size = len(tokens)
        self._space = space

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        data, ids = self._space + text.encode(), []
        while data:
            token = max((t for t in self.tokens if t and data.startswith(t)), key=len)
            ids.append(self.tokens.index(token))
            data = data[len(token) :]
        return ids

    def token_bytes(self, token_id: int, *, special: bool = False) -> bytes:
        if token_id == 0:
            return b"</s>" if special else b""
        token = self.tokens[token_id]
        if token is None:
            raise KeyError(token_id)
        return token


def listed(*tokens: bytes | None, size: int | None = None, space: bytes = b"") -> Grammars:
    made = [b"", *tokens]
    return Grammars(lambda: Listed(made, space), size or len(made), Listed.eos_token_ids)


def test_ids_without_bytes_are_never_drawn() -> None:
    grammars = listed(b"a", b"", None, b"\xff", b"a\xff", b"\xc3", b"b", b"ab", size=70)
    try:
        state = state_of(grammars, r"start: /(.|\n)+/")
        assert permitted(grammars, state) == [[1, 6, 7, 8]]
    finally:
        grammars.close()


def test_text_does_not_pass_for_a_control_token() -> None:
    grammars = listed(b"a", b"\xff[1]", b"\xff[0]")
    try:
        assert permitted(grammars, state_of(grammars, 'start: <[1]> "a"')) == [[1]]
        assert permitted(grammars, state_of(grammars, "start: <[0-1]>"))[0] in ([0, 1], [1])
    finally:
        grammars.close()


def test_logits_may_be_narrower_than_the_vocabulary() -> None:
    grammars = listed(b"a", b"b", b"ab", size=3)
    try:
        assert permitted(grammars, state_of(grammars, "start: /.+/")) == [[1, 2]]
    finally:
        grammars.close()


def test_equal_tokens_may_both_be_drawn_or_one_of_them() -> None:
    grammars = listed(b"a", b"a", b"b")
    try:
        state = state_of(grammars, 'start: "a" "b" | "ac"?')
        rows = permitted(grammars, state)
        assert rows is not None
        assert {1} <= set(rows[0]) <= {0, 1, 2}
        state.advance([2])
        assert state.error is None
    finally:
        grammars.close()


def test_a_tokenizer_that_puts_a_space_in_front_spells_forced_text_without() -> None:
    grammars = listed(b" ", b"a", b"b", b"ab", b"\n", b"c", space=b" ")
    try:
        state = state_of(grammars, 'start: "abc" "a"? "b"')
        forced = state.forced(9)
        assert forced == [4, 6]
        state.advance(forced)
        assert state.error is None
    finally:
        grammars.close()


def test_a_tokenizer_that_refuses_texts_is_done_without() -> None:
    class Refuses(Listed):
        def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
            raise RuntimeError("no")

    grammars = Grammars(lambda: Refuses([b"", b"a", b"b", b"ab"]), 4, Listed.eos_token_ids)
    try:
        state = state_of(grammars, 'start: "abab"')
        state.advance(state.forced(9) or [3, 3])
        assert (state.is_finished, state.error) == (True, None)
    finally:
        grammars.close()


def test_without_an_end_of_sequence_there_is_no_vocabulary() -> None:
    with pytest.raises(ValueError, match="end-of-sequence"):
        Vocabulary(FakeTokenizer, 260, frozenset())
    with pytest.raises(ValueError, match="end-of-sequence"):
        Vocabulary(FakeTokenizer, 200, FakeTokenizer.eos_token_ids)


def test_an_end_of_sequence_is_no_text_whatever_the_tokenizer_says() -> None:
    vocabulary = Vocabulary(FakeTokenizer, 260, frozenset({ord("x"), EOS}))
    assert vocabulary.is_control(ord("x"))
    assert [t for t in range(260) if vocabulary.is_control(t)] == [ord("x"), 256, 257, 258, IM_END]
    assert ids_of(vocabulary.full) == list(range(260))
    assert set(ids_of(vocabulary.full)) - set(ids_of(vocabulary.all_but_eos)) == {ord("x"), EOS}


@pytest.mark.parametrize("backend", ["llamacpp", "torch"])
def test_the_demo_model(backend: str) -> None:
    files = demo_files()
    if backend == "torch":
        if importlib.util.find_spec("torch") is None:
            pytest.skip("the torch backend needs torch")
        from torch_backend.twin import twin_files

        files = twin_files()
    tokenizer = load_plugins().create("backend", backend, {}).tokenizer(files)
    grammars = Grammars(lambda: tokenizer, tokenizer.vocab_size + 5, tokenizer.eos_token_ids)
    try:
        state = state_of(grammars, compact(FLAG_SCHEMA))
        forced = state.forced(99)
        assert forced == tokenizer.encode('{"a":', add_special=False, parse_special=False)
        state.advance([*forced, *tokenizer.encode("true}", add_special=False, parse_special=False)])
        assert (state.is_finished, state.error) == (True, None)
        # Its control tokens as tags of thoughts.
        begin, end = (tokenizer.encode(t, add_special=False, parse_special=True) for t in ("<|im_start|>", "<file_sep>"))
        thinking = Thinking(is_open=False, begin="<|im_start|>", end="<file_sep>", budget=9, end_token_ids=end)
        state = state_of(grammars, compact(FLAG_SCHEMA), thinking)
        rows = permitted(grammars, state)
        assert rows is not None
        assert set(rows[0]) == {*begin, forced[0], *tokenizer.encode("<", add_special=False, parse_special=False)}
        state.advance([*begin, forced[0], *end])
        assert state.forced(99) == forced
        assert state.error is None
    finally:
        grammars.close()


def test_a_token_that_ends_thoughts_may_begin_the_answer() -> None:
    grammars = listed(b"<e>", b"x", b"<e>\n", b"<e> yx", b"<e>z", b"y")
    thinking = Thinking(is_open=True, begin="", end="<e>")
    try:
        for token, rest in ((1, [6]), (3, [6]), (4, [2])):
            state = state_of(grammars, 'start: "yx" "x"', thinking)
            state.advance([2, token])
            rows = permitted(grammars, state)
            assert rows == [rest]
        state = state_of(grammars, 'start: "yx" "x"', thinking)
        assert state.allowed([2, 5]) == 1
        rows = permitted(grammars, state, [2, 5])
        assert rows is not None
        assert state.error is None, "it is only a draft"
        state.advance([2, 5])
        assert state.error is not None
    finally:
        grammars.close()


def test_code_points_may_span_tokens(request: pytest.FixtureRequest) -> None:
    grammars = Grammars(FakeTokenizer, 260, FakeTokenizer.eos_token_ids)
    request.addfinalizer(grammars.close)
    state = state_of(grammars, 'start: "é€🦊"')
    feed(state, "é€🦊")
    assert state.is_finished
