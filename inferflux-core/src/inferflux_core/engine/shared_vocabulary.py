"""Whether a draft model and its target mean the same by a token id, and what to do about the few that they do not share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from inferflux_core.errors import ModelFileError
from inferflux_core.interfaces import Tokenizer


@dataclass(frozen=True, slots=True)
class SharedVocabulary:
    """Token ids that two models have in common. Made by `share_vocabulary`.

    Attributes:
        size: ids from here on at least one of the two lacks.
        foreign: ids below `size` that are no token, or another one, in the other model.
        substitute: what the draft reads in place of a token that it does not have; one of its end-of-sequence tokens.
    """

    size: int
    foreign: frozenset[int]
    substitute: int

    def is_shared(self, token: int) -> bool:
        """Whether both models mean the same by it: whether the draft may propose it."""
        return token < self.size and token not in self.foreign

    def for_draft(self, tokens: Sequence[int]) -> list[int]:
        """The target's tokens as the draft reads them."""
        size, foreign, substitute = self.size, self.foreign, self.substitute
        return [token if token < size and token not in foreign else substitute for token in tokens]


def share_vocabulary(
    draft: Tokenizer, target: Tokenizer, *, draft_name: str, target_name: str, sizes: tuple[int, int] | None = None
) -> SharedVocabulary:
    """Compare two vocabularies, token by token.

    Every ordinary token below the smaller size has to be the same text in both. Control tokens may differ, since models of
    one family often end turns or mark roles in their own ways; so may ids that one of the two has no text for. Takes about 2
    us for each token and model.

    Args:
        draft_name, target_name: what the administrator calls the models, for the message.
        sizes: how many tokens the draft and the target can read and draw, where that may be fewer than their tokenizers have.

    Raises:
        ModelFileError: the draft's tokens are not the target's.
    """
    draft_size, target_size = sizes or (draft.vocab_size, target.vocab_size)
    size = min(draft_size, target_size, draft.vocab_size, target.vocab_size)
    foreign: set[int] = set()
    clashes: list[tuple[int, bytes, bytes]] = []
    for token in range(size):
        ours, theirs = draft.token_bytes(token, special=True), target.token_bytes(token, special=True)
        if ours == theirs and ours:
            continue
        foreign.add(token)
        if ours and theirs and not (_is_control(draft, ours) and _is_control(target, theirs)):
            clashes.append((token, ours, theirs))
    if clashes:
        token, ours, theirs = clashes[0]
        raise ModelFileError(
            f"draft model {draft_name!r} cannot draft for {target_name!r}: {len(clashes)} of their first {size} tokens differ, "
            f"the first of them {token}, which is {_shown(ours)} in the draft and {_shown(theirs)} in the target; name a draft "
            f"model of the same family"
        )
    ends = sorted(token for token in draft.eos_token_ids if token < draft_size)
    return SharedVocabulary(size, frozenset(foreign), ends[0] if ends else 0)


def _is_control(tokenizer: Tokenizer, text: bytes) -> bool:
    return text.decode("utf-8", "replace") in tokenizer.special_tokens


def _shown(text: bytes) -> str:
    return repr(text.decode("utf-8", "backslashreplace")[:60])
