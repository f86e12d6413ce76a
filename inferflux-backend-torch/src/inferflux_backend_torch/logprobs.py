"""Log-probabilities of drawn tokens and of the most likely ones, under the model's raw distribution.

Both functions take logits [R, V] of any floating type, some rows of it [N], the tokens drawn for these [N] and how many
alternatives M to report. They return values [N, 1 + M] float32, the drawn token's first, and the alternatives' ids [N, M]
int64: most likely first, of equals the lowest id. Broken rows are read as in the reference sampler.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from inferflux_backend_torch.device_draw import scale
from inferflux_backend_torch.host_draw import float_row, possible

_LOW32 = 0xFFFFFFFF
# Most often the alternatives wanted are among the tokens with e**-8 of the probability of the most likely one.
_LIKELY = np.float32(8.0)


def device_logprobs(logits: Tensor, rows: Tensor, tokens: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """With torch, for all rows at once; waits for nothing on the host."""
    logits = logits[rows].float()
    logprobs = scale(logits, torch.ones(len(logits), device=logits.device)).log_softmax(dim=-1)
    ids = tokens.unsqueeze(1)
    if most:
        ids = torch.cat((ids, _most_likely(logits, most)), dim=1)
    return logprobs.gather(1, ids), ids[:, 1:]


def _most_likely(logits: Tensor, count: int) -> Tensor:
    """Ids [N, count]. torch leaves the order of equals open, so the id is made part of the number that is sorted."""
    logits = logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0  # -0 becomes 0
    bits = logits.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    falling = torch.arange(_LOW32, _LOW32 - logits.shape[1], -1, device=logits.device)
    keys = ((ordered << 32) | falling).topk(count, dim=-1).values
    return _LOW32 - (keys & _LOW32)


def host_logprobs(logits: Tensor, rows: Tensor, tokens: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """With numpy, row by row, for logits in the memory of the host."""
    values = np.empty((len(rows), 1 + most), dtype=np.float32)
    ids = np.empty((len(rows), most), dtype=np.int64)
    for i, (index, token) in enumerate(zip(rows.tolist(), tokens.tolist(), strict=True)):
        row, highest = possible(float_row(logits, index))
        with np.errstate(over="ignore"):
            relative = row - highest
        if most:
            likely = np.flatnonzero(relative >= -_LIKELY)
            if len(likely) < most:
                likely = np.flatnonzero(row >= np.partition(row, -most)[-most])
            ids[i] = likely[np.argsort(-row[likely], kind="stable")[:most]]
        normaliser = np.log(np.exp(relative).sum(dtype=np.float64))
        values[i, 0] = relative[token] - normaliser
        values[i, 1:] = relative[ids[i]] - normaliser
    return torch.from_numpy(values), torch.from_numpy(ids)
