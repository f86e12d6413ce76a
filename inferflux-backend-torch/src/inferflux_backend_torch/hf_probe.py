"""Finds out what attention a model of transformers wants, and checks that the paged cache gives it just that.

Hundreds of architectures go through `AttentionInterface`, and some put into masks, extra arguments or state of their own what a
paged kernel never sees. So a model is tried before it is served, with its own weights and a few tokens:

    reference    the model as transformers runs it, one sequence at a time
    record       the same with `record_attention`: notes heads, scale, window and softcap of each layer, and refuses a mask that
                 is not exactly causal, or causal within a window, at positions far beyond those of the trial too
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
_RECORDED, _MASK = "inferflux_recorded", "inferflux_mask"
_FARTHEST = 1 << 20  # position that masks are tried at; a window as wide as that is none
# Arguments of attention that change nothing for tokens already rotated and a model in evaluation mode.
_HARMLESS: Final = frozenset(
    {"position_ids", "position_embeddings", "cache_position", "past_key_values", "dropout", "sliding_window"}
)


@dataclass(frozen=True, slots=True)
class CausalMask:
    """A mask that paged attention can do without.

    Attributes:
        window: how many tokens a query sees, itself included; None where it is all before it.
    """

    window: int | None

    @classmethod
    def read(cls, sees: Sees, device: torch.device) -> CausalMask | None:
        """None for any other mask."""
        tokens = torch.arange(_FARTHEST + 1, device=device)
        zeros = torch.zeros_like(tokens)
        seen = int(sees(zeros, zeros, torch.full_like(tokens, _FARTHEST), tokens).sum())
        window = None if seen == len(tokens) else seen
        # Everywhere else by samples, densest where masks change: near the query, the window's end, and powers of two.
        steps = {0, 1, *(factor << k for factor in (1, 3) for k in range(19)), *((window, 2 * window) if window else ())}
        near = sorted({max(0, step + d) for step in steps for d in (-1, 0, 1)})
        grid = torch.meshgrid(torch.tensor(near, device=device), torch.tensor(near, device=device), indexing="ij")
        query, other = (part.flatten() for part in grid)
        token = torch.cat(((query - other).clamp(min=0), query + other, other))
        query = query.repeat(3)
        wanted = token <= query
        if window is not None:
            wanted &= token > query - window
        zeros = zeros[: len(query)]
        return cls(window) if bool((sees(zeros, zeros, query, token) == wanted).all()) else None


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
        # Flags choose what a model returns beside its logits.
        if not (argument is None or isinstance(argument, bool) or name in _HARMLESS):
            raise ModelFileError(f"its attention takes {name!r}, which is unknown here")
    if getattr(module, _RECORDED, None) is not None:
        raise ModelFileError("it runs a layer more than once in a step")
    heads, kv_heads, value_dim = query.shape[1], key.shape[1], value.shape[3]
    if query.shape[0] != 1 or key.shape[2] != query.shape[2] or value.shape[1] != kv_heads or heads % kv_heads:
        raise ModelFileError(f"its attention is of an unknown form: {[tuple(t.shape) for t in (query, key, value)]}")
    # The mask, and not `sliding_window`, which some models leave out and others name for layers without a window.
    mask: CausalMask | None = getattr(attention_mask, _MASK, None)
    if mask is None:
        raise ModelFileError("its attention mask is not causal, or more than causal within a window")
    scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
    query, key, value, head_dim = pad_heads(query, key, value)
    layer = AttentionLayer(
        index=0,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        scale=scale,
        window=mask.window,
        softcap=float(softcap) if softcap else None,
    )
    setattr(module, _RECORDED, Recorded(module, layer, value_dim))
    out = attend(query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), layer, 0)
    return out[..., :value_dim].to(value.dtype).unsqueeze(0).contiguous(), None


def record_mask(*args: Any, mask_function: Sees, **kwargs: Any) -> Tensor | None:
    """transformers' own mask, marked with what it is if it is causal."""
    from transformers.masking_utils import eager_mask

    mask: Tensor | None = eager_mask(*args, mask_function=mask_function, **kwargs)
    if mask is not None:
        setattr(mask, _MASK, CausalMask.read(mask_function, mask.device))
    return mask


def pad_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Heads of one size, filled up with zeros, which add nothing to scores; and that size."""
    size = max(key.shape[3], value.shape[3])
    query, key, value = (x if x.shape[3] == size else functional.pad(x, (0, size - x.shape[3])) for x in (query, key, value))
    return query, key, value, size
