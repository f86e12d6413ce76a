"""The tokenizer of a Hugging Face model, run by the `tokenizers` library from tokenizer.json; no code of the model is run."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from inferflux_backend_torch.hf_tokens import HFTokens, eos_token_ids, read_hf_tokens
from inferflux_backend_torch.piece_decoder import PieceDecoder
from inferflux_core.errors import InvalidRequestError, ModelFileError
from inferflux_core.interfaces import Tokenizer

__all__ = ["HFTokenizer", "eos_token_ids"]


class HFTokenizer(Tokenizer):
    """Thread-safe: nothing changes after construction but a cache. Encoding runs without the GIL.

    `token_bytes` gives what a token adds in the middle of a text. Vocabularies in the manner of SentencePiece put a space in
    front of each text they encode, so the first token of a text brings one byte more than the text has; `decode` drops that
    space, as the library's own decoders do, and is exact for whole texts. What a model generates goes on from a prompt:
    there `token_bytes` is exact from the first token on.

    Args:
        folder: of the model, with tokenizer.json and config.json.
        config: contents of config.json, where they have been read already.

    Raises:
        ModelFileError: as `hf_tokens.read_hf_tokens`; or the tokenizer is malformed, or of a kind that cannot give back the
            exact text.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any] | None = None) -> None:
        tokens = read_hf_tokens(folder, config)
        try:
            self._decoder = PieceDecoder(tokens.document.get("decoder"))
        except ValueError as error:
            raise ModelFileError(f"{tokens.path}: not a usable tokenizer: {error}; choose another model") from None
        # Two of them: in the second one no text can spell a control token. A flag on one would not be thread-safe, and text
        # could still reach those that the vocabulary itself lists (Unigram picks them first, their score being 0).
        with _library_errors(tokens.path):
            self._trusted = _build(tokens, hidden=tokens.beyond)
            self._untrusted = _build(tokens, hidden=tokens.beyond | tokens.control.keys())
            self._prefix, self._suffix = _surroundings(tokens, self._trusted)
            first = self._untrusted.encode("a", add_special_tokens=False).ids
        self._texts = {number: text for text, number in tokens.control.items()}
        self._special = tokens.special
        self._added = frozenset(self._trusted.get_added_tokens_decoder())
        self._pieces: dict[int, bytes] = {}
        self.vocab_size = tokens.vocab_size
        self.eos_token_ids = tokens.eos_token_ids
        self.bos_token = tokens.bos_token
        self.eos_token = tokens.eos_token
        self.chat_template = tokens.chat_template
        self.special_tokens = frozenset(tokens.control)
        self._adds_space = b"".join(map(self.token_bytes, first)).startswith(b" ")

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        tokenizer = self._trusted if parse_special else self._untrusted
        try:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises nothing narrower
            raise InvalidRequestError(
                "the text cannot be tokenised: it holds something that is no Unicode or that the vocabulary lacks; remove it"
            ) from error
        return [*self._prefix, *ids, *self._suffix] if add_special else ids

    def token_bytes(self, token_id: int, *, special: bool = False) -> bytes:
        if token_id in self._special and not special:
            return b""
        if not 0 <= token_id < self.vocab_size:
            return b""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._piece(token_id)
        return piece

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Text of a token sequence, taken as a whole text; invalid UTF-8 becomes U+FFFD."""
        data = b"".join([self.token_bytes(token, special=special) for token in token_ids])
        if self._adds_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def _piece(self, token_id: int) -> bytes:
        if (text := self._texts.get(token_id)) is not None:
            return text.encode()
        if (spelling := self._trusted.id_to_token(token_id)) is None:
            return b""  # rows of the embedding that no token uses
        return self._decoder.added_bytes(spelling) if token_id in self._added else self._decoder.piece_bytes(spelling)


@contextmanager
def _library_errors(path: Path) -> Iterator[None]:
    """Turn what the tokenizers library raises about a malformed file into a ModelFileError."""
    try:
        yield
    except ModelFileError:
        raise
    except BaseException as error:
        # On some files the library panics, which arrives as something that is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelFileError(f"{path}: not a usable tokenizer: {error}; fetch the file again") from None


def _build(tokens: HFTokens, hidden: Collection[str]) -> tokenizers.Tokenizer:
    """The library's tokenizer, in which no text is read as one of the hidden tokens.

    Raises:
        ModelFileError: the library numbers the added tokens otherwise than the file.
    """
    document = _without(tokens.document, hidden) if hidden else tokens.document
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(document, ensure_ascii=False))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for token in document["added_tokens"]:
        if (number := tokenizer.token_to_id(token["content"])) != token["id"]:
            text = next(t["content"] for t in tokens.document["added_tokens"] if t["id"] == token["id"])
            raise ModelFileError(
                f"{tokens.path}: not a usable tokenizer: the added token {text!r} has the id {token['id']}, but by its "
                f"place it gets {number}; fetch all files of the model again from one place"
            )
    return tokenizer


def _without(document: Mapping[str, Any], hidden: Collection[str]) -> dict[str, Any]:
    """tokenizer.json with the hidden tokens renamed to texts that nobody can guess. All ids stay."""
    secret = secrets.token_hex(16)
    names = {text: f"\ue000{secret}{rank}\ue000" for rank, text in enumerate(hidden)}
    model = dict(document["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in vocab.items()}
        # Merges could still make them: converters derive merges from all pieces of a vocabulary.
        glue = len(model.get("continuing_subword_prefix") or "")
        model["merges"] = [
            merge
            for merge in model["merges"]
            for left, right in [merge.split(" ", 1) if isinstance(merge, str) else merge]
            if not (left in names or right in names or left + right[glue:] in names)
        ]
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if (unknown := model.get("unk_token")) in names:
        model["unk_token"] = names[unknown]
    added = [{**token, "content": names.get(token["content"], token["content"])} for token in document["added_tokens"]]
    return {**document, "model": model, "added_tokens": added}


def _surroundings(tokens: HFTokens, tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the model wants before and behind a text."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    at = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    prefix, suffix = whole[:at], whole[at + len(bare) :]
    if tokens.add_bos is not None and (bos := tokenizer.token_to_id(tokens.bos_token)) is not None:
        prefix = [bos] * tokens.add_bos + [token for token in prefix if token != bos]
    if tokens.add_eos is not None and (eos := tokenizer.token_to_id(tokens.eos_token)) is not None:
        suffix = [token for token in suffix if token != eos] + [eos] * tokens.add_eos
    if wrong := [token for token in (*prefix, *suffix) if token >= tokens.vocab_size]:
        raise ModelFileError(
            f"{tokens.path}: not a usable tokenizer: it puts the id {wrong[0]} around a text, but the model has only "
            f"{tokens.vocab_size}; fetch all files of the model again from one place"
        )
    return prefix, suffix
