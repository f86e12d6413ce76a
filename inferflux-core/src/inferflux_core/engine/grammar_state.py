"""One sequence under its constraint: what it may draw next, told to the scheduler as tokens and to the sampler as a mask."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from inferflux_core.engine.thinking import ThoughtPhase, Thoughts
from inferflux_core.engine.vocabulary import Vocabulary

Words = npt.NDArray[np.int32]

_FAILED = "The output could not be held to the required format: "
# The library's own words are for nobody: they may repeat the grammar and the output.
_LOST = _FAILED + "its grammar could not be followed at this point, and may be too complex. Simplify the schema or grammar."
_NOT_TAKEN = _FAILED + "a token was drawn that it does not allow."
_NO_TOKEN = _FAILED + "no token of the model's vocabulary can go on. Simplify the schema or grammar."
_BEHIND_TAG = _FAILED + "what the model wrote right behind its thoughts does not begin an answer."
_INCOMPLETE = _FAILED + "the model ended it too early."


# A mask whose states are all known takes less; one that takes longer has most likely learned some.
_KNOWN_S = 200e-6
# Measured with 49,152 tokens: 50,000 states, the limit, take 86 ms and 21 to 27 MB.
_BYTES_PER_SECOND = 250e6
_MOST_BYTES = 27_000_000


@dataclass(frozen=True, slots=True)
class Tags:
    """The tags around thoughts in a vocabulary.

    Attributes:
        controls: texts of the control tokens among them, by id; other control tokens are no text of an answer.
        opening: takes the begin tag, in every spelling; None if it is not needed.
    """

    controls: Mapping[int, bytes]
    opening: LLMatcher | None


@dataclass(slots=True)
class Wear:
    """How much a compiled grammar was used. What the library learns of its patterns on the way all copies share, up to a limit
    from which on it fails.

    Attributes:
        num_tokens: drawn under it.
        has_failed: whether a sequence could not be held to it.
        seconds: spent on learning.
    """

    num_tokens: int = 0
    has_failed: bool = False
    seconds: float = 0.0

    def masked(self, rows: int, seconds: float) -> None:
        """So many rows of a mask took so long."""
        self.seconds += max(0.0, seconds - rows * _KNOWN_S)

    @property
    def num_bytes(self) -> int:
        """What was learned takes about so much memory, as the library does not tell."""
        return int(min(_BYTES_PER_SECOND * self.seconds, _MOST_BYTES))


class GrammarState:
    """A `ConstraintState`: a grammar, behind thoughts or not, or a budget of thoughts alone.

    - While thoughts are open anything may be drawn but, if an answer with a grammar follows, the end of the sequence.
    - Where thoughts may begin but need not, either the begin tag may come or what the grammar allows.
    - Behind the end tag the grammar begins. White space in the token that completes the tag is no part of the answer, as those
      who split the two drop it; what else that token brings the grammar has to take, or the constraint is broken.

    `fill` may run in another thread while nothing else is called.

    Args:
        answer: the grammar at its beginning; None for any answer. The state's own.
        thoughts: None if there are none.
        tags: those of the thoughts.
        wear: of the grammar.

    Attributes:
        is_finished, error: see `ConstraintState`.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        answer: LLMatcher | None,
        thoughts: Thoughts | None = None,
        tags: Tags | None = None,
        wear: Wear | None = None,
    ) -> None:
        self.is_finished = False
        self.error: str | None = None
        self._vocabulary = vocabulary
        self._answer = answer
        self._thoughts = None if thoughts is None or thoughts.phase is ThoughtPhase.OVER else thoughts
        self._tags = tags
        self._wear = wear or Wear()
        self._untouched: LLMatcher | None = None  # the grammar's beginning, while thoughts may still come
        self._opening: LLMatcher | None = None  # alive while the begin tag may still come
        self._takes_answer = True  # whether what was drawn may be the beginning of the answer
        if self._thoughts is not None and answer is not None and self._thoughts.phase is ThoughtPhase.BEFORE:
            self._untouched = answer.deep_copy()
            self._opening = None if tags is None or tags.opening is None else tags.opening.deep_copy()
        self._forced: list[int] = []  # what `forced` found, until a token is drawn

    # --- for the scheduler --------------------------------------------------------------------------------------------

    def forced(self, at_most: int) -> list[int]:
        """Tokens that must come next, since nothing else may; often none."""
        if self.error is not None or self.is_finished:
            return []
        if self._thoughts is not None:
            return self._thoughts.forced()[:at_most]
        if self._answer is None:
            return []
        if not self._forced:
            eos = self._vocabulary.eos_token_ids
            self._forced = list(itertools.takewhile(lambda token: token not in eos, self._answer.compute_ff_tokens()))
        return self._forced[:at_most]

    def allowed(self, draft: Sequence[int]) -> int:
        """How many tokens of a draft may come next, one after the other; none from an end of the sequence on."""
        if self.error is not None or self.is_finished:
            return 0
        eos = self._vocabulary.eos_token_ids
        until = next((i for i, token in enumerate(draft) if token in eos), len(draft))
        if self._thoughts is None:
            return until if self._answer is None else self._answer.validate_tokens(list(draft[:until]))
        ahead = self._copy()
        for i in range(until):
            if not ahead._accepts(draft[i]):
                return i
            ahead._take(draft[i])
            if ahead.error is not None:
                return i
            if ahead.is_finished:
                return i + 1
        return until

    def advance(self, tokens: Sequence[int]) -> None:
        """These tokens were drawn. Sets `is_finished` or `error` where that ends the sequence."""
        for token in tokens:
            if self.error is not None or self.is_finished:
                return
            self._wear.num_tokens += 1
            self._take(token)

    def fail(self, reason: str = _LOST) -> None:
        """The constraint cannot be held any longer."""
        if self.error is None:
            self.error = reason
            self._wear.has_failed = True

    # --- for the sampler ----------------------------------------------------------------------------------------------

    def is_free(self, draft: Sequence[int]) -> bool:
        """Whether it is plain that anything may be drawn, or that it does not matter what is."""
        if self.error is not None or self.is_finished:
            return True
        if self._answer is not None:
            return False
        return self._thoughts is None or (not draft and self._thoughts.phase < ThoughtPhase.CLOSING)

    def fill(self, draft: Sequence[int], rows: Words) -> bool:
        """Write what may be drawn next and after each token of a draft.

        Rows behind a token that may not come permit everything: what is drawn there is dropped. If no mask can be made,
        `error` is set, and a token is drawn that counts for nothing.

        Args:
            rows: [len(draft) + 1, words]; each gets at least one bit.

        Returns:
            Whether any row permits less than everything.
        """
        if self.is_free(draft):
            return False
        began = time.perf_counter()
        try:
            return self._fill(draft, rows)
        finally:
            self._wear.masked(len(rows), time.perf_counter() - began)

    def _fill(self, draft: Sequence[int], rows: Words) -> bool:
        """As `fill`, where something may be forbidden."""
        if self._thoughts is None and self._answer is not None:
            self._fill_answer(self._answer, draft, rows)
            return True
        if not draft:
            return self._fill_next(rows[0])
        ahead = self._copy()
        constrained = False
        rows[:] = self._vocabulary.full
        for i, row in enumerate(rows):
            constrained |= ahead._fill_next(row)
            if ahead.error is not None:
                self.fail(ahead.error)
                break
            if i == len(draft) or not ahead._accepts(draft[i]):
                break
            ahead._take(draft[i])
            if ahead.error is not None or ahead.is_finished:
                break
        return constrained

    def _fill_answer(self, answer: LLMatcher, draft: Sequence[int], rows: Words) -> None:
        """As `fill`, where there is nothing but the grammar: it goes along the draft and back."""
        consumed = 0
        forced = self._forced
        for i, row in enumerate(rows):
            if forced and (i >= min(len(forced), len(draft)) or draft[i] != forced[i]):
                forced = []  # from here on it has to be asked
            if forced:
                _only(draft[i], row)
            elif not self._mask(answer, row):
                rows[i:] = row
                return  # there is no way back from an error, and no use for it
            if i == len(draft):
                break
            if draft[i] in self._vocabulary.eos_token_ids or answer.try_consume_tokens([draft[i]]) != 1:
                rows[i + 1 :] = self._vocabulary.full
                break
            consumed += 1
        if consumed and not answer.rollback(consumed):
            self.fail()

    def _fill_next(self, row: Words) -> bool:
        """Write what may be drawn next; returns whether that is less than everything."""
        thoughts, answer = self._thoughts, self._answer
        if thoughts is not None and thoughts.phase is ThoughtPhase.CLOSING:
            _only(thoughts.forced()[0], row)
            return True
        if answer is None:
            row[:] = self._vocabulary.full
            return False
        if thoughts is None:
            self._mask(answer, row)
        elif thoughts.phase is ThoughtPhase.OPEN:
            row[:] = self._vocabulary.all_but_eos
        else:
            row[:] = 0
            if self._takes_answer:
                self._mask(answer, row)
            if self._opening is not None and self.error is None:
                tag = np.empty_like(row)
                self._mask(self._opening, tag)
                row |= tag
        return True

    def _mask(self, matcher: LLMatcher, row: Words) -> bool:
        """What a grammar permits; False, and a row for nothing, if that cannot be told."""
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if matcher.is_error():
            self.fail()
        elif row.any():
            return True
        else:
            self.fail(_NO_TOKEN)
        # A token that ends nothing, so that nobody takes the output for complete.
        row[:] = self._vocabulary.all_but_eos
        return False

    # --- going on -----------------------------------------------------------------------------------------------------

    def _copy(self) -> GrammarState:
        twin = object.__new__(GrammarState)
        twin.__dict__.update(self.__dict__)
        twin._wear = Wear()
        twin._answer = None if self._answer is None else self._answer.deep_copy()
        twin._opening = None if self._opening is None else self._opening.deep_copy()
        twin._thoughts = None if self._thoughts is None else self._thoughts.copy()
        return twin

    def _accepts(self, token: int) -> bool:
        """Whether a token that does not end the sequence may come next."""
        thoughts, answer = self._thoughts, self._answer
        if thoughts is not None and thoughts.phase is ThoughtPhase.CLOSING:
            return token == thoughts.forced()[0]
        if token in self._vocabulary.eos_token_ids:
            return False
        if answer is None:
            return True
        if thoughts is not None and thoughts.phase is ThoughtPhase.OPEN:
            return token < self._vocabulary.num_known
        if self._opening is not None and self._opening.validate_tokens([token]) == 1:
            return True
        return self._takes_answer and answer.validate_tokens([token]) == 1

    def _take(self, token: int) -> None:
        self._forced = []
        if token in self._vocabulary.eos_token_ids and not self._is_forced(token):
            self._end()
        elif self._thoughts is not None:
            self._think(self._thoughts, token)
        elif self._answer is not None:
            if not self._answer.consume_token(token):
                self.fail()
            elif self._answer.is_stopped():
                self._stopped(self._answer)

    def _is_forced(self, token: int) -> bool:
        return self._thoughts is not None and self._thoughts.forced()[:1] == [token]

    def _end(self) -> None:
        begun = self._takes_answer and (self._thoughts is None or self._thoughts.phase is ThoughtPhase.BEFORE)
        if self._answer is None or (begun and self._answer.is_accepting()):
            self.is_finished = True
        else:
            self.fail(_INCOMPLETE)

    def _think(self, thoughts: Thoughts, token: int) -> None:
        """A token came before the thoughts were over."""
        vocabulary = self._vocabulary
        controls = {} if self._tags is None else self._tags.controls
        waited = thoughts.phase is ThoughtPhase.BEFORE
        try:
            rest = thoughts.advance(token, controls.get(token) or vocabulary.bytes_of(token))
        except ValueError:
            self.fail(_NOT_TAKEN)
            return
        if waited and not thoughts.had_thoughts:
            self._begin(token)
        elif waited:
            self._answer, self._untouched, self._opening, self._takes_answer = self._untouched, None, None, True
        if self.error is None and thoughts.phase is ThoughtPhase.OVER:
            self._thoughts = self._untouched = self._opening = None
            answer = self._answer
            if answer is None:
                return
            spelled = vocabulary.spell(rest) if rest else []
            if spelled is None or (spelled and not answer.consume_tokens(spelled)):
                self.fail(_BEHIND_TAG)
            elif answer.is_stopped():
                self._stopped(answer)

    def _begin(self, token: int) -> None:
        """A token came that may belong to the begin tag, or to the answer."""
        if self._answer is None:
            return
        if self._opening is not None and self._opening.try_consume_tokens([token]) != 1:
            self._opening = None
        if self._takes_answer and self._answer.try_consume_tokens([token]) != 1:
            self._takes_answer = False
        if not self._takes_answer and self._opening is None:
            self.fail(_NOT_TAKEN)

    def _stopped(self, answer: LLMatcher) -> None:
        if answer.is_error() or not answer.is_accepting():
            self.fail()
        else:
            self.is_finished = True


def _only(token: int, row: Words) -> None:
    """Permit one token."""
    row[:] = 0
    row.view(np.uint32)[token // 32] = np.uint32(1 << token % 32)
