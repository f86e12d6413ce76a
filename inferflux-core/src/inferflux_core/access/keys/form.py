"""The form of an API key: `ifx_<env>_<id>_<secret><checksum>`.

    ifx_live_4fK1c09ZtQpX_<43 characters><6 characters>
    |   |    |             |              CRC-32 of all before it, base62: typing errors are refused without asking the store
    |   |    |             256 random bits, base62
    |   |    the id, base62: not secret; logs, the admin API and policies name the key by it
    |   where the key belongs (`live`, `test`), so that a leaked one tells
    for secret scanners

No `-` and no `.`: a double click selects all of it.
"""

from __future__ import annotations

import re
import secrets
import string
import zlib
from dataclasses import dataclass

PREFIX = "ifx_"
ID_LENGTH = 12
SECRET_LENGTH = 43  # 62**43 > 2**256
CHECKSUM_LENGTH = 6  # 62**6 > 2**32

_BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
_ENV = "[a-z][a-z0-9]{0,15}"
_BODY = rf"{PREFIX}({_ENV})_([0-9A-Za-z]{{{ID_LENGTH}}})_[0-9A-Za-z]{{{SECRET_LENGTH + CHECKSUM_LENGTH}}}"

KEY_PATTERN = rf"\b{PREFIX}{_ENV}_[0-9A-Za-z]{{{ID_LENGTH}}}_[0-9A-Za-z]{{{SECRET_LENGTH + CHECKSUM_LENGTH}}}\b"
"""Regular expression that finds keys in text, for secret scanners (also in RE2's syntax)."""

_ENV_FORM = re.compile(_ENV)
_ID_FORM = re.compile(rf"[0-9A-Za-z]{{{ID_LENGTH}}}")
_FORM = re.compile(_BODY)


@dataclass(frozen=True, slots=True)
class ParsedKey:
    """What a key says of itself; whether it is true is not known yet."""

    env: str
    id: str


def new_key(env: str = "live", key_id: str | None = None) -> tuple[str, str]:
    """A new secret, and a new id unless one is given.

    Returns:
        The id, and the whole key: the only time that it exists in clear.

    Raises:
        ValueError: `env` or `key_id` have not the form they have in a key.
    """
    if not is_env(env):
        raise ValueError(f"{env!r} cannot stand in a key: use 1 to 16 lower-case letters and digits, a letter first")
    if key_id is None:
        key_id = _random(ID_LENGTH)
    elif not is_key_id(key_id):
        raise ValueError(f"{key_id!r} is no key id: it has {ID_LENGTH} letters and digits")
    body = f"{PREFIX}{env}_{key_id}_{_random(SECRET_LENGTH)}"
    return key_id, body + checksum(body)


def parse_key(text: str) -> ParsedKey | None:
    """The parts of a key; None if it has not the form of one or its checksum is wrong. Costs the same few microseconds for
    any text, however long."""
    match = _FORM.fullmatch(text)
    if match is None or checksum(text[:-CHECKSUM_LENGTH]) != text[-CHECKSUM_LENGTH:]:
        return None
    return ParsedKey(match[1], match[2])


def is_env(text: str) -> bool:
    """Whether a text can be the `<env>` of a key."""
    return _ENV_FORM.fullmatch(text) is not None


def is_key_id(text: str) -> bool:
    """Whether a text has the form of a key's id."""
    return _ID_FORM.fullmatch(text) is not None


def checksum(body: str) -> str:
    """The last six characters of a key, made from all the others (ASCII)."""
    number = zlib.crc32(body.encode("ascii"))
    digits = ""
    for _ in range(CHECKSUM_LENGTH):
        number, digit = divmod(number, 62)
        digits = _BASE62[digit] + digits
    return digits


def _random(length: int) -> str:
    return "".join(secrets.choice(_BASE62) for _ in range(length))
