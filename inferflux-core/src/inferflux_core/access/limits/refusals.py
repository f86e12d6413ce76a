"""The words of a 429: what is used up and whose quota it is. They name nobody but the caller."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from inferflux_core.access.limits.quotas import Demand
from inferflux_core.access.limits.usage import Refusal
from inferflux_core.errors import RateLimitError
from inferflux_core.identity import ANONYMOUS


def rate_limited(
    demands: Sequence[Demand], refusal: Refusal, *, model: str, tokens: int, headers: Mapping[str, str]
) -> RateLimitError:
    """The error for a refusal.

    Args:
        tokens: how many were asked for; 0 if it was about a request as such.
    """
    demand = demands[refusal.which]
    return RateLimitError(
        _message(demand, refusal, model, tokens),
        kind=refusal.kind,
        retry_after=refusal.wait,
        code="insufficient_quota" if refusal.kind == "daily_tokens" else None,
        limit_headers=headers,
    )


def _message(demand: Demand, refusal: Refusal, model: str, tokens: int) -> str:
    limits, owner = demand.limits, _owner(demand.subject)
    again = f"Try again in {max(1, math.ceil(refusal.wait))} s"
    if refusal.kind == "requests":
        return f"Too many requests to model {model!r}: the limit of {owner} is {limits.rpm} requests a minute. {again}."
    if refusal.kind == "concurrency":
        return (
            f"Too many requests to model {model!r} at one time: the limit of {owner} is {limits.concurrency} concurrent "
            "requests. Wait for one to end."
        )
    needs = f", and this request needs {tokens} (prompt and answer)" if tokens else ""
    if refusal.kind == "daily_tokens":
        return (
            f"Too many tokens today for model {model!r}: the quota of {owner} is {limits.daily_tokens} tokens a day{needs}. "
            "It starts anew at 00:00 UTC; retrying before does not help."
        )
    if limits.tpm is not None and tokens > limits.tpm:
        return (
            f"This request to model {model!r} needs {tokens} tokens (prompt and answer), and the limit of {owner} is "
            f"{limits.tpm} tokens a minute: it can never pass. Shorten the prompt or lower max_tokens."
        )
    return (
        f"Too many tokens for model {model!r}: the limit of {owner} is {limits.tpm} tokens a minute{needs}. "
        f"{again}, or lower max_tokens."
        if tokens
        else f"Too many tokens for model {model!r}: the limit of {owner} is {limits.tpm} tokens a minute. {again}."
    )


def _owner(subject: str) -> str:
    kind, _, name = subject.partition(":")
    if kind == "key":
        return "this API key"
    if kind == "tenant":
        return f"tenant {name!r}"
    if kind == "model":
        return f"model {name!r}, for all its users together,"
    return "callers without a credential together" if subject == ANONYMOUS else "this user"
