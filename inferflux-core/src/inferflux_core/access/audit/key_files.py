"""The secrets of the audit log, created at the first start: the key of the chain, and the key that signs checkpoints.

`audit.key` holds 32 random bytes. `audit-checkpoint.key` is an Ed25519 private key, `audit-checkpoint.pub` its public half
(both PEM): copy that one to where checkpoints are verified.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from inferflux_core.errors import ConfigError
from inferflux_core.private_files import create_private, read_private
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


def read_key(path: Path, *, any_owner: bool = False) -> bytes:
    """The key of the chain.

    Args:
        any_owner: see `check_private`.

    Raises:
        ConfigError: there is none, it cannot be read, others may read it, or it is not a key.
    """
    key = read_private(path, "the audit key", any_owner=any_owner)
    if len(key) != KEY_BYTES:
        raise ConfigError(f"the audit key {str(path)!r} has {len(key)} bytes instead of {KEY_BYTES}; restore it from a backup")
    return key


def create_key(path: Path) -> bytes:
    """The key of the chain, made now if there is none yet.

    Raises:
        ConfigError: as `read_key`, or it cannot be written.
    """
    if not path.exists():
        create_private(path, secrets.token_bytes(KEY_BYTES))
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
        create_private(private, pem)
    try:
        key = serialization.load_pem_private_key(read_private(private, "the checkpoint key"), password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the checkpoint key {str(private)!r} is not a PEM key; restore it from a backup") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"the checkpoint key {str(private)!r} is not an Ed25519 key; restore it from a backup")
    public_pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    if not public.exists():
        create_private(public, public_pem)
    if public.read_bytes() != public_pem:
        raise ConfigError(
            f"{str(public)!r} is not the public half of {str(private)!r}; delete the former to have it written again"
        )
    return key
