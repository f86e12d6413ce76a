"""A model's folder: its configuration and the headers of its weights, checked. Imports no torch: the server reads it too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferflux_backend_torch.checkpoint import Checkpoint
from inferflux_backend_torch.config import DecoderConfig
from inferflux_backend_torch.families import decoder_config
from inferflux_backend_torch.model_file import read_json
from inferflux_backend_torch.weights import expected_tensors, ignored_tensors
from inferflux_core.interfaces import ModelFiles


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What can be known of a model without loading it.

    Attributes:
        config: contents of config.json.
        decoder: what this backend's own decoder needs; None for an architecture that only transformers knows.
    """

    path: Path
    config: Mapping[str, Any]
    decoder: DecoderConfig | None
    checkpoint: Checkpoint

    @classmethod
    def open(cls, files: ModelFiles) -> ModelFolder:
        """Read and check everything but the weights.

        Raises:
            ModelFileError: the files are damaged, contradict each other, or want code of their own to be run.
        """
        path = Path(files.paths[0])
        config = read_json(path / "config.json", "the model's configuration")
        decoder = decoder_config(config)
        checkpoint = Checkpoint.open(files)
        if decoder is not None:
            checkpoint.check(expected_tensors(decoder), ignored=ignored_tensors(decoder))
        return cls(path, config, decoder, checkpoint)

    @property
    def architecture(self) -> str:
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else "unknown"
