"""Which files of a repository make up the model that a reference means."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from inferflux_core.errors import ModelFileError
from inferflux_core.models.hub_reference import HubReference, is_safe_path
from inferflux_core.models.shards import ShardName, gguf_models, model_stem, safetensors_weights

PREFERENCE = (
    "Q4_K_M", "Q5_K_M", "Q4_0", "Q8_0", "Q4_K_S", "Q5_K_S", "Q6_K", "Q5_0", "Q4_1", "Q5_1", "IQ4_XS", "IQ4_NL", "MXFP4",
    "MXFP4_MOE", "Q3_K_M", "Q3_K_L", "BF16", "F16", "F32",
)  # fmt: skip
"""Quantisations taken when a reference names none: the usual balance first, then close ones, then large ones."""

_LABEL = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?(?:IQ[1-4]_(?:XXS|XS|NL|S|M)|TQ[12]_0|Q[1-8]_(?:K(?:_(?:XXS|XS|S|M|L|XL|XXL))?|0|1)"
    r"|MXFP4(?:_MOE)?|NVFP4|BF16|FP?16|FP?32))(?![A-Za-z0-9])",
    re.IGNORECASE,
)

# what a safetensors model is made of besides its weights; nothing that could hold code
_COMPANIONS = re.compile(
    r"(?:config|generation_config|preprocessor_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|merges\.txt|vocab\.txt|tokenizer\.model|chat_template\.(?:jinja|json)|.+\.safetensors\.index\.json"
)


@dataclass(frozen=True, slots=True)
class Choice:
    """Files to fetch.

    Attributes:
        format: `gguf` or `safetensors`.
        files: paths in the repository; of a GGUF model in the order of its parts.
        quantisation: its name, or None if the file's name tells none.
    """

    format: str
    files: tuple[str, ...]
    quantisation: str | None = None


def quantisation(path: str) -> str | None:
    """The quantisation that a file's name tells, else that of its folder, in upper case; None if there is none."""
    folder, _, _ = path.rpartition("/")
    for text in (model_stem(path), folder):
        if labels := _LABEL.findall(text):
            label = str(labels[-1]).upper()
            return {"FP16": "F16", "FP32": "F32"}.get(label, label)
    return None


def choose(ref: str, wanted: HubReference, names: Iterable[str]) -> Choice:
    """The files that a reference means among those of its repository.

    Raises:
        ModelFileError: there is no such file, there are several, or some of its parts are missing; lists the choices.
    """
    present = {name for name in names if is_safe_path(name)}
    models = gguf_models(present)
    if wanted.file is not None:
        shard = ShardName.parse(wanted.file)
        first = wanted.file if shard is None else shard.all[0]
        if wanted.file not in present:
            raise ModelFileError(f"{ref!r}: {wanted.repo} has no file {wanted.file!r}; it has {_listed(models)}")
        return _gguf(ref, first, (wanted.file,) if shard is None else shard.all, present)
    if not models:
        if wanted.quantisation is not None:
            raise ModelFileError(f"{ref!r}: {wanted.repo} has no GGUF files; leave ':{wanted.quantisation}' out")
        return _safetensors(ref, wanted, present)
    by_label: dict[str | None, list[str]] = {}
    for first in models:
        by_label.setdefault(quantisation(first), []).append(first)
    candidates = _wanted(ref, wanted, by_label) if wanted.quantisation else _preferred(by_label, list(models))
    if len(candidates) != 1:
        why = "names no quantisation, and none is the usual one" if not candidates else "fits several files"
        raise ModelFileError(
            f"{ref!r} {why}; {wanted.repo} has {_listed(candidates or models)}; "
            f"append one as ':file.gguf'{'' if candidates else ' or its quantisation, such as :Q4_K_M'}"
        )
    return _gguf(ref, candidates[0], models[candidates[0]], present)


def _wanted(ref: str, wanted: HubReference, by_label: dict[str | None, list[str]]) -> list[str]:
    label = wanted.quantisation
    found = by_label.get(label) or by_label.get(f"UD-{label}")
    if not found:
        known = ", ".join(sorted(name for name in by_label if name)) or "none that its file names tell"
        raise ModelFileError(f"{ref!r}: {wanted.repo} has no quantisation {label!r}; it has {known}")
    return found


def _preferred(by_label: dict[str | None, list[str]], models: list[str]) -> list[str]:
    if len(models) == 1:
        return models
    return next((by_label[label] for label in PREFERENCE if label in by_label), [])


def _gguf(ref: str, first: str, files: tuple[str, ...], present: set[str]) -> Choice:
    _check_complete(ref, files, present)
    return Choice("gguf", files, quantisation(first))


def _check_complete(ref: str, files: tuple[str, ...], present: set[str]) -> None:
    if missing := [name for name in files if name not in present]:
        raise ModelFileError(
            f"{ref!r}: of {len(files)} files {len(missing)} are missing: {', '.join(missing[:5])}; choose another one"
        )


def _safetensors(ref: str, wanted: HubReference, present: set[str]) -> Choice:
    weights = safetensors_weights(name for name in present if "/" not in name)
    if not weights or "config.json" not in present:
        raise ModelFileError(
            f"{ref!r}: {wanted.repo} has neither GGUF files nor config.json with .safetensors files; other formats are not "
            f"loaded, some because they can run code; choose another repository"
        )
    _check_complete(ref, weights, present)
    companions = sorted(name for name in present if "/" not in name and _COMPANIONS.fullmatch(name))
    return Choice("safetensors", (*companions, *weights))


def _listed(names: Iterable[str], most: int = 20) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return (", ".join(listed[:most]) or "no GGUF files") + more
