"""CPU time that access control adds to a request: API key, a policy of 300 rules, three quotas and the audit log.

    .venv/bin/python tools/bench_admission.py [--requests 20000] [--keys 1000] [--rules 300]

Prints microseconds of this thread's CPU time: for whole requests as the server makes them (authenticate, find the model, admit,
reserve, settle, record), for each of these, and for decisions that are in no cache.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from inferflux_core.access.admission import Judged
from inferflux_core.access.audit.events import AuditEvent
from inferflux_core.access.keys.records import NewKey
from inferflux_core.access.services import AccessServices
from inferflux_core.errors import RequestError
from inferflux_core.identity import Principal
from inferflux_core.plugins import load_plugins
from inferflux_core.settings import Limits, Settings
from inferflux_core.telemetry.metrics import Metrics

LIMITS = Limits(rpm=10**9, tpm=10**9, concurrency=1000, daily_tokens=10**12)
ROLES = 50


@dataclass(frozen=True, slots=True)
class Model:
    name: str


class Directory:
    def get(self, name: str | None) -> Model:
        return Model(name or "demo")


def policy(rules: int, keys: list[str]) -> str:
    """`rules` p rows spread over 50 roles, and one g row a key."""
    lines = ["role, " + ", ".join(f"r{i}" for i in range(ROLES))]
    for i in range(rules):
        lines.append(f"p, role:r{i % ROLES}, t{i % 7}, model/m{i // ROLES}-*, generate, {'deny' if i % 29 == 28 else 'allow'}")
    lines += [f"g, key:{key}, role:r{i % ROLES}, *" for i, key in enumerate(keys)]
    return "\n".join(lines) + "\n"


class Clock:
    """Collects CPU microseconds by name."""

    def __init__(self) -> None:
        self.samples: defaultdict[str, list[float]] = defaultdict(list)

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        begun = time.thread_time_ns()
        yield
        self.samples[name].append((time.thread_time_ns() - begun) / 1000)

    def report(self) -> None:
        sys.stdout.write(f"{'':26}{'median':>10}{'p99':>10}{'max':>10}   microseconds of CPU\n")
        for name, values in self.samples.items():
            values.sort()
            columns = statistics.median(values), values[int(len(values) * 0.99)], values[-1]
            sys.stdout.write(f"{name:26}" + "".join(f"{value:10.1f}" for value in columns) + "\n")


async def main(requests: int, num_keys: int, rules: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = Settings.model_validate(
            {
                "state_dir": folder / "state",
                "auth": {"providers": ["api_keys"]},
                "policy": {"file": folder / "policy.csv"},
                "limits": {"default": LIMITS, "tenants": {"*": LIMITS}, "models": {"*": LIMITS}},
            }
        )
        registry = load_plugins()
        (folder / "policy.csv").write_text("role, none\np, role:none, *, api/models, read, allow\n")
        access = AccessServices.open(settings, Metrics(), registry)
        await access.start()
        assert access.keys is not None
        assert access.policy is not None
        keys = []
        for i in range(num_keys):
            new = NewKey.model_validate({"name": f"key {i}", "tenant": f"t{i % 7}", "scopes": ["generate"]})
            keys.append(await access.keys.create(new))
        (folder / "policy.csv").write_text(policy(rules, [record.id for record, _ in keys]))
        await access.policy.reload()
        clock = Clock()
        await cold_decisions(access, keys, clock)
        for number in range(requests):
            await one_request(access, keys[number % min(100, num_keys)][1], f"m{number % 6}-x", clock)
        clock.report()
        await access.close()


async def cold_decisions(access: AccessServices, keys: list[tuple[object, str]], clock: Clock) -> None:
    for number, (_, key) in enumerate(keys):
        principal = await access.admission.authenticate(key, "127.0.0.1")
        with clock.time("decision, in no cache"):
            access.admission.decide(principal, f"model/m{number % 6}-{number}", "generate")


async def one_request(access: AccessServices, key: str, model: str, clock: Clock) -> None:
    admission, judged = access.admission, list[Judged]()
    begun = time.thread_time_ns()
    with clock.time("  authenticate"):
        principal = await admission.authenticate(key, "127.0.0.1")
    allowed = True
    with clock.time("  find the model"):
        try:
            admission.find(principal, Directory(), model, "generate", judged)
        except RequestError:
            allowed = False
    if allowed:
        await use(access, principal, model, clock)
    with clock.time("  audit record"):
        await access.audit.record(
            AuditEvent(
                event="request.completed", request_id="x" * 32, principal=principal, address="127.0.0.1", fields=dict(FIELDS)
            )
        )
    clock.samples["request, warm"].append((time.thread_time_ns() - begun) / 1000)


async def use(access: AccessServices, principal: Principal, model: str, clock: Clock) -> None:
    with clock.time("  admit"):
        admitted = await access.admission.admit(principal, model)
    with clock.time("  reserve and settle"):
        await admitted.reserve(100, 200)
        await admitted.settle(150)


FIELDS = {
    "api": "/v1/chat/completions", "method": "POST", "status": 200, "latency_ms": 12, "auth_method": "api_keys",
    "stream": True, "address_source": "peer", "ended_by": "server", "model": "demo", "model_requested": "demo",
    "model_digest": "fp_0123456789ab", "tokens_in": 100, "tokens_out": 50, "tokens_cached": 0, "finish_reason": "stop",
    "parameters": "0123456789abcdef",
}  # fmt: skip

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--keys", type=int, default=1000)
    parser.add_argument("--rules", type=int, default=300)
    arguments = parser.parse_args()
    asyncio.run(main(arguments.requests, arguments.keys, arguments.rules))
