"""What the llama.cpp backend does beyond the contract: its settings, adapters, split files, refusals."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from inferflux_backend_llamacpp.backend import LlamaCppBackend
from inferflux_backend_llamacpp.gguf import read_gguf
from inferflux_backend_llamacpp.settings import LlamaCppSettings, LoraSettings
from inferflux_core.errors import ModelFileError
from inferflux_core.interfaces import EngineConfig, ModelFiles
from inferflux_core.testing.driver import Answer, EngineDriver, make_request
from llamacpp.demo_model import demo_files
from llamacpp.gguf_writer import text

FILES = demo_files()
CONFIG = EngineConfig(max_num_seqs=2, max_num_batched_tokens=64, max_model_len=256)
TOKENIZER = LlamaCppBackend(LlamaCppSettings()).tokenizer(FILES)
PROMPT = TOKENIZER.encode("The capital of France is", add_special=True, parse_special=False)

STRING, U16, U32, F32 = 8, 2, 4, 6


def answer(settings: LlamaCppSettings, files: ModelFiles = FILES, config: EngineConfig = CONFIG) -> Answer:
    backend = LlamaCppBackend(settings)
    backend.validate(files)
    driver = EngineDriver(backend.runner(files, config), config)
    try:
        return driver.generate(make_request(PROMPT, max_tokens=6, logprobs=0))[0]
    finally:
        driver.core.close()


def entry(key: str, type_number: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", type_number) + value


def file_of(entries: list[bytes], tensors: list[tuple[str, tuple[int, ...], int, bytes]]) -> bytes:
    """A GGUF file of encoded metadata and (name, shape, type number, data)."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(entries)) + b"".join(entries)
    data = b""
    for name, shape, type_number, raw in tensors:
        data += bytes(-len(data) % 32)
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_number, len(data))
        data += raw
    return head + bytes(-len(head) % 32) + data


def adapter(path: Path, strength: float) -> Path:
    """A LoRA adapter of rank 2 on the queries of the first layer, with fixed random weights."""
    rnd = random.Random(1)
    size = 576
    entries = [
        entry("general.type", STRING, text("adapter")),
        entry("adapter.type", STRING, text("lora")),
        entry("general.architecture", STRING, text("llama")),
        entry("adapter.lora.alpha", F32, struct.pack("<f", 2.0)),
    ]
    weights = [struct.pack(f"<{2 * size}f", *(rnd.gauss(0, strength) for _ in range(2 * size))) for _ in "ab"]
    tensors = [
        ("blk.0.attn_q.weight.lora_a", (size, 2), 0, weights[0]),
        ("blk.0.attn_q.weight.lora_b", (2, size), 0, weights[1]),
    ]
    path.write_bytes(file_of(entries, tensors))
    return path


def split(folder: Path) -> ModelFiles:
    """The demo model in two files, as llama-gguf-split makes them."""
    whole = Path(FILES.paths[0]).read_bytes()
    header = read_gguf(FILES.paths[0])
    number_of_entries = struct.unpack_from("<Q", whole, 16)[0]
    metadata = whole[24 : whole.index(text(header.tensors[0].name))]
    types = {"F32": 0, "Q4_1": 3, "Q6_K": 14, "Q8_0": 8}
    paths = []
    half = len(header.tensors) // 2
    for number, part in enumerate((header.tensors[:half], header.tensors[half:])):
        marks = [
            entry("split.no", U16, struct.pack("<H", number)),
            entry("split.count", U16, struct.pack("<H", 2)),
            entry("split.tensors.count", 5, struct.pack("<i", len(header.tensors))),
        ]
        entries = [metadata, *marks] if number == 0 else marks
        tensors = [(t.name, t.shape, types[t.type], whole[t.offset : t.offset + t.nbytes]) for t in part]
        data = bytearray(file_of(entries, tensors))
        if number == 0:
            struct.pack_into("<Q", data, 16, number_of_entries + len(marks))
        path = folder / f"demo-{number + 1:05}-of-00002.gguf"
        path.write_bytes(data)
        paths.append(str(path))
    return ModelFiles(ref=paths[0], format="gguf", paths=tuple(paths))


@pytest.mark.parametrize(
    "settings",
    [
        LlamaCppSettings(),
        LlamaCppSettings(type_k="q8_0", type_v="q8_0", flash_attn="on"),
        LlamaCppSettings(n_threads=1, n_ubatch=16, load_mode="none"),
        LlamaCppSettings(n_gpu_layers=0, split_mode="none", kv_layout="unified", swa_full=False),
    ],
    ids=["default", "quantised cache", "small passes", "unified"],
)
def test_settings_change_how_and_not_what(settings: LlamaCppSettings) -> None:
    assert TOKENIZER.decode(answer(settings).token_ids).startswith(" Paris")


def test_an_adapter_changes_the_logits(tmp_path: Path) -> None:
    plain = answer(LlamaCppSettings()).logprobs[0].logprob
    path = adapter(tmp_path / "lora.gguf", strength=5.0)
    adapted = answer(LlamaCppSettings(lora=(LoraSettings(path=path),))).logprobs[0].logprob
    switched_off = answer(LlamaCppSettings(lora=(LoraSettings(path=path, scale=0.0),))).logprobs[0].logprob
    assert abs(adapted - plain) > 0.01
    assert switched_off == pytest.approx(plain, abs=1e-3)


def test_a_model_is_no_adapter() -> None:
    settings = LlamaCppSettings(lora=(LoraSettings(path=Path(FILES.paths[0])),))
    with pytest.raises(ModelFileError, match="not a LoRA adapter"):
        LlamaCppBackend(settings).validate(FILES)


def test_an_adapter_that_does_not_fit(tmp_path: Path) -> None:
    entries = [
        entry("general.type", STRING, text("adapter")),
        entry("adapter.type", STRING, text("lora")),
        entry("general.architecture", STRING, text("qwen2")),
        entry("adapter.lora.alpha", F32, struct.pack("<f", 2.0)),
    ]
    path = tmp_path / "other.gguf"
    path.write_bytes(file_of(entries, [("x.lora_a", (32,), 0, bytes(128))]))
    with pytest.raises(ModelFileError, match=r"other\.gguf"):
        answer(LlamaCppSettings(lora=(LoraSettings(path=path),)))


def test_a_split_model(tmp_path: Path) -> None:
    assert answer(LlamaCppSettings(), split(tmp_path)).token_ids == answer(LlamaCppSettings()).token_ids


def test_too_many_streams() -> None:
    config = EngineConfig(max_num_seqs=200, max_num_batched_tokens=512, max_model_len=256)
    with pytest.raises(ModelFileError, match=r"llama\.cpp allows 256"):
        LlamaCppBackend(LlamaCppSettings(retained_streams=100)).runner(FILES, config)


def test_the_longest_sequence_is_the_models_own() -> None:
    config = EngineConfig(max_num_seqs=1, max_num_batched_tokens=64, max_model_len=10**6)
    runner = LlamaCppBackend(LlamaCppSettings()).runner(FILES, config)
    assert runner.model_info.max_model_len == read_gguf(FILES.paths[0]).context_length
    runner.close()
