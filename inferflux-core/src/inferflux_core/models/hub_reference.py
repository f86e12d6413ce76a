"""What an administrator writes for a model on the Hugging Face hub: `hf:owner/repo[:file-or-quantisation][@revision]`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from inferflux_core.errors import ModelFileError
from inferflux_core.models.shards import GGUF_SUFFIX
from inferflux_core.models.sources import HUB_PREFIX

_GRAMMAR = "hf:owner/repo[:file-or-quantisation][@revision]"
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_QUANTISATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
_FILE = re.compile(r"[^\\\x00-\x1f:@]{1,512}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,254}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubReference:
    """A parsed reference.

    Attributes:
        repo: `owner/repo`.
        file: path of the file in the repository, if one is named.
        quantisation: its name in upper case, if one is named.
        revision: branch, tag or commit; None for the repository's main branch.
    """

    repo: str
    file: str | None = None
    quantisation: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, ref: str) -> HubReference:
        """Raises ModelFileError, naming the part that is wrong."""
        location, at, revision = ref.removeprefix(HUB_PREFIX).partition("@")
        repo, colon, selector = location.partition(":")
        owner, slash, name = repo.partition("/")
        if not ref.startswith(HUB_PREFIX) or not slash:
            raise ModelFileError(f"{ref!r} names no repository; write {_GRAMMAR}")
        for what, text in (("owner", owner), ("repository", name)):
            if not _NAME.fullmatch(text) or "--" in text or ".." in text:
                raise ModelFileError(
                    f"{ref!r}: {text!r} is no {what} on the hub (letters, digits, '-', '_', '.'); write {_GRAMMAR}"
                )
        if at and (not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision or revision.endswith("/")):
            raise ModelFileError(
                f"{ref!r}: {revision!r} is no revision; write a branch, tag or commit after '@', or leave it out"
            )
        file, quantisation = _selector(ref, selector) if colon else (None, None)
        return cls(repo, file, quantisation, revision if at else None)

    @property
    def is_commit(self) -> bool:
        """Whether the revision is a full commit hash, which never comes to mean something else."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None


def _selector(ref: str, text: str) -> tuple[str | None, str | None]:
    if text.lower().endswith(GGUF_SUFFIX):
        if not is_safe_path(text):
            raise ModelFileError(f"{ref!r}: {text!r} is no path in a repository; write it as the hub shows it")
        return text, None
    if text.lower().endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")):
        raise ModelFileError(f"{ref!r}: {text!r} can run code when loaded and is refused; choose a .gguf file")
    if text.lower().endswith(".safetensors"):
        raise ModelFileError(f"{ref!r}: safetensors models are taken whole; leave {':' + text!r} out")
    if not _QUANTISATION.fullmatch(text):
        raise ModelFileError(
            f"{ref!r}: {text!r} is neither a .gguf file nor a quantisation; write for example ':Q4_K_M', or leave it out"
        )
    return None, text.upper()


def is_safe_path(path: str) -> bool:
    """Whether a path from outside stays inside the folder it is put into."""
    return _FILE.fullmatch(path) is not None and not any(part in ("", ".", "..") for part in path.split("/"))
