"""The demo model's safetensors twin: the same weights for both backends, made once from the demo's GGUF by transformers."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest

from inferflux_core.errors import ModelFileError
from inferflux_core.interfaces import ModelFiles, SourceContext
from inferflux_core.models.sources import DemoSource, PathSource


def demo_twin() -> Path:
    """Folder of SmolLM2-135M-Instruct in bf16, cached outside the tree. Skips the caller where it cannot be made."""
    for module in ("torch", "transformers", "gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed, which makes the demo's safetensors twin", allow_module_level=True)
    try:
        gguf = DemoSource().resolve("demo", SourceContext())
    except ModelFileError as error:
        pytest.skip(str(error), allow_module_level=True)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "inferflux-tests"
    folder = cache / f"smollm2-135m-instruct-{gguf.revision or 'unknown'}-digits"
    if not folder.is_dir():
        _make(Path(gguf.paths[0]), folder)
    return folder


def twin_files() -> ModelFiles:
    """The twin as the path source finds it."""
    return PathSource().resolve(str(demo_twin()), SourceContext())


def first_layers(folder: Path, layers: int) -> Path:
    """Write a draft model of the twin's first layers."""
    spec = importlib.util.spec_from_file_location("cut_layers", Path(__file__).parents[2] / "tools" / "cut_layers.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.cut_layers(demo_twin(), folder, layers)
    return folder


def _make(gguf: Path, folder: Path) -> None:
    """One process of several makes it while the others wait; a process that dies leaves no lock and no half folder."""
    from filelock import FileLock  # torch depends on it

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return
        making = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            _convert(gguf, making)
            os.rename(making, folder)
        finally:
            shutil.rmtree(making, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about its own internals
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    _split_digits(folder / "tokenizer.json")


def _split_digits(path: Path) -> None:
    """What transformers loses on the way from GGUF: this vocabulary reads each digit by itself, as llama.cpp does too."""
    document = json.loads(path.read_text(encoding="utf-8"))
    splits = {"type": "Digits", "individual_digits": True}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [splits, document["pre_tokenizer"]]}
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
