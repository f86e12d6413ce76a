"""The vocabulary of a GGUF model, read by llama.cpp itself so that token ids are exactly its own."""

from __future__ import annotations

import ctypes

import llama_cpp

from inferflux_backend_llamacpp import library
from inferflux_backend_llamacpp.gguf import read_split
from inferflux_core.interfaces import ModelFiles, Tokenizer

_ATTR_UNKNOWN, _ATTR_CONTROL = 1, 8
_MAX_PIECE = 512


class LlamaCppTokenizer(Tokenizer):
    """Thread-safe: the vocabulary is read-only after loading. Long calls run without the GIL."""

    def __init__(self, files: ModelFiles) -> None:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        with library.errors_as(f"tokenizer of {files.ref!r}"):
            self._model = library.load_model(files.paths[0], files.paths, params)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        vocab = self._vocab
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self.eos_token_ids = eog_tokens(vocab, self.vocab_size)
        self.bos_token = self._text(llama_cpp.llama_vocab_bos(vocab))
        self.eos_token = self._text(llama_cpp.llama_vocab_eos(vocab))
        self.chat_template = read_split(files.paths).chat_template
        get_attr = llama_cpp.llama_vocab_get_attr
        self.special_tokens = frozenset(
            self._text(token) for token in range(self.vocab_size) if get_attr(vocab, token) & (_ATTR_CONTROL | _ATTR_UNKNOWN)
        ) - {""}

    def _text(self, token: int) -> str:
        return "" if token < 0 else self.token_bytes(token, special=True).decode("utf-8", "replace")

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        # One token a byte is the most there can be, and BOS and EOS.
        buffer = (llama_cpp.llama_token * (len(data) + 4))()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), buffer, len(buffer), add_special, parse_special)
        if count < 0:
            buffer = (llama_cpp.llama_token * -count)()
            count = llama_cpp.llama_tokenize(self._vocab, data, len(data), buffer, -count, add_special, parse_special)
        return list(buffer[:count])

    def token_bytes(self, token_id: int, *, special: bool = False) -> bytes:
        key = (token_id, special)
        piece = self._pieces.get(key)
        if piece is None:
            piece = self._pieces[key] = self._piece(token_id, special)
        return piece

    def _piece(self, token_id: int, special: bool) -> bytes:
        if not 0 <= token_id < self.vocab_size:  # the library would end the process
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        buffer = ctypes.create_string_buffer(_MAX_PIECE)
        length = llama_cpp.llama_token_to_piece(self._vocab, token_id, buffer, _MAX_PIECE, 0, special)
        if length < 0:
            buffer = ctypes.create_string_buffer(-length)
            length = llama_cpp.llama_token_to_piece(self._vocab, token_id, buffer, -length, 0, special)
        return buffer.raw[:length]


def eog_tokens(vocab: object, vocab_size: int) -> frozenset[int]:
    """Tokens that llama.cpp takes for the end of a generation: EOS, and what else the model ends a turn with."""
    is_eog = llama_cpp.llama_vocab_is_eog
    return frozenset(token for token in range(vocab_size) if is_eog(vocab, token))
