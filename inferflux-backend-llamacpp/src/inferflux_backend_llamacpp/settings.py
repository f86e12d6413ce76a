"""Settings of the llama.cpp backend."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from inferflux_core.settings import Group

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl"]


class LoraSettings(Group):
    """One LoRA adapter, applied to every request of the model."""

    path: Path = Field(description="GGUF file of the adapter.")
    scale: float = Field(1.0, description="Strength; 1 is as trained.")


class LlamaCppSettings(Group):
    """How llama.cpp loads and runs a model. Names are llama.cpp's."""

    n_gpu_layers: int | None = Field(None, ge=0, description="Layers to keep on the GPU; null means all that there are.")
    split_mode: Literal["none", "layer", "row", "tensor"] = Field(
        "layer", description="How several GPUs share the model: one only, whole layers each, rows of each tensor, or tensors."
    )
    main_gpu: int = Field(0, ge=0, description="GPU to use with split_mode `none`.")
    tensor_split: tuple[float, ...] | None = Field(None, description="Share of the model for each GPU; null splits evenly.")
    n_threads: int | None = Field(None, ge=1, description="CPU threads for decoding; null means one for each physical core.")
    n_threads_batch: int | None = Field(None, ge=1, description="CPU threads for prefill; null means as n_threads.")
    n_ubatch: int = Field(
        512, ge=16, description="Most tokens of one pass over the weights; more takes more memory and gains nothing on a CPU."
    )
    load_mode: Literal["auto", "none", "mmap", "mlock", "mmap_mlock", "direct_io"] = Field(
        "auto", description="How the file is read; mlock keeps it from being swapped out."
    )
    repack: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Rearrange weights in memory for faster kernels where llama.cpp has them. auto means on, except on CPUs "
        "with AMX, where the AMX kernels of llama.cpp builds of 2026 end the process (ggml-org/llama.cpp#26954).",
    )
    type_k: CacheType = Field("f16", description="Data type of the K cache; q8_0 halves it at a small loss of quality.")
    type_v: CacheType = Field("f16", description="Data type of the V cache; a quantised one needs flash attention.")
    flash_attn: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Flash attention. auto leaves it to llama.cpp on GPUs, and turns it off on CPUs, where its kernel is "
        "slower for all but long prompts, unless type_v is quantised, which needs it.",
    )
    swa_full: bool = Field(
        True,
        description="Keep the whole context of sliding-window layers, so that any prefix can be reused; false saves memory "
        "and turns prefix reuse off for such models.",
    )
    kv_layout: Literal["per_stream", "unified"] = Field(
        "per_stream",
        description="`per_stream`: each sequence attends over its own cells, fastest for distinct contexts. `unified`: one "
        "pool of cells that copies share, which saves memory when live sequences have one large prefix in common.",
    )
    kv_cache_mib: int = Field(
        1024,
        ge=16,
        description="Memory for the KV cache in MiB from which max_model_len follows when it is not set: the model's own "
        "context length if it fits for max_num_seqs sequences, but no less than 2,048 tokens.",
    )
    retained_streams: int = Field(
        0,
        ge=0,
        le=255,
        description="Streams beside max_num_seqs that only keep finished sequences for reuse; each costs cache.",
    )
    lora: tuple[LoraSettings, ...] = Field((), description="LoRA adapters to apply.")
