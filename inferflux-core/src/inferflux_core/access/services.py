"""The parts of access control, put together from the configuration and stopped together."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from inferflux_core.access.admission import Admission
from inferflux_core.access.audit.events import AuditEvent
from inferflux_core.access.audit.log import AuditLog, NoAudit
from inferflux_core.access.audit.strangers import Strangers
from inferflux_core.access.audit.trail import AuditTrail
from inferflux_core.access.keys.provider import ApiKeyProvider
from inferflux_core.access.keys.ring import KeyRing
from inferflux_core.access.limits.failures import FailureLimit
from inferflux_core.access.limits.quotas import Limiter, LimitRules, make_limiter
from inferflux_core.access.policy.file import PolicyError
from inferflux_core.access.policy.store import PolicyEvent, PolicyStore
from inferflux_core.access.store import DEFAULT_STORE, AccessStore, Document
from inferflux_core.errors import AccessUnavailableError, ConfigError
from inferflux_core.identity import AuthContext, AuthProvider
from inferflux_core.plugins import PluginRegistry
from inferflux_core.settings import LimitTable, Settings
from inferflux_core.state_dir import state_dir
from inferflux_core.telemetry.metrics import Metrics

logger = logging.getLogger("inferflux.access")

LIMITS_DOCUMENT = "limits"
"""Name in the store of the quotas that the admin API wrote; they take the place of those in the settings."""

METADATA_PATH = "/.well-known/oauth-protected-resource"
"""Where clients learn which authorization servers this server believes (RFC 9728)."""

# How long a slot and a reservation outlive a server that died with them, beyond the longest request.
_LEASE_MARGIN_S = 60.0


@dataclass(slots=True, kw_only=True)
class AccessServices:
    """Everything that decides, counts and records. What the admin API changes is changed here.

    Attributes:
        admission: decides for every surface.
        keys: the API keys; None unless the provider `api_keys` is configured.
        policy: the policy file; None if there is none.
        limit_rules: the quotas in force.
        store: documents that the admin API writes; None without an auth provider.
        audit: the audit log, or what stands for it when it is off.
        strangers: how much of it those without a credential may fill.
    """

    admission: Admission
    limiter: Limiter
    limit_rules: LimitRules
    audit: AuditTrail
    strangers: Strangers
    providers: Sequence[AuthProvider] = ()
    keys: KeyRing | None = None
    policy: PolicyStore | None = None
    store: AccessStore | None = None

    @classmethod
    def open(cls, settings: Settings, metrics: Metrics, registry: PluginRegistry | None = None) -> AccessServices:
        """Put together what the settings ask for. Nothing runs before `start`.

        Args:
            registry: where the auth providers are found; None needs settings without one.

        Raises:
            ConfigError: a part cannot work as configured.
        """
        # What can fail by the configuration alone comes before what opens files.
        limiter = make_limiter(
            settings.limits, metrics.limiter_event, lease_seconds=settings.server.request_timeout_s + _LEASE_MARGIN_S
        )
        audit: AuditTrail = NoAudit()
        if settings.audit.enabled or (settings.audit.enabled is None and settings.auth.providers):
            audit = AuditLog(settings.audit, state_dir(settings), metrics.audit)
            metrics.observe_audit(lambda: audit.head)
        policy = None
        if settings.policy.file is not None:
            policy = PolicyStore(settings.policy, lambda event: _policy_changed(event, metrics, audit))
        providers = _providers(settings, metrics, registry)
        keys = next((p.keys for p in providers if isinstance(p, ApiKeyProvider)), None)
        store = None
        if providers:
            store = AccessStore(state_dir(settings) / DEFAULT_STORE) if keys is None else keys.store
        rules = LimitRules(settings.limits)
        admission = Admission(
            providers=providers,
            metadata_url=_metadata_url(settings.server.public_url, providers),
            policy=policy,
            limiter=limiter,
            limit_rules=rules,
            failures=FailureLimit(settings.auth.max_failures_per_minute),
            metrics=metrics,
        )
        return cls(
            admission=admission,
            limiter=limiter,
            limit_rules=rules,
            audit=audit,
            strangers=Strangers(audit, lambda: metrics.audit("suppressed")),
            providers=providers,
            keys=keys,
            policy=policy,
            store=store,
        )

    async def start(self) -> None:
        """Start all parts.

        Raises:
            ConfigError: a part cannot work as configured; those already started are stopped again.
        """
        try:
            await self.audit.start()
            if self.policy is not None:
                await self.policy.start()
            await self.limiter.start()
            for provider in self.providers:
                await provider.start()
            if self.store is not None and (document := await self.store.get_document(LIMITS_DOCUMENT)) is not None:
                self.limit_rules.replace(_table(document))
        except AccessUnavailableError as error:
            await self.close()
            raise ConfigError(f"access control cannot start: {error.message}") from error
        except BaseException:
            await self.close()
            raise

    async def reload_policy(self) -> None:
        """Look at the policy file now. What is wrong with it is logged, counted and recorded; the last good one stays."""
        if self.policy is not None:
            with contextlib.suppress(PolicyError):
                await self.policy.reload()

    async def close(self) -> None:
        """Stop all parts, the audit log last. One that fails to stop keeps no other from it."""
        async with contextlib.AsyncExitStack() as parts:
            parts.push_async_callback(self.audit.close, AuditEvent(event="server.stop"))
            parts.callback(self.strangers.flush)
            if self.store is not None:
                parts.push_async_callback(asyncio.to_thread, self.store.close)
            parts.push_async_callback(self.limiter.close)
            if self.policy is not None:
                parts.push_async_callback(self.policy.close)
            for provider in self.providers:
                parts.push_async_callback(provider.close)


def _providers(settings: Settings, metrics: Metrics, registry: PluginRegistry | None) -> list[AuthProvider]:
    names = settings.auth.providers
    if not names:
        return []
    if registry is None:
        raise ConfigError("auth.providers needs the plugins that provide them")
    folder = state_dir(settings)
    made: list[AuthProvider] = []
    for name in names:
        context = AuthContext(
            state_dir=folder,
            resource=settings.server.public_url,
            count=functools.partial(metrics.auth_event, name),
        )
        provider: Any = registry.create("auth provider", name, settings.auth.settings.get(name, {}), context)
        made.append(provider)
    return made


def _metadata_url(public_url: str | None, providers: Sequence[AuthProvider]) -> str | None:
    """Where clients learn where to get a credential; None if there is no authorization server."""
    if public_url is None or not any(provider.metadata().get("authorization_servers") for provider in providers):
        return None
    return metadata_url(public_url)


def metadata_url(public_url: str) -> str:
    """Where the metadata of a resource is: the well-known path goes between its host and its own path (RFC 9728, 3.1)."""
    parts = urlsplit(public_url)
    return f"{parts.scheme}://{parts.netloc}{METADATA_PATH}{parts.path.rstrip('/')}"


def _table(document: Document) -> LimitTable:
    try:
        return LimitTable.model_validate(document.value)
    except ValidationError as error:
        raise ConfigError(
            f"the limits in the key store are not valid; another version may have written them:\n{error}"
        ) from None


def _policy_changed(event: PolicyEvent, metrics: Metrics, audit: AuditTrail) -> None:
    """A change of the policy file, taken or rejected, is counted, logged and recorded."""
    metrics.policy_reload(event.kind)
    fields: dict[str, object] = {"version": event.version}
    if event.kind == "rejected":
        fields["problems"] = [f"line {p.line}: {p.message}" if p.line else p.message for p in event.problems[:20]]
        for problem in event.problems:
            logger.error("policy rejected, the last good one stays: line %s: %s", problem.line or "-", problem.message)
    else:
        logger.info("policy %s is in force", event.version)
    audit.record_soon(AuditEvent(event=f"policy.{event.kind}", fields=fields))
