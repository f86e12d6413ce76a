"""The process that compiles grammars to see whether they can be held. Run as a script by `checker`; imports only llguidance and
the standard library.

A schema or grammar is a program by a stranger: patterns explode, rules multiply. llguidance bounds much of that by counting,
and the operating system the rest: CPU seconds by a timer that kills, memory by RLIMIT_AS.

Frames on standard input and output: a 64-bit little-endian length, then as many bytes. In: `{"grammar", "seconds"}`. Out: a
status byte, then UTF-8 text:

    o  it can be held        r  it cannot, and why        l  it is too large to be held
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import struct
import sys
from typing import BinaryIO

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

LENGTH = struct.Struct("<Q")
OK, REFUSED, LIMIT = b"o", b"r", b"l"

_MEMORY = 512 << 20  # bytes a grammar may allocate
_STEPS = 24  # masks that are tried
_MAX_TEXT = 300  # characters of a reason
_EOS, _SPECIAL = 256, 257
_TOKEN_ID = re.compile(r"<\[[0-9]+\]>")


class _Bytes:
    """A vocabulary of single bytes, and one control token that stands for all of them."""

    eos_token_id = _EOS
    bos_token_id = None
    special_token_ids = (_EOS, _SPECIAL)
    tokens = (*(bytes([byte]) for byte in range(256)), b"\xff<eos>", b"\xff<special>")

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _limits() -> LLParserLimits:
    """Those of the engine: what passes here compiles there."""
    return LLParserLimits(
        max_items_in_row=2_000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=100_000,
        step_max_items=10_000,
        max_lexer_states=50_000,
        max_grammar_size=500_000,
        precompute_large_lexemes=True,
        verbose_errors=False,
    )


def check(vocabulary: LLTokenizer, grammar: str) -> tuple[bytes, str]:
    """Compile a grammar and follow it for some tokens."""
    matcher = LLMatcher(vocabulary, _TOKEN_ID.sub(f"<[{_SPECIAL}]>", grammar), log_level=0, limits=_limits())
    if matcher.is_error():
        return _refusal(matcher.get_error())
    for step in range(_STEPS):
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            return LIMIT, ""
        allowed = [token for token in range(_SPECIAL + 1) if mask[token // 8] >> token % 8 & 1]
        if not allowed:
            return REFUSED, "describes nothing: no text can satisfy all of it"
        others = [token for token in allowed if token != _EOS]
        if not others:
            break
        matcher.consume_token(others[step * 7 % len(others)])
        if matcher.is_error():
            return LIMIT, ""
        if matcher.is_stopped():
            break
    return OK, ""


def _refusal(error: str) -> tuple[bytes, str]:
    """The library's reason in one line, without the excerpts of the grammar that it adds."""
    line = error.strip().split("\n", 1)[0]
    if "nsatisfiable" in line or ("empty" in line.lower() and "regex" in line.lower()):
        return REFUSED, "describes nothing: no text can satisfy all of it"
    if any(word in line for word in ("fuel", "too big", "too large", "limit", "too many", "states", "timeout")):
        return LIMIT, ""
    place = re.match(r"at (\d+)\((\d+)\): ", line)
    if place:
        line = f"{line[place.end() :]} (line {place[1]}, column {place[2]})"
    return REFUSED, "cannot be compiled: " + line[:_MAX_TEXT]


def _baseline() -> int | None:
    """Address space in use, in bytes; None where the system does not tell, and memory is bounded by the time alone."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def _receive(stream: BinaryIO) -> bytes | None:
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    return stream.read(LENGTH.unpack(head)[0])


def _answer(vocabulary: LLTokenizer, frame: bytes) -> tuple[bytes, str]:
    request = json.loads(frame)
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])
    try:
        return check(vocabulary, request["grammar"])
    except (MemoryError, RecursionError):
        return LIMIT, ""
    except BaseException as error:  # a panic of the library arrives as one that is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return REFUSED, f"cannot be compiled ({type(error).__name__})"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    vocabulary = LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=_SPECIAL + 1, eos_token=[_EOS], slices=[])
    if (baseline := _baseline()) is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (baseline + _MEMORY, hard))
    while (frame := _receive(stdin)) is not None:
        status, text = _answer(vocabulary, frame)
        body = status + text.encode("utf-8", "replace")
        stdout.write(LENGTH.pack(len(body)) + body)
        stdout.flush()


if __name__ == "__main__":
    main()
