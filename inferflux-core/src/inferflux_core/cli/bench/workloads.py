"""What the benchmark asks: prompts that follow from a seed alone, so that every server gets the same ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Name = Literal["plain", "shared-prefix", "turns", "mixed"]
NAMES: tuple[Name, ...] = get_args(Name)

TURNS = 4
"""Requests of one conversation in the workload `turns`."""
LONG_EVERY = 4
"""In the workload `mixed`, every one of so many prompts is long."""

PLAIN_TOKENS = 110
SUFFIX_TOKENS = 30

TOKENS_PER_WORD = 1.18  # measured with SmolLM2's tokenizer, full stops included; reports show the server's own count

_VOCABULARY = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power hour
game line end member law car city community name president team minute idea kid body information back parent face others
level office door health person art war history party result change morning reason research girl guy moment air teacher
force education foot boy age policy music market river garden bridge winter summer island village forest mountain harbour
engine letter window kitchen machine paper painter doctor farmer captain soldier writer singer driver market valley
good new first last long great little own other old big high different small large next early young important few public
bad same able quiet bright narrow heavy distant careful sudden gentle broken silent modern ancient common simple useful
find give tell ask seem feel try leave call keep begin help show hear play run move live believe bring happen write sit
stand lose pay meet include continue set learn lead understand watch follow stop create speak read spend grow open walk
win teach offer remember consider appear buy serve die send build stay fall cut reach kill raise pass sell decide return
about above across after against along among around before behind below beside between beyond during inside near outside
over past since through toward under until upon within without because although while whether unless however therefore
slowly often always never perhaps almost already together again quickly finally nearly rather simply clearly certainly
"""
_WORDS = _VOCABULARY.split()


@dataclass(frozen=True, slots=True)
class Script:
    """The user's side of one conversation. Most workloads have one message; a server's answers come in between."""

    messages: tuple[str, ...]

    def prompt(self, answers: Sequence[str]) -> str:
        """The prompt of the next turn, given the answers to all turns before it."""
        if len(self.messages) == 1:
            return self.messages[0]
        parts: list[str] = []
        for index, message in enumerate(self.messages[: len(answers) + 1]):
            parts.append(f"User: {message}\nAssistant:")
            if index < len(answers):
                parts.append(f"{answers[index]}\n")
        return "".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A kind of load. `prompt_tokens` is the size of what the workload varies: see `describe`."""

    name: Name
    prompt_tokens: int
    max_tokens: int

    @classmethod
    def make(cls, name: Name, prompt_tokens: int | None = None, max_tokens: int | None = None) -> Workload:
        """The workload of that name; None takes its usual size."""
        usual_prompt, usual_output = _USUAL[name]
        return cls(name=name, prompt_tokens=prompt_tokens or usual_prompt, max_tokens=max_tokens or usual_output)

    @property
    def requests_per_script(self) -> int:
        """How many requests one script makes."""
        return TURNS if self.name == "turns" else 1

    def describe(self) -> str:
        """The load in words."""
        size, output = self.prompt_tokens, f"{self.max_tokens} tokens out"
        return {
            "plain": f"distinct prompts of about {size} tokens, {output}",
            "shared-prefix": f"a common prefix of about {size} tokens and {SUFFIX_TOKENS} of one's own, {output}",
            "turns": f"conversations of {TURNS} turns, about {size} new tokens a turn, {output} each",
            "mixed": f"every {LONG_EVERY}th prompt about {size} tokens, the others {PLAIN_TOKENS}, {output}",
        }[self.name]

    def scripts(self, requests: int, *, seed: int, alternation: int) -> list[Script]:
        """The scripts for at least `requests` requests. No two alternations share a prompt or a prefix of one, so that
        none is served from the cache that another has filled. Warm-up is alternation -1."""
        stem = f"{self.name}/{seed}/{alternation}"
        # A string seed is hashed by random itself, so it does not depend on the process as hash() does.
        prefix = _text(random.Random(f"{stem}/prefix"), self.prompt_tokens)  # noqa: S311 - no secret
        count = -(-requests // self.requests_per_script)
        return [
            self._script(random.Random(f"{stem}/{index}"), index, prefix)  # noqa: S311 - no secret
            for index in range(count)
        ]

    def _script(self, rng: random.Random, index: int, prefix: str) -> Script:
        if self.name == "shared-prefix":
            return Script((f"{prefix} {_text(rng, SUFFIX_TOKENS)}",))
        if self.name == "turns":
            return Script(tuple(_text(rng, self.prompt_tokens) for _ in range(TURNS)))
        if self.name == "mixed" and index % LONG_EVERY != LONG_EVERY - 1:
            return Script((_text(rng, PLAIN_TOKENS),))
        return Script((_text(rng, self.prompt_tokens),))


_USUAL: dict[Name, tuple[int, int]] = {
    "plain": (PLAIN_TOKENS, 64),
    "shared-prefix": (840, 32),
    "turns": (60, 32),
    "mixed": (1250, 64),
}


def _text(rng: random.Random, tokens: int) -> str:
    """Sentences of common words, about `tokens` tokens long."""
    words: list[str] = []
    left = max(1, round(tokens / TOKENS_PER_WORD))
    while left > 0:
        sentence = rng.choices(_WORDS, k=min(left, rng.randint(6, 14)))
        left -= len(sentence)
        sentence[0] = sentence[0].capitalize()
        if len(sentence) > 8:
            sentence[len(sentence) // 2] += ","
        sentence[-1] += "."
        words += sentence
    return " ".join(words)
