"""Every error InferFlux raises on purpose, as one tree.

InferFluxError
├── ConfigError                      start-up: a setting, a file, a port; never reaches a client
│   ├── PluginError                  a plugin that cannot be loaded, or a name nobody registered
│   └── ModelFileError               a model reference, path or file that is refused
└── RequestError                     one request: has an HTTP status and OpenAI's type and code
    ├── InvalidRequestError          400
    │   └── ContextLengthExceededError
    ├── ModelNotFoundError           404
    ├── RequestTooLargeError         413
    ├── NotSupportedError            501
    ├── RequestTimeoutError          504
    └── UnavailableError             503, always with Retry-After
        ├── OverloadedError          the queue is full
        ├── ModelLoadingError        the model is not loaded (yet, or any more)
        ├── EngineRestartedError     the engine process died under the request
        └── DrainingError            the server is shutting down

Messages say what was wrong with `!r` around values and what to do about it. They may reach a client, so they never hold
paths of the server, prompt text or another request's data.
"""

from __future__ import annotations

import math
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


class ModelNotFoundError(RequestError):
    status = 404
    type = "invalid_request_error"
    default_code = "model_not_found"
    grpc_code = "NOT_FOUND"


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


class DrainingError(UnavailableError):
    default_code = "draining"
