"""A proposer that knows the answers, and errs when it is told to: what drafts do to an engine, without luck."""

from __future__ import annotations

from collections.abc import Sequence

from inferflux_core.engine.speculation import Speculation
from inferflux_core.engine.verify_cost import VerifyCost
from inferflux_core.interfaces import KnownSequence, Outlook, Proposer


class ScriptedDrafts(Proposer):
    """Proposes the known answer to a prompt, with every so manyth token of the answer wrong.

    Attributes:
        proposed: tokens proposed so far.
    """

    def __init__(
        self, answers: Sequence[tuple[Sequence[int], Sequence[int]]], *, wrong_every: int = 0, length: int = 8
    ) -> None:
        """
        Args:
            answers: prompts and what the model says to them.
            wrong_every: positions of the answer that are multiples of it, from 1 on, are proposed wrong; 0 for none.
            length: most tokens of one draft.
        """
        self.proposed = 0
        self._answers = {tuple(prompt): list(answer) for prompt, answer in answers}
        self._wrong_every = wrong_every
        self._length = length

    def prior(self, kind: int) -> float:
        return 0.99

    def outlook(self, sequence: KnownSequence) -> Outlook | None:
        rest = self._rest(sequence)
        return Outlook(max_tokens=min(len(rest), self._length)) if rest else None

    def _rest(self, sequence: KnownSequence) -> list[int]:
        prompt = tuple(sequence.tokens[: sequence.num_prompt_tokens])
        done = len(sequence.tokens) - sequence.num_prompt_tokens
        answer = self._answers.get(prompt, [])
        wrong = self._wrong_every
        return [t ^ 1 if wrong and (i + 1) % wrong == 0 else t for i, t in enumerate(answer) if i >= done]

    def propose(self, wanted: Sequence[tuple[KnownSequence, int]]) -> list[Sequence[int]]:
        drafts = [self._rest(sequence)[:count] for sequence, count in wanted]
        self.proposed += sum(map(len, drafts))
        return [*drafts]

    def always(self) -> Speculation:
        """A speculation that verifies whatever this proposes, as if that cost nothing."""
        return Speculation(self, VerifyCost.flat(), self._length)
