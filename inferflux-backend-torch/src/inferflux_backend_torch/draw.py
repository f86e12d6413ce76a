"""How tokens are chosen from logits that bias, bans and penalties have been applied to: what every way of drawing offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from inferflux_backend_torch.permitted import Words
from inferflux_core.engine.types import SamplingParams

# Lower temperatures are greedy, as in the reference.
_LEAST_TEMPERATURE = 1e-5


def is_greedy(params: SamplingParams) -> bool:
    """Whether the most likely token is taken, without noise and filters."""
    return params.temperature < _LEAST_TEMPERATURE


class Draw(Protocol):
    """Draws for the slots of one engine."""

    def start(self, slot: int, params: SamplingParams) -> None: ...

    def argmax(self, logits: Tensor) -> Tensor:
        """Most likely token of each row of [R, V]: [R] int64."""

    def draw(self, logits: Tensor, rows: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Draw a token for some rows of logits [R, V]: [N] int64; rows, slots and positions are parallel."""

    def draw_permitted(
        self, logits: Tensor, rows: Sequence[int], slots: Sequence[int], positions: Sequence[int], words: Sequence[Words]
    ) -> Tensor:
        """As `draw`, but only tokens permitted by the row's words, and the most likely of them for greedy slots."""
