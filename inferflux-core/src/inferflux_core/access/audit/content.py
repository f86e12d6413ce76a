"""What is kept of prompts: nothing, a keyed hash, a text with what looks personal or secret blacked out, or the text.

Blacking out goes by form, in favour of too much: a date may look like a telephone number. It is no proof that nothing
personal is left. Every pattern needs time in proportion to the text: possessive quantifiers leave nothing to try again.
"""

from __future__ import annotations

import re
from typing import Literal

from inferflux_core.access.audit.chain import keyed_hash
from inferflux_core.access.audit.events import MAX_CONTENT, Json
from inferflux_core.access.keys.form import PREFIX

_MARK = "[redacted]"
# What straddles the place where the text is cut is recognised by what follows it.
_BEYOND = 1024

_PATTERNS = (
    re.compile(r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(PREFIX + r"[A-Za-z0-9_]{4,}+"),
    re.compile(r"\beyJ[A-Za-z0-9_-]{4,}+(?:\.[A-Za-z0-9_-]*+){1,4}"),  # a signed or encrypted JSON web token
    re.compile(r"(?i)\b(?:bearer|basic)\s{1,8}[A-Za-z0-9._~+/=-]{6,}+"),
    re.compile(r"(?i)\b(?:password|passwd|passphrase|secret|token|api[_ -]?key)\"?\s{0,8}[:=]\s{0,8}[^\s,;]++"),
    re.compile(r"(?<![\w-])(?:sk|pk|rk|gh[a-z]|github_pat|glpat|xox[a-z]|hf|AKIA|ASIA)[-_]?[A-Za-z0-9_-]{14,}+"),
    re.compile(r"(?<![A-Za-z0-9_+/-])[A-Za-z0-9_+/-]{32,}+={0,2}"),  # any long word of the alphabets that keys use
    re.compile(r"(?<![\w.%+'-])[\w.%+'-]++@[\w-]++(?:\.[\w-]++)*+"),
    re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}+(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{1,4})?+"),
    re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?!\d)"),
    re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}+(?: ?[A-Z0-9]{1,4})?\b"),  # bank accounts
    re.compile(r"\+?(?<!\d)\d(?:[ ()./-]{0,3}+\d){6,}+"),  # cards, telephones, and other numbers of seven digits or more
)

Kind = Literal["none", "hash", "redacted", "full"]


def kept_content(kind: Kind, text: str, key: bytes) -> dict[str, Json]:
    """What the record of a request keeps of its prompt, as fields of its event.

    `{}`, `{"prompt_hmac": ...}`, or `{"prompt": ...}`, with `"prompt_cut": true` if the text was longer than 32 KiB. A plain
    hash of a short prompt could be guessed; a keyed one cannot, and still tells that two prompts are the same.
    """
    if kind == "none":
        return {}
    if kind == "hash":
        return {"prompt_hmac": keyed_hash(key, "prompt", text.encode("utf-8", "surrogatepass"))}
    kept = text if kind == "full" else redacted(text[: MAX_CONTENT + _BEYOND])
    if len(text) <= MAX_CONTENT and len(kept) <= MAX_CONTENT:
        return {"prompt": kept}
    return {"prompt": kept[:MAX_CONTENT], "prompt_cut": True}


def redacted(text: str) -> str:
    """The text with what looks like a credential, an address or a number of a person replaced by a mark."""
    for pattern in _PATTERNS:
        text = pattern.sub(_MARK, text)
    return text
