"""Which tokens the rows of a step may draw: masks of grammars, packed 32 tokens to a word.

A token without its bit is never drawn, whatever its logit, bias or the other tokens' state is: where a broken row, or one that
has no possible token, makes several tokens equal, it does so among those that are permitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inferflux_core.engine.types import GrammarMask, Row

Words = npt.NDArray[np.uint32]
TokenIds = npt.NDArray[np.int64]

_WORD = 32
# Up to so many words with a bit are unpacked one by one, which costs less than anything that reads a whole row.
_FEW_WORDS = 64


def permitted_words(mask: GrammarMask | None, rows: Iterable[Row], vocab_size: int) -> dict[int, Words]:
    """Of each place that sampled rows have logits at, in order: the words of what it may draw; without those that may draw any.

    Args:
        rows: those that are sampled; each has a place more than drafts.
    """
    if mask is None:
        return {}
    bits = np.ascontiguousarray(mask.bits).view(np.uint32)
    last = vocab_size % _WORD
    by_place: dict[int, Words] = {}
    place = 0
    for row in rows:
        first = mask.first.get(row.slot)
        count = row.n_draft + 1
        if first is not None:
            part = bits[first : first + count]
            assert part.shape == (count, -(-vocab_size // _WORD)), "a mask has rows for all drafts, of the model's vocabulary"
            if last:
                part = part.copy()
                part[:, -1] &= np.uint32((1 << last) - 1)
            assert part.any(axis=1).all(), "something may be drawn at every place"
            by_place.update(enumerate(part, place))
        place += count
    return by_place


def without(words: Words, banned: Sequence[int]) -> Words:
    """Without the bits of banned tokens, unless no other is set."""
    if not banned:
        return words
    left = words.copy()
    for token in banned:
        left[token // _WORD] &= ~np.uint32(1 << token % _WORD)
    return left if left.any() else words


def has(words: Words, token: int) -> bool:
    return bool(int(words[token // _WORD]) >> token % _WORD & 1)


def few_ids(words: Words) -> TokenIds | None:
    """Tokens that are permitted, ascending, if they lie in few words; else None."""
    used = np.flatnonzero(words)
    if len(used) > _FEW_WORDS:
        return None
    index, bit = np.nonzero(_unpacked(words[used]).reshape(-1, _WORD))
    return np.asarray(used[index] * _WORD + bit, dtype=np.int64)


def all_tokens(words: Words, vocab_size: int) -> npt.NDArray[np.bool_]:
    """[V], whether each token is permitted."""
    return _unpacked(words)[:vocab_size]


def _unpacked(words: Words) -> npt.NDArray[np.bool_]:
    # As little-endian bytes, whatever the machine's order is.
    return np.unpackbits(words.astype("<u4", copy=False).view(np.uint8), bitorder="little").view(np.bool_)


def restrict(logits: Tensor, words: Tensor) -> Tensor:
    """Logits [N, V] in which all tokens are impossible but those permitted by words [N, W] int32, of which some is possible.

    With torch operations that wait for nothing on the host.
    """
    bit = torch.arange(_WORD, dtype=torch.int32, device=logits.device)
    permitted = ((words.unsqueeze(2) >> bit) & 1).to(torch.bool).flatten(1)[:, : logits.shape[1]]
    # NaN is impossible, here already: it would hide what the permitted tokens have.
    logits = torch.where(permitted, logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), -torch.inf)
    highest = logits.amax(dim=-1, keepdim=True)
    certain = torch.where(permitted & (logits == highest), 0.0, -torch.inf)
    return torch.where(highest.isfinite(), logits, certain)
