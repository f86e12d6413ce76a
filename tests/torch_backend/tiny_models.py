"""Tiny random models of every family, saved by transformers: odd sizes, windows shorter than the prompts, fixed seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from inferflux_core.interfaces import ModelFiles, SourceContext
from inferflux_core.models.sources import PathSource

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 20
VOCAB = 131

_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 72,  # not heads * head_dim
    "intermediate_size": 101,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Classes that derive head_dim from these two.
_SQUARE: Mapping[str, Any] = {**{k: v for k, v in _SIZES.items() if k != "head_dim"}, "hidden_size": HEADS * HEAD_DIM}
_EXPERTS: Mapping[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2}
_WINDOWED: Mapping[str, Any] = {"use_sliding_window": True, "sliding_window": 7}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How transformers builds a model: its configuration class and arguments, and the architecture under which it is saved."""

    config_class: str
    settings: Mapping[str, Any]
    architecture: str


def _recipe(family: str, base: Mapping[str, Any], **settings: Any) -> Recipe:
    return Recipe(f"{family}Config", {**base, **settings}, f"{family.removesuffix('Text')}ForCausalLM")


LONGROPE: Mapping[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.8,
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.5 + 0.2 * i for i in range(8)],
    "original_max_position_embeddings": 128,
}

RECIPES: Mapping[str, Recipe] = {
    "llama": _recipe("Llama", _SIZES, tie_word_embeddings=True),
    "llama-bias": _recipe("Llama", _SIZES, attention_bias=True, mlp_bias=True, num_key_value_heads=HEADS, hidden_act="gelu"),
    "mistral": _recipe("Mistral", _SIZES, sliding_window=7),
    "qwen2": _recipe("Qwen2", _SQUARE, **_WINDOWED, max_window_layers=1, tie_word_embeddings=True),
    "qwen3": _recipe("Qwen3", _SIZES, num_hidden_layers=3),
    "qwen3-bias": _recipe("Qwen3", _SIZES, attention_bias=True, **_WINDOWED, max_window_layers=1),
    "gemma": _recipe("Gemma", _SIZES, num_key_value_heads=1),
    "gemma2": _recipe("Gemma2", _SIZES, sliding_window=7, query_pre_attn_scalar=31, attn_logit_softcapping=3.0),
    "gemma3": _recipe(
        "Gemma3Text", _SIZES, num_hidden_layers=4, sliding_window=7, query_pre_attn_scalar=31, sliding_window_pattern=3
    ),
    "phi3": _recipe("Phi3", _SQUARE, sliding_window=7),
    "phi3-longrope": _recipe(
        "Phi3", _SQUARE, num_key_value_heads=HEADS, rope_parameters=dict(LONGROPE), original_max_position_embeddings=128
    ),
    "smollm3": _recipe("SmolLM3", _SIZES, num_hidden_layers=5, sliding_window=7, use_sliding_window=True),
    "olmo2": _recipe("Olmo2", _SIZES),
    "granite": _recipe(
        "Granite",
        _SIZES,
        embedding_multiplier=6.0,
        logits_scaling=3.0,
        residual_multiplier=0.22,
        attention_multiplier=0.11,
        tie_word_embeddings=True,
    ),
    "stablelm": _recipe("StableLm", _SQUARE, use_qkv_bias=True, partial_rotary_factor=0.5),
    "stablelm-parallel": _recipe(
        "StableLm", _SQUARE, use_parallel_residual=True, qk_layernorm=True, partial_rotary_factor=0.3
    ),
    "internlm2": Recipe("LlamaConfig", {**_SQUARE}, "InternLM2ForCausalLM"),
    "internlm3": Recipe(
        "InternLM3Config", {**_SIZES, "attention_bias": True, "mlp_bias": True}, "InternLM3ForCausalLM"
    ),
    "mixtral": _recipe("Mixtral", _SIZES, num_local_experts=5, sliding_window=7),
    "qwen2-moe": _recipe(
        "Qwen2Moe",
        _SQUARE,
        **_EXPERTS,
        **_WINDOWED,
        num_hidden_layers=3,
        max_window_layers=2,
        decoder_sparse_step=2,
        moe_intermediate_size=37,
        shared_expert_intermediate_size=53,
    ),
    "qwen3-moe": _recipe(
        "Qwen3Moe", _SIZES, **_EXPERTS, **_WINDOWED, moe_intermediate_size=37, norm_topk_prob=True, mlp_only_layers=[1]
    ),
    "olmoe": _recipe("Olmoe", _SQUARE, **_EXPERTS),
    "granite-moe": _recipe(
        "GraniteMoe",
        _SQUARE,
        num_local_experts=5,
        num_experts_per_tok=3,
        embedding_multiplier=6.0,
        logits_scaling=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.11,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A model in a folder, and the same one in transformers."""

    folder: Path
    reference: Any


@cache
def tiny_model(name: str, root: Path) -> TinyModel:
    """Build a model of RECIPES in a folder below root."""
    recipe = RECIPES[name]
    return TinyModel(root / name, build(recipe, root / name))


def tiny_files(name: str, root: Path) -> ModelFiles:
    """A model of RECIPES in a folder that the whole backend can open: with a vocabulary of VOCAB made-up pieces."""
    folder = tiny_model(name, root).folder
    pieces = [[f"w{i}", -1.0] for i in range(VOCAB)]
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return PathSource().resolve(str(folder), SourceContext())


def build(recipe: Recipe, folder: Path) -> Any:
    """Save the model in the folder.

    Returns:
        transformers' model.
    """
    import transformers

    config = getattr(transformers, recipe.config_class)(**recipe.settings)
    torch.manual_seed(11)
    config._experts_implementation = "eager"  # the grouped product refuses odd sizes
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for parameter_name, parameter in model.named_parameters():
        _fill(parameter_name, parameter.data)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    config_file = folder / "config.json"
    raw = json.loads(config_file.read_text()) | {"architectures": [recipe.architecture]}
    if recipe.architecture == "InternLM2ForCausalLM":
        raw |= {"bias": False, "rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
        del raw["rope_parameters"]
        _rename_to_internlm2(folder / "model.safetensors")
    config_file.write_text(json.dumps(raw))
    return model


def _fill(name: str, parameter: torch.Tensor) -> None:
    """Weights large enough that every part of the model shows in the logits: fresh models have unit norms and zero biases."""
    if parameter.dim() == 1:
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
    else:
        scale = 0.5 if "embed_tokens" in name else 1.3 * parameter.shape[-1] ** -0.5
        parameter.copy_(torch.randn_like(parameter) * scale)


_INTERNLM2_NAMES = (
    (r"embed_tokens", "tok_embeddings"),
    (r"lm_head", "output"),
    (r"self_attn\.o_proj", "attention.wo"),
    (r"mlp\.gate_proj", "feed_forward.w1"),
    (r"mlp\.up_proj", "feed_forward.w3"),
    (r"mlp\.down_proj", "feed_forward.w2"),
    (r"input_layernorm", "attention_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
)


def _rename_to_internlm2(path: Path) -> None:
    """InternLM 2 is Llama with other names, and one tensor of heads by KV head: [KV heads, group + 2, head_dim, hidden]."""
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("q_proj.weight")]:
        parts = [tensors.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        grouped = [part.view(KV_HEADS, -1, HEAD_DIM, part.shape[-1]) for part in parts]
        tensors[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(grouped, 1).flatten(0, 2)
    for old, new in _INTERNLM2_NAMES:
        tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
    save_file(tensors, path)
