"""Drawing tokens with plain torch operations: for devices without a faster way, and the oracle of those that have one.

Every function works on a batch of rows and waits for nothing on the host, so that all of them may be captured into a graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from inferflux_backend_torch.draw import is_greedy
from inferflux_backend_torch.penalties import upload
from inferflux_backend_torch.permitted import Words, restrict
from inferflux_backend_torch.philox import device_noise
from inferflux_core.engine.types import SamplingParams

_INFINITY_BITS = 0x7F800000
# Noise is computed for so many groups of four tokens at a time, for which the words take some 100 MB.
_GROUPS_AT_ONCE = 2**20


def argmax(logits: Tensor) -> Tensor:
    """Most likely token of each row of [R, V]; the lowest id of equals.

    As in `scale`: NaN is impossible, +inf certain, and if nothing is possible all are equal.
    """
    return logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argmax(dim=-1)


def scale(logits: Tensor, temperature: Tensor) -> Tensor:
    """(logits - highest) / temperature: [R, V] float32, at most 0 and somewhere 0, of float32 logits and a temperature [R].

    Broken rows become ones that can be drawn from: NaN is impossible, +inf certain, and if nothing is possible all are equal.
    """
    logits = logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    highest = logits.amax(dim=-1, keepdim=True)
    certain = torch.where(logits == highest, 0.0, -torch.inf)
    # Shifted first: a tiny temperature would overflow otherwise.
    return torch.where(highest.isfinite(), (logits - highest) / temperature.unsqueeze(1), certain)


def filter_thresholds(scaled: Tensor, top_k: Tensor, top_p: Tensor, log_min_p: Tensor) -> Tensor:
    """Least scaled logit that survives top_k, then top_p among what top_k left, then min_p; ties at a threshold survive.

    Bisection over the bits of a nonnegative float, which are ordered like its value: 31 passes that count and 31 that add up
    probabilities. Exact up to rounding of the sums, and nothing is sorted.

    Args:
        scaled: [R, V] float32, from `scale`.
        top_k: [R] int64; V or more is off.
        top_p: [R] float64 (float32 where the device has no float64); 1 is off.
        log_min_p: [R] float32; -inf is off.

    Returns:
        [R] float32, at most 0.
    """
    distance = scaled.abs().view(torch.int32)
    everything = torch.full_like(top_k, _INFINITY_BITS, dtype=torch.int32)
    kept = _least_limit(lambda limit: (distance <= limit).sum(dim=-1), top_k, everything)
    mass = torch.where(distance <= kept.unsqueeze(1), scaled.exp(), 0.0)
    needed = top_p * mass.sum(dim=-1, dtype=top_p.dtype)
    likely = _least_limit(lambda limit: torch.where(distance <= limit, mass, 0.0).sum(dim=-1, dtype=top_p.dtype), needed, kept)
    limit = torch.where(top_p < 1, likely, kept)
    return torch.maximum(-limit.view(torch.float32), log_min_p)


def _least_limit(amount: Callable[[Tensor], Tensor], needed: Tensor, most: Tensor) -> Tensor:
    """Least limit in [0, most], [R] int32, with amount(limit as a column) >= needed, or `most` if that has too little too."""
    low, high = torch.zeros_like(most), most
    for _ in range(31):
        middle = low + ((high - low) >> 1)
        enough = amount(middle.unsqueeze(1)) >= needed
        low, high = torch.where(enough, low, (middle + 1).minimum(high)), torch.where(enough, middle, high)
    return high


def gumbel_argmax(scaled: Tensor, thresholds: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draw from softmax(scaled) restricted to the tokens at or above the row's threshold: [R] int64.

    Args:
        scaled: [R, V] float32, from `scale`.
        thresholds: [R] float32, from `filter_thresholds`; -inf keeps every possible token.
        seeds: [R] int64, the 64 bits of the seed.
        positions: [R] int64, index of the new token in its sequence.
    """
    rows, vocab_size = scaled.shape
    num_groups = -(-vocab_size // 4)
    step = max(1, _GROUPS_AT_ONCE // rows)
    best: Tensor | None = None
    token = torch.zeros_like(positions)
    for first in range(0, num_groups, step):
        groups = torch.arange(first, min(first + step, num_groups), device=scaled.device)
        part = scaled[:, 4 * first : 4 * (first + step)]
        noisy = part + device_noise(seeds, positions, groups)[:, : part.shape[1]]
        score, index = torch.where(part >= thresholds.unsqueeze(1), noisy, -torch.inf).max(dim=-1)
        if best is None:
            best, token = score, index
        else:  # of equals the first, as in argmax
            token = torch.where(score > best, index + 4 * first, token)
            best = torch.maximum(best, score)
    return token


class DeviceDraw:
    """Draws for the slots of one engine; their parameters live on the device, by slot.

    Attributes:
        temperature, top_k, top_p, log_min_p, seeds: [S], as `filter_thresholds` and `gumbel_argmax` want them.
    """

    def __init__(
        self,
        vocab_size: int,
        max_num_seqs: int,
        device: torch.device,
        filter_thresholds: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = filter_thresholds,
        gumbel_argmax: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = gumbel_argmax,
    ) -> None:
        """The two functions may be replaced by faster ones of the same meaning."""
        self._vocab_size = vocab_size
        self._device = device
        self._filter_thresholds = filter_thresholds
        self._gumbel_argmax = gumbel_argmax
        self._filtered: set[int] = set()
        self._greedy: set[int] = set()
        self.temperature = torch.ones(max_num_seqs, dtype=torch.float32, device=device)
        self.top_k = torch.full((max_num_seqs,), vocab_size, dtype=torch.int64, device=device)
        sums = torch.float32 if device.type == "mps" else torch.float64
        self.top_p = torch.ones(max_num_seqs, dtype=sums, device=device)
        self.log_min_p = torch.full((max_num_seqs,), -torch.inf, dtype=torch.float32, device=device)
        self.seeds = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)

    def start(self, slot: int, params: SamplingParams) -> None:
        self.temperature[slot] = params.temperature
        self.top_k[slot] = params.top_k if 0 < params.top_k < self._vocab_size else self._vocab_size
        self.top_p[slot] = params.top_p
        self.log_min_p[slot] = math.log(params.min_p) if params.min_p > 0.0 else -math.inf
        self.seeds[slot] = params.seed - 2**64 if params.seed >= 2**63 else params.seed
        if 0 < params.top_k < self._vocab_size or params.top_p < 1.0 or params.min_p > 0.0:
            self._filtered.add(slot)
        else:
            self._filtered.discard(slot)
        if is_greedy(params):
            self._greedy.add(slot)
        else:
            self._greedy.discard(slot)

    def argmax(self, logits: Tensor) -> Tensor:
        return argmax(logits)

    def draw(self, logits: Tensor, rows: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Draw a token for some rows of logits [R, V]: [N] int64; rows, slots and positions are parallel."""
        which, where, position = upload(self._device, [list(rows), list(slots), list(positions)], torch.int64)
        chosen = logits if len(rows) == len(logits) else logits[which]
        scaled = scale(chosen.float(), self.temperature[where])
        filtered = [i for i, slot in enumerate(slots) if slot in self._filtered]
        thresholds = scaled.new_full((len(rows),), -torch.inf)
        if filtered:
            some = upload(self._device, filtered, torch.int64)
            slot = where[some]
            thresholds[some] = self._filter_thresholds(scaled[some], self.top_k[slot], self.top_p[slot], self.log_min_p[slot])
        return self._gumbel_argmax(scaled, thresholds, self.seeds[where], position)

    def draw_permitted(
        self, logits: Tensor, rows: Sequence[int], slots: Sequence[int], positions: Sequence[int], words: Sequence[Words]
    ) -> Tensor:
        """As `draw`, but only tokens permitted by the row's words, and the most likely of them for greedy slots.

        Beside the draw some ten passes over the rows in float32, and their bits go to the device.
        """
        which = upload(self._device, list(rows), torch.int64)
        allowed = restrict(logits[which].float(), upload(self._device, np.stack(words).view(np.int32), torch.int32))
        drawn = [i for i, slot in enumerate(slots) if slot not in self._greedy]
        if len(drawn) == len(slots):
            return self.draw(allowed, drawn, slots, positions)
        tokens = self.argmax(allowed)
        if drawn:
            index = upload(self._device, drawn, torch.int64)
            tokens[index] = self.draw(allowed, drawn, [slots[i] for i in drawn], [positions[i] for i in drawn])
        return tokens
