"""Admission: the one place that says who asks, what they may do and how much. Every surface goes through it.

    credential -> `authenticate` -> Principal        401, 429 after too many failures, 503 when it cannot be found out
    Principal, api object  -> `authorize`            403
    Principal, model name  -> `find`                 404 for what may not be seen, 403 for what may be seen and not used
    Principal, model       -> `admit`                429; the `Admitted` reserves tokens and settles what was used

A permission is the intersection of the credential's scopes, its list of models and the policy. Any error denies.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from inferflux_core.access.limits.failures import FailureLimit
from inferflux_core.access.limits.quotas import Demand, Lease, Limiter, LimitRules
from inferflux_core.access.policy.casbin_policy import Decision
from inferflux_core.access.policy.match import model_matches
from inferflux_core.access.policy.store import PolicyStore
from inferflux_core.errors import (
    AccessUnavailableError,
    AuthenticationError,
    ForbiddenError,
    InvalidRequestError,
    ModelNotFoundError,
    RateLimitError,
)
from inferflux_core.identity import Action, AuthProvider, Principal
from inferflux_core.telemetry.logging import frames_of
from inferflux_core.telemetry.metrics import Metrics

logger = logging.getLogger("inferflux.access")

# Credentials that were accepted lately, so that a noisy neighbour behind the same address does not lock their holders out.
_KNOWN_CREDENTIALS = 10_000

# Objects that show all models at once, whatever a credential's list of models says.
_ABOUT_ALL_MODELS = frozenset({"api/metrics", "api/models"})

# Output tokens reserved at most for one choice. A request that draws more takes its bucket into debt: what is running is
# never cut off, and the next request waits longer.
RESERVED_OUTPUT_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Judged:
    """One decision about one request, for the audit log."""

    obj: str
    action: Action
    decision: Decision


class Named(Protocol):
    """What admission needs to know of a model."""

    @property
    def name(self) -> str: ...


ViewT_co = TypeVar("ViewT_co", bound=Named, covariant=True)


class ModelDirectory(Protocol[ViewT_co]):
    """Where models are found by name."""

    def get(self, name: str | None) -> ViewT_co:
        """The model of this name or alias; None means the default one. Raises ModelNotFoundError."""


class Admitted:
    """A request that was let in: what it may use, and what it has to give back."""

    __slots__ = ("_answers", "_lease", "_max_tokens", "_metrics", "_tpm")

    def __init__(self, lease: Lease, demands: Sequence[Demand], max_tokens: int | None, answers: int, metrics: Metrics) -> None:
        self._lease = lease
        self._max_tokens = max_tokens
        self._answers = answers
        self._metrics = metrics
        self._tpm = min((d.limits.tpm for d in demands if d.limits.tpm is not None), default=None)

    def max_tokens(self, wanted: int, prompt_tokens: int) -> int:
        """Most output tokens of each answer.

        One answer may take its quota into debt, by at most a context. Several share what a minute holds, or one request
        for hundreds would owe the tokens of hours.

        Args:
            prompt_tokens: of all prompts together.
        """
        if self._max_tokens is not None:
            wanted = min(wanted, self._max_tokens)
        if self._answers > 1 and self._tpm is not None:
            wanted = min(wanted, max(1, (self._tpm - prompt_tokens) // self._answers))
        return wanted

    async def reserve(self, prompt_tokens: int, output_tokens: int) -> None:
        """Take the tokens that the request will use from every quota it is under.

        Args:
            output_tokens: most output tokens of one answer.

        Raises:
            RateLimitError: a quota does not have them now.
        """
        output = min(output_tokens, RESERVED_OUTPUT_TOKENS) * self._answers
        if self._tpm is not None and self._answers == 1:
            # A quota smaller than what a request may draw at most still serves it; it then goes into debt.
            output = min(output, max(0, self._tpm - prompt_tokens))
        try:
            await self._lease.reserve_tokens(prompt_tokens + output)
        except RateLimitError as error:
            self._metrics.rate_limited(error.kind)
            raise

    async def settle(self, used_tokens: int) -> None:
        """Give back what was reserved and not used, and the slot. Idempotent; never raises."""
        await self._lease.settle(used_tokens)

    @property
    def headers(self) -> dict[str, str]:
        """The x-ratelimit-* headers of the reply."""
        return self._lease.headers


class Admission:
    """Decides for every surface. Make one with `AccessServices`."""

    def __init__(
        self,
        *,
        providers: Sequence[AuthProvider],
        metadata_url: str | None,
        policy: PolicyStore | None,
        limiter: Limiter,
        limit_rules: LimitRules,
        failures: FailureLimit,
        metrics: Metrics,
    ) -> None:
        self._providers = tuple(providers)
        self._where = "" if metadata_url is None else f'resource_metadata="{metadata_url}"'
        self._policy = policy
        self._limiter = limiter
        self._rules = limit_rules
        self._failures = failures
        self._metrics = metrics
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._salt = secrets.token_bytes(16)

    @property
    def open(self) -> bool:
        """Whether there is no auth provider: everyone is anonymous, and nobody is an administrator."""
        return not self._providers

    # --- who ----------------------------------------------------------------------------------------------------------

    async def authenticate(self, credential: str | None, address: str | None) -> Principal:
        """Who holds a credential. Without a provider everyone is anonymous, whatever they send.

        Args:
            credential: the one credential of the request; None if it has none.
            address: of the client.

        Raises:
            AuthenticationError: nobody.
            RateLimitError: too many failures from this address lately, and this credential is none that is good.
            AccessUnavailableError: it cannot be found out now.
        """
        if self.open:
            return Principal()
        if not credential:
            # Not counted as a failure: nothing was tried, and probes without a key come often.
            error = AuthenticationError("missing")
            self._metrics.auth_failure(error.reason)
            error.challenge = f"Bearer {self._where}".strip()
            raise error
        mark = self._mark(credential)
        provider = next((p for p in self._providers if p.claims(credential)), None)
        limited = None if mark in self._known else self._over_limit(address)
        if limited is not None and (provider is None or not provider.is_local(credential)):
            self._metrics.rate_limited(limited.kind)
            raise limited
        try:
            if provider is None:
                raise AuthenticationError("unclaimed")
            principal = await self._ask(provider, credential, address)
        except AuthenticationError as error:
            self._known.pop(mark, None)
            self.authentication_failed(error, address)
            if limited is not None:
                self._metrics.rate_limited(limited.kind)
                raise limited from None
            raise
        self._known[mark] = None
        self._known.move_to_end(mark)
        if len(self._known) > _KNOWN_CREDENTIALS:
            self._known.popitem(last=False)
        return principal

    def _over_limit(self, address: str | None) -> RateLimitError | None:
        try:
            self._failures.check(address)
        except RateLimitError as error:
            return error
        return None

    def authentication_failed(self, error: AuthenticationError, address: str | None) -> None:
        """Count a failure and say where a credential can be had; for those that a surface finds by itself, too."""
        error.challenge = ", ".join(filter(None, ('Bearer error="invalid_token"', self._where)))
        self._failures.failed(address)
        self._metrics.auth_failure(error.reason)

    async def _ask(self, provider: AuthProvider, credential: str, address: str | None) -> Principal:
        try:
            principal = await provider.authenticate(credential, address)
        except (AuthenticationError, AccessUnavailableError):
            raise
        except Exception as error:
            logger.error("auth provider %s failed: %s\n%s", type(provider).__name__, type(error).__name__, frames_of(error))
            raise AccessUnavailableError("Who sent this request cannot be found out now. Please retry later.") from None
        if not principal.subject or principal.method == "none":
            logger.error("auth provider %s returned a principal without subject or method", type(provider).__name__)
            raise AccessUnavailableError("Who sent this request cannot be found out now. Please retry later.")
        if principal.expires_at is not None and principal.expires_at <= time.time():
            raise AuthenticationError("expired")
        return principal

    def _mark(self, credential: str) -> bytes:
        return hashlib.blake2b(credential.encode("utf-8", "surrogatepass"), key=self._salt, digest_size=16).digest()

    # --- what ---------------------------------------------------------------------------------------------------------

    def decide(self, principal: Principal, obj: str, action: Action) -> Decision:
        """Whether a principal may do something to an object. The rule says what decided.

        Raises:
            AccessUnavailableError: the policy failed to decide.
        """
        if not _in_scope(principal, action):
            return _out_of_scope(action)
        name = obj.removeprefix("model/")
        if name != obj and principal.models is not None and not any(model_matches(p, name) for p in principal.models):
            return Decision(allowed=False, rule="the credential is not for this model", engine="models", version="")
        if principal.models is not None and obj in _ABOUT_ALL_MODELS:
            return Decision(allowed=False, rule="the credential is for some models only", engine="models", version="")
        if self._policy is None:
            return Decision(allowed=True, rule=None, engine="scopes", version="")
        begun = time.perf_counter()
        try:
            decision = self._policy.current.decide(principal, obj, action)
        except Exception as error:
            logger.error("the policy failed to decide: %s\n%s", type(error).__name__, frames_of(error))
            raise AccessUnavailableError(
                "What this credential may do cannot be found out now. Please retry later.", code="policy_unavailable"
            ) from None
        self._metrics.policy_decision(decision.engine, decision.allowed, time.perf_counter() - begun)
        return decision

    def authorize(self, principal: Principal, obj: str, action: Action, judged: list[Judged]) -> None:
        """Raises ForbiddenError unless the principal may do this; the decision is appended to `judged` in either case."""
        judged.append(Judged(obj, action, self.decide(principal, obj, action)))
        if not judged[-1].decision.allowed:
            raise _forbidden(principal, judged[-1])

    def may_see(self, principal: Principal, model: str) -> bool:
        """Whether a model exists for this principal: it may use it in any way, or read the list of all models."""
        obj = f"model/{model}"
        if any(self.decide(principal, obj, action).allowed for action in ("generate", "embed", "read")):
            return True
        return self.decide(principal, "api/models", "read").allowed

    def visible(self, principal: Principal, models: Sequence[ViewT_co]) -> list[ViewT_co]:
        """Those of the models that exist for this principal."""
        return [model for model in models if self.may_see(principal, model.name)]

    def see(self, principal: Principal, models: ModelDirectory[ViewT_co], name: str | None, judged: list[Judged]) -> ViewT_co:
        """The model of this name, if it exists for this principal; a refusal is appended to `judged`.

        Raises:
            ModelNotFoundError: the same for a model that is not there and for one that may not be seen.
        """
        model = _get(models, name)
        if not self.may_see(principal, model.name):
            obj = f"model/{model.name}"
            judged.append(Judged(obj, "read", self.decide(principal, obj, "read")))
            raise ModelNotFoundError(not_found_message(name), param="model")
        return model

    def find(
        self,
        principal: Principal,
        models: ModelDirectory[ViewT_co],
        name: str | None,
        action: Action,
        judged: list[Judged],
    ) -> ViewT_co:
        """The model to use; the decision about it is appended to `judged`.

        Raises:
            ModelNotFoundError: as in `see`.
            ForbiddenError: it may be seen, but not used so.
        """
        if not _in_scope(principal, action):
            # Whatever the model: that there is one of this name is not told by this.
            judged.append(Judged("model/*", action, _out_of_scope(action)))
            raise _forbidden(principal, judged[-1])
        model = _get(models, name)
        obj = f"model/{model.name}"
        judged.append(Judged(obj, action, self.decide(principal, obj, action)))
        if judged[-1].decision.allowed:
            return model
        if not self.may_see(principal, model.name):
            raise ModelNotFoundError(not_found_message(name), param="model")
        raise _forbidden(principal, judged[-1])

    # --- how much -----------------------------------------------------------------------------------------------------

    async def admit(self, principal: Principal, model: str, answers: int = 1) -> Admitted:
        """Count one request for a model against every quota it is under.

        Args:
            answers: how many it wants at one time, all prompts and choices together.

        Raises:
            InvalidRequestError: it wants more answers at one time than a quota ever allows.
            RateLimitError: one of them is used up; nothing was taken from the others.
            AccessUnavailableError: the counts cannot be reached, and the configuration says to refuse then.
        """
        demands = self._rules.demands(principal, model)
        most = min((d.limits.concurrency for d in demands if d.limits.concurrency is not None), default=answers)
        if answers > most:
            raise InvalidRequestError(
                f"This request wants {answers} answers at one time, all prompts and choices together; at most {most} are "
                f"allowed here. Ask for fewer, one request after the other.",
                code="too_many_answers",
            )
        try:
            lease = await self._limiter.acquire(demands, model, answers)
        except RateLimitError as error:
            self._metrics.rate_limited(error.kind)
            raise
        return Admitted(lease, demands, self._rules.max_tokens(principal, model), answers, self._metrics)

    @contextlib.asynccontextmanager
    async def counted(self, principal: Principal, model: str) -> AsyncIterator[None]:
        """For requests that use a model without generating: they count as requests, and hold a slot while they last.

        Raises:
            RateLimitError, AccessUnavailableError: as in `admit`.
        """
        admitted = await self.admit(principal, model)
        try:
            yield
        finally:
            await admitted.settle(0)


def _get(models: ModelDirectory[ViewT_co], name: str | None) -> ViewT_co:
    """The model, or the very words that are also said of one that may not be seen."""
    try:
        return models.get(name)
    except ModelNotFoundError:
        raise ModelNotFoundError(not_found_message(name), param="model") from None


def not_found_message(name: str | None) -> str:
    """What a client learns of a model that is not there, or not for it."""
    if name is None:
        return "There is no default model that you may use; name a model. GET /v1/models lists those there are."
    return f"The model {name[:128]!r} does not exist; GET /v1/models lists the models there are."


def _in_scope(principal: Principal, action: Action) -> bool:
    return action in principal.scopes or "admin" in principal.scopes


def _out_of_scope(action: Action) -> Decision:
    return Decision(allowed=False, rule=f"the credential is not for {action!r}", engine="scopes", version="")


def _forbidden(principal: Principal, judged: Judged) -> ForbiddenError:
    action, obj = judged.action, judged.obj
    if judged.decision.engine == "scopes":
        scope = principal.scope_prefix + action
        return ForbiddenError(
            f"This credential is not for {action!r}. Use one that has the scope {scope!r}.",
            code="insufficient_scope",
            scope=scope,
        )
    if obj.startswith("model/"):
        return ForbiddenError(
            f"You may not use the model {obj.removeprefix('model/')!r} in this way ({action}). Ask an administrator for "
            f"access, or choose another.",
            code="model_not_allowed",
            param="model",
        )
    return ForbiddenError(f"You may not do this ({action} on {obj!r}). Ask an administrator for access.")
