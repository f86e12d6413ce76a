"""What loading takes and refuses beside the weights themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the torch backend is not installed")

from safetensors.torch import load_file, save_file  # noqa: E402  # after the skip
from tokenizers import Tokenizer, models  # noqa: E402

from inferflux_backend_torch.loading import load  # noqa: E402
from inferflux_backend_torch.model import Decoder  # noqa: E402
from inferflux_backend_torch.settings import TorchSettings  # noqa: E402
from inferflux_core.errors import ModelFileError  # noqa: E402
from inferflux_core.interfaces import EngineConfig, SourceContext  # noqa: E402
from inferflux_core.models.sources import PathSource  # noqa: E402
from torch_backend.tiny_models import tiny_model  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tiny_model("llama", tmp_path).folder
    Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).save(str(made / "tokenizer.json"))
    return made


def loaded(folder: Path, **settings: object) -> Decoder:
    files = PathSource().resolve(str(folder), SourceContext())
    own = TorchSettings.model_validate({"device": "cpu", "kv_cache_mib": 1, "num_threads": 1, **settings})
    model = load(files, own, EngineConfig()).model
    assert isinstance(model, Decoder)
    return model


def test_rotary_tables_are_as_long_as_a_sequence_can_get(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1 << 27}))
    table = loaded(folder).layers[0].rope
    assert table is not None
    assert table.shape[0] < 10_000, "a table for all positions would take 10 GB"


def test_a_weight_that_float16_cannot_hold(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 99840.0
    save_file(tensors, path, metadata={"format": "pt"})
    loaded(folder, dtype="bfloat16")
    with pytest.raises(ModelFileError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' holds 99840, more than float16 can"):
        loaded(folder, dtype="float16")
