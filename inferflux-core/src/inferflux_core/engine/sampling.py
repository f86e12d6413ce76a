"""The reference sampler, in numpy: what every sampling parameter means, and the oracle of the other samplers' tests.

A draw is `argmax(logits / T + g)` over the tokens that survive the filters, with Gumbel noise g keyed by (seed, position,
token). No state is carried from draw to draw, so the same seed gives the same text whatever else is in the batch, however
the prompt was chunked, and after a preemption.

Order, as in vLLM: mask; banned tokens and logit_bias; penalties; temperature; top_k; top_p; min_p; draw.

A mask is the word of a grammar, so nothing comes before it: the draw is among its tokens, whatever a bias or broken logits
say, and bans that would leave none of them do not count.

A model that went numerically wrong harms its own sequence only: NaN is an impossible token, +inf a certain one, and if no
token is possible all are equal; of a mask, all that it permits and no ban forbids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from inferflux_core.engine.types import SamplingParams, SequenceInit, TokenLogprobs

Logits = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.int64]
Words = npt.NDArray[np.int32]

# Lower temperatures are greedy: dividing by them overflows long before it changes a draw.
_LEAST_TEMPERATURE = 1e-5
# top_p looks at this many most likely tokens first; only if they do not hold enough mass is the whole vocabulary sorted.
_TOP_P_WINDOW = 256
# Noise for more candidates than this is computed for all token ids up to the largest.
_DENSE = 2048
# A mask with bits in more words than this is applied to the whole vocabulary, which then costs less than picking its tokens.
_MANY_WORDS = 128

_PHILOX_M0, _PHILOX_M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_LOW32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)


def philox_4x32(seed: int, position: int, counters: npt.NDArray[np.uint64]) -> list[npt.NDArray[np.uint64]]:
    """Philox-4x32-10 (Salmon et al., SC '11) at counters (c, position, 0, 0) under the 64-bit key `seed`.

    Returns four arrays of 32-bit words, one per lane. Counter-based: any subset of the noise costs only that subset.
    """
    x0 = counters.astype(np.uint64)
    x1 = np.full_like(x0, position & 0xFFFFFFFF)
    x2 = np.zeros_like(x0)
    x3 = np.zeros_like(x0)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0 = x0 * _PHILOX_M0
        p1 = x2 * _PHILOX_M1
        x0, x1, x2, x3 = (
            (p1 >> _SHIFT32) ^ x1 ^ np.uint64(k0),
            p1 & _LOW32,
            (p0 >> _SHIFT32) ^ x3 ^ np.uint64(k1),
            p0 & _LOW32,
        )
        k0, k1 = (k0 + _PHILOX_W0) & 0xFFFFFFFF, (k1 + _PHILOX_W1) & 0xFFFFFFFF
    return [x0, x1, x2, x3]


def gumbel_noise(seed: int, position: int, token_ids: TokenIds) -> Logits:
    """Standard Gumbel noise, float32, for these tokens at this position of the sequence.

    Token t takes lane t % 4 of counter t // 4. With a 32-bit word w, v = (w + 1/2) / 2**32 is uniform in (0, 1) and
    -log(-log1p(-v)) is Gumbel; the upper tail, which decides draws, comes from small v, where float32 is exact.
    """
    group = token_ids >> 2
    if len(token_ids) > _DENSE:  # finding the distinct groups would cost more than computing all of them
        groups, inverse = np.arange(int(group.max()) + 1), group
    else:
        groups, inverse = np.unique(group, return_inverse=True)
    lanes = np.stack(philox_4x32(seed, position, groups.astype(np.uint64)))
    words = lanes[token_ids & 3, inverse]
    v = (words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    np.minimum(v, np.float32(1 - 2.0**-24), out=v)
    return np.asarray(-np.log(-np.log1p(-v)), dtype=np.float32)


@dataclass(slots=True)
class _Sequence:
    """What penalties and bans need to know of one sequence."""

    params: SamplingParams
    num_output: int
    prompt_ids: TokenIds | None
    output_counts: dict[int, int] = field(default_factory=dict)
    bias_ids: TokenIds | None = None
    bias_values: Logits | None = None


class Sampler:
    """Draws tokens for the sequences of one engine, by slot."""

    def __init__(self, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._vocab_size = vocab_size
        self._eos = np.array(sorted(eos_token_ids), dtype=np.int64)
        self._sequences: dict[int, _Sequence] = {}

    def start(self, init: SequenceInit) -> None:
        """A sequence gets a slot, new or resumed."""
        params = init.params
        output = init.tokens[init.num_prompt_tokens :]
        penalised = params.repetition_penalty != 1.0
        sequence = _Sequence(
            params=params,
            num_output=len(output),
            prompt_ids=np.unique(np.array(init.tokens[: init.num_prompt_tokens], dtype=np.int64)) if penalised else None,
        )
        for token in output:
            sequence.output_counts[token] = sequence.output_counts.get(token, 0) + 1
        if params.logit_bias:
            sequence.bias_ids = np.fromiter(params.logit_bias.keys(), dtype=np.int64)
            sequence.bias_values = np.fromiter(params.logit_bias.values(), dtype=np.float32)
        self._sequences[init.slot] = sequence

    def free(self, slot: int) -> None:
        """The slot's sequence is gone."""
        self._sequences.pop(slot, None)

    def sample(self, slot: int, position: int, logits: Logits, mask: Words | None = None) -> tuple[int, TokenLogprobs | None]:
        """Draw the token at `position` from the logits of the position before it.

        Args:
            slot: whose parameters and history to use.
            position: index of the new token in the sequence; part of the noise's key.
            logits: [vocab_size], float32; not modified.
            mask: [(vocab_size + 31) // 32], the tokens that may be drawn, as in `GrammarMask`; None for any.
        """
        sequence = self._sequences[slot]
        params = sequence.params
        with np.errstate(over="ignore", invalid="ignore"):
            token = None if mask is None else self._likely(sequence, logits, mask)
            if token is None:
                permitted = None if mask is None else permitted_ids(mask, self._vocab_size)
                token = self._token(sequence, position, logits, permitted)
            sequence.num_output += 1
            sequence.output_counts[token] = sequence.output_counts.get(token, 0) + 1
            return token, None if params.logprobs is None else self._logprobs(logits, token, params.logprobs)

    def sample_row(
        self,
        slot: int,
        position: int,
        logits: Sequence[Logits],
        draft: Sequence[int] = (),
        masks: Words | None = None,
    ) -> tuple[list[int], list[TokenLogprobs] | None]:
        """Draw tokens from `position` on until one differs from the draft at its place: accepted drafts and one token more.

        The tokens are those that `sample` would draw one by one: each has the noise of its own position.

        Args:
            logits: of the len(draft) + 1 positions before these tokens.
            masks: [len(draft) + 1, words]; None for no mask.

        Returns:
            The tokens, and their log-probabilities if the sequence wants them.
        """
        tokens: list[int] = []
        logprobs: list[TokenLogprobs] = []
        for i, row in enumerate(logits):
            token, entry = self.sample(slot, position + i, row, None if masks is None else masks[i])
            tokens.append(token)
            if entry is not None:
                logprobs.append(entry)
            if i >= len(draft) or token != draft[i]:
                break
        return tokens, None if self._sequences[slot].params.logprobs is None else logprobs

    def _token(self, sequence: _Sequence, position: int, logits: Logits, permitted: TokenIds | None) -> int:
        params = sequence.params
        if permitted is not None:
            permitted = self._not_banned(sequence, permitted)
            if len(permitted) == 1:
                return int(permitted[0])
        adjusted = self._adjust(sequence, logits, permitted)
        best = int(adjusted.argmax())
        if not np.isfinite(adjusted[best]):
            adjusted = _drawable(adjusted)
            best = int(adjusted.argmax())
        if params.temperature >= _LEAST_TEMPERATURE:
            best = self._draw(params, position, adjusted, adjusted[best], permitted)
        return best if permitted is None else int(permitted[best])

    def _likely(self, sequence: _Sequence, logits: Logits, mask: Words) -> int | None:
        """The most likely token, where it is plain that it is drawn: greedy, permitted, and nothing changes logits."""
        params = sequence.params
        if params.temperature >= _LEAST_TEMPERATURE or params.is_penalised or params.logit_bias:
            return None
        if self._banned(sequence) is not None:
            return None
        token = int(logits.argmax())
        return token if np.isfinite(logits[token]) and int(mask[token // 32]) >> token % 32 & 1 else None

    def _banned(self, sequence: _Sequence) -> TokenIds | None:
        params = sequence.params
        if sequence.num_output < params.min_tokens:
            return np.union1d(self._eos, np.fromiter(params.stop_token_ids, dtype=np.int64))
        return self._eos if params.ignore_eos else None

    def _not_banned(self, sequence: _Sequence, permitted: TokenIds) -> TokenIds:
        """What is left of the permitted tokens; all of them where bans would leave none."""
        banned = self._banned(sequence)
        if banned is None:
            return permitted
        places = np.searchsorted(permitted, banned)
        places = places[(places < len(permitted)) & (permitted[np.minimum(places, len(permitted) - 1)] == banned)]
        return np.delete(permitted, places) if len(places) < len(permitted) else permitted

    def _adjust(self, sequence: _Sequence, logits: Logits, permitted: TokenIds | None) -> Logits:
        """Bias and penalties, and bans where there is no mask; of the permitted tokens only, in their order.

        Returns the input itself when there is nothing to do.
        """
        params = sequence.params
        banned = self._banned(sequence) if permitted is None else None
        repetition = params.repetition_penalty != 1.0
        counted = params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
        bias_ids, bias_values = sequence.bias_ids, sequence.bias_values
        if banned is None and not (repetition or counted or bias_ids is not None):
            return logits if permitted is None else logits[permitted]
        logits = logits.copy()
        if bias_ids is not None and bias_values is not None:
            logits[bias_ids] += bias_values
        if banned is not None:
            logits[banned] = -np.inf
        if repetition or (counted and sequence.output_counts):
            output_ids = np.fromiter(sequence.output_counts.keys(), dtype=np.int64)
        if repetition:
            assert sequence.prompt_ids is not None
            seen = np.union1d(sequence.prompt_ids, output_ids)
            values = logits[seen]
            penalty = np.float32(params.repetition_penalty)
            logits[seen] = np.where(values > 0, values / penalty, values * penalty)
        if counted and sequence.output_counts:
            counts = np.fromiter(sequence.output_counts.values(), dtype=np.float32)
            logits[output_ids] -= np.float32(params.frequency_penalty) * counts + np.float32(params.presence_penalty)
        return logits if permitted is None else logits[permitted]

    def _draw(
        self, params: SamplingParams, position: int, logits: Logits, highest: np.float32, permitted: TokenIds | None
    ) -> int:
        """Index of the logit that wins."""
        kept, scaled = self._filter(params, logits, highest)
        noise = gumbel_noise(params.seed, position, kept if permitted is None else permitted[kept])
        return int(kept[int((scaled + noise).argmax())])

    def _filter(self, params: SamplingParams, logits: Logits, highest: np.float32) -> tuple[TokenIds, Logits]:
        """Indices of candidates and their logits / temperature; ties at a threshold are kept."""
        # Shifted first: a tiny temperature would overflow otherwise, and inf - inf is no number.
        scaled = (logits - highest) / np.float32(params.temperature)
        keep: Any = np.isfinite(scaled)
        if 0 < params.top_k < len(scaled):
            keep &= scaled >= np.partition(scaled, -params.top_k)[-params.top_k]
        if params.top_p < 1.0:
            keep &= scaled >= self._top_p_threshold(scaled[keep], params.top_p)
        if params.min_p > 0.0:
            keep &= scaled >= np.float32(np.log(params.min_p))
        ids = np.flatnonzero(keep)
        return ids, scaled[ids]

    @staticmethod
    def _top_p_threshold(scaled: Logits, top_p: float) -> np.float32:
        """Logit of the last token of the smallest most likely set whose probability reaches top_p."""
        needed = top_p * float(np.exp(scaled).sum(dtype=np.float64))
        if len(scaled) > _TOP_P_WINDOW:
            head = np.partition(scaled, -_TOP_P_WINDOW)[-_TOP_P_WINDOW:]
            if float(np.exp(head).sum(dtype=np.float64)) >= needed:
                scaled = head
        descending = np.sort(scaled)[::-1]
        mass = np.cumsum(np.exp(descending), dtype=np.float64)
        last = min(int(np.searchsorted(mass, needed)), len(descending) - 1)
        return np.float32(descending[last])

    @staticmethod
    def _logprobs(logits: Logits, token: int, count: int) -> TokenLogprobs:
        """Under the raw distribution: before bans, penalties and temperature, as OpenAI and vLLM report them."""
        highest = logits.max()
        if not np.isfinite(highest):
            logits = _drawable(logits)
            highest = logits.max()
        relative = logits - highest
        normaliser = float(np.log(np.exp(relative).sum(dtype=np.float64)))
        ids = np.empty(0, dtype=np.int64)
        if count:  # of equally likely tokens those with the lowest ids, so that a greedy draw is always the first
            ids = np.flatnonzero(logits >= np.partition(logits, -count)[-count])
            ids = ids[np.argsort(-logits[ids], kind="stable")][:count]
        top = [(int(i), float(relative[i]) - normaliser) for i in ids]
        return TokenLogprobs(float(relative[token]) - normaliser, top)


def permitted_ids(mask: Words, vocab_size: int) -> TokenIds:
    """Ascending ids of the tokens that a mask permits.

    Raises:
        ValueError: there are none. Nothing can be drawn then, and to draw anything all the same would break a promise.
    """
    words = np.flatnonzero(mask)
    if len(words) > _MANY_WORDS:
        bits = np.unpackbits(np.ascontiguousarray(mask, dtype="<i4").view(np.uint8), count=vocab_size, bitorder="little")
        return np.flatnonzero(bits.view(np.bool_))
    used = np.ascontiguousarray(mask[words], dtype="<i4").view(np.uint8).reshape(len(words), 4)
    index, bit = np.nonzero(np.unpackbits(used, axis=1, bitorder="little"))
    ids = words[index] * 32 + bit
    if len(ids) and ids[-1] >= vocab_size:
        ids = ids[ids < vocab_size]
    if not len(ids):
        raise ValueError("a mask permits no token")
    return ids


def _drawable(logits: Logits) -> Logits:
    """Logits whose highest is a finite number: NaN is impossible, +inf certain, and if nothing is possible all are equal."""
    logits = np.where(np.isnan(logits), np.float32(-np.inf), logits)
    highest = logits.max()
    if np.isfinite(highest):
        return logits
    return np.where(logits == highest, np.float32(0), np.float32(-np.inf))
