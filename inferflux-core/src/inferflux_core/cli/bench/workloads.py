"""What the benchmark asks: prompts that follow from a seed alone, so that every server gets the same ones."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from inferflux_core.cli.bench.prompts import array_schema, copying, describing, sentences

Name = Literal["plain", "shared-prefix", "turns", "mixed", "copy", "novel", "json", "json-new"]
NAMES: tuple[Name, ...] = get_args(Name)

TURNS = 4
"""Requests of one conversation in the workload `turns`."""
LONG_EVERY = 4
"""In the workload `mixed`, every one of so many prompts is long."""

PLAIN_TOKENS = 110
SUFFIX_TOKENS = 30


@dataclass(frozen=True, slots=True)
class Script:
    """The user's side of one conversation. Most workloads have one message; a server's answers come in between.

    Attributes:
        fields: what its requests say beyond what every request says.
    """

    messages: tuple[str, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)

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
            "copy": f"files of about {size} tokens to repeat with one edit, {output}",
            "novel": f"distinct prompts of about {size} tokens, sampled so that nothing repeats, {output}",
            "json": f"distinct texts of about {size} tokens, answered as JSON by one schema, {output}",
            "json-new": f"distinct texts of about {size} tokens, answered as JSON by a schema of each, {output}",
        }[self.name]

    def scripts(self, requests: int, *, seed: int, alternation: int) -> list[Script]:
        """The scripts for at least `requests` requests. No two alternations share a prompt or a prefix of one, so that
        none is served from the cache that another has filled. Warm-up is alternation -1."""
        stem = f"{self.name}/{seed}/{alternation}"
        # A string seed is hashed by random itself, so it does not depend on the process as hash() does.
        prefix = sentences(random.Random(f"{stem}/prefix"), self.prompt_tokens)  # noqa: S311 - no secret
        count = -(-requests // self.requests_per_script)
        return [
            self._script(random.Random(f"{stem}/{index}"), index, prefix)  # noqa: S311 - no secret
            for index in range(count)
        ]

    def _script(self, rng: random.Random, index: int, prefix: str) -> Script:
        size = self.prompt_tokens
        if self.name == "copy":
            return Script((copying(rng, size),))
        if self.name == "novel":
            # Greedy, a small model soon says the same sentence for ever, and copying that is easy.
            return Script((sentences(rng, size),), {"temperature": 1, "seed": rng.getrandbits(31)})
        if self.name in ("json", "json-new"):
            schema = array_schema(rng if self.name == "json-new" else None)
            return Script((describing(rng, size),), {"response_format": _json_schema(schema)})
        if self.name == "shared-prefix":
            return Script((f"{prefix} {sentences(rng, SUFFIX_TOKENS)}",))
        if self.name == "turns":
            return Script(tuple(sentences(rng, size) for _ in range(TURNS)))
        if self.name == "mixed" and index % LONG_EVERY != LONG_EVERY - 1:
            return Script((sentences(rng, PLAIN_TOKENS),))
        return Script((sentences(rng, size),))


_USUAL: dict[Name, tuple[int, int]] = {
    "plain": (PLAIN_TOKENS, 64),
    "shared-prefix": (840, 32),
    "turns": (60, 32),
    "mixed": (1250, 64),
    "copy": (320, 128),
    "novel": (PLAIN_TOKENS, 64),
    "json": (60, 64),
    "json-new": (60, 64),
}


def _json_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "things", "schema": schema, "strict": True}}
