"""Every error InferFlux raises on purpose, as one tree.

InferFluxError
├── ConfigError                      start-up: a setting, a file, a port; never reaches a client
│   ├── PluginError                  a plugin that cannot be loaded, or a name nobody registered
│   └── ModelFileError               a model reference, path or file that is refused
└── RequestError                     one request: has an HTTP status and OpenAI's type and code
    ├── InvalidRequestError          400
    │   └── ContextLengthExceededError
    ├── AuthenticationError          401, with WWW-Authenticate
    ├── ForbiddenError               403
    ├── NotFoundError                404
    │   └── ModelNotFoundError
    ├── ConflictError                409
    ├── PreconditionFailedError      412, an If-Match that is not current
    │   └── PreconditionRequiredError    428, no If-Match
    ├── RequestTooLargeError         413
    ├── RateLimitError               429, with Retry-After and x-ratelimit-*
    ├── NotSupportedError            501
    ├── RequestTimeoutError          504
    └── UnavailableError             503, always with Retry-After
        ├── OverloadedError          the queue is full
        ├── ModelLoadingError        the model is not loaded (yet, or any more)
        ├── EngineRestartedError     the engine process died under the request
        ├── AccessUnavailableError   who asks, what is allowed or how much cannot be found out: never answered with a yes
        └── DrainingError            the server is shutting down

Messages say what was wrong with `!r` around values and what to do about it. They may reach a client, so they never hold
paths of the server, prompt text or another request's data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar


class InferFluxError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(InferFluxError):
    """The server cannot start or go on as configured. The command line prints the message and exits with 2."""


class PluginError(ConfigError):
    """A plugin failed to load or was asked for by a name that nobody registered. Names the distribution."""


class ModelFileError(ConfigError):
    """A model reference cannot be resolved, or its files are missing, outside the allowed roots, or malformed."""


class RequestError(InferFluxError):
    """One request failed; the server and every other request go on.

    Attributes:
        status: HTTP status.
        type: OpenAI's `error.type`.
        code: OpenAI's `error.code`; None where OpenAI has none.
        param: dotted path of the offending request field, or None.
        retry_after: seconds after which a retry may succeed, or None.
        grpc_code: name of the matching gRPC status code.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = "internal_error"
    grpc_code: ClassVar[str] = "INTERNAL"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers this error adds to its response."""
        return {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}

    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's four-key error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequestError(RequestError):
    status = 400
    type = "invalid_request_error"
    default_code: ClassVar[str | None] = None
    grpc_code = "INVALID_ARGUMENT"


class ContextLengthExceededError(InvalidRequestError):
    default_code = "context_length_exceeded"
    grpc_code = "OUT_OF_RANGE"


class AuthenticationError(RequestError):
    """Who asks is not known. The same words for a missing, an unknown, an expired and a revoked credential.

    Attributes:
        reason: why, for the audit log and a metrics label: a short word such as `unknown_key`; never sent.
        challenge: value of the WWW-Authenticate header; `Admission` knows where a credential can be had and sets it.
    """

    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"
    grpc_code = "UNAUTHENTICATED"

    def __init__(self, reason: str) -> None:
        super().__init__(
            "The request has no valid credential. Send an API key or an access token as 'Authorization: Bearer ...'."
        )
        self.reason = reason
        self.challenge = "Bearer"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": self.challenge}


class ForbiddenError(RequestError):
    """Who asks is known and may not do this. Codes: `insufficient_scope`, `model_not_allowed`, `policy_denied`, and
    `origin_not_allowed` for a web page.

    Attributes:
        scope: the scope that was missing, for the WWW-Authenticate header (RFC 6750); None for other causes.
    """

    status = 403
    type = "permission_error"
    default_code = "policy_denied"
    grpc_code = "PERMISSION_DENIED"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, scope: str | None = None) -> None:
        super().__init__(message, param=param, code=code)
        self.scope = scope

    @property
    def headers(self) -> dict[str, str]:
        if self.scope is None:
            return {}
        return {"WWW-Authenticate": f'Bearer error="insufficient_scope", scope="{self.scope}"'}


class NotFoundError(RequestError):
    status = 404
    type = "invalid_request_error"
    default_code = "not_found"
    grpc_code = "NOT_FOUND"


class ModelNotFoundError(NotFoundError):
    default_code = "model_not_found"


class ConflictError(RequestError):
    status = 409
    type = "conflict_error"
    default_code = None
    grpc_code = "ALREADY_EXISTS"


class PreconditionFailedError(RequestError):
    """A write that names another version than the current one: somebody else wrote in between."""

    status = 412
    type = "conflict_error"
    default_code = "version_mismatch"
    grpc_code = "FAILED_PRECONDITION"


class PreconditionRequiredError(PreconditionFailedError):
    """A write without If-Match (RFC 6585)."""

    status = 428
    default_code = "version_required"


class RateLimitError(RequestError):
    """The caller's own quota is used up; 503 is the server's.

    Attributes:
        kind: `requests`, `tokens`, `concurrency`, `daily_tokens` or `failures`; a metrics label.
        limit_headers: the x-ratelimit-* headers of the reply.
    """

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"
    grpc_code = "RESOURCE_EXHAUSTED"

    def __init__(
        self,
        message: str,
        *,
        kind: str,
        retry_after: float,
        code: str | None = None,
        limit_headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, code=code, retry_after=retry_after)
        self.kind = kind
        self.limit_headers = dict(limit_headers or {})

    @property
    def headers(self) -> dict[str, str]:
        # A day's quota does not come back by retrying (`insufficient_quota`); OpenAI's clients read this header.
        never = {"x-should-retry": "false"} if self.code == "insufficient_quota" else {}
        return {**super().headers, **self.limit_headers, **never}


class RequestTooLargeError(RequestError):
    status = 413
    type = "invalid_request_error"
    default_code = "request_too_large"
    grpc_code = "RESOURCE_EXHAUSTED"


class NotSupportedError(RequestError):
    status = 501
    type = "not_supported_error"
    default_code = None
    grpc_code = "UNIMPLEMENTED"


class RequestTimeoutError(RequestError):
    status = 504
    type = "timeout_error"
    default_code = "request_timeout"
    grpc_code = "DEADLINE_EXCEEDED"


class UnavailableError(RequestError):
    status = 503
    default_code = "no_backend"
    grpc_code = "UNAVAILABLE"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, retry_after: float = 1.0) -> None:
        super().__init__(message, param=param, code=code, retry_after=retry_after)


class OverloadedError(UnavailableError):
    default_code = "overloaded"


class ModelLoadingError(UnavailableError):
    default_code = "model_loading"


class EngineRestartedError(UnavailableError):
    default_code = "engine_restarted"


class AccessUnavailableError(UnavailableError):
    """Codes: `auth_unavailable`, `policy_unavailable`, `limits_unavailable`, `audit_unavailable`."""

    default_code = "auth_unavailable"


class DrainingError(UnavailableError):
    default_code = "draining"
