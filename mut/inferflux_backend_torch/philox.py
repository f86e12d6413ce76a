"""The keyed noise of core's reference sampler, twice: as torch operations for any device, and as numpy for CPUs.

Word t % 4 of Philox-4x32-10 (Salmon et al., SC '11) at counter (t // 4, position, 0, 0) under the sequence's seed belongs to
token t. With that 32-bit word w, v = (w + 1/2) / 2**32 is uniform in (0, 1) and -log(-log1p(-v)) is Gumbel noise. The words
are equal to the reference's bit for bit; the noise differs by the rounding of the device's logarithms, in numpy by nothing.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Words64 = npt.NDArray[np.uint64]

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW32 = 0xFFFFFFFF
_ROUNDS = 10
_HALF = np.uint64(32)

# The noise is bounded, as there are only 2**32 words: v is 2**-33 at least and 1 - 2**-24 at most. Rounding of a logarithm
# moves these by some 1e-6.
MOST_NOISE = -math.log(-math.log1p(-(2.0**-33)))  # 22.87
LEAST_NOISE = -math.log(24 * math.log(2))  # -2.81


# --- torch, any device ------------------------------------------------------------------------------------------------


def philox_words(seeds: Tensor, positions: Tensor, groups: Tensor) -> Tensor:
    """Words of each group of four tokens.

    Args:
        seeds: [R] int64, the 64 bits of the seed.
        positions: [R] int64, index of the new token in its sequence.
        groups: [G] int64, token id // 4.

    Returns:
        [R, G, 4] int64, each below 2**32.
    """
    # torch has no unsigned multiplication on every device. A product of 32-bit words wraps into the sign bit of int64, and
    # masking after the arithmetic shift takes the copies of that bit off again.
    x0 = groups.expand(seeds.shape[0], -1)
    x1 = (positions & _LOW32).unsqueeze(1).expand_as(x0)
    x2 = x3 = torch.zeros_like(x0)
    k0, k1 = (seeds & _LOW32).unsqueeze(1), ((seeds >> 32) & _LOW32).unsqueeze(1)
    for _ in range(_ROUNDS):
        p0, p1 = x0 * _M0, x2 * _M1
        x0, x1, x2, x3 = ((p1 >> 32) & _LOW32) ^ x1 ^ k0, p1 & _LOW32, ((p0 >> 32) & _LOW32) ^ x3 ^ k1, p0 & _LOW32
        k0, k1 = (k0 + _W0) & _LOW32, (k1 + _W1) & _LOW32
    return torch.stack((x0, x1, x2, x3), dim=-1)


def device_noise(seeds: Tensor, positions: Tensor, groups: Tensor) -> Tensor:
    """Gumbel noise, [R, 4 G] float32, of the tokens 4 g .. 4 g + 3 of each group; arguments as for `philox_words`."""
    v = (philox_words(seeds, positions, groups).flatten(1).float() + 0.5) * 2.0**-32
    return v.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()


# --- numpy, where calls are cheap and rows are few --------------------------------------------------------------------


def round_keys(seed: int) -> Words64:
    """The two keys of each round in the upper half of a word, [20]: what `philox_pairs` wants of a seed."""
    k0, k1 = seed & _LOW32, (seed >> 32) & _LOW32
    keys = []
    for round_ in range(_ROUNDS):
        keys += [((k0 + round_ * _W0) & _LOW32) << 32, ((k1 + round_ * _W1) & _LOW32) << 32]
    return np.array(keys, dtype=np.uint64)


def philox_pairs(keys: Words64, positions: Words64, groups: Words64) -> tuple[Words64, Words64]:
    """Words (0, 1) and words (2, 3) of each group, the even word in the upper half.

    Two words in one array halve the memory traffic of the textbook form: with A = x0:x1 and B = x2:x3, a round is
    A' = M1 (B >> 32) ^ (A << 32) ^ k0 and B' = M0 (A >> 32) ^ (B << 32) ^ k1.

    Args:
        keys: `round_keys` as columns: [20, 1] for groups of one sequence, [20, N] for groups of several.
        positions: [1] or [N].
        groups: [N].
    """
    m0, m1 = np.uint64(_M0), np.uint64(_M1)
    # B is 0 at first, so the first round leaves A equal for all groups of a sequence, and the second multiplies only one.
    a = (positions << _HALF) ^ keys[0]
    b = groups * m0
    b ^= keys[1]
    p, q = np.empty_like(b), b >> _HALF
    q *= m1
    common = (a >> _HALF) * m0 ^ keys[3]
    a = q ^ ((a << _HALF) ^ keys[2])
    b <<= _HALF
    b ^= common
    for k0, k1 in zip(keys[4::2], keys[5::2], strict=True):
        # In place: 80 fresh arrays a row would cost a large vocabulary more than the arithmetic.
        np.right_shift(a, _HALF, out=p)
        p *= m0
        np.right_shift(b, _HALF, out=q)
        q *= m1
        a <<= _HALF
        a ^= q
        a ^= k0
        b <<= _HALF
        b ^= p
        b ^= k1
    return a, b


def noise_of_groups(keys: Words64, position: int, groups: Words64) -> npt.NDArray[np.float32]:
    """Noise [4 N] of one sequence, for the tokens 4 g .. 4 g + 3 of each group."""
    a, b = philox_pairs(keys[:, np.newaxis], np.array([position], dtype=np.uint64), groups)
    words = np.empty((len(groups), 4), dtype=np.uint32)
    for column, pair in ((0, a), (2, b)):
        words[:, column] = pair >> _HALF
        words[:, column + 1] = pair  # cut to its lower half
    return _gumbel(words.reshape(-1))


def noise_of_tokens(keys: Words64, positions: Words64, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Noise [N] of single tokens; keys [20, N] and positions [N] of the sequence that each is a candidate of."""
    a, b = philox_pairs(keys, positions, (token_ids >> 2).astype(np.uint64))
    pair = np.where(token_ids & 2, b, a)
    return _gumbel(np.where(token_ids & 1, pair, pair >> _HALF).astype(np.uint32))


def _gumbel(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.float32]:
    """The reference's formula, each step in float32 as there, so that the results are the same bits."""
    v = words.astype(np.float32)
    v += np.float32(0.5)
    v *= np.float32(2.0**-32)
    np.minimum(v, np.float32(1 - 2.0**-24), out=v)
    for step in (np.negative, np.log1p, np.negative, np.log, np.negative):
        step(v, out=v)
    return v
