"""Models that have no decoder of their own here: transformers' modules, with this backend's attention over the paged cache.

config.json    hf_architecture: what can't be served is refused before anything is read
weights        the checkpoint's tensors, and no other file, are given to transformers: no pickle, no network, no remote code
trial          hf_probe: what attention each layer wants; the paged cache must give the logits that transformers gives
step           one sequence of all tokens of the step, each with its own position; only attention knows of sequences
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor

from inferflux_backend_torch.checkpoint import Checkpoint, refuse_not_finite
from inferflux_backend_torch.devices import dtype_name
from inferflux_backend_torch.files import ModelFolder
from inferflux_backend_torch.hf_architecture import causal_lm, max_positions
from inferflux_backend_torch.hf_probe import RECORD, Recorded, pad_heads, record_attention, record_mask, recorded_layers
from inferflux_backend_torch.inputs import KVCache, StepInputs
from inferflux_backend_torch.ops import AttentionLayer, TorchOps
from inferflux_backend_torch.safetensors_header import FLOATING_DTYPES
from inferflux_backend_torch.steps import HostSteps
from inferflux_core.engine.types import PagedOps, Row
from inferflux_core.errors import ModelFileError

log = logging.getLogger(__name__)

_PAGED: Final = "inferflux"
_ATTENTION: Final = "inferflux_attention"
_LISTED = 5
# How far a token's logits may be off, by root mean square, against their spread: several times what rounding makes of a deep
# model (measured: 0.03 for 30 layers in bfloat16), a fraction of what a lost mask, position or state does.
_TOLERANCE: Final = {torch.float32: 0.01}
_ROUNDED_TOLERANCE: Final = 0.25


@dataclass(slots=True)
class _Step:
    """What the attention of all layers works on; set anew for each step.

    Attributes:
        dtype: of the model, which `ops` are made for.
    """

    ops: TorchOps
    dtype: torch.dtype
    inputs: StepInputs
    cache: KVCache


class _PagedAttention:
    """Attention of one layer, hung on the module that transformers calls attention for."""

    def __init__(self, model: TransformersModel, layer: AttentionLayer, value_dim: int) -> None:
        self._model = model
        self._layer = layer
        self._value_dim = value_dim

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query, key, value: [1, heads or KV heads, T, D], rotated. Returns [1, T, heads, size of a value]."""
        step, layer = self._model.step, self._layer
        assert step is not None
        query, key, value, _ = pad_heads(query, key, value)
        tokens = query.shape[2]
        # In the type that the cache and its kernels are made for; some models rotate in float32.
        qkv = torch.cat([x[0].transpose(0, 1).reshape(tokens, -1) for x in (query, key, value)], 1).to(step.dtype)
        step.ops.rope_and_cache(qkv, layer, step.inputs, step.cache)
        out = step.ops.attention(qkv, layer, step.inputs, step.cache).to(value.dtype)
        return out.view(1, tokens, layer.num_heads, layer.head_dim)[..., : self._value_dim].contiguous()


def _paged_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """What `AttentionInterface` calls. Scale, window and softcap are those of the trial, and rows of a step need no mask."""
    return getattr(module, _ATTENTION)(query, key, value), None


class TransformersModel:
    """A causal language model of transformers that reads and writes the paged cache.

    Attributes:
        layers: attention of each layer, as the model asked for it in its trial.
        vocab_size: logits of a token.
        max_position_embeddings: longest sequence.
        step: what its attention works on in a forward pass.
    """

    def __init__(self, module: Any, ops: TorchOps) -> None:
        self._module = module
        self._ops = ops
        self._dtype: torch.dtype = module.dtype
        self.max_position_embeddings = max_positions(module.config)
        self.step: _Step | None = None
        with torch.inference_mode():
            sequences = self._sequences()
            references = [self._reference(sequence) for sequence in sequences]
            self.vocab_size = references[0].shape[1]
            self.layers = self._record(sequences[0])
            self._check(sequences, references)

    def forward(self, inputs: StepInputs, cache: KVCache) -> Tensor:
        """Write the step's keys and values to the cache.

        Returns:
            [R, V], logits already: what a model does between hidden states and logits is known to its own forward pass only.
        """
        return self._forward(_Step(self._ops, self._dtype, inputs, cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """What `forward` returned."""
        return hidden

    def _forward(self, step: _Step) -> Tensor:
        self.step = step
        inputs = step.inputs
        logits: Tensor = self._module(
            input_ids=inputs.token_ids.unsqueeze(0),
            position_ids=inputs.positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=inputs.logits_indices,
            return_dict=True,
        ).logits
        return logits[0]

    # The trial: two sequences, the first in chunks of 7 and 5 tokens, the second in a chunk of 5 beside the first chunk and a
    # single token beside the second one.

    def _sequences(self) -> list[Tensor]:
        module, generator = self._module, torch.Generator().manual_seed(1)
        if self.max_position_embeddings < 12:
            raise ModelFileError(f"its sequences are too short: {self.max_position_embeddings} tokens")
        return [
            torch.randint(module.config.vocab_size, (1, n), generator=generator).to(module.device, torch.int64) for n in (12, 6)
        ]

    def _reference(self, tokens: Tensor) -> Tensor:
        """[T, V] float32, as the model gives them without a cache and without being told of positions."""
        self._module.set_attn_implementation("eager")
        logits: Tensor = self._module(input_ids=tokens, use_cache=False, return_dict=True).logits
        return logits[0].float()

    def _record(self, tokens: Tensor) -> tuple[AttentionLayer, ...]:
        self._module.set_attn_implementation(RECORD)
        self._module(input_ids=tokens, use_cache=False, return_dict=True)
        recorded = [_numbered(found, index) for index, found in enumerate(recorded_layers(self._module))]
        for found in recorded:
            setattr(found.module, _ATTENTION, _PagedAttention(self, found.layer, found.value_dim))
        self._module.set_attn_implementation(_PAGED)
        return tuple(found.layer for found in recorded)

    def _check(self, sequences: list[Tensor], references: list[Tensor]) -> None:
        """Refuse the model unless the cache gives what it gives without one."""
        first, second = (sequence[0].tolist() for sequence in sequences)
        layer, dtype, device = self.layers[0], self._dtype, self._module.device
        cache = KVCache(len(self.layers), 3, 16, layer.num_kv_heads, layer.head_dim, dtype, device)
        steps = HostSteps(2, 16, 16, device)
        for slot in range(2):
            steps.start(slot)
        chunks = [
            [_row(0, 0, first[:7], 1), _row(1, 0, second[:5], 2)],
            [_row(1, 5, second[5:], None), _row(0, 7, first[7:], None)],
        ]
        results = []
        for rows in chunks:
            inputs = steps.inputs(rows, [0, 1])
            every = torch.arange(len(inputs.token_ids), device=device)
            results.append(self._forward(_Step(TorchOps(), dtype, replace(inputs, logits_indices=every), cache)).float())
        one, other = references
        wanted = [torch.cat((one[:7], other[:5])), torch.cat((other[5:], one[7:]))]
        tolerance = _TOLERANCE.get(dtype, _ROUNDED_TOLERANCE)
        for paged, reference in zip(results, wanted, strict=True):
            errors = (paged - reference).square().mean(1).sqrt() / reference.std(1).clamp(min=1e-6)
            # Of most tokens: rounding may send a few to other experts.
            error = float(errors.median())
            if not error <= tolerance:
                raise ModelFileError(
                    f"over the paged cache its logits differ by {error:.2g} of their spread from those without a cache; "
                    f"rounding in {dtype_name(dtype)} explains up to {tolerance}"
                )


def load_transformers(folder: ModelFolder, *, dtype: torch.dtype, device: torch.device, ops: TorchOps) -> TransformersModel:
    """Load a model, and try it.

    Raises:
        ModelFileError: transformers is missing, can't load the model from these files, or can't serve it from a paged cache.
    """
    name = folder.architecture
    model_class, config = causal_lm(folder.config)
    log.info("architecture %r has no decoder of its own here, or isn't to use it: served by transformers", name)
    _register()
    try:
        module = _load(model_class, config, folder.checkpoint, dtype, device)
        module.requires_grad_(False)
        return TransformersModel(module.to(device), ops)
    except ModelFileError as error:
        raise ModelFileError(f"{folder.checkpoint.ref!r}: {name!r} can't be served through transformers: {error}") from error
    except Exception as error:  # of hundreds of models' code, run on a configuration from anywhere
        raise ModelFileError(
            f"{folder.checkpoint.ref!r}: {name!r} can't be served: transformers fails with {type(error).__name__}: {error}"
        ) from error


def transformers_bytes(folder: ModelFolder, dtype: torch.dtype) -> int:
    """Memory that the weights will take, from the configuration alone: a damaged one must not ask for more than there is.

    Raises:
        ModelFileError: as `load_transformers`.
    """
    model_class, config = causal_lm(folder.config)
    try:
        with torch.device("meta"):
            module = model_class(config)
    except Exception as error:  # as above
        raise ModelFileError(
            f"{folder.checkpoint.ref!r}: transformers can't build {folder.architecture!r} from its config.json: {error}"
        ) from error
    sizes = [b.numel() * b.itemsize for b in module.buffers()] + [p.numel() * dtype.itemsize for p in module.parameters()]
    return sum(map(int, sizes))


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.utils import logging as transformers_logging

    # In the server's log they are noise: progress, and tables of what is refused in one line below.
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    AttentionInterface.register(_PAGED, _paged_attention)
    AttentionInterface.register(RECORD, record_attention)
    AttentionMaskInterface.register(RECORD, record_mask)


def _load(model_class: type[Any], config: Any, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """The module, still on the CPU, with all weights as the checkpoint has them; `device` is where it will run."""
    # The grouped product, transformers' choice where there is one, refuses rows that are not of whole 16 bytes on CPUs.
    experts = "eager" if device.type == "cpu" else None
    with _tensors(checkpoint) as tensors:
        module, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            attn_implementation="eager",
            experts_implementation=experts,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    entries = checkpoint.tensors
    whole = [n for n, t in module.state_dict().items() if t.is_floating_point() and n in entries]
    faults = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape than config.json calls for": sorted(map(str, info["mismatched_keys"])),
        "not of floating point": [name for name in whole if entries[name].dtype not in FLOATING_DTYPES],
        "wrong": list(info["error_msgs"]),
    }
    if listed := [f"{len(names)} {fault}: {', '.join(names[:_LISTED])}" for fault, names in faults.items() if names]:
        raise ModelFileError(f"tensors are {'; '.join(listed)}. Fetch config.json and all weights again from one place")
    cure = "the checkpoint is damaged, fetch it again"
    if dtype is torch.float16:
        cure = f"if the checkpoint holds more than float16 can, set `dtype` to bfloat16 or float32; else {cure}"
    for name, tensor in module.state_dict().items():
        refuse_not_finite(name, tensor, cure)
    return module


@contextmanager
def _tensors(checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:
    """The tensors by name, each read when transformers slices it."""
    with ExitStack() as stack:
        files = {
            shard.path: stack.enter_context(safe_open(str(shard.path), framework="pt", device="cpu"))
            for shard in checkpoint.shards
        }
        yield {name: files[entry.path].get_slice(name) for name, entry in checkpoint.tensors.items()}


def _numbered(recorded: Recorded, index: int) -> Recorded:
    return replace(recorded, layer=replace(recorded.layer, index=index))


def _row(slot: int, start: int, tokens: list[int], block: int | None) -> Row:
    """Of a trial; `block` is the new one of its sequence."""
    ops = PagedOps(() if block is None else (block,))
    return Row(slot=slot, start=start, n=len(tokens), tokens=tokens, n_draft=0, sample=True, kv=ops)
