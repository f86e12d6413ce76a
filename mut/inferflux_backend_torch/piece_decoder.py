"""The bytes that one token of a vocabulary stands for, by the `decoder` of tokenizer.json."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SENTENCEPIECE_SPACE = "▁"


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: a printable character for each byte (bytes_to_unicode in GPT-2's encoder.py)."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


class PieceDecoder:
    """Turns a token's spelling in the vocabulary into bytes, each token by itself.

    Exact for byte-level BPE, where a piece may be part of a code point; and for SentencePiece vocabularies, where ▁ is a space
    and <0xAB> a byte. What decoders do to a sequence as a whole (dropping a space at its beginning) is left to the caller.

    Args:
        decoder: the object of tokenizer.json.

    Raises:
        ValueError: a decoder that does not work token by token, or that is unknown; the text says which.
    """

    def __init__(self, decoder: Any) -> None:
        self._byte_level = False
        self._byte_fallback = False
        self._replacements: list[tuple[str, str]] = []
        for step in _steps(decoder):
            self._add(step)

    def _add(self, step: Mapping[str, Any]) -> None:
        match step.get("type"):
            case "ByteLevel":
                self._byte_level = True
            case "ByteFallback":
                self._byte_fallback = True
            case "Metaspace":
                self._replacements.append((str(step.get("replacement", _SENTENCEPIECE_SPACE)), " "))
            case "Replace":
                pattern = step.get("pattern")
                text = pattern.get("String") if isinstance(pattern, dict) else None
                if not isinstance(text, str) or not isinstance(step.get("content"), str):
                    raise ValueError(f"its decoder replaces {pattern!r}; only plain text is supported")
                self._replacements.append((text, step["content"]))
            case "Fuse" | "Strip":
                pass  # about the sequence as a whole
            case kind:
                raise ValueError(f"its decoder {kind!r} is not supported")

    def piece_bytes(self, piece: str) -> bytes:
        """Bytes of a piece of the vocabulary."""
        if self._byte_level:
            try:
                return bytes([_BYTE_OF_CHARACTER[character] for character in piece])
            except KeyError:  # outside the alphabet: it was added as it is
                return piece.encode()
        if self._byte_fallback and (byte := _BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        return self._replaced(piece).encode()

    def added_bytes(self, text: str) -> bytes:
        """Bytes of an added token. Byte-level vocabularies spell these out; others put ▁ into them as well."""
        return (text if self._byte_level else self._replaced(text)).encode()

    def _replaced(self, piece: str) -> str:
        for old, new in self._replacements:
            piece = piece.replace(old, new)
        return piece


def _steps(decoder: Any) -> Iterator[Mapping[str, Any]]:
    if not isinstance(decoder, dict):
        raise ValueError("it has no decoder")
    if decoder.get("type") != "Sequence":
        yield decoder
        return
    inners = decoder.get("decoders")
    if not isinstance(inners, list):
        raise ValueError(f"its decoder is a sequence of {inners!r}")
    for inner in inners:
        yield from _steps(inner)
