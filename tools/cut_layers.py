"""Make a draft model of a model's first layers: python tools/cut_layers.py MODEL_FOLDER NEW_FOLDER --layers 7

A model that leaves its later layers out guesses some of its own tokens, without any training, and has the same vocabulary:
enough to try and to measure speculative decoding where no trained draft model is at hand.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import struct
from pathlib import Path

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def cut_layers(model: Path, draft: Path, layers: int) -> None:
    """Write a safetensors model with the first layers of another one, which is in a single file.

    Raises:
        ValueError: the model has fewer layers.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if not 1 <= layers <= config["num_hidden_layers"]:
        raise ValueError(f"{str(model)!r} has {config['num_hidden_layers']} layers; ask for 1 to that many, not {layers}")
    draft.mkdir(parents=True)
    config["num_hidden_layers"] = layers
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    (draft / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name in _COPIED:
        if (model / name).exists():
            shutil.copyfile(model / name, draft / name)
    _cut_weights(model / "model.safetensors", draft / "model.safetensors", layers)


def _cut_weights(source: Path, target: Path, layers: int) -> None:
    """Copy the tensors of the first layers, and those that belong to no layer."""
    with source.open("rb") as reader:
        (length,) = struct.unpack("<Q", reader.read(8))
        header = json.loads(reader.read(length))
        kept, end = {"__metadata__": header.pop("__metadata__", {})}, 0
        sources = []
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if (layer := _LAYER.search(name)) is not None and int(layer[1]) >= layers:
                continue
            first, last = entry["data_offsets"]
            kept[name] = {**entry, "data_offsets": [end, end + last - first]}
            sources.append((8 + length + first, last - first))
            end += last - first
        text = json.dumps(kept).encode()
        text += b" " * (-len(text) % 8)
        with target.open("wb") as writer:
            writer.write(struct.pack("<Q", len(text)) + text)
            for first, size in sources:
                reader.seek(first)
                writer.write(reader.read(size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a safetensors model")
    parser.add_argument("draft", type=Path, help="folder to make")
    parser.add_argument("--layers", type=int, required=True, help="layers to keep")
    arguments = parser.parse_args()
    cut_layers(arguments.model, arguments.draft, arguments.layers)


if __name__ == "__main__":
    main()
