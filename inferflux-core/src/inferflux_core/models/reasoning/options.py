"""What a request may say of a model's thoughts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningOptions:
    """How much to think, and what the client gets to see of it.

    Attributes:
        effort: None leaves it to the model; `none` asks for no thoughts at all.
        budget: most tokens of thoughts; None for any number, 0 for none.
        include: whether the client wants to see them.
        apart: whether they are told apart from the text; otherwise they stand in it, between the model's tags.
    """

    effort: Effort | None = None
    budget: int | None = None
    include: bool = True
    apart: bool = True

    @property
    def is_off(self) -> bool:
        """Whether the client asks for no thoughts at all."""
        return self.budget == 0 or (self.budget is None and self.effort == "none")
