"""Settings of the torch backend."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from inferflux_core.settings import Group


class TorchSettings(Group):
    """How torch loads and runs a model. Names are vLLM's where it has them."""

    device: Literal["auto", "cpu", "cuda", "rocm", "mps"] = Field(
        "auto", description="Where the model runs; auto takes the first of CUDA, ROCm, MPS and CPU that is there."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type of weights and activations. auto takes the checkpoint's own, but bfloat16 for float16 on CPUs, which "
        "compute in it faster.",
    )
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8"] = Field(
        "auto", description="Type of the KV cache; auto means as `dtype`. fp8 (e4m3) halves it at a small loss of quality."
    )
    quantization: Literal["none", "int8"] = Field(
        "none",
        description="int8 keeps the weights of a CPU model in 8 bits, one scale for each output channel: half the memory, and "
        "faster decoding of up to about four sequences at once, where reading the weights is the limit; more are slower.",
    )
    block_size: int | None = Field(
        None,
        ge=8,
        le=512,
        multiple_of=8,
        description="Tokens of one KV block, a multiple of 8; null means 64 on CPUs and 32 on GPUs.",
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of a GPU's memory that weights and KV cache may take together."
    )
    kv_cache_mib: int = Field(
        1024, ge=1, description="Memory for the KV cache in MiB on CPUs and MPS, where there is no share to take."
    )
    num_threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="CPU threads; null means one for each physical core: hyper-threads only slow products down.",
    )
    tensor_parallel_size: int = Field(1, ge=1, le=64, description="Processes, one a GPU, that share each layer of the model.")
    model_impl: Literal["auto", "inferflux", "transformers"] = Field(
        "auto",
        description="Which code serves the model: this backend's own decoder, or transformers' with this backend's attention "
        "(needs the extra `transformers`). auto takes its own where it knows the architecture.",
    )
    cuda_graphs: bool = Field(True, description="Replay decode steps as CUDA graphs, which takes the CPU out of them.")
    async_scheduling: bool = Field(True, description="Plan a step while the one before it still runs on the GPU.")
