"""The texts that the benchmark's prompts are made of, and the schemas it asks answers to follow. All from a generator alone."""

from __future__ import annotations

import random
from typing import Any

TOKENS_PER_WORD = 1.18  # measured with SmolLM2's tokenizer, full stops included; reports show the server's own count
TOKENS_PER_SETTING = 10.6  # the same for a line of `settings_file`

COPIED_SETTINGS = 4
"""Lines of an edited file that the prompt itself begins the answer with. Told to copy, a small model talks about copying
instead; with the copy begun it goes on copying (SmolLM2-135M: 95 of 100 characters stand in the file)."""

JSON_ITEMS = 5  # objects of an answer that follows `array_schema`: at least 70 tokens
ITEM_KINDS = ("animal", "plant", "place", "tool", "idea")

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
_NAMES = tuple(dict.fromkeys(word for word in _WORDS if len(word) > 3))


def sentences(rng: random.Random, tokens: int) -> str:
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


def copying(rng: random.Random, tokens: int) -> str:
    """A prompt with a file of about `tokens` tokens, of which the rest is to be repeated after an edit near its top."""
    lines = _settings_file(rng, tokens)
    name = lines[1].partition(" = ")[0]
    edited = _value(rng)
    begun = [lines[0], f"{name} = {edited}", *lines[2 : 1 + COPIED_SETTINGS]]
    whole = "\n".join(lines)
    return (
        f"This is the file `main.conf`:\n\n```\n{whole}\n```\n\n"
        f"This is the same file, with `{name}` set to {edited} and no other change:\n\n```\n" + "\n".join(begun) + "\n"
    )


def describing(rng: random.Random, tokens: int) -> str:
    """A prompt of about `tokens` tokens of text and a question whose answer is an object by `array_schema`."""
    return f"{sentences(rng, tokens)}\n\nFive things of this text as JSON, with a title:\n\n"


def array_schema(rng: random.Random | None) -> dict[str, Any]:
    """A JSON Schema of an object with an array of small objects. With a generator its keys are as nobody has had them."""
    keys = ["title", "items", "name", "kind", "amount"]
    if rng is not None:
        keys = [f"{key}_{rng.getrandbits(32):08x}" for key in keys]
    title, items, name, kind, amount = keys
    return _object(
        {
            title: {"type": "string", "maxLength": 24},
            items: {
                "type": "array",
                "minItems": JSON_ITEMS,
                "maxItems": JSON_ITEMS,
                "items": _object(
                    {
                        name: {"type": "string", "maxLength": 16},
                        kind: {"enum": list(ITEM_KINDS)},
                        amount: {"type": "integer", "minimum": 0, "maximum": 999},
                    }
                ),
            },
        }
    )


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _settings_file(rng: random.Random, tokens: int) -> list[str]:
    count = max(COPIED_SETTINGS + 2, round(tokens / TOKENS_PER_SETTING))
    names = rng.sample(_NAMES, 2 * min(count, len(_NAMES) // 2))  # no word twice, as long as there are enough
    lines = ["# settings of the service"]
    for index in range(count):
        first, second = names[2 * index % len(names)], names[(2 * index + 1) % len(names)]
        lines.append(f"{first}_{second} = {_value(rng)}")
    return lines


def _value(rng: random.Random) -> str:
    return f'"{" ".join(rng.sample(_NAMES, 3))}"'
