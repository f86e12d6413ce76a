"""Tables of the access store, as numbered migrations: `PRAGMA user_version` says how many of them a file has had."""

from __future__ import annotations

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE keys (
            id TEXT PRIMARY KEY,
            name TEXT NOT NULL,
            tenant TEXT NOT NULL,
            owner TEXT NOT NULL,
            scopes TEXT NOT NULL,           -- JSON, as are roles, models, limits and cidr
            roles TEXT NOT NULL,
            models TEXT,
            limits TEXT,
            priority INTEGER NOT NULL,
            cidr TEXT NOT NULL,
            created_at REAL NOT NULL,       -- Unix seconds, as are all times
            expires_at REAL,
            last_used_at REAL,
            revoked_at REAL,
            rotated_at REAL,
            version INTEGER NOT NULL
        ) STRICT, WITHOUT ROWID
        """,
        """
        CREATE TABLE key_hashes (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            key_id TEXT NOT NULL REFERENCES keys (id),
            pepper_id TEXT NOT NULL,
            hash BLOB NOT NULL CHECK (length(hash) = 32),
            valid_until REAL                -- NULL: the key's current secret
        ) STRICT
        """,
        "CREATE INDEX key_hashes_of_key ON key_hashes (key_id, seq)",
        "CREATE TABLE peppers (id TEXT PRIMARY KEY, check_value BLOB NOT NULL) STRICT, WITHOUT ROWID",
        "CREATE TABLE documents (name TEXT PRIMARY KEY, value TEXT NOT NULL, version INTEGER NOT NULL) STRICT, WITHOUT ROWID",
    ),
)
"""Append only: a file in the field may have had any number of them."""
