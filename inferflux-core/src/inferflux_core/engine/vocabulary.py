"""A model's vocabulary as llguidance has to know it: the bytes of each token, and which tokens are no text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from llguidance import LLTokenizer, TokenizerWrapper

from inferflux_core.interfaces import Tokenizer

# What llguidance tells control tokens by. The byte occurs in no text, as UTF-8 has no use for it.
_CONTROL = b"\xff"
# Texts that canonical tokens are asked of are short; a tokenizer that puts a space in front of a text does not do so here.
_BEFORE = "\n"


class Vocabulary:
    """Bytes of tokens, and their canonical spelling of a text.

    Reading it takes about 5 us a token and a trie of about 400 bytes a token. Of the tokenizer that is made here nothing is
    kept but what encoding needs and the tokens that were asked for later.

    Args:
        make_tokenizer: called twice; the first tokenizer is dropped with all that it cached about its tokens.
        size: width of the model's logits. Ids beyond the tokenizer's own are never drawn under a grammar, nor are ids that
            it has no bytes for.
        eos_token_ids: tokens that end a sequence.

    Attributes:
        library: for the library's calls.
        num_known: ids from here on are no tokens.
        full: mask that permits everything, [words] int32.
        all_but_eos: mask that permits every token of the tokenizer's that does not end a sequence.

    Raises:
        ValueError: no token ends a sequence, or the library refuses the vocabulary.
    """

    def __init__(self, make_tokenizer: Callable[[], Tokenizer], size: int, eos_token_ids: frozenset[int]) -> None:
        self.size = size
        self.eos_token_ids = frozenset(token for token in eos_token_ids if 0 <= token < size)
        if not self.eos_token_ids:
            raise ValueError("the vocabulary has no end-of-sequence token")
        spelling = _Spelling()
        wrapper = TokenizerWrapper(spelling)
        wrapper.tokens, controls = _pieces(make_tokenizer(), size, self.eos_token_ids)
        wrapper.special_token_ids = controls
        wrapper.eos_token_id = min(self.eos_token_ids)
        spelling.tokenizer = self._tokenizer = make_tokenizer()
        self.library = LLTokenizer(wrapper, n_vocab=size, eos_token=sorted(self.eos_token_ids))
        spelling.library = self.library
        wrapper.tokens = wrapper.special_token_ids = ()  # the library has its own copy
        self._controls = frozenset(controls)
        self.full = _bits(size)
        known = np.zeros_like(self.full)
        self.num_known = min(size, self._tokenizer.vocab_size)
        bits = _bits(self.num_known)
        known[: len(bits)] = bits
        self.all_but_eos = _without(known, self.eos_token_ids)

    @property
    def num_words(self) -> int:
        """Words of a mask."""
        return (self.size + 31) // 32

    def is_control(self, token: int) -> bool:
        """Whether a token is no text."""
        return token in self._controls

    def bytes_of(self, token: int, *, control: bool = False) -> bytes:
        """What a token adds to a text; b"" for those that are none, and for ids that the tokenizer knows nothing of.

        Args:
            control: the text of a control token too.
        """
        return _piece(self._tokenizer, token, control)

    def parse(self, text: str) -> list[int]:
        """Tokens of a text in which the texts of control tokens are these."""
        return self._tokenizer.encode(text, add_special=False, parse_special=True)

    def spell(self, data: bytes) -> list[int] | None:
        """Tokens of a text that may begin and end within a code point; None if there are none for it."""
        tokens: list[int] = self.library.tokenize_bytes(data)
        return tokens if self.library.decode_bytes(tokens) == data else None


class _Spelling:
    """Encodes a text for the library, which asks for it while it has no GIL: it must never raise."""

    eos_token_id = 0
    bos_token_id = None
    tokens: tuple[bytes, ...] = ()
    special_token_ids: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.tokenizer: Tokenizer | None = None
        self.library: LLTokenizer | None = None

    def __call__(self, data: bytes) -> list[int]:
        if self.tokenizer is None:  # asked whether it takes bytes
            return []
        text = data.decode("utf-8", "replace")
        try:
            tokens = self.tokenizer.encode(text, add_special=False, parse_special=False)
            if self.library is None or self.library.decode_bytes(tokens) == data:
                return tokens
            # Vocabularies in the manner of SentencePiece put a space in front of a text, but not in the middle of one.
            tokens = self.tokenizer.encode(_BEFORE + text, add_special=False, parse_special=False)
            for first in range(1, min(3, len(tokens)) + 1):
                if self.library.decode_bytes(tokens[first:]) == data:
                    return tokens[first:]
        except Exception:  # a text that the tokenizer refuses, for whatever reason, is spelled without it
            if self.library is None:
                return []
        greedy: list[int] = self.library.greedy_tokenize(text)
        return greedy


def _pieces(tokenizer: Tokenizer, size: int, eos_token_ids: frozenset[int]) -> tuple[list[bytes], list[int]]:
    """The bytes of each token as the library wants them, and which are control tokens."""
    pieces: list[bytes] = []
    controls: list[int] = []
    for token in range(size):
        piece = _piece(tokenizer, token, False)
        if token in eos_token_ids or not piece:
            text = _piece(tokenizer, token, True) or (b"<eos>" if token in eos_token_ids else b"")
            piece = _CONTROL + text if text else b""
            if piece:
                controls.append(token)
        elif _CONTROL in piece:
            piece = b""  # a byte of broken text, which would pass for a control token
        pieces.append(piece)
    return pieces, controls


def _piece(tokenizer: Tokenizer, token: int, special: bool) -> bytes:
    if token >= tokenizer.vocab_size:  # a native library may end the process for it
        return b""
    try:
        return tokenizer.token_bytes(token, special=special)
    except Exception:  # an id that the tokenizer has nothing for, in the way of each library
        return b""


def _bits(size: int) -> npt.NDArray[np.int32]:
    bits = np.zeros((size + 31) // 32 * 32, dtype=np.uint8)
    bits[:size] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)


def _without(mask: npt.NDArray[np.int32], tokens: frozenset[int]) -> npt.NDArray[np.int32]:
    mask = mask.copy()
    words = mask.view(np.uint32)
    for token in tokens:
        words[token // 32] &= ~np.uint32(1 << token % 32)
    return mask
