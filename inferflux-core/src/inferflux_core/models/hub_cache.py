"""The hub client's cache of one repository, as far as InferFlux reads and writes it itself.

    models--owner--repo/
        refs/main                         commit that a branch or tag meant when it was last fetched completely
        snapshots/<commit>/<file>         link to ../../blobs/<name>
        blobs/<name>                      content; a name of 64 digits is its sha256
        .unverified/<commit>/<file>       the sha256 it should have: downloaded, or about to be, but not checked yet

The last one is ours: if the process dies between download and check, the next one checks before it uses the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class HubCache:
    """The folder of one repository.

    Attributes:
        folder: `models--owner--repo`.
    """

    folder: Path

    @classmethod
    def of(cls, repo: str, cache_dir: Path | None) -> HubCache:
        """Args:
        cache_dir: folder of all repositories; None means the client library's own (HF_HOME, HF_HUB_CACHE).
        """
        return cls(default_cache_dir(cache_dir) / f"models--{repo.replace('/', '--')}")

    def commit(self, revision: str) -> str | None:
        """The commit that a branch or tag meant when it was last fetched."""
        try:
            return (self.folder / "refs" / revision).read_text().strip() or None
        except OSError:
            return None

    def remember(self, revision: str, commit: str) -> None:
        """Let a branch or tag mean this commit from now on, also without network. A read-only cache stays as is."""
        if revision == commit or self.commit(revision) == commit:
            return
        path = self.folder / "refs" / revision
        draft = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(commit)
            draft.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)

    def files(self, commit: str) -> list[str]:
        """Paths in the repository of the files that are here, complete and checked."""
        snapshot = self.folder / "snapshots" / commit
        found = []
        for directory, _, names in os.walk(snapshot):
            for name in names:
                path = Path(directory, name)
                relative = path.relative_to(snapshot).as_posix()
                if path.is_file() and self.expected(commit, relative) is None:
                    found.append(relative)
        return sorted(found)

    def path(self, commit: str, file: str) -> Path:
        """Where a file lies, or will lie."""
        return self.folder / "snapshots" / commit / file

    def expected(self, commit: str, file: str) -> str | None:
        """The sha256 that an unchecked file should have; None if it has been checked or came from elsewhere."""
        try:
            return self._mark(commit, file).read_text()
        except OSError:
            return None

    def mark(self, commit: str, file: str, sha256: str) -> None:
        """Note that a file has to be checked before it is used. Raises OSError if the cache cannot be written."""
        mark = self._mark(commit, file)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(sha256)

    def unmark(self, commit: str, file: str) -> None:
        """Note that a file has been checked, or is gone."""
        mark = self._mark(commit, file)
        mark.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # folders that are not empty, or gone already
            for folder in mark.parents:
                folder.rmdir()
                if folder.name == ".unverified":
                    break

    def sha256(self, commit: str, file: str) -> str:
        """Read the whole file. Some 1.5 GB a second."""
        with self.path(commit, file).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def discard(self, commit: str, file: str) -> None:
        """Delete a file and the blob that it links to."""
        path = self.path(commit, file)
        while path.is_symlink():
            target = path.parent / path.readlink()
            path.unlink()
            path = target
        path.unlink(missing_ok=True)
        self.unmark(commit, file)

    def free_bytes(self) -> int:
        """Free space where the cache is, or will be."""
        folder = self.folder
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def _mark(self, commit: str, file: str) -> Path:
        return self.folder / ".unverified" / commit / file


def default_cache_dir(cache_dir: Path | None) -> Path:
    """The folder of all repositories, absolute."""
    if cache_dir is None:
        from huggingface_hub import constants

        cache_dir = Path(constants.HF_HUB_CACHE)
    return cache_dir.expanduser().resolve()


def cached_references(cache_dir: Path | None) -> list[str]:
    """What an administrator could write for each GGUF file and safetensors model that is complete in the cache."""
    from inferflux_core.models.shards import gguf_models

    references = []
    for folder in sorted(default_cache_dir(cache_dir).glob("models--*--*")):
        _, owner, repo = folder.name.split("--", 2)
        cache = HubCache(folder)
        refs = folder / "refs"
        for ref in sorted(path for path in refs.rglob("*") if path.is_file()) if refs.is_dir() else []:
            revision = ref.relative_to(refs).as_posix()
            files = cache.files(cache.commit(revision) or "")
            at = "" if revision == "main" else f"@{revision}"
            models = gguf_models(files)
            references += [f"hf:{owner}/{repo}:{first}{at}" for first in models]
            if not models and "config.json" in files:
                references.append(f"hf:{owner}/{repo}{at}")
    return references
