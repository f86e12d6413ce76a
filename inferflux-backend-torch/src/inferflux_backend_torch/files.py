"""A model's folder: its configuration and the headers of its weights, checked. Imports no torch: the server reads it too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from inferflux_backend_torch.checkpoint import Checkpoint
from inferflux_backend_torch.config import DecoderConfig
from inferflux_backend_torch.families import FAMILIES, decoder_config
from inferflux_backend_torch.model_file import read_json
from inferflux_backend_torch.weights import expected_tensors, ignored_tensors
from inferflux_core.errors import ModelFileError
from inferflux_core.interfaces import ModelFiles

ModelImpl = Literal["auto", "inferflux", "transformers"]


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
    def open(cls, files: ModelFiles, model_impl: ModelImpl = "auto") -> ModelFolder:
        """Read and check everything but the weights.

        Args:
            model_impl: as in the settings; with `transformers` there is no decoder, whatever the architecture.

        Raises:
            ModelFileError: the files are damaged, contradict each other, or want code of their own to be run.
        """
        path = Path(files.paths[0])
        config = read_json(path / "config.json", "configuration of the model")
        # Without a name no decoder is found, and the checks that hold for every model are made nevertheless.
        decoder = decoder_config({**config, "architectures": None} if model_impl == "transformers" else config)
        if decoder is None and model_impl == "inferflux":
            raise ModelFileError(
                f"config.json: 'architectures' is {config.get('architectures')!r}, which has no decoder of its own here; set "
                f"`model_impl` to 'auto' to serve it through transformers, or take one of {', '.join(FAMILIES)}"
            )
        checkpoint = Checkpoint.open(files)
        if decoder is not None:
            checkpoint.check(expected_tensors(decoder), ignored=ignored_tensors(decoder))
        return cls(path, config, decoder, checkpoint)

    @property
    def architecture(self) -> str:
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else "unknown"
