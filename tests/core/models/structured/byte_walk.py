"""Follows a grammar over a vocabulary of single bytes, as a model would: any byte that the mask allows may come."""

from __future__ import annotations

import random

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

EOS = 256

_LIKELY = b'"abcfor012 @'  # few characters, of which some pattern's end comes up soon


class _Bytes:
    eos_token_id = EOS
    bos_token_id = None
    special_token_ids = (EOS,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"\xff<eos>")

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


_VOCABULARY = LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=EOS + 1, eos_token=[EOS], slices=[])
_IN_STRING = 40  # bytes that are allowed: more of them there are only within strings


class Grammar:
    """A compiled grammar.

    Raises:
        ValueError: llguidance refuses it.
    """

    def __init__(self, text: str) -> None:
        self._matcher = LLMatcher(_VOCABULARY, text, log_level=0)
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error())

    def accepts(self, text: str) -> bool:
        """Whether the text is one of the grammar's, whole."""
        matcher = self._matcher.deep_copy()
        data = list(text.encode())
        return bool(matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting())

    def walk(self, choose: random.Random, *, soft: int = 200, hard: int = 3000) -> str:
        """A random text of the grammar.

        Args:
            soft: bytes after which what closes a value is preferred.
            hard: bytes after which the walk counts as endless.
        """
        matcher = self._matcher.deep_copy()
        text = bytearray()
        while not matcher.is_stopped():
            mask = matcher.compute_bitmask()
            allowed = [byte for byte in range(256) if mask[byte // 8] >> byte % 8 & 1]
            if matcher.is_accepting() and (not allowed or len(text) > soft // 4):
                break
            assert allowed, f"stuck after {bytes(text)!r}"
            closing = [byte for byte in (b'"' if len(allowed) > _IN_STRING else b"]}n") if byte in allowed]
            if closing and choose.random() < (0.95 if len(text) > soft else 0.25):
                allowed = closing
            likely = [byte for byte in _LIKELY if byte in allowed] if len(text) > soft else []
            plain = likely or [byte for byte in allowed if 32 <= byte < 127]
            byte = choose.choice(plain or allowed)
            assert matcher.consume_token(byte), matcher.get_error()
            text.append(byte)
            assert len(text) < hard, f"endless: {bytes(text[:100])!r}"
        return text.decode()
