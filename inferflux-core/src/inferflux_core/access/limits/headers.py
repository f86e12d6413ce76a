"""What a reply says about the caller's quotas, in OpenAI's x-ratelimit-{limit,remaining,reset}-{requests,tokens}."""

from __future__ import annotations

import math
from collections.abc import Sequence

from inferflux_core.access.limits.quotas import Demand
from inferflux_core.access.limits.usage import MINUTE, Reading


def limit_headers(demands: Sequence[Demand], readings: Sequence[Reading], day_left: float) -> dict[str, str]:
    """The headers of the tightest quota for requests and for tokens, the one with the least left; none for what has no limit.

    Quotas of a model are left out: what remains of them tells what other tenants do.

    Args:
        day_left: seconds to the next day (UTC), when daily tokens start anew.
    """
    requests: list[tuple[int, int, float]] = []  # remaining, limit, seconds until all is there again
    tokens: list[tuple[int, int, float]] = []
    for demand, used in zip(demands, readings, strict=True):
        if demand.shared:
            continue
        limits = demand.limits
        if limits.rpm is not None:
            requests.append((_remaining(limits.rpm, used.requests), limits.rpm, used.requests * MINUTE / limits.rpm))
        if limits.tpm is not None:
            tokens.append((_remaining(limits.tpm, used.tokens), limits.tpm, used.tokens * MINUTE / limits.tpm))
        if limits.daily_tokens is not None:
            tokens.append((_remaining(limits.daily_tokens, used.day_tokens), limits.daily_tokens, day_left))
    headers = {}
    for kind, windows in (("requests", requests), ("tokens", tokens)):
        if windows:
            remaining, limit, reset = min(windows)
            headers[f"x-ratelimit-limit-{kind}"] = str(limit)
            headers[f"x-ratelimit-remaining-{kind}"] = str(remaining)
            headers[f"x-ratelimit-reset-{kind}"] = go_duration(reset)
    return headers


def go_duration(seconds: float) -> str:
    """A duration as Go writes it, rounded up to milliseconds: `120ms`, `1s`, `6m0s`, `1h0m0.5s`."""
    milliseconds = max(0, math.ceil(round(seconds * 1000, 3)))
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest // 1000}.{rest % 1000:03}".rstrip("0").rstrip(".") + "s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text


def _remaining(limit: int, used: float) -> int:
    # A thousandth: what drained within a moment is no use back, and dust of the arithmetic no use gone.
    return max(0, math.floor(limit - used + 0.001))
