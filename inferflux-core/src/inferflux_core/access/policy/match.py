"""Patterns of objects and model names: `*` within one `/` segment, `**` across segments, all else literal.

    model/*         model/demo, but not model/meta-llama/Llama-3
    model/acme-*    model/acme-chat
    model/**        every model
    **              every object

Matching is on the whole name, is case-sensitive, and takes time linear in the name for each `**`, of which a pattern has at
most two, so that no name can make it slow.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

MAX_OBJECT_CHARS = 512
_MAX_ACROSS = 2  # how many `**` a pattern may have
_ACROSS = "**"
_STARS = re.compile(r"(\*+)")
# Controls, format characters such as zero-width ones, surrogates, private use, unassigned, separators, odd spaces.
_INVISIBLE = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"))


def is_plain(text: str) -> bool:
    """Whether text shows all that it holds: no control or invisible character, and no space but U+0020."""
    if text.isascii():
        return text.isprintable()
    return all(c == " " or unicodedata.category(c) not in _INVISIBLE for c in text)


def pattern_problem(pattern: str) -> str | None:
    """What is wrong with a pattern, in words that follow its name; None if it is fine."""
    if not pattern:
        return "is empty"
    if len(pattern) > MAX_OBJECT_CHARS:
        return f"is longer than {MAX_OBJECT_CHARS} characters"
    if not is_plain(pattern):
        return "has a control character or one that cannot be seen"
    if not unicodedata.is_normalized("NFC", pattern):
        return "is not in Unicode's NFC form, in which names are compared"
    if pattern != pattern.strip() or "" in pattern.split("/"):
        return "has an empty segment or a space at an end"
    if "***" in pattern:
        return "has more than two '*' in a row; '*' matches within one segment, '**' across segments"
    if pattern.count("**") > _MAX_ACROSS:
        return f"has more than {_MAX_ACROSS} '**'"
    return None


def compile_pattern(pattern: str) -> re.Pattern[str] | None:
    """The regular expression of a pattern, for `fullmatch`; None if the pattern is not valid."""
    return None if pattern_problem(pattern) is not None else re.compile(_expression(pattern), re.DOTALL)


def _expression(pattern: str) -> str:
    head, *rest = _STARS.split(pattern)  # literals and stars in turn, beginning and ending with a literal
    parts = [re.escape(head)]
    stars, literals = rest[::2], rest[1::2]
    for star, literal, follower in zip(stars, literals, [*stars[1:], ""], strict=False):
        one = "." if star == _ACROSS else "[^/]"
        # Where a further star of no less reach follows, the first place of the literal is as good as any later one. The atomic
        # group says so, and keeps the work linear. Elsewhere the place is fixed by what follows, but for that of `**`.
        if follower in (star, _ACROSS) and "/" not in literal:
            parts.append(f"(?>{one}*?{re.escape(literal)})")
        else:
            parts.append(f"{one}*{re.escape(literal)}")
    return "".join(parts)


_compiled = lru_cache(maxsize=4096)(compile_pattern)


def model_matches(pattern: str, name: str) -> bool:
    """Whether a model's canonical name matches a pattern. An invalid pattern and a name with control characters never do."""
    if not name or len(name) > MAX_OBJECT_CHARS or not is_plain(name):
        return False
    compiled = _compiled(pattern)
    return compiled is not None and compiled.fullmatch(name) is not None
