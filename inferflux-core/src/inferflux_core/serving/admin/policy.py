"""`/v1/admin/policy`: reading, checking, testing, explaining and replacing the policy file."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Self

import msgspec
from fastapi import APIRouter
from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from inferflux_core.access.keys.records import Roles, Tenant, key_principal
from inferflux_core.access.policy.casbin_policy import Policy, version_of
from inferflux_core.access.policy.cases import read_cases, run_cases
from inferflux_core.access.policy.explain import Explanation
from inferflux_core.access.policy.file import PolicyError, Problem
from inferflux_core.access.policy.lint import check_policy
from inferflux_core.access.policy.store import PolicyStore
from inferflux_core.errors import InvalidRequestError, NotFoundError, UnavailableError
from inferflux_core.identity import ACTIONS, Action, Principal
from inferflux_core.serving.admin.body import AdminBodyReader, is_text
from inferflux_core.serving.admin.record import record
from inferflux_core.serving.admin.versions import expected_version, tagged
from inferflux_core.serving.guard import GuardedRoute, needs
from inferflux_core.serving.openai.wire import encode
from inferflux_core.serving.openapi import documented
from inferflux_core.serving.services import Services
from inferflux_core.settings import Group

PATH = "/v1/admin/policy"
MAX_CASES = 2000
_SHOWN_PROBLEMS = 10


class PolicyBody(Group):
    """A policy to check or to put in force. The same may be sent as `text/csv`, as the file is."""

    policy: str = Field(description="The whole policy file (CSV).")


class PolicyTestBody(Group):
    """What to test, with what."""

    policy: str | None = Field(None, description="A candidate; by default the policy in force.")
    cases: str | None = Field(
        None, description="Test file (CSV: subject, tenant, object, action, expected); by default the server's own."
    )


class ExplainBody(Group):
    """Who would do what. Exactly one of `key` and `subject`."""

    key: Annotated[str, Field(max_length=64)] | None = Field(None, description="Id of an API key of this server.")
    subject: Annotated[str, Field(min_length=1, max_length=512)] | None = Field(
        None, description="`user:<issuer>|<sub>` or `key:<id>`, as the audit log has it."
    )
    roles: Roles = Field(frozenset(), description="Roles that the subject's credential brings, without `role:`.")
    tenant: Tenant = Field("default", description="The subject's tenant.")
    object: Annotated[str, Field(min_length=1, max_length=512)] = Field(description="`model/<name>` or `api/<group>`.")
    action: Action = Field(description="`generate`, `embed`, `read` or `admin`.")

    @model_validator(mode="after")
    def _one_subject(self) -> Self:
        if (self.key is None) == (self.subject is None):
            raise InvalidRequestError("Send exactly one of 'key' and 'subject'.", param="subject")
        return self


class PolicyProblem(msgspec.Struct, frozen=True):
    """What is wrong with a policy or test file; line null is the file as a whole."""

    line: int | None
    message: str
    severity: str


class PolicyReply(msgspec.Struct, frozen=True, kw_only=True):
    """The policy in force. `file_problems`: why the file as it is now is not; null if it is."""

    policy: str
    version: str
    warnings: list[PolicyProblem]
    file_problems: list[PolicyProblem] | None


class CheckReply(msgspec.Struct, frozen=True, kw_only=True):
    """What a candidate would change."""

    ok: bool
    version: str
    problems: list[PolicyProblem]
    added: list[str]
    removed: list[str]


class PolicyTestReply(msgspec.Struct, frozen=True, kw_only=True):
    """How the cases ended; a line each for those that failed."""

    ok: bool
    version: str
    cases: int | None
    failures: list[str]


class ExplainReply(msgspec.Struct, frozen=True, kw_only=True):
    """The decision that a request would get, and what the policy says by itself."""

    allowed: bool
    engine: str
    rule: str | None
    version: str
    policy: Explanation | None


def policy_routes(services: Services) -> APIRouter:
    """The routes of the policy file."""
    router = APIRouter(tags=["Admin"], route_class=GuardedRoute)
    reader = AdminBodyReader(services.settings.server)

    def store() -> PolicyStore:
        if services.access.policy is None:
            raise UnavailableError("This server has no policy file; set policy.file.", code="policy_store_disabled")
        return services.access.policy

    async def candidate(request: Request) -> bytes:
        if is_text(request):
            return await reader.read_text(request)
        return (await reader.read(request, PolicyBody)).policy.encode()

    def shown() -> Response:
        policy, error = store().current, store().last_error
        reply = PolicyReply(
            policy=policy.text.decode("utf-8", "replace"),
            version=policy.version,
            warnings=_problems(policy.warnings),
            file_problems=None if error is None else _problems(error),
        )
        return tagged(encode(reply), policy.version)

    @router.get(PATH, **documented(None, PolicyReply))
    @needs("api/policy", "admin")
    async def show_policy() -> Response:
        """The policy in force, with its version."""
        return shown()

    @router.put(PATH, **documented(PolicyBody, PolicyReply, changes=True))
    @needs("api/policy", "admin")
    async def replace_policy(request: Request) -> Response:
        """Put a policy in force and into the file, as it was sent; both or neither. It must pass the server's tests. Needs
        If-Match."""
        version = expected_version(request)
        text = await candidate(request)
        try:
            before, policy = await store().replace(text, version)
        except PolicyError as error:
            raise _refused(error) from None
        added, removed = await asyncio.to_thread(_difference, before, policy)
        await record(
            services, request, "policy.replaced", version=policy.version, before=before.version, added=added, removed=removed
        )
        return shown()

    @router.post(PATH + "/check", **documented(PolicyBody, CheckReply, changes=True))
    @needs("api/policy", "admin")
    async def check_candidate(request: Request) -> Response:
        """What is wrong with a candidate, whether it passes the server's tests, and what it would change. Changes nothing."""
        text = await candidate(request)
        problems = await asyncio.to_thread(check_policy, text)
        added: list[str] = []
        removed: list[str] = []
        ok = not any(problem.severity == "error" for problem in problems)
        if ok and services.access.policy is not None:
            try:
                policy = await store().dry_run(text)
                added, removed = await asyncio.to_thread(_difference, store().current, policy)
            except PolicyError as error:
                ok, problems = False, [*error.problems]
        return tagged(
            encode(CheckReply(ok=ok, version=version_of(text), problems=_problems(problems), added=added, removed=removed))
        )

    @router.post(PATH + "/test", **documented(PolicyTestBody, PolicyTestReply, changes=True))
    @needs("api/policy", "admin")
    async def test_policy(request: Request) -> Response:
        """Run test cases against the policy in force or a candidate. Changes nothing."""
        body = await reader.read(request, PolicyTestBody)
        try:
            if body.policy is None:
                policy = store().current
            else:
                policy = await asyncio.to_thread(Policy.compile, body.policy.encode(), "candidate")
            count: int | None = None
            if body.cases is None:
                failures = await _own_tests(store(), policy)
            else:
                count, failures = await asyncio.to_thread(_tested, policy, body.cases.encode())
        except PolicyError as error:
            raise _refused(error) from None
        return tagged(encode(PolicyTestReply(ok=not failures, version=policy.version, cases=count, failures=failures)))

    @router.post(PATH + "/explain", **documented(ExplainBody, ExplainReply, changes=True))
    @needs("api/policy", "admin")
    async def explain_policy(request: Request) -> Response:
        """Why a request would be allowed or denied."""
        body = await reader.read(request, ExplainBody)
        principal = await _principal(services, body)
        decision = services.access.admission.decide(principal, body.object, body.action)
        policy = services.access.policy
        explanation = None
        if policy is not None:
            explanation = await asyncio.to_thread(policy.current.explain, principal, body.object, body.action)
        reply = ExplainReply(
            allowed=decision.allowed,
            engine=decision.engine,
            rule=decision.rule,
            version=decision.version,
            policy=explanation,
        )
        return tagged(encode(reply))

    @router.post(PATH + "/reload", **documented(None, PolicyReply, changes=True))
    @needs("api/policy", "admin")
    async def reload_policy(request: Request) -> Response:
        """Look at the file now. One that is not good is refused with 400, and the policy in force stays."""
        before = store().current.version
        try:
            policy = await store().reload()
        except PolicyError as error:
            raise _refused(error) from None
        await record(services, request, "policy.reload_requested", version=policy.version, before=before)
        return shown()

    return router


async def _principal(services: Services, body: ExplainBody) -> Principal:
    if body.key is not None:
        if services.access.keys is None:
            raise NotFoundError(f"There is no key {body.key[:64]!r}: this server keeps no API keys.", param="key")
        return key_principal(await services.access.keys.get(body.key))
    return Principal(
        subject=body.subject or "", tenant=body.tenant, method="explain", scopes=frozenset(ACTIONS), roles=body.roles
    )


async def _own_tests(store: PolicyStore, policy: Policy) -> list[str]:
    """What of the server's own tests fails; they are read anew."""
    try:
        await store.dry_run(policy.text)
    except PolicyError as error:
        return [str(problem) for problem in error.problems if problem.severity == "error"]
    return []


def _tested(policy: Policy, text: bytes) -> tuple[int, list[str]]:
    """How many cases a test file has, and those that fail. Takes a while; raises PolicyError for a file that is wrong."""
    cases = read_cases(text, "cases")
    if len(cases) > MAX_CASES:
        raise InvalidRequestError(
            f"The test file has {len(cases)} cases, more than {MAX_CASES}, the most that are run at one time; split it.",
            param="cases",
        )
    return len(cases), run_cases(policy, cases)


def _difference(before: Policy, after: Policy) -> tuple[list[str], list[str]]:
    """Rows that are new, and rows that are gone, each in the order of its file."""
    old, new = _rows(before), _rows(after)
    known, kept = set(old), set(new)
    return [row for row in new if row not in known], [row for row in old if row not in kept]


def _rows(policy: Policy) -> list[str]:
    rows = policy.rows
    lines = [str(row) for row in (*rows.rules, *rows.bindings)]
    lines = [line.partition(": ")[2] for line in lines]
    lines += [f"g2, {row.action}, {row.by}" for row in rows.implications]
    return lines + [role.replace("role:", "role, ", 1) for role in rows.roles]


def _problems(problems: Sequence[Problem]) -> list[PolicyProblem]:
    return [PolicyProblem(problem.line, problem.message, problem.severity) for problem in problems]


def _refused(error: PolicyError) -> InvalidRequestError:
    """Without the path of the file, which is the server's own affair."""
    errors = [str(problem) for problem in error.problems if problem.severity == "error"]
    more = f"; and {len(errors) - _SHOWN_PROBLEMS} more" if len(errors) > _SHOWN_PROBLEMS else ""
    return InvalidRequestError(
        f"The policy is refused: {'; '.join(errors[:_SHOWN_PROBLEMS])}{more}.", code="policy_invalid", param="policy"
    )
