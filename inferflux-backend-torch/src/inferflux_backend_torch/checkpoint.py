"""The weights of a model: all its safetensors files together, checked against each other, its index and its configuration."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from inferflux_backend_torch.memory import available_memory, check_memory
from inferflux_backend_torch.model_file import read_json
from inferflux_backend_torch.safetensors_header import FLOATING_DTYPES, SafetensorsHeader, TensorEntry, read_header
from inferflux_core.errors import ModelFileError
from inferflux_core.interfaces import ModelFiles
from inferflux_core.models.shards import SAFETENSORS_SUFFIX, ShardName

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "available_memory", "check_memory", "read_json", "refuse_not_finite"]

_LISTED = 5  # faults of a kind that a message lists
_CHUNK = 1 << 20  # elements searched at once for the one that is not finite
_MAX_INDEX_BYTES = 100_000_000  # one line a tensor; the largest published ones have 10 MB


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Headers of all weight files of a model. Holds no weights and keeps no file open.

    Attributes:
        ref: the model as the administrator wrote it, for messages.
        folder: where `config.json` lies.
        shards: in the order of the files.
        tensors: of all shards, by name. At least one.
    """

    ref: str
    folder: Path
    shards: tuple[SafetensorsHeader, ...]
    tensors: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, files: ModelFiles) -> Checkpoint:
        """Read and check the headers of all weight files, and the index where there is one.

        Args:
            files: folder of the model, then its `.safetensors` files. No other file is opened, pickled ones least of all.

        Raises:
            ModelFileError: as `safetensors_header.read_header`; no weights; the same tensor in two files; an index that
                contradicts the files.
        """
        if len(files.paths) < 2:
            raise ModelFileError(f"{files.ref!r} has no weight files; name a folder with config.json and .safetensors files")
        folder, *weights = map(Path, files.paths)
        for path in weights:
            if not path.name.endswith(SAFETENSORS_SUFFIX):
                raise ModelFileError(
                    f"{path}: not a {SAFETENSORS_SUFFIX} file; other formats are refused, some because they can run code"
                )
        shards = tuple(read_header(path) for path in weights)
        tensors: dict[str, TensorEntry] = {}
        for shard in shards:
            for name, entry in shard.tensors.items():
                if (other := tensors.setdefault(name, entry)) is not entry:
                    raise ModelFileError(
                        f"{files.ref!r}: tensor {name!r} is in two files, {other.path.name!r} and {entry.path.name!r}; "
                        f"keep the files of one model in its folder"
                    )
        if not tensors:
            raise ModelFileError(f"{files.ref!r}: its weight files hold no tensors; fetch the whole model again")
        for index in _indexes(folder, weights):
            _check_index(index, tensors, {path.name for path in weights})
        return cls(files.ref, folder, shards, MappingProxyType(tensors))

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def dtype(self) -> str:
        """The dtype of most bytes, in the format's spelling, e.g. `BF16`."""
        sizes: dict[str, int] = {}
        for entry in self.tensors.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    def check(
        self,
        expected: Mapping[str, tuple[int, ...]],
        optional: Collection[str] = (),
        ignored: Sequence[re.Pattern[str]] = (),
    ) -> None:
        """Compare the tensors with those that the configuration calls for.

        Args:
            expected: shapes by name.
            optional: names that may be missing. Where present they must be in `expected` with the right shape.
            ignored: tensors that one of these patterns matches from its beginning may be there too; they are not loaded.

        Raises:
            ModelFileError: tensors are missing, unexpected, of another shape or no floating-point numbers; lists the first
                five of each kind.
        """
        here = self.tensors
        common = [(here[name], shape) for name, shape in expected.items() if name in here]
        faults = [
            _listed("is missing", "are missing", (repr(n) for n in expected if n not in here and n not in optional)),
            _listed(
                "is unexpected",
                "are unexpected",
                (repr(name) for name in here if name not in expected and not any(p.match(name) for p in ignored)),
            ),
            _listed(
                "contradicts config.json in its shape",
                "contradict config.json in their shapes",
                (
                    f"{entry.name!r} is {entry.shape} instead of {tuple(shape)}"
                    for entry, shape in common
                    if entry.shape != tuple(shape)
                ),
            ),
            _listed(
                "is not of floating point",
                "are not of floating point",
                (f"{entry.name!r} is {entry.dtype}" for entry, _ in common if entry.dtype not in FLOATING_DTYPES),
            ),
        ]
        if found := [fault for fault in faults if fault]:
            raise ModelFileError(
                f"{self.ref!r}: the weights do not fit config.json: {'; '.join(found)}. Fetch config.json and all weights "
                f"again from one place; checkpoints quantised by other tools are not supported"
            )


def refuse_too_large(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Check that a finite tensor stays finite in another type.

    Raises:
        ModelFileError: float16, the only type that is short of range, cannot hold one of its elements.
    """
    import torch

    if dtype is not torch.float16 or tensor.dtype is torch.float16 or not tensor.numel():
        return
    largest = max(abs(float(extreme)) for extreme in torch.aminmax(tensor))
    if largest > torch.finfo(dtype).max:
        raise ModelFileError(
            f"tensor {name!r} holds {largest:g}, more than float16 can; set `dtype` of the torch backend to bfloat16 or float32"
        )


def refuse_not_finite(name: str, tensor: torch.Tensor, cure: str = "the checkpoint is damaged, fetch it again") -> None:
    """Check that a tensor holds neither NaN nor infinity. One pass without a copy at memory speed where it does not.

    Args:
        name: of the tensor, for the message.
        tensor: of any shape, dtype and device. Whole numbers are always finite.
        cure: end of the message.

    Raises:
        ModelFileError: one of its elements is not finite; says which and what it is.
    """
    import torch

    if not tensor.is_floating_point():
        return
    # A sum with NaN or infinity in it is never finite. A finite tensor may overflow it; then the search finds nothing.
    # torch sums no 8-bit floats.
    if tensor.element_size() > 1 and bool(torch.isfinite(tensor.sum())):
        return
    for start, chunk in _chunks(tensor):
        finite = torch.isfinite(chunk)
        if not bool(finite.all()):
            at = int((~finite).nonzero()[0])
            value = float(chunk[at])
            place = [int(i) for i in torch.unravel_index(torch.tensor(start + at), tensor.shape)]
            raise ModelFileError(f"tensor {name!r} is {value} at {place}; {cure}")


def _chunks(tensor: torch.Tensor) -> Iterable[tuple[int, torch.Tensor]]:
    """Flat pieces of a tensor in float32 or wider, each with the number of elements before it."""
    import torch

    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        yield start, chunk if chunk.element_size() >= 4 else chunk.to(torch.float32)


def _indexes(folder: Path, weights: Iterable[Path]) -> list[Path]:
    """The index files that name these weights. One beside a model in a single file is a leftover that says nothing."""
    shards = [ShardName.parse(path.name) for path in weights]
    names = {f"{shard.stem}{SAFETENSORS_SUFFIX}.index.json" for shard in shards if shard is not None}
    if len(shards) > 1:
        names.add(f"model{SAFETENSORS_SUFFIX}.index.json")
    return [folder / name for name in sorted(names) if os.path.lexists(folder / name)]


def _check_index(path: Path, tensors: Mapping[str, TensorEntry], files: Collection[str]) -> None:
    """Raises ModelFileError unless the index maps exactly these tensors to the files that hold them."""
    weight_map: Any = read_json(path, "index of the weights", max_bytes=_MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelFileError(f"{path}: not a usable index: it has no object 'weight_map'; fetch it again")

    for name, file in weight_map.items():
        maps = f"it maps tensor {name!r} to {file!r}"
        if not isinstance(file, str) or not file or os.path.basename(file) != file or "\\" in file:
            fault = f"{maps}, which is not the name of a file in the same folder"
        elif file not in files:
            fault = f"{maps}, which is not among the files of the model"
        elif name not in tensors:
            fault = f"{maps}, but no file holds such a tensor"
        elif (holder := tensors[name].path.name) != file:
            fault = f"{maps}, but {holder!r} holds it"
        else:
            continue
        raise ModelFileError(f"{path}: contradicts the weights: {fault}; fetch the whole model again")
    if left_out := _listed("is not in it", "are not in it", (repr(name) for name in tensors if name not in weight_map)):
        raise ModelFileError(f"{path}: contradicts the weights: {left_out}; fetch the whole model again")


def _listed(one: str, many: str, items: Iterable[str]) -> str:
    """`2 tensors are missing: 'a', 'b'`, at most five of them; "" for none."""
    listed = list(items)
    if not listed:
        return ""
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    noun = f"1 tensor {one}" if len(listed) == 1 else f"{len(listed)} tensors {many}"
    return f"{noun}: {', '.join(listed[:_LISTED])}{more}"
