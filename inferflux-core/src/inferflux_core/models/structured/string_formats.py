"""Patterns of JSON Schema's string formats.

Each describes texts that are valid for sure, and not always all of them: a date never is February 29, whose year would have
to be counted. Formats that the standard does not know are annotations.
"""

from __future__ import annotations

from typing import Final

_DATE = (
    r"(?:19|20)[0-9]{2}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_PLAIN_LABEL = r"[A-Za-z](?:[A-Za-z0-9]{0,30})"
_HOST = rf"{_LABEL}(?:\.{_PLAIN_LABEL}){{0,3}}"  # within the 253 characters of a name
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_H = "[0-9a-fA-F]{1,4}"
_IPV6 = "|".join(
    [rf"(?:{_H}:){{7}}{_H}"]
    + [rf"(?:{_H}:){{{n}}}(?::{_H}){{1,{7 - n}}}" for n in range(1, 7)]
    + [rf":(?::{_H}){{1,7}}", rf"(?:{_H}:){{1,7}}:", "::"]
)
_PCHAR = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"
_TAIL = rf"(?:\?(?:{_PCHAR}|[/?])*)?(?:#(?:{_PCHAR}|[/?])*)?"
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]{0,20}"
_NO_COLON = r"(?:[A-Za-z0-9._~!$&'()*+,;=@-]|%[0-9A-Fa-f]{2})"
_AUTHORITY = rf"{_HOST}(?::[0-9]{{1,4}})?"
_URI = rf"(?:https?|ftp|wss?)://{_AUTHORITY}(?:/{_PCHAR}*)*{_TAIL}|(?:urn|mailto|tel|data):{_PCHAR}+"
_REFERENCE = rf"{_URI}|/(?:{_PCHAR}+(?:/{_PCHAR}*)*)?{_TAIL}|{_NO_COLON}+(?:/{_PCHAR}*)*{_TAIL}"
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,30}"
_EMAIL = rf"{_ATOM}(?:\.{_ATOM})?@{_HOST}"
_TIME_PERIOD = r"T(?:[0-9]{1,6}H(?:[0-9]{1,6}M(?:[0-9]{1,6}S)?)?|[0-9]{1,6}M(?:[0-9]{1,6}S)?|[0-9]{1,6}S)"
_DAYS = r"(?:[0-9]{1,6}Y(?:[0-9]{1,6}M(?:[0-9]{1,6}D)?)?|[0-9]{1,6}M(?:[0-9]{1,6}D)?|[0-9]{1,6}D)"
_POINTER = r"(?:/(?:[^~/]|~[01])*)*"
_HEX = "[0-9a-fA-F]"

_FORMATS: Final = {
    "date": _DATE,
    "time": _TIME,
    "date-time": rf"{_DATE}T{_TIME}",
    "duration": rf"P(?:{_DAYS}(?:{_TIME_PERIOD})?|{_TIME_PERIOD}|[0-9]{{1,6}}W)",
    "email": _EMAIL,
    "idn-email": _EMAIL,
    "hostname": _HOST,
    "idn-hostname": _HOST,
    "ipv4": rf"(?:{_BYTE}\.){{3}}{_BYTE}",
    "ipv6": _IPV6,
    "uri": _URI,
    "iri": _URI,
    "uri-reference": _REFERENCE,
    "iri-reference": _REFERENCE,
    "uri-template": r"(?:[A-Za-z0-9._~/:?&=-]|\{[a-z][a-z0-9_]*\})*",
    "uuid": rf"{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}",
    "json-pointer": _POINTER,
    "relative-json-pointer": rf"(?:0|[1-9][0-9]{{0,5}})(?:#|{_POINTER})",
    "regex": r"\^?(?:[A-Za-z0-9 _:;,<>=!@%&-]|\\[dwsDWS.]|\[[A-Za-z0-9 _]+\][+*?]?)*\$?",
}


def format_pattern(name: str | None) -> str | None:
    """The pattern of a format as a whole match; None if texts of this format may be anything."""
    pattern = None if name is None else _FORMATS.get(name)
    return None if pattern is None else f"^(?:{pattern})$"
