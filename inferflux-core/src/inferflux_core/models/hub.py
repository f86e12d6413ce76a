"""Models from the Hugging Face hub, kept in the hub client's own cache."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inferflux_core.errors import ModelFileError
from inferflux_core.interfaces import ModelFiles, ModelSource, SourceContext
from inferflux_core.models.hub_cache import HubCache
from inferflux_core.models.hub_choice import Choice, choose
from inferflux_core.models.hub_errors import TooLongError, explained, is_network_failure
from inferflux_core.models.hub_reference import HubReference
from inferflux_core.models.sources import HUB_PREFIX

_MAIN = "main"
_INFO_TIMEOUT = 30.0  # seconds
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Remote:
    """What the hub says about a file: its size in bytes, and the sha256 of its content if it is kept as a large file."""

    size: int
    sha256: str | None


class HubSource(ModelSource):
    """`hf:owner/repo[:file-or-quantisation][@revision]`.

    Without a file or quantisation: the GGUF file of the first quantisation in `hub_choice.PREFERENCE`, or, where there is no
    GGUF, config, tokenizer and weights in safetensors. Files with pickled objects are never fetched.

    Every large file is checked against the hub's sha256 when it has been downloaded, and deleted if it differs. A model that
    is in the cache is used when the hub cannot be reached. HF_ENDPOINT names another hub.
    """

    def matches(self, ref: str) -> bool:
        return ref.startswith(HUB_PREFIX)

    def resolve(self, ref: str, context: SourceContext) -> ModelFiles:
        wanted = HubReference.parse(ref)
        cache = HubCache.of(wanted.repo, context.cache_dir)
        if context.offline or _library_is_offline():
            return self._cached(ref, wanted, cache, "the hub is not asked, because offline is set")
        try:
            commit, remote = _ask(wanted, context)
        except ModelFileError:
            raise
        except Exception as error:  # the client library passes on whatever its HTTP library raises
            if not is_network_failure(error) or not cache.folder.is_dir():
                raise explained(error, ref, wanted, context, str(cache.folder.parent)) from error
            _log.warning("the hub cannot be reached; using what is in the cache for %s", ref)
            return self._cached(ref, wanted, cache, "the hub cannot be reached")
        choice = choose(ref, wanted, remote)
        try:
            self._fetch(ref, wanted, cache, context, commit, {name: remote[name] for name in choice.files})
            cache.remember(wanted.revision or _MAIN, commit)
        except ModelFileError:
            raise
        except Exception as error:
            raise explained(error, ref, wanted, context, str(cache.folder.parent)) from error
        return _model_files(ref, cache, commit, choice)

    def _cached(self, ref: str, wanted: HubReference, cache: HubCache, why: str) -> ModelFiles:
        commit = wanted.revision if wanted.is_commit else cache.commit(wanted.revision or _MAIN)
        files = cache.files(commit) if commit is not None and _COMMIT.fullmatch(commit) else []
        if commit is None or not files:
            raise ModelFileError(f"{ref!r} is not in the cache {str(cache.folder.parent)!r}, and {why}; pull it with network")
        try:
            choice = choose(ref, wanted, files)
        except ModelFileError as error:
            raise ModelFileError(f"{error} (only the cache was searched: {why})") from None
        return _model_files(ref, cache, commit, choice)

    def _fetch(
        self,
        ref: str,
        wanted: HubReference,
        cache: HubCache,
        context: SourceContext,
        commit: str,
        remote: Mapping[str, _Remote],
    ) -> None:
        here = set(cache.files(commit))
        missing = {name: file for name, file in remote.items() if name not in here}
        needed = sum(file.size for name, file in missing.items() if not cache.path(commit, name).is_file())
        if needed > (free := cache.free_bytes()):
            raise ModelFileError(
                f"{ref!r} needs {needed / 1e9:.2f} GB, but {cache.folder.parent} has {free / 1e9:.2f} GB free; "
                f"free some, or set hub.cache_dir"
            )
        for name, file in missing.items():
            if file.sha256 is not None:
                cache.mark(commit, name, file.sha256)
            try:
                _download(wanted, context, commit, name)
            finally:
                if not cache.path(commit, name).is_file():
                    cache.unmark(commit, name)
            if file.sha256 is not None:
                _verify(ref, cache, commit, name, file.sha256)


def _ask(wanted: HubReference, context: SourceContext) -> tuple[str, dict[str, _Remote]]:
    """The commit that the revision means now, and its files. Raises what the client library raises."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=_endpoint(), token=context.token, library_name="inferflux")
    info = api.model_info(wanted.repo, revision=wanted.revision, files_metadata=True, timeout=_INFO_TIMEOUT)
    commit = str(info.sha)
    if not _COMMIT.fullmatch(commit):
        raise ModelFileError(f"the hub names the commit {commit[:80]!r} for {wanted.repo}; check HF_ENDPOINT")
    remote = {}
    for sibling in info.siblings or ():
        sha256 = str(sibling.lfs.sha256) if sibling.lfs is not None else None
        if sha256 is not None and not _SHA256.fullmatch(sha256):
            raise ModelFileError(f"the hub names the sha256 {sha256[:80]!r} for a file of {wanted.repo}; check HF_ENDPOINT")
        remote[str(sibling.rfilename)] = _Remote(int(sibling.size or 0), sha256)
    return commit, remote


def _download(wanted: HubReference, context: SourceContext, commit: str, name: str) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(
        wanted.repo,
        name,
        revision=commit,
        cache_dir=context.cache_dir,
        token=context.token,
        endpoint=_endpoint(),
        library_name="inferflux",
        tqdm_class=_progress_class(context.show_progress),
    )


def _verify(ref: str, cache: HubCache, commit: str, name: str, sha256: str) -> None:
    actual = cache.sha256(commit, name)
    if actual != sha256:
        cache.discard(commit, name)
        raise ModelFileError(
            f"{ref!r}: {name} arrived damaged and was deleted: its sha256 is {actual}, the hub says {sha256}; try again; if it "
            f"stays so, a proxy or mirror in between alters files"
        )
    cache.unmark(commit, name)


def _model_files(ref: str, cache: HubCache, commit: str, choice: Choice) -> ModelFiles:
    paths = [str(cache.path(commit, name)) for name in choice.files]
    if choice.format == "safetensors":
        weights = [path for path in paths if path.endswith(".safetensors")]
        paths = [str(cache.folder / "snapshots" / commit), *weights]
    return ModelFiles(ref=ref, format=choice.format, paths=tuple(paths), revision=commit)


def _endpoint() -> str | None:
    """Read when it is used: the client library reads it once, when it is imported."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _library_is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _progress_class(show: bool) -> type[Any]:
    """A progress bar on standard error, or none; and an end to transfers that send more than the file has."""
    from huggingface_hub.utils import tqdm

    class Progress(tqdm):  # type: ignore[misc]  # the client library's types are not followed
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if not show:
                kwargs["disable"] = True
            total = kwargs.get("total")
            # a quarter more than the file, because some transports count their own overhead
            self._left = None if total is None else total * 5 // 4 + (1 << 20) - kwargs.get("initial", 0)
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            if self._left is not None:
                self._left -= n or 0
                if self._left < 0:
                    raise TooLongError
            return bool(super().update(n))

    return Progress
