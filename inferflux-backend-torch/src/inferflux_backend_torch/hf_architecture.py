"""Which models transformers can compute with this backend's attention and cache, told by their configuration alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

from inferflux_backend_torch.config_reader import MAX_LAYERS, MAX_POSITIONS, MAX_VOCABULARY
from inferflux_core.errors import ModelFileError

_LAYER_TYPES: Final = frozenset({"full_attention", "sliding_attention"})
# Keys of config.json with which transformers would choose code for the model, or other files to read.
_DROPPED: Final = frozenset(
    {"attn_implementation", "experts_implementation", "fusion_config", "distributed_config", "transformers_weights"}
)


def causal_lm(raw: Mapping[str, Any]) -> tuple[type[Any], Any]:
    """The class of transformers that a config.json names, and its configuration.

    Nothing else is read and no code of the model's own is run: only classes that transformers ships are looked up.

    Args:
        raw: content of config.json, of which `decoder_config` has refused remote code and quantized weights.

    Raises:
        ModelFileError: transformers is missing or doesn't know the model, or the model is none of those that a paged cache of
            keys and values can serve. Says why.
    """
    architecture, model_type = _named(raw)
    try:
        import transformers
        from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
    except ImportError as error:
        raise ModelFileError(
            f"{architecture!r} has no decoder of its own here and needs transformers, which can't be imported ({error}); "
            "install it with: pip install 'inferflux-backend-torch[transformers]'"
        ) from None
    version = f"transformers {transformers.__version__}"
    if model_type not in CONFIG_MAPPING:
        raise ModelFileError(f"config.json: 'model_type' is {model_type!r}, which {version} doesn't know; try a newer one")
    if any(_is_part(raw.get(key)) for key in ("vision_config", "audio_config", "text_config", "encoder", "decoder")):
        raise ModelFileError(f"{architecture!r} is made of several models, for more than text; only language models are served")
    config_class = CONFIG_MAPPING[model_type]
    kept = {key: value for key, value in raw.items() if key not in _DROPPED and not key.startswith("_")}
    try:
        config = config_class.from_dict(kept)
    except Exception as error:  # what a class makes of a damaged file is anyone's guess
        raise ModelFileError(f"config.json: {version} can't read it: {error}; correct it, or fetch it again") from error
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None)
    if model_class is None or model_class.__name__ != architecture:
        known = "none" if model_class is None else repr(model_class.__name__)
        raise ModelFileError(
            f"config.json: 'architectures' is {raw['architectures']!r}: no language model that generates, as far as {version} "
            f"knows; for 'model_type' {model_type!r} that is {known}"
        )
    _check(architecture, config, model_class, version)
    max_positions(config)
    return model_class, config


def max_positions(config: Any) -> int:
    """How long a sequence may get.

    Where rotary frequencies depend on the longest sequence of a batch (dynamic NTK and LongRoPE in transformers), lengths at
    which they would change for all requests at once are left out: what is cached was rotated with other ones.

    Raises:
        ModelFileError: the configuration doesn't say.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if type(positions) is not int or not 0 < positions <= MAX_POSITIONS:
        raise ModelFileError(
            f"config.json: 'max_position_embeddings' is {positions!r}: the longest sequence of the model, from 1 to "
            f"{MAX_POSITIONS}, is needed"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()) if isinstance(rope, Mapping) else ():
        if isinstance(parameters, Mapping) and parameters.get("rope_type") in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings")
            positions = min(positions, original if type(original) is int and original > 0 else positions)
    return positions


def _named(raw: Mapping[str, Any]) -> tuple[str, str]:
    architectures, model_type = raw.get("architectures"), raw.get("model_type")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise ModelFileError(
            f"config.json: 'architectures' is {architectures!r}: it must name the model's class, e.g. ['LlamaForCausalLM']"
        )
    if not isinstance(model_type, str):
        raise ModelFileError(f"config.json: 'model_type' is {model_type!r}: transformers chooses the model by this name")
    return architectures[0], model_type


def _is_part(value: object) -> bool:
    return isinstance(value, Mapping)


def _check(architecture: str, config: Any, model_class: type[Any], version: str) -> None:
    """Refuse what can't work; each fault with its reason."""
    parameters = inspect.signature(model_class.forward).parameters
    layer_types = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    layers, vocabulary = getattr(config, "num_hidden_layers", None), getattr(config, "vocab_size", None)
    faults = {
        "it has an encoder beside its decoder": getattr(config, "is_encoder_decoder", False),
        "it remembers by recurrence instead of keys and values": model_class._is_stateful,
        f"it has layers of the kind {', '.join(sorted(map(repr, layer_types)))}": layer_types,
        "it adds position biases to its scores (ALiBi)": getattr(config, "alibi", False),
        f"{version} computes its attention in a way that can't be replaced": not model_class._supports_attention_backend,
        "it is made of several models, for more than text": config.get_text_config() is not config or config.sub_configs,
        f"in {version} it takes no positions, or computes logits of all tokens": not (
            {"position_ids", "logits_to_keep"} <= parameters.keys()
        ),
        f"it has {layers!r} layers, not from 1 to {MAX_LAYERS}": not _within(layers, MAX_LAYERS),
        f"it has a vocabulary of {vocabulary!r}, not from 1 to {MAX_VOCABULARY}": not _within(vocabulary, MAX_VOCABULARY),
    }
    for reason, is_so in faults.items():
        if is_so:
            raise ModelFileError(f"{architecture!r} can't be served: {reason}")


def _within(value: object, most: int) -> bool:
    return type(value) is int and 0 < value <= most
