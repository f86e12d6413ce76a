"""What the head of a request must be, beyond what the HTTP parser refuses by itself (RFC 9112)."""

from __future__ import annotations

import httptools

from inferflux_core.serving.connections import Refusal

Headers = list[tuple[bytes, bytes]]

_METHODS = frozenset({b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"})
_VERSION = Refusal(505, "http_version_not_supported", "This server speaks HTTP/1.1 and HTTP/1.0 only.")
_METHOD = Refusal(
    501, "method_not_supported", "This server knows the methods GET, HEAD, POST, PUT, PATCH, DELETE and OPTIONS only."
)
_TRANSFER_CODING = Refusal(501, "transfer_coding_not_supported", "The only Transfer-Encoding that is accepted is 'chunked'.")
_CHUNKED_IN_1_0 = Refusal(400, "malformed_request", "HTTP/1.0 has no Transfer-Encoding; send Content-Length (RFC 9112, 6.1).")
_TARGET = Refusal(
    400,
    "malformed_request",
    "The request target must be a path such as '/v1/models'; a whole URL is accepted only for the host that the Host header "
    "names, and a fragment never (RFC 9112, section 3.2).",
)


class HeadRefused(Exception):
    """Raised in a callback of the parser to make it stop; the refusal says why."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.code)
        self.refusal = refusal


def check_head(method: bytes, version: str, headers: Headers) -> None:
    """Whether this server can answer such a request.

    Raises:
        HeadRefused: not HTTP/1.x, an unknown method, or a body that two servers might see end in different places.
    """
    if version not in ("1.1", "1.0"):
        raise HeadRefused(_VERSION)
    if method not in _METHODS:
        raise HeadRefused(_METHOD)
    for name, value in headers:
        if name == b"transfer-encoding":
            # The parser takes `gzip, chunked` and leaves the gzip to us.
            if value.strip().lower() != b"chunked":
                raise HeadRefused(_TRANSFER_CODING)
            if version == "1.0":
                raise HeadRefused(_CHUNKED_IN_1_0)


def split_target(target: bytes, method: bytes, headers: Headers) -> tuple[bytes, bytes]:
    """Path and query of a request target.

    Raises:
        HeadRefused: a URL of another host than the one in the Host header, or no path at all.
    """
    if b"#" in target:
        raise HeadRefused(_TARGET)
    if target[:1] == b"/":
        path, _, query = target.partition(b"?")
        return path, query
    if target == b"*" and method == b"OPTIONS":
        return target, b""
    try:
        url = httptools.parse_url(target)
    except httptools.HttpParserInvalidURLError:
        raise HeadRefused(_TARGET) from None
    if url.schema is None or url.host is None or url.userinfo is not None or url.schema.lower() not in (b"http", b"https"):
        raise HeadRefused(_TARGET)
    # The authority is compared as it was written: what the parser makes of it is not what another server may read.
    authority = target.partition(b"://")[2].partition(b"/")[0].partition(b"?")[0]
    if [value.lower() for name, value in headers if name == b"host"] != [authority.lower()]:
        raise HeadRefused(_TARGET)
    return url.path or b"/", url.query or b""
