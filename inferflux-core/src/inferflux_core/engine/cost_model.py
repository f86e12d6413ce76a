"""How long a step takes, learnt from the steps themselves, so that prefill chunks can be cut to a target."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

# Steps before the fit is trusted; until then a chunk beside decodes is this long.
_MIN_OBSERVATIONS = 4
_FIRST_CHUNK = 128
_FORGETTING = 0.995
# Of a weight of which nothing is known.
_VARIANCE = 1e4


class StepCostModel:
    """t = a + b * prefill tokens + c * decodes + d * tokens these attend over + e * attention of the prefill + f * drafts,
    where the attention of a chunk is its tokens times the tokens before it; by recursive least squares.

    Old steps are forgotten slowly (half after about 140), so that the fit follows another load on the machine. Times are
    milliseconds. Decoding sequences have their own term because a token of a long chunk costs far less than one alone.
    """

    def __init__(self) -> None:
        self._weights: Vector = np.zeros(6)
        self._covariance = np.eye(6) * _VARIANCE
        self._count = 0

    @staticmethod
    def _features(num_prefill: int, num_decode: int, kv_tokens: int, prefill_attention: int, num_draft: int) -> Vector:
        # Scaled so that every feature is about 1 in a usual step, which keeps the covariance well conditioned.
        attention = prefill_attention / (128 * 1024)
        return np.array([1.0, num_prefill / 128, num_decode / 8, kv_tokens / 4096, attention, num_draft / 8])

    def observe(
        self,
        num_prefill: int,
        num_decode: int,
        kv_tokens: int,
        milliseconds: float,
        prefill_attention: int = 0,
        num_draft: int = 0,
    ) -> None:
        """Learn from a finished step. A time that is no number teaches nothing."""
        if not math.isfinite(milliseconds):
            return
        x = self._features(num_prefill, num_decode, kv_tokens, prefill_attention, num_draft)
        px = self._covariance @ x
        gain = px / (_FORGETTING + float(x @ px))
        self._weights = self._weights + gain * (milliseconds - float(x @ self._weights))
        covariance = (self._covariance - np.outer(gain, px)) / _FORGETTING
        # Rounding makes it lopsided, forgetting amplifies that: after thousands of steps it would no longer be a covariance.
        covariance = (covariance + covariance.T) / 2
        # What a load never shows (drafts, mostly) is never observed: its variance would grow without bound. It is held where it
        # began, and what is known of the rest is left alone.
        shrink = np.sqrt(np.minimum(1.0, _VARIANCE / np.diag(covariance)))
        self._covariance = covariance * np.outer(shrink, shrink)
        self._count += 1

    def predict(
        self, num_prefill: int, num_decode: int, kv_tokens: int, prefill_attention: int = 0, num_draft: int = 0
    ) -> float:
        """Milliseconds of such a step."""
        return float(self._features(num_prefill, num_decode, kv_tokens, prefill_attention, num_draft) @ self._weights)

    def max_prefill(
        self,
        num_decode: int,
        kv_tokens: int,
        target_ms: float,
        at_least: int,
        at_most: int,
        depth: int = 0,
        num_draft: int = 0,
    ) -> int:
        """Largest prefill chunk beside these decodes that is predicted to stay within the target, within the bounds.

        Args:
            depth: tokens before the chunk in its own sequence.
            num_draft: draft tokens that the decodes verify.
        """
        if self._count < _MIN_OBSERVATIONS:
            return min(_FIRST_CHUNK, at_most)
        # Context never makes a token cheaper: a negative weight is noise of the fit, and would end in one huge chunk.
        attention = max(0.0, float(self._weights[4])) * depth / (128 * 1024)
        per_token = max(float(self._weights[1]) / 128, 1e-6) + attention
        room = target_ms - self.predict(0, num_decode, kv_tokens, num_draft=num_draft)
        return max(at_least, min(at_most, int(room / per_token)))
