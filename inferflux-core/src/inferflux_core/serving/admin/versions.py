"""Entity tags: what was read, and the writes that depend on it (RFC 9110, sections 8.8.3 and 13.1.1)."""

from __future__ import annotations

import hashlib
import re

from starlette.requests import Request
from starlette.responses import Response

from inferflux_core.errors import InvalidRequestError, PreconditionFailedError, PreconditionRequiredError
from inferflux_core.serving.error_responses import json_response

_TAG = re.compile(r'(W/)?"([\x21\x23-\x7e]*)"')


def tagged(body: bytes, version: int | str | None = None, status: int = 200) -> Response:
    """A JSON reply with an ETag: of its version, or of its bytes where it has none."""
    tag = hashlib.blake2b(body, digest_size=8).hexdigest() if version is None else version
    return json_response(body, status, {"ETag": f'"{tag}"', "Cache-Control": "no-store"})


def expected_version(request: Request, *, required: bool = True) -> str | None:
    """The version that a write depends on; None for `If-Match: *`, which takes whatever is there when it is written.

    Args:
        required: whether a write without If-Match is refused; otherwise it takes any version too.

    Raises:
        PreconditionRequiredError: there is no If-Match.
        PreconditionFailedError: a weak tag, which never matches.
        InvalidRequestError: If-Match is not one tag.
    """
    value = request.headers.get("if-match")
    if value is None:
        if required:
            raise PreconditionRequiredError(
                "This write needs the header If-Match with the ETag of what it replaces, so that nobody's change is lost: "
                "read it first. 'If-Match: *' replaces whatever is there."
            )
        return None
    if value.strip() == "*":
        return None
    match = _TAG.fullmatch(value.strip())
    if match is None:
        raise InvalidRequestError("If-Match must be one entity tag, such as '\"3\"', or '*'.", param="If-Match")
    if match[1]:
        raise PreconditionFailedError("If-Match has a weak entity tag (W/), which never matches; send the ETag as it came.")
    return match[2]


def expected_number(request: Request, *, required: bool = True) -> int | None:
    """As `expected_version`, for versions that are counted."""
    version = expected_version(request, required=required)
    if version is None:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", version):
        raise PreconditionFailedError(f"The version {version[:40]!r} is none of this resource; read it again.")
    return int(version)
