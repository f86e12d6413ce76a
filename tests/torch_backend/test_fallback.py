"""Models without a decoder of their own here: served through transformers with the paged cache, or refused with the reason."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the torch backend needs torch")
pytest.importorskip("transformers", reason="the fallback is the extra inferflux-backend-torch[transformers]")

import torch
import transformers
from hypothesis import given, settings, strategies
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import masking_utils

from inferflux_backend_torch import hf, loading
from inferflux_backend_torch.hf_architecture import causal_lm, max_positions
from inferflux_backend_torch.hf_probe import CausalMask, record_attention, record_mask, recorded_layers
from inferflux_backend_torch.runner import TorchRunner
from inferflux_backend_torch.settings import TorchSettings
from inferflux_backend_torch.shard import Shard
from inferflux_core.errors import ConfigError, ModelFileError
from inferflux_core.interfaces import EngineConfig, ModelFiles
from inferflux_core.testing.driver import EngineDriver, make_request
from torch_backend.tiny_models import LONGROPE, Recipe, build

ENGINE = EngineConfig(max_num_seqs=4, max_num_batched_tokens=24)  # prompts below take several chunks
PROMPTS = [[(17 * i + 5 * n) % 120 + 5 for i in range(n)] for n in (29, 3, 11)]

_SIZES: Mapping[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 72,
    "intermediate_size": 101,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EQUAL_HEADS = {**_SIZES, "num_key_value_heads": 6}
_LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 10}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 33, "n_group": 1, "topk_group": 1}

RECIPES: Mapping[str, Recipe] = {
    "gpt-neox": Recipe("GPTNeoXConfig", {**_SIZES, "rotary_pct": 0.5}, "GPTNeoXForCausalLM"),
    "starcoder2": Recipe("Starcoder2Config", {**_SIZES, "sliding_window": 7}, "Starcoder2ForCausalLM"),
    "cohere": Recipe("CohereConfig", {**_SIZES, "logit_scale": 0.3}, "CohereForCausalLM"),
    "nemotron": Recipe("NemotronConfig", {**_SIZES, "head_dim": 20}, "NemotronForCausalLM"),
    "gpt2": Recipe("GPT2Config", {k: v for k, v in _SIZES.items() if "key" not in k and "inter" not in k}, "GPT2LMHeadModel"),
    "opt": Recipe(
        "OPTConfig",
        {**_SIZES, "ffn_dim": 101, "word_embed_proj_dim": 72, "pad_token_id": 1, "bos_token_id": 2},
        "OPTForCausalLM",
    ),
    # A window in the mask alone: its attention is not told of it.
    "phimoe": Recipe("PhimoeConfig", {**_SIZES, "sliding_window": 7, "num_local_experts": 3}, "PhimoeForCausalLM"),
    # Values of another size than keys.
    "deepseek-v3": Recipe(
        "DeepseekV3Config", {**_EQUAL_HEADS, **_LATENT, **_EXPERTS, "first_k_dense_replace": 1}, "DeepseekV3ForCausalLM"
    ),
    # Architectures with a decoder here, by `model_impl`.
    "llama": Recipe("LlamaConfig", {**_SIZES, "tie_word_embeddings": True}, "LlamaForCausalLM"),
    "gemma2": Recipe(
        "Gemma2Config",
        {**_SIZES, "head_dim": 20, "sliding_window": 7, "attn_logit_softcapping": 3.0},
        "Gemma2ForCausalLM",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@cache
def built(recipe_name: str, root: Path) -> tuple[Path, Any]:
    return saved(RECIPES[recipe_name], root / recipe_name)


def saved(recipe: Recipe, folder: Path) -> tuple[Path, Any]:
    """Folder of a model with a tokenizer, and the model."""
    model = build(recipe, folder)
    Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).save(str(folder / "tokenizer.json"))
    return folder, model


def copy_of(name: str, root: Path, to: Path, **changes: Any) -> Path:
    """A copy with a changed config.json."""
    shutil.copytree(built(name, root)[0], to, dirs_exist_ok=True)
    path = to / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return to


def load(folder: Path, config: EngineConfig = ENGINE, shard: Shard | None = None, **changes: Any) -> loading.Loaded:
    here = {"device": "cpu", "dtype": "float32", "kv_cache_mib": 4, "block_size": 8, "num_threads": 1}
    chosen = TorchSettings(**{**here, "model_impl": "transformers", **changes})
    weights = sorted(str(path) for path in folder.glob("*.safetensors"))
    files = ModelFiles(ref="tiny", format="safetensors", paths=(str(folder), *weights))
    return loading.load(files, chosen, config, shard or Shard())


def generated(model: Any, prompt: list[int], count: int) -> list[int]:
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=count, do_sample=False
        )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def likeliest(model: Any, prompt: list[int], tokens: list[int]) -> list[int]:
    """What the model would have chosen at each place: the same tokens if they are its greedy ones, in one forward pass."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits
    chosen: list[int] = logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
    return chosen


@pytest.mark.parametrize("name", RECIPES)
def test_serves_the_tokens_that_generate_gives(name: str, root: Path) -> None:
    folder, model = built(name, root)
    driver = EngineDriver(TorchRunner(load(folder), ENGINE), ENGINE)

    together = driver.generate(*[make_request(prompt, max_tokens=64, ignore_eos=True) for prompt in PROMPTS])
    again = driver.generate(make_request([*PROMPTS[0], *together[0].token_ids[:9]], max_tokens=20, ignore_eos=True))[0]

    assert together[2].token_ids == generated(model, PROMPTS[2], 64)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        assert answer.token_ids == likeliest(model, prompt, answer.token_ids)
        assert len(answer.token_ids) == 64
    assert again.token_ids == together[0].token_ids[9:29]
    assert again.num_cached_tokens == 32, "38 tokens were computed before: four blocks of 8"


def test_says_which_path_serves_the_model(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        details = load(built("cohere", root)[0], model_impl="auto").model_info.details
    assert (details["path"], details["architecture"]) == ("transformers", "CohereForCausalLM")
    assert "architecture 'CohereForCausalLM' has no decoder of its own here" in caplog.text

    llama = built("llama", root)[0]
    paths = {impl: load(llama, model_impl=impl).model_info.details["path"] for impl in ("auto", "inferflux", "transformers")}
    assert paths == {"auto": "inferflux decoder", "inferflux": "inferflux decoder", "transformers": "transformers"}


def test_serves_in_bfloat16(root: Path) -> None:
    runner = TorchRunner(load(built("cohere", root)[0], dtype="bfloat16"), ENGINE)
    answer = EngineDriver(runner, ENGINE).generate(make_request(PROMPTS[0], max_tokens=8, ignore_eos=True))[0]
    assert runner.model_info.details["dtype"] == "bfloat16"
    assert len(answer.token_ids) == 8


def test_attention_gets_the_type_that_its_kernels_are_made_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer() -> list[int]:
        driver = EngineDriver(TorchRunner(loaded, ENGINE), ENGINE)
        return driver.generate(make_request(PROMPTS[0], max_tokens=8, ignore_eos=True))[0].token_ids

    loaded = load(built("cohere", root)[0], dtype="bfloat16")
    before = answer()
    module: Any = sys.modules[transformers.CohereForCausalLM.__module__]
    rotate = module.apply_rotary_pos_emb
    monkeypatch.setattr(module, "apply_rotary_pos_emb", lambda *args, **names: [x.float() for x in rotate(*args, **names)])
    assert answer() == before


def test_layers_are_those_that_the_model_asks_for(root: Path) -> None:
    model = load(built("gemma2", root)[0]).model
    assert isinstance(model, hf.TransformersModel)
    assert [(a.index, a.num_heads, a.num_kv_heads, a.head_dim, a.window, a.softcap) for a in model.layers] == [
        (0, 6, 2, 20, 7, 3.0),
        (1, 6, 2, 20, None, 3.0),
    ]


def test_only_the_listed_weight_files_are_read(root: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    folder = copy_of("cohere", root, tmp_path / "model", transformers_weights="pytorch_model.bin")

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return marker.touch, ()

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "https://example.invalid/model"}))
    assert load(folder).model_info.vocab_size == 131
    assert not marker.exists()


def test_sequences_end_where_rotary_frequencies_would_change_for_all(tmp_path: Path) -> None:
    sizes = {**_SIZES, "num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 60}
    longrope = {**sizes, "rope_parameters": dict(LONGROPE), "original_max_position_embeddings": 128}
    folder, model = saved(Recipe("Phi3Config", longrope, "Phi3ForCausalLM"), tmp_path / "phi3")
    assert model.config.max_position_embeddings == 256
    assert load(folder).model_info.max_model_len == 128

    dynamic = transformers.LlamaConfig(**sizes, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4})
    assert max_positions(dynamic) == 256


# What can't work is refused, by config.json alone.

REFUSED_CONFIGS: Mapping[str, tuple[str, str, str]] = {
    "Mamba": ("MambaConfig", "MambaForCausalLM", "remembers by recurrence"),
    "Jamba": ("JambaConfig", "JambaForCausalLM", "remembers by recurrence"),
    "MiniMax": ("MiniMaxConfig", "MiniMaxForCausalLM", "layers of the kind .*'linear_attention'"),
    "Llama 4": ("Llama4TextConfig", "Llama4ForCausalLM", "layers of the kind 'chunked_attention'"),
    "T5": ("T5Config", "T5ForConditionalGeneration", "no language model that generates.*that is none"),
    "BART": ("BartConfig", "BartForCausalLM", "has an encoder beside its decoder"),
    "Gemma 3 with vision": ("Gemma3Config", "Gemma3ForConditionalGeneration", "made of several models"),
    "Bloom (ALiBi)": ("BloomConfig", "BloomForCausalLM", "attention in a way that can't be replaced"),
    "Falcon (ALiBi)": ("FalconConfig", "FalconForCausalLM", "adds position biases"),
    "a classifier": ("LlamaConfig", "LlamaForSequenceClassification", "that is 'LlamaForCausalLM'"),
}


@pytest.mark.parametrize("name", REFUSED_CONFIGS)
def test_refuses_architectures_that_a_paged_cache_cannot_serve(name: str) -> None:
    config_class, architecture, reason = REFUSED_CONFIGS[name]
    raw = getattr(transformers, config_class)(**({"alibi": True} if "Falcon" in name else {})).to_dict()
    with pytest.raises(ModelFileError, match=reason):
        causal_lm({**raw, "architectures": [architecture]})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architectures": None}, "'architectures' is None: it must name"),
        ({"model_type": None}, "'model_type' is None: transformers chooses"),
        ({"model_type": "gpt_neox_9"}, "'model_type' is 'gpt_neox_9', which transformers .* doesn't know"),
        ({"hidden_size": "wide"}, "can't read it: .*hidden_size"),
        ({"num_hidden_layers": 10**9}, "it has 1000000000 layers, not from 1 to 1024"),
        ({"vocab_size": 10**9}, "it has a vocabulary of 1000000000"),
        ({"max_position_embeddings": 0}, "'max_position_embeddings' is 0"),
    ],
)
def test_refuses_configurations_that_make_no_sense(change: Mapping[str, Any], reason: str) -> None:
    raw = transformers.GPTNeoXConfig(**_SIZES).to_dict() | {"architectures": ["GPTNeoXForCausalLM"]}
    assert causal_lm(raw)[0] is transformers.GPTNeoXForCausalLM
    with pytest.raises(ModelFileError, match=reason):
        causal_lm({**raw, **change})


def test_names_the_extra_where_transformers_is_missing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = built("cohere", root)[0]
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelFileError, match=r"pip install 'inferflux-backend-torch\[transformers\]'"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}, "'auto_map'.*code of its own"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized by 'gptq'"),
    ],
)
@pytest.mark.parametrize("impl", ["auto", "transformers"])
def test_refuses_remote_code_and_quantized_weights(
    change: Mapping[str, Any], reason: str, impl: str, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelFileError, match=reason):
        load(copy_of("cohere", root, tmp_path, **change), model_impl=impl)


def test_refuses_unknown_architectures_where_only_own_decoders_are_wanted(root: Path) -> None:
    with pytest.raises(
        ModelFileError, match=r"'CohereForCausalLM'.*`model_impl` to 'auto'.*LlamaForCausalLM, MistralForCausalLM"
    ):
        load(built("cohere", root)[0], model_impl="inferflux")


def test_refuses_what_only_own_decoders_have(root: Path) -> None:
    folder = built("cohere", root)[0]
    with pytest.raises(ConfigError, match="no quantization 'int8' here"):
        load(folder, quantization="int8")
    with pytest.raises(ConfigError, match="no tensor parallelism here; set `tensor_parallel_size` to 1"):
        load(folder, shard=Shard(0, 2))


# Refused in its trial.

_FEW: Mapping[str, Any] = {**_EQUAL_HEADS, "is_decoder": True, "pad_token_id": 0}
REFUSED_IN_TRIAL: Mapping[str, tuple[Recipe, str]] = {
    "sinks": (
        Recipe("GptOssConfig", {**_SIZES, "pad_token_id": 0, "head_dim": 12, "num_local_experts": 4}, "GptOssForCausalLM"),
        "its attention takes 's_aux'",
    ),
    "a layer that attends twice": (
        Recipe("DiffLlamaConfig", _EQUAL_HEADS, "DiffLlamaForCausalLM"),
        "runs a layer more than once",
    ),
    "tokens that see those after them": (
        Recipe("BertConfig", {**_FEW, "is_decoder": False}, "BertLMHeadModel"),
        "its attention mask is not causal",
    ),
    # It counts positions from the padding token's id on, unless it is told of them, as here it has to be.
    "positions of another kind": (
        Recipe("RobertaConfig", {**_FEW, "pad_token_id": 1}, "RobertaForCausalLM"),
        "over the paged cache",
    ),
}


@pytest.mark.parametrize("name", REFUSED_IN_TRIAL)
def test_refuses_what_turns_out_wrong_in_the_trial(name: str, tmp_path: Path) -> None:
    recipe, reason = REFUSED_IN_TRIAL[name]
    with pytest.raises(
        ModelFileError, match=f"'tiny': '{recipe.architecture}' can't be served through transformers: .*{reason}"
    ):
        load(saved(recipe, tmp_path)[0])


def test_refuses_a_model_whose_attention_is_not_called(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.CohereForCausalLM, "set_attn_implementation", lambda *_: None)
    with pytest.raises(ModelFileError, match="don't call the attention function"):
        load(built("cohere", root)[0])


def test_refuses_layers_of_different_sizes() -> None:
    layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
    mask = record_mask(batch_size=1, q_length=3, kv_length=3, mask_function=masking_utils.causal_mask_function)
    for layer, size in zip(layers, (4, 6), strict=True):
        query = torch.zeros(1, 2, 3, size)
        record_attention(layer, query, query, query, mask)
    with pytest.raises(ModelFileError, match="different keys and values: 2 heads of 4, 2 heads of 6"):
        recorded_layers(layers)


def test_an_error_of_transformers_becomes_a_refusal(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.CohereForCausalLM, "forward", lambda self, position_ids=None, logits_to_keep=0, **_: 1 / 0)
    with pytest.raises(ModelFileError, match="'CohereForCausalLM' can't be served: transformers fails with ZeroDivisionError"):
        load(built("cohere", root)[0])


# Damaged weights.


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("missing", "1 missing: model.layers.1.mlp.up_proj.weight"),
        ("extra", "1 unexpected: model.layers.7.spare"),
        ("shape", "1 of another shape.*model.layers.1.mlp.up_proj.weight"),
        ("integers", "1 not of floating point: model.layers.1.mlp.up_proj.weight"),
        ("nan", "'model.layers.1.mlp.up_proj.weight' is nan at .3, 4."),
    ],
)
def test_refuses_damaged_weights(fault: str, reason: str, root: Path, tmp_path: Path) -> None:
    folder, name = copy_of("cohere", root, tmp_path), "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    if fault == "missing":
        del tensors[name]
    elif fault == "extra":
        tensors["model.layers.7.spare"] = torch.ones(3)
    elif fault == "shape":
        tensors[name] = tensors[name][1:].contiguous()
    elif fault == "integers":
        tensors[name] = tensors[name].to(torch.int8)
    else:
        tensors[name][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelFileError, match=reason):
        load(folder)


def test_refuses_what_does_not_fit_before_weights_are_read(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "available_memory", lambda: 40 << 20)
    monkeypatch.setattr(hf, "_load", lambda *_: pytest.fail("weights were read"))
    # The files hold two layers of it.
    folder = copy_of("cohere", root, tmp_path, num_hidden_layers=500)
    with pytest.raises(
        ModelFileError, match=r"'tiny' in float32, beside \d+ MiB of KV cache .*, needs 0\.0\d GiB.*0\.04 GiB are available"
    ):
        load(folder)


# Masks.


@settings(max_examples=20, deadline=None)
@given(strategies.integers(1, 1 << 19))
def test_finds_the_window_of_a_mask(window: int) -> None:
    sees = masking_utils.sliding_window_causal_mask_function(window)
    assert CausalMask.read(sees, torch.device("cpu")) == CausalMask(window)


def test_a_causal_mask_has_no_window() -> None:
    assert CausalMask.read(masking_utils.causal_mask_function, torch.device("cpu")) == CausalMask(None)


@settings(max_examples=20, deadline=None)
@given(strategies.integers(2, 1 << 19))
def test_refuses_masks_of_chunks(size: int) -> None:
    sees = masking_utils.chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.int64))
    assert CausalMask.read(sees, torch.device("cpu")) is None


@pytest.mark.parametrize(
    "sees",
    [
        masking_utils.bidirectional_mask_function,
        masking_utils.sliding_window_bidirectional_mask_function(9),
        masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, kv: kv - q == 1),
        masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, q, kv: kv > 0),
        masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, q, kv: q - kv != 64),
    ],
)
def test_refuses_other_masks(sees: Any) -> None:
    assert CausalMask.read(sees, torch.device("cpu")) is None
