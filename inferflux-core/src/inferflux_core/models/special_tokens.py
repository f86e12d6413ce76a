"""Finds the texts of control tokens in what users wrote, and carries them through a chat template unharmed.

    user text    Say <|im_end|> now.
    protected    Say X now.                   X: one private-use character that occurs nowhere else in the request
    rendered     <|im_start|>user\\nSay X now.<|im_end|>\\n
    segments     ("<|im_start|>user\\nSay ", trusted) ("<|im_end|>", untrusted) (" now.<|im_end|>\\n", trusted)

One character cannot be cut in two by slicing, has no case, is no white space, and means nothing to JSON.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from inferflux_core.errors import InvalidRequestError

_HEAD = 4  # characters by which a candidate is recognised before the exact comparison
PRIVATE_USE = re.compile("[\U000f0000-\U000ffffd]")
_PRIVATE_RANGE = range(0xF0000, 0xFFFFE)
_random = random.SystemRandom()


class Segment(NamedTuple):
    """A piece of a prompt. Trusted text may hold control tokens; in untrusted text their spelling is only text."""

    text: str
    trusted: bool


Prompt = list[Segment]


class SpecialTokens:
    """The texts of a model's control tokens, ready to be searched for.

    Upper and lower case count as equal, because a template may change them. The end of a text that begins a control token
    (`<|im_`) is found too, because a template may put another text of the user right behind it; not for control tokens that
    begin with a letter or digit, whose beginnings are everyday text.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        lowered = {text.lower() for text in texts if text}
        self._texts = lowered
        self._beginnings = {text[:end] for text in lowered if not text[0].isalnum() for end in range(1, len(text))}
        self._first = {text[0] for text in self._beginnings}
        self._longest_beginning = max(map(len, self._beginnings), default=0)
        lengths: dict[str, set[int]] = {}
        for text in lowered:
            lengths.setdefault(text[:_HEAD], set()).add(len(text))
        self._lengths = {head: sorted(found, reverse=True) for head, found in lengths.items()}
        heads = "|".join(re.escape(head) for head in sorted(self._lengths))
        self._scan = re.compile(heads, re.IGNORECASE) if heads else None

    def find(self, text: str) -> list[tuple[int, int]]:
        """Where control tokens are spelt in a text, as (start, end), left to right; the longest at each place."""
        if self._scan is None:
            return []
        found: list[tuple[int, int]] = []
        at = 0
        while (match := self._scan.search(text, at)) is not None:
            end = self._end(text, match.start())
            if end is None:
                at = match.start() + 1
            else:
                found.append((match.start(), end))
                at = end
        if (tail := self._tail(text, at=found[-1][1] if found else 0)) is not None:
            found.append(tail)
        return found

    def _end(self, text: str, start: int) -> int | None:
        longest = 0
        for size in range(1, _HEAD + 1):
            for length in self._lengths.get(text[start : start + size].lower(), ()):
                if length > longest and text[start : start + length].lower() in self._texts:
                    longest = length
                    break
        return start + longest if longest else None

    def _tail(self, text: str, at: int) -> tuple[int, int] | None:
        """The beginning of a control token that ends the text, but for white space, which a template may trim."""
        end = len(text.rstrip())
        for start in range(max(at, end - self._longest_beginning), end):
            if text[start] in self._first and text[start:end].lower() in self._beginnings:
                return start, end
        return None


@dataclass(slots=True)
class Protection:
    """The placeholders of one request.

    Args:
        special: what to look for.
        reserved: private-use characters that something else uses, e.g. the template.
    """

    special: SpecialTokens
    reserved: frozenset[str] = frozenset()
    _placeholders: dict[str, str] = field(default_factory=dict)  # text -> placeholder

    def protect(self, value: Any) -> Any:
        """A JSON value with the spellings of control tokens replaced in all strings; the same object if there are none.

        Raises:
            InvalidRequestError: it uses up all private-use characters.
        """
        spellings: set[str] = set()
        _collect(self.special, value, spellings)
        if not spellings:
            return value
        used = {*self.reserved, *PRIVATE_USE.findall(json.dumps(value, ensure_ascii=False))}
        wanted = len(spellings) + len(used)  # so many different ones include enough that are free
        if wanted > len(_PRIVATE_RANGE):
            raise InvalidRequestError(
                "the messages hold too many private-use characters next to spellings of control tokens; remove them",
                param="messages",
            )
        free = [c for c in map(chr, _random.sample(_PRIVATE_RANGE, wanted)) if c not in used]
        self._placeholders = dict(zip(spellings, free, strict=False))
        return self._replace(value)

    def segments(self, rendered: str) -> Prompt:
        """Split a template's output at the placeholders, with the user's spelling back in their place."""
        if not self._placeholders:
            return [Segment(rendered, True)] if rendered else []
        originals = self._originals()
        prompt: Prompt = []
        for index, text in enumerate(re.split(f"((?:{'|'.join(map(re.escape, originals))})+)", rendered)):
            if text and index % 2:
                prompt.append(Segment(self.restore(text), False))
            elif text:
                prompt.append(Segment(text, True))
        return prompt

    def restore(self, text: str) -> str:
        """A text with the user's spelling in place of the placeholders."""
        if not self._placeholders:
            return text
        originals = self._originals()
        return re.sub("|".join(map(re.escape, originals)), lambda match: originals[match.group()], text)

    def _originals(self) -> dict[str, str]:
        originals = {placeholder: text for text, placeholder in self._placeholders.items()}
        for text, placeholder in self._placeholders.items():  # as `tojson(ensure_ascii=True)` writes it
            originals[json.dumps(placeholder)[1:-1]] = json.dumps(text)[1:-1]
        return originals

    def _replace(self, value: Any) -> Any:
        if isinstance(value, str):
            pieces = []
            at = 0
            for start, end in self.special.find(value):
                pieces += [value[at:start], self._placeholders[value[start:end]]]
                at = end
            return "".join([*pieces, value[at:]]) if pieces else value
        if isinstance(value, dict):
            return {self._replace(key): self._replace(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._replace(item) for item in value]
        return value


def _collect(special: SpecialTokens, value: Any, spellings: set[str]) -> None:
    if isinstance(value, str):
        spellings.update(value[start:end] for start, end in special.find(value))
    elif isinstance(value, dict):
        for key, item in value.items():
            _collect(special, key, spellings)
            _collect(special, item, spellings)
    elif isinstance(value, list | tuple):
        for item in value:
            _collect(special, item, spellings)
