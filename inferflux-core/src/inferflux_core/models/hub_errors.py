"""What went wrong at the hub, in words that name the cure. Tokens and signed addresses never get into a message."""

from __future__ import annotations

import errno

from inferflux_core.errors import ModelFileError
from inferflux_core.interfaces import SourceContext
from inferflux_core.models.hub_reference import HubReference

# by name, because the client library has changed its HTTP library twice and each has classes of its own
_NETWORK = frozenset({"TransportError", "ConnectionError", "Timeout", "TimeoutError", "ProxyError"})


class TooLongError(OSError):
    """A server sends more than the file has."""


def is_network_failure(error: BaseException) -> bool:
    """Whether the hub could not be reached or did not answer, so that what is cached may be used instead."""
    if _status(error) in (500, 502, 503, 504):
        return True
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _NETWORK:
        return True
    return error.__cause__ is not None and "LocalEntryNotFoundError" in names and is_network_failure(error.__cause__)


def explained(error: Exception, ref: str, wanted: HubReference, context: SourceContext, folder: str) -> ModelFileError:
    """The error to raise instead of one of the client library's.

    Args:
        folder: where downloads go.
    """
    return ModelFileError(f"{ref!r}: {_reason(error, wanted, context, folder)}")


def _reason(error: Exception, wanted: HubReference, context: SourceContext, folder: str) -> str:
    from huggingface_hub import errors

    token = "the token in use" if context.token else "HF_TOKEN or hub.token"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{wanted.repo} is gated: accept its terms at https://huggingface.co/{wanted.repo}, and set hub.token or HF_TOKEN "
            f"to a token of that account"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{wanted.repo} has no revision {wanted.revision or 'main'!r}; correct it, or leave '@...' out"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no repository {wanted.repo!r}, or {token} may not read it; correct the name, or set another token"
    if isinstance(error, errors.EntryNotFoundError) and not is_network_failure(error):
        return f"{wanted.repo} lacks a file that it lists; try again, or choose another revision"
    status = _status(error)
    if status == 401:
        return f"the hub does not accept {token} (HTTP 401); set hub.token or HF_TOKEN to a valid token"
    if status == 403:
        return f"{token} may not read {wanted.repo} (HTTP 403); give it that right, or set another one"
    if status == 429:
        return "the hub refuses more requests for now (HTTP 429); wait some minutes, or set hub.token"
    if is_network_failure(error):
        return (
            "the hub cannot be reached, and the model is not in the cache; check network and proxy, or pull the model where "
            "there is one"
        )
    if status is not None:
        return f"the hub answered with HTTP {status}; try again later"
    if isinstance(error, TooLongError):
        return "the server sent more than the file has; nothing was kept; check the proxy or mirror in between"
    if isinstance(error, OSError):
        return _disk(error, folder)
    return f"fetching failed ({type(error).__name__}); try again, and report it if it stays so"


def _disk(error: OSError, folder: str) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left in {folder}; nothing half-written was kept; free some, or set hub.cache_dir"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        return f"{folder} cannot be written ({error.strerror}); correct its permissions, or set hub.cache_dir"
    if "Consistency check failed" in str(error):
        return "the server sent less or more than the file has; nothing was kept; try again"
    return f"writing to {folder} failed ({error.strerror or type(error).__name__}); set hub.cache_dir, or try again"


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
