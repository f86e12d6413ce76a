"""Finds out what attention a model of transformers wants, and checks that the paged cache gives it just that.

Hundreds of architectures go through `AttentionInterface`, and some put into masks, extra arguments or state of their own what a
paged kernel never sees. So a model is tried before it is served, with its own weights and a few tokens:

    reference    the model as transformers runs it, one sequence at a time
    record       the same with `record_attention`: notes heads, scale, window and softcap of each layer, and refuses a mask that
                 is not exactly causal, or causal within that window, at positions far beyond those of the trial too
    paged        the sequences together, in two chunks, from the cache: must give the logits of the reference
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from inferflux_backend_torch.ops import AttentionLayer, attend
from inferflux_core.errors import ModelFileError

Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""transformers' mask function: (batch, head, query, token) indices -> whether the query sees the token."""

RECORD: Final = "inferflux-record"
_RECORDED, _SEES = "inferflux_recorded", "inferflux_sees"
# Arguments of attention that change nothing for tokens already rotated and a model in evaluation mode.
_HARMLESS: Final = frozenset(
    {"position_ids", "position_embeddings", "cache_position", "past_key_values", "use_cache", "output_attentions", "dropout"}
    | {"is_causal", "deterministic"}
)


@dataclass(frozen=True, slots=True)
class Recorded:
    """One layer's attention, as it was called.

    Attributes:
        module: of transformers, which is handed to the attention function.
        layer: its `index` counts in the order of the model's modules.
        value_dim: size of a head's value where it is smaller than `layer.head_dim`, as multi-head latent attention has it.
    """

    module: torch.nn.Module
    layer: AttentionLayer
    value_dim: int


def recorded_layers(model: torch.nn.Module) -> list[Recorded]:
    """What a forward pass under RECORD has noted.

    Raises:
        ModelFileError: nothing, or layers whose keys and values differ in size, which one cache can't hold.
    """
    found = [recorded for module in model.modules() if (recorded := getattr(module, _RECORDED, None)) is not None]
    for recorded in found:
        delattr(recorded.module, _RECORDED)
    if not found:
        raise ModelFileError("its layers don't call the attention function that they are given")
    sizes = {f"{recorded.layer.num_kv_heads} heads of {recorded.layer.head_dim}" for recorded in found}
    if len(sizes) > 1:
        raise ModelFileError(f"its layers have different keys and values: {', '.join(sorted(sizes))}")
    return found


def record_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one whole sequence in plain torch; notes on the module what was asked for.

    Args:
        query: [1, heads, T, D].
        key: [1, KV heads, T, D].
        value: [1, KV heads, T, V].
        attention_mask: as `record_mask` made it.

    Returns:
        [1, T, heads, V].

    Raises:
        ModelFileError: the layer wants something else than causal attention of each query over the tokens before it.
    """
    for name, argument in kwargs.items():
        if argument is not None and name not in _HARMLESS:
            raise ModelFileError(f"its attention takes {name!r}, which is unknown here")
    if getattr(module, _RECORDED, None) is not None:
        raise ModelFileError("it runs a layer more than once in a step")
    heads, kv_heads, value_dim = query.shape[1], key.shape[1], value.shape[3]
    if query.shape[0] != 1 or key.shape[2] != query.shape[2] or value.shape[1] != kv_heads or heads % kv_heads:
        raise ModelFileError(f"its attention is of an unknown form: {[tuple(t.shape) for t in (query, key, value)]}")
    window = int(sliding_window) if sliding_window else None
    sees: Sees | None = getattr(attention_mask, _SEES, None)
    if sees is None or not _is_causal(sees, window, query.device):
        raise ModelFileError(f"its attention mask is not causal within a window of {window} tokens (None: all before it)")
    scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
    query, key, value, head_dim = pad_heads(query, key, value)
    layer = AttentionLayer(
        index=0,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        scale=scale,
        window=window,
        softcap=float(softcap) if softcap else None,
    )
    setattr(module, _RECORDED, Recorded(module, layer, value_dim))
    out = attend(query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), layer, 0)
    return out[..., :value_dim].to(query.dtype).unsqueeze(0), None


def record_mask(*args: Any, mask_function: Sees, **kwargs: Any) -> Tensor | None:
    """transformers' own mask, with the function that says what it holds at any position."""
    from transformers.masking_utils import eager_mask

    mask: Tensor | None = eager_mask(*args, mask_function=mask_function, **kwargs)
    if mask is not None:
        setattr(mask, _SEES, mask_function)
    return mask


def pad_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Heads of one size, filled up with zeros, which add nothing to scores; and that size."""
    size = max(key.shape[3], value.shape[3])
    query, key, value = (x if x.shape[3] == size else functional.pad(x, (0, size - x.shape[3])) for x in (query, key, value))
    return query, key, value, size


def _is_causal(sees: Sees, window: int | None, device: torch.device) -> bool:
    """Whether a query sees itself and the tokens before it, within the window, at the positions where masks change."""
    steps = {0, 1, *(s << k for s in (1, 3) for k in range(20)), *((window, 2 * window) if window is not None else ())}
    near = sorted({max(0, step + d) for step in steps for d in (-1, 0, 1)})
    positions = torch.tensor(near, device=device)
    query, back = (grid.flatten() for grid in torch.meshgrid(positions, positions, indexing="ij"))
    # Distances backwards, the same forwards, and absolute positions.
    token = torch.cat(((query - back).clamp(min=0), query + back, back))
    query = query.repeat(3)
    wanted = token <= query
    if window is not None:
        wanted &= token > query - window
    zeros = torch.zeros_like(query)
    return bool((sees(zeros, zeros, query, token).expand_as(wanted) == wanted).all())
