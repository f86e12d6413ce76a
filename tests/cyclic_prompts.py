"""Prompts that go round and round: a small model is sure how they go on, so a wrong place in a cache would show."""

from __future__ import annotations

from collections.abc import Sequence

from inferflux_core.interfaces import Tokenizer

_SENTENCES = (
    "One two three four five six seven eight nine ten. ",
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday. ",
    "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z ",
    "January February March April May June July August September October November December. ",
    "red orange yellow green blue indigo violet ",
    "do re mi fa sol la ti do re mi fa sol la ti ",
    "2 4 6 8 10 12 14 16 18 20 22 24 26 28 30 32 34 36 38 40 ",
)


def cyclic_prompt(tokenizer: Tokenizer, length: int, variant: int = 0) -> Sequence[int]:
    """So many token ids of one of the sentences, again and again."""
    cycle = tokenizer.encode(_SENTENCES[variant % len(_SENTENCES)], add_special=False, parse_special=False)
    return (cycle * (length // len(cycle) + 1))[:length]
