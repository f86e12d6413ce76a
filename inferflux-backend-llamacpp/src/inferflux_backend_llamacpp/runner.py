"""The half of the backend that computes, in the engine process: one `llama_decode` a step, sampling in numpy."""

from __future__ import annotations

import ctypes
import math
import time
from dataclasses import dataclass, field
from typing import Literal

import llama_cpp
import numpy as np

from inferflux_backend_llamacpp import library
from inferflux_backend_llamacpp.batch import Batch
from inferflux_backend_llamacpp.gguf import read_split
from inferflux_backend_llamacpp.gguf_header import GGUFArray, GGUFHeader
from inferflux_backend_llamacpp.settings import LlamaCppSettings
from inferflux_backend_llamacpp.tokenizer import eog_tokens
from inferflux_core.engine.sampling import Logits, Sampler
from inferflux_core.engine.types import ModelRunnerOutput, Row, SchedulerOutput, SequenceOps, TokenLogprobs
from inferflux_core.errors import ModelFileError
from inferflux_core.interfaces import (
    Capabilities,
    EngineConfig,
    GrammarMask,
    KVCacheSpec,
    ModelFiles,
    ModelInfo,
    ModelRunner,
    Ticket,
)

MAX_STREAMS = 256  # LLAMA_MAX_SEQ
_CELL_PADDING = 256  # llama.cpp rounds each stream's cells up to this
_LEAST_MODEL_LEN = 2048
# Logits of so many drafts of one row take 156 MB of llama.cpp's memory where the vocabulary has 152k tokens.
_MOST_DRAFT = 256
_ATTENTION_TILE = 64  # ggml's tiled attention on CPUs needs so many queries (GGML_FA_TILE_Q); fewer go row by row
# Measured on two cores: a copy between streams moves 5 GB/s, in which time a small model prefills about 500 tokens a second.
_COPY_BYTES_PER_TOKEN = 10e6


@dataclass(slots=True)
class _LlamaTicket(Ticket):
    outputs: dict[int, int]  # slot -> index in the batch of the first token with logits
    milliseconds: float
    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[TokenLogprobs] | None] = field(default_factory=list)


class LlamaCppRunner(ModelRunner):
    """A llama.cpp context whose cells are managed by stream (`SequenceKVCacheManager`)."""

    def __init__(self, files: ModelFiles, settings: LlamaCppSettings, config: EngineConfig) -> None:
        header = read_split(files.paths)
        self._settings = settings
        self._flash_attn = _flash_attention(settings)
        self._num_streams = config.max_num_seqs + settings.retained_streams
        if self._num_streams > MAX_STREAMS:
            raise ModelFileError(
                f"max_num_seqs + retained_streams is {self._num_streams}, llama.cpp allows {MAX_STREAMS}; lower one of them"
            )
        with library.errors_as(f"model {files.ref!r}"):
            self._model = library.load_model(files.paths[0], files.paths, self._model_params())
            self._context = self._make_context(header, config)
            self._adapters = self._load_adapters()
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = Batch(config.max_num_batched_tokens)
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self.model_info = ModelInfo(
            vocab_size=vocab_size,
            max_model_len=self._stream_tokens(),
            eos_token_ids=eog_tokens(vocab, vocab_size),
            details=self._details(header),
        )
        self.kv_cache_spec = KVCacheSpec(
            layout="sequence",
            num_streams=self._num_streams,
            stream_tokens=self._stream_tokens(),
            pool_tokens=llama_cpp.llama_n_ctx(self._context) if settings.kv_layout == "unified" else None,
            can_trim=self._can_trim(),
            min_copy_tokens=self._min_copy_tokens(header),
        )
        self.caps = Capabilities(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            prefill_tile=1 if self._flash_attn == "off" else _ATTENTION_TILE,
            max_draft=min(_MOST_DRAFT, config.max_num_batched_tokens - 1) if self.kv_cache_spec.can_trim else 0,
            grammar=True,
        )
        self._sampler = Sampler(vocab_size, self.model_info.eos_token_ids)

    # --- loading ------------------------------------------------------------------------------------------------------

    def _model_params(self) -> object:
        settings = self._settings
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = -1 if settings.n_gpu_layers is None else settings.n_gpu_layers
        params.split_mode = library.SPLIT_MODES[settings.split_mode]
        params.main_gpu = settings.main_gpu
        params.load_mode = library.LOAD_MODES[settings.load_mode]
        params.use_extra_bufts = not library.uses_amx() if settings.repack == "auto" else settings.repack == "on"
        if settings.tensor_split is not None:
            most = llama_cpp.llama_max_devices()
            if len(settings.tensor_split) > most:
                raise ModelFileError(f"tensor_split has {len(settings.tensor_split)} entries, there are {most} devices at most")
            self._tensor_split = (ctypes.c_float * most)(*settings.tensor_split)
            params.tensor_split = self._tensor_split
        return params

    def _make_context(self, header: GGUFHeader, config: EngineConfig) -> object:
        settings = self._settings
        model_len = self._model_len(header, config)
        cells = math.ceil(model_len / _CELL_PADDING) * _CELL_PADDING
        threads = settings.n_threads or library.physical_cores()
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = cells * self._num_streams
        params.n_batch = config.max_num_batched_tokens
        params.n_ubatch = min(settings.n_ubatch, config.max_num_batched_tokens)
        params.n_seq_max = self._num_streams
        params.n_threads = threads
        params.n_threads_batch = settings.n_threads_batch or threads
        params.flash_attn_type = library.FLASH_ATTENTION[self._flash_attn]
        params.type_k = library.CACHE_TYPES[settings.type_k]
        params.type_v = library.CACHE_TYPES[settings.type_v]
        params.kv_unified = settings.kv_layout == "unified"
        params.swa_full = settings.swa_full
        params.no_perf = True
        self._max_model_len = model_len
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            wanted = params.n_ctx * _bytes_per_token(header, settings) / 2**20
            raise library.LibraryError(
                f"no context of {self._num_streams} streams with {cells} cells each, about {wanted:.0f} MiB of KV cache; "
                f"lower max_num_seqs or max_model_len"
            )
        return context

    def _model_len(self, header: GGUFHeader, config: EngineConfig) -> int:
        trained = header.context_length
        if config.max_model_len is not None:
            return min(config.max_model_len, trained)
        budget = self._settings.kv_cache_mib * 2**20 / (self._num_streams * _bytes_per_token(header, self._settings))
        fitting = int(budget) // _CELL_PADDING * _CELL_PADDING
        return min(trained, max(fitting, _LEAST_MODEL_LEN))

    def _load_adapters(self) -> list[object]:
        adapters = []
        for adapter in self._settings.lora:
            handle = llama_cpp.llama_adapter_lora_init(self._model, str(adapter.path).encode())
            if not handle:
                raise library.LibraryError(f"LoRA adapter {str(adapter.path)!r} does not fit the model")
            adapters.append(handle)
        if adapters:
            handles = (llama_cpp.llama_adapter_lora_p_ctypes * len(adapters))(*adapters)
            scales = (ctypes.c_float * len(adapters))(*(adapter.scale for adapter in self._settings.lora))
            if llama_cpp.llama_set_adapters_lora(self._context, handles, len(adapters), scales):
                raise library.LibraryError("the LoRA adapters cannot be applied")
        return adapters

    def _stream_tokens(self) -> int:
        return min(self._max_model_len, int(llama_cpp.llama_n_ctx_seq(self._context)))

    def _can_trim(self) -> bool:
        """Recurrent memory cannot forget its end; a sliding window without `swa_full` has forgotten its beginning."""
        model = self._model
        if llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model):
            return False
        return self._settings.swa_full or llama_cpp.llama_model_n_swa(model) == 0

    def _min_copy_tokens(self, header: GGUFHeader) -> int:
        """A copy moves the stream's whole buffer, however little of it is used."""
        if self._settings.kv_layout == "unified":
            return 1
        stream_bytes = self._stream_tokens() * _bytes_per_token(header, self._settings)
        return max(16, int(stream_bytes / _COPY_BYTES_PER_TOKEN))

    def _details(self, header: GGUFHeader) -> dict[str, str]:
        return {
            "architecture": header.architecture,
            "quantization": header.file_type,
            "parameters": str(header.parameter_count),
            "path": "llama.cpp",
            "kv_layout": self._settings.kv_layout,
            "flash_attn": self._flash_attn,
            "threads": str(llama_cpp.llama_n_threads(self._context)),
        }

    # --- one step -----------------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        batch = Batch(1)
        batch.struct.n_tokens = 1
        self._decode(batch)
        llama_cpp.llama_memory_clear(self._memory, False)

    def launch(self, plan: SchedulerOutput) -> Ticket:
        began = time.perf_counter()
        for slot in plan.free:
            self._sampler.free(slot)
        for init in plan.start:
            self._sampler.start(init)
        for row in plan.rows:
            assert isinstance(row.kv, SequenceOps)
            self._apply(row.kv)
        outputs = self._batch.fill(plan.rows)
        self._decode(self._batch)
        return _LlamaTicket(plan, outputs, (time.perf_counter() - began) * 1e3)

    def _apply(self, ops: SequenceOps) -> None:
        memory = self._memory
        for stream in ops.clear:
            llama_cpp.llama_memory_seq_rm(memory, stream, -1, -1)
        if ops.copy_from is not None:
            # Always the whole stream: part of one between streams would end the process.
            llama_cpp.llama_memory_seq_rm(memory, ops.stream, -1, -1)
            llama_cpp.llama_memory_seq_cp(memory, ops.copy_from, ops.stream, -1, -1)
        if ops.keep_len is not None and not llama_cpp.llama_memory_seq_rm(memory, ops.stream, ops.keep_len or -1, -1):
            raise RuntimeError(f"llama.cpp cannot cut a sequence to {ops.keep_len} tokens")

    def _decode(self, batch: Batch) -> None:
        status = llama_cpp.llama_decode(self._context, batch.struct)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def sample(self, ticket: Ticket, mask: GrammarMask | None) -> None:
        assert isinstance(ticket, _LlamaTicket)
        for row in ticket.plan.rows:
            if row.sample:
                tokens, logprobs = self._draw(row, ticket.outputs[row.slot], mask)
                ticket.tokens.append(tokens)
                ticket.logprobs.append(logprobs)

    def _draw(self, row: Row, first: int, mask: GrammarMask | None) -> tuple[list[int], list[TokenLogprobs] | None]:
        assert row.tokens is not None
        k = row.n_draft
        masks = None
        if mask is not None and (at := mask.first.get(row.slot)) is not None:
            masks = mask.bits[at : at + k + 1]
        return self._sampler.sample_row(
            row.slot, row.start + row.n - k, self._logits(first, k + 1), row.tokens[row.n - k :], masks
        )

    def _logits(self, index: int, count: int) -> list[Logits]:
        """Of tokens that follow each other in the batch: views on the library's memory, valid until the next decode.

        The library keeps the logits that were asked for in the order of the batch, without gaps.
        """
        pointer = llama_cpp.llama_get_logits_ith(self._context, index)
        address = ctypes.cast(pointer, ctypes.c_void_p).value
        assert address is not None
        width = self.model_info.vocab_size
        memory = (ctypes.c_float * (width * count)).from_address(address)
        return list(np.ctypeslib.as_array(memory).reshape(count, width))

    def collect(self, ticket: Ticket) -> ModelRunnerOutput:
        assert isinstance(ticket, _LlamaTicket)
        return ModelRunnerOutput(ticket.plan.step, ticket.tokens, ticket.logprobs, ticket.milliseconds)

    def close(self) -> None:
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)


def _flash_attention(settings: LlamaCppSettings) -> Literal["auto", "on", "off"]:
    """What to ask llama.cpp for. Its kernel for CPUs goes query by query below 64 of them, and reads the cache again for each.

    Measured on two cores with the demo model, 1,024 tokens deep, without and with it: one token 16 and 25 ms, 16 drafts 76
    and 221 ms, 16 sequences with a token each 130 and 236 ms; a prompt of 512 tokens 1,579 and 1,490 ms.
    """
    if settings.flash_attn != "auto":
        return settings.flash_attn
    on_gpu = llama_cpp.llama_supports_gpu_offload() and settings.n_gpu_layers != 0
    # A quantised V cache cannot be read without it.
    return "auto" if on_gpu or settings.type_v not in ("f32", "f16", "bf16") else "off"


def _bytes_per_token(header: GGUFHeader, settings: LlamaCppSettings) -> float:
    """KV cache bytes of one token over all layers, from the header alone."""
    arch = header.architecture
    layers = header.integer(f"{arch}.block_count") or 1
    heads = header.integer(f"{arch}.attention.head_count") or 1
    width = (header.integer(f"{arch}.embedding_length") or heads) // heads
    kv_heads = header.metadata.get(f"{arch}.attention.head_count_kv", heads)
    if isinstance(kv_heads, GGUFArray):
        total = sum(int(n) for n in kv_heads.read())
    else:
        total = int(kv_heads) * layers if isinstance(kv_heads, int) else heads * layers
    key = header.integer(f"{arch}.attention.key_length") or width
    value = header.integer(f"{arch}.attention.value_length") or width
    sizes = library.CACHE_TYPE_BYTES
    return max(1.0, total * (key * sizes[settings.type_k] + value * sizes[settings.type_v]))
