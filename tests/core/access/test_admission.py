"""Admission: credential scopes, model lists, the policy and the quotas together; any error denies."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from inferflux_core.access.admission import RESERVED_OUTPUT_TOKENS, Admission, Judged
from inferflux_core.access.limits.failures import FailureLimit
from inferflux_core.access.limits.quotas import LimitRules, make_limiter
from inferflux_core.access.policy.store import PolicyStore
from inferflux_core.errors import (
    AccessUnavailableError,
    ForbiddenError,
    InvalidRequestError,
    ModelNotFoundError,
    RateLimitError,
)
from inferflux_core.identity import Action, Principal
from inferflux_core.settings import Limits, LimitSettings, PolicySettings
from inferflux_core.telemetry.metrics import Metrics

POLICY = b"""\
role, user
role, lister

p, role:user, acme, model/acme-*, generate, allow
p, role:user, acme, model/acme-internal, generate, deny
p, role:lister, *, api/models, read, allow
"""


@dataclass
class Model:
    name: str


class Models:
    def __init__(self, *names: str) -> None:
        self.names = names

    def get(self, name: str | None) -> Model:
        if name not in self.names:
            raise ModelNotFoundError(
                f"The model {name!r} does not exist; GET /v1/models lists the models there are.", param="model"
            )
        return Model(name)


MODELS = Models("acme-chat", "acme-internal", "globex-chat")


def who(
    *scopes: Action, roles: tuple[str, ...] = ("user",), models: tuple[str, ...] | None = None, limits: Limits | None = None
) -> Principal:
    return Principal(
        subject="key:abc",
        tenant="acme",
        method="api_keys",
        scopes=frozenset(scopes),
        roles=frozenset(roles),
        models=models,
        limits=limits,
    )


def admission(policy: PolicyStore | None = None, limits: LimitSettings | None = None) -> Admission:
    limits = limits or LimitSettings()
    return Admission(
        providers=(),
        metadata_url=None,
        policy=policy,
        limiter=make_limiter(limits, lambda event: None),
        limit_rules=LimitRules(limits),
        failures=FailureLimit(20),
        metrics=Metrics(),
    )


@pytest.fixture
async def policy(tmp_path: Path) -> AsyncIterator[PolicyStore]:
    file = tmp_path / "policy.csv"
    file.write_bytes(POLICY)
    store = PolicyStore(PolicySettings(file=file), lambda event: None)
    await store.start()
    yield store
    await store.close()


def outcome(admission: Admission, principal: Principal, model: str, action: Action = "generate") -> str:
    """`allow`, or the class and code of the refusal; and the decision is always on record."""
    judged: list[Judged] = []
    try:
        found = admission.find(principal, MODELS, model, action, judged)
    except (ForbiddenError, ModelNotFoundError) as error:
        assert all(not j.decision.allowed for j in judged)
        return str(error.code)
    assert (found.name, judged[0].obj, judged[0].decision.allowed) == (model, f"model/{model}", True)
    return "allow"


@pytest.mark.parametrize(
    ("principal", "model", "expected"),
    [
        (who("generate"), "acme-chat", "allow"),
        (who("admin"), "acme-chat", "allow"),  # this scope includes the others; the policy still has its say
        (who("read"), "acme-chat", "insufficient_scope"),  # said before any model is looked for
        (who("read"), "no-such-model", "insufficient_scope"),
        (who("read", roles=("user", "lister")), "acme-chat", "insufficient_scope"),
        (who("generate"), "acme-internal", "model_not_found"),
        (who("generate"), "globex-chat", "model_not_found"),
        (who("generate"), "no-such-model", "model_not_found"),
        (who("generate", roles=()), "acme-chat", "model_not_found"),
        (who("generate", models=("acme-chat",)), "acme-chat", "allow"),
        (who("generate", models=("globex-*",)), "acme-chat", "model_not_found"),
        (who("generate", models=("globex-*",)), "globex-chat", "model_not_found"),
        (who("generate", "read", roles=("user", "lister")), "globex-chat", "model_not_allowed"),
        (who("generate", "read", roles=("user", "lister")), "acme-internal", "model_not_allowed"),
        (who("generate", "read", roles=("user", "lister"), models=("acme-chat",)), "globex-chat", "model_not_found"),
    ],
)
async def test_all_three_must_agree(policy: PolicyStore, principal: Principal, model: str, expected: str) -> None:
    assert outcome(admission(policy), principal, model) == expected


async def test_without_a_policy_the_credential_decides() -> None:
    there = admission()
    assert outcome(there, who("generate"), "globex-chat") == "allow"
    assert outcome(there, who("generate", models=("acme-*",)), "globex-chat") == "model_not_found"
    assert outcome(there, who("read"), "globex-chat") == "insufficient_scope"


async def test_hidden_and_missing_models_have_the_same_words(policy: PolicyStore) -> None:
    there = admission(policy)
    bodies = []
    for name in ("globex-chat", "no-such-mod"):
        with pytest.raises(ModelNotFoundError) as caught:
            there.find(who("generate"), MODELS, name, "generate", [])
        bodies.append(str(caught.value.body()).replace(name, "X"))
    assert bodies[0] == bodies[1]


async def test_a_policy_that_fails_denies(policy: PolicyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(type(policy.current), "decide", broken)
    there = admission(policy)
    with pytest.raises(AccessUnavailableError) as caught:
        there.find(who("generate"), MODELS, "acme-chat", "generate", [])
    assert (caught.value.status, caught.value.code) == (503, "policy_unavailable")


async def test_a_reservation_never_asks_for_more_than_the_quota_holds() -> None:
    """A request without max_tokens may draw thousands; a quota of fewer a minute must still serve it."""
    there = admission()
    admitted = await there.admit(who("generate", limits=Limits(tpm=100)), "tiny")
    await admitted.reserve(30, 8000)
    assert admitted.headers["x-ratelimit-remaining-tokens"] == "0"
    await admitted.settle(50)
    with pytest.raises(RateLimitError) as caught:
        await (await there.admit(who("generate", limits=Limits(tpm=100)), "tiny")).reserve(99, 8000)
    assert caught.value.kind == "tokens"


async def test_output_is_reserved_up_to_a_bound() -> None:
    there = admission()
    admitted = await there.admit(who("generate", limits=Limits(tpm=10_000)), "tiny", 2)
    await admitted.reserve(100, 8000)
    assert admitted.headers["x-ratelimit-remaining-tokens"] == str(10_000 - 100 - 2 * RESERVED_OUTPUT_TOKENS)
    await admitted.settle(150)
    await admitted.settle(150)
    again = await there.admit(who("generate", limits=Limits(tpm=10_000)), "tiny")
    await again.reserve(0, 1)
    assert int(again.headers["x-ratelimit-remaining-tokens"]) >= 10_000 - 150 - 1


async def test_one_request_cannot_owe_the_tokens_of_hours() -> None:
    """A single answer may take its quota into debt; many share what a minute holds."""
    there = admission()
    one = await there.admit(who("generate", limits=Limits(tpm=1000)), "tiny")
    assert one.max_tokens(8000, 100) == 8000
    many = await there.admit(who("generate", limits=Limits(tpm=1000)), "tiny", 256)
    assert many.max_tokens(400, 64) == (1000 - 64) // 256
    free = await there.admit(who("generate"), "tiny", 256)
    assert free.max_tokens(400, 64) == 400


async def test_a_slot_is_an_answer_not_a_request() -> None:
    there = admission()
    principal = who("generate", limits=Limits(concurrency=4))
    first = await there.admit(principal, "tiny", 3)
    with pytest.raises(RateLimitError) as caught:
        await there.admit(principal, "tiny", 2)
    assert caught.value.kind == "concurrency"
    second = await there.admit(principal, "tiny", 1)
    await first.settle(0)
    third = await there.admit(principal, "tiny", 3)
    for admitted in (second, third):
        await admitted.settle(0)
    with pytest.raises(InvalidRequestError) as refused:
        await there.admit(principal, "tiny", 5)
    assert (refused.value.status, refused.value.code) == (400, "too_many_answers")
