"""The secrets of the audit log, created at the first start: the key of the chain, and the key that signs checkpoints.

`audit.key` holds 32 random bytes. `audit-checkpoint.key` is an Ed25519 private key, `audit-checkpoint.pub` its public half
(both PEM): copy that one to where checkpoints are verified.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from inferflux_core.errors import ConfigError
from inferflux_core.settings import AuditSettings

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class AuditPaths:
    """The files of an audit log."""

    log: Path
    checkpoints: Path
    key: Path
    checkpoint_key: Path
    public_key: Path

    @classmethod
    def of(cls, settings: AuditSettings, state_dir: Path) -> AuditPaths:
        """Where the files are, as configured or by default."""
        return cls(
            log=settings.file or state_dir / "audit.jsonl",
            checkpoints=settings.checkpoint_file or state_dir / "audit-checkpoints.jsonl",
            key=state_dir / "audit.key",
            checkpoint_key=state_dir / "audit-checkpoint.key",
            public_key=state_dir / "audit-checkpoint.pub",
        )


def read_key(path: Path) -> bytes:
    """The key of the chain.

    Raises:
        ConfigError: there is none, it cannot be read, others may read it, or it is not a key.
    """
    key = _read_private(path)
    if len(key) != KEY_BYTES:
        raise ConfigError(f"the audit key {str(path)!r} has {len(key)} bytes instead of {KEY_BYTES}; restore it from a backup")
    return key


def create_key(path: Path) -> bytes:
    """The key of the chain, made now if there is none yet.

    Raises:
        ConfigError: as `read_key`, or it cannot be written.
    """
    if not path.exists():
        _create(path, secrets.token_bytes(KEY_BYTES))
    return read_key(path)


def create_checkpoint_key(private: Path, public: Path) -> Ed25519PrivateKey:
    """The key that signs checkpoints, made now if there is none yet; its public half is written beside it.

    Raises:
        ConfigError: it cannot be read or written, others may read it, or it is not an Ed25519 key.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if not private.exists():
        pem = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        _create(private, pem)
    try:
        key = serialization.load_pem_private_key(_read_private(private), password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the checkpoint key {str(private)!r} is not a PEM key; restore it from a backup") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"the checkpoint key {str(private)!r} is not an Ed25519 key; restore it from a backup")
    public_pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    if not public.exists():
        _create(public, public_pem)
    if public.read_bytes() != public_pem:
        raise ConfigError(
            f"{str(public)!r} is not the public half of {str(private)!r}; delete the former to have it written again"
        )
    return key


def _read_private(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if os.name == "posix" and mode & 0o077:
                raise ConfigError(f"others may read the secret {str(path)!r} (mode {mode & 0o777:03o}); run 'chmod 600 {path}'")
            return file.read(64 * 1024)
    except OSError as error:
        raise ConfigError(f"the secret {str(path)!r} cannot be read: {error.strerror}") from error


def _create(path: Path, content: bytes) -> None:
    """Write a file that did not exist, whole or not at all; of two that try at once, one wins and both read its file."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)
            except FileExistsError:
                return
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"the secret {str(path)!r} cannot be written: {error.strerror}") from error


def sync_folder(path: Path) -> None:
    """Force the names in a folder to disk."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
