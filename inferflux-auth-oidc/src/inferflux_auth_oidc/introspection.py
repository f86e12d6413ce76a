"""Opaque tokens: ask the issuer (RFC 7662), and remember the answer for a short while.

Anybody can invent tokens, and each one costs a call. So the calls that one client address has under way are few; its next ones
wait for those, and nobody else waits for them.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from inferflux_auth_oidc.circuit_breaker import CircuitBreaker
from inferflux_auth_oidc.claim_checks import check_claims, check_client, expiry
from inferflux_auth_oidc.client_proof import ClientProof
from inferflux_auth_oidc.discovery import Discovery
from inferflux_auth_oidc.fair_turns import FairTurns
from inferflux_auth_oidc.issuer_http import FetchError, IssuerHttp
from inferflux_auth_oidc.principals import PrincipalMap
from inferflux_auth_oidc.refusal import Refusal, Unavailable
from inferflux_auth_oidc.settings import IntrospectionSettings, IssuerSettings
from inferflux_core.client_network import client_network
from inferflux_core.identity import Principal

logger = logging.getLogger("inferflux.oidc")

_POSITIVE_FOR, _NEGATIVE_FOR = 60.0, 10.0  # seconds
_REMEMBERED = 10_000  # answers of each kind
_CONCURRENT, _CONCURRENT_OF_CLIENT = 4, 2  # calls at a time
_WAITING, _WAITING_OF_CLIENT = 512, 64  # calls that may wait for a turn
# Replies about this server, a busy endpoint or the way there. Any other 4xx is about the token: issuers and what stands before
# them refuse odd ones so, and nobody who sends those may have the issuer counted as failing.
_NOT_ABOUT_TOKEN = frozenset({401, 403, 407, 408, 425, 429})
_ABOUT_CLIENT = frozenset({"invalid_client", "unauthorized_client"})  # RFC 6749 section 5.2: with status 400, also of us
_NO_ENDPOINT = frozenset({404, 405, 410})


@dataclass(frozen=True, slots=True)
class _Answer:
    """What an issuer said of one token: a principal, or the reason why not; `until` in monotonic seconds."""

    principal: Principal | None
    reason: str
    until: float


class Introspection:
    """Asks one issuer about tokens. Requests with the same token wait for the same call."""

    def __init__(
        self,
        issuer: IssuerSettings,
        settings: IntrospectionSettings,
        audiences: frozenset[str],
        http: IssuerHttp,
        discovery: Discovery,
        *,
        timeout: float,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        count: Callable[[str], None],
    ) -> None:
        """
        Raises:
            ConfigError: the client's secret or key cannot be used.
        """
        self._issuer = issuer
        self._settings = settings
        self._audiences = audiences
        self._http = http
        self._discovery = discovery
        self._timeout = timeout
        self._now = now
        self._monotonic = monotonic
        self._count = count
        self._proof = ClientProof(settings, issuer.issuer, now)
        self._principals = PrincipalMap(issuer)
        self._breaker = CircuitBreaker(monotonic)
        self._turns = FairTurns(_CONCURRENT, _CONCURRENT_OF_CLIENT, waiting_of_client=_WAITING_OF_CLIENT, waiting=_WAITING)
        # Apart, so that a flood of invented tokens does not push out those of real callers.
        self._accepted: OrderedDict[bytes, _Answer] = OrderedDict()
        self._refused: OrderedDict[bytes, _Answer] = OrderedDict()
        self._calls: dict[bytes, asyncio.Task[_Answer | float]] = {}

    async def principal(self, token: str, address: str | None) -> Principal:
        """Who holds a token.

        Args:
            address: of the client that presents it.

        Raises:
            Refusal: the issuer does not vouch for it, or it is not for this server.
            Unavailable: the issuer cannot be asked now.
        """
        # The whole digest: a shorter key would make one caller out of two (CVE-2026-35030).
        digest = hashlib.sha256(token.encode()).digest()
        answer: _Answer | float | None = self._remembered(digest)
        if answer is None:
            call = self._calls.get(digest)
            if call is None:
                run = self._run(token, digest, client_network(address))
                call = asyncio.create_task(run, name="inferflux-oidc-introspection")
                self._calls[digest] = call
            # Shielded: a client that goes away must not end the call that others wait for.
            answer = await asyncio.shield(call)
        if not isinstance(answer, _Answer):
            raise Unavailable(answer)
        if answer.principal is None:
            raise Refusal(answer.reason)
        return answer.principal

    async def close(self) -> None:
        """End the calls that are under way."""
        calls = list(self._calls.values())
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        self._calls.clear()

    def _remembered(self, digest: bytes) -> _Answer | None:
        for answers in (self._accepted, self._refused):
            if (answer := answers.get(digest)) is not None:
                if self._monotonic() < answer.until:
                    answers.move_to_end(digest)
                    return answer
                del answers[digest]
        return None

    async def _run(self, token: str, digest: bytes, client: str) -> _Answer | float:
        """One call: the answer, or seconds until another try makes sense. Raises nothing but cancellation."""
        try:
            async with self._turns.turn(client, self._timeout):
                if wait := self._breaker.enter():
                    return wait
                # Not together with the wait: a short rest of the time would make the issuer look slow.
                async with asyncio.timeout(self._timeout):
                    said = await self._guarded(token)
        except Unavailable as unavailable:
            return unavailable.retry_after
        except TimeoutError:
            return 1.0
        finally:
            self._calls.pop(digest, None)
        if said is None:
            return 1.0
        answer = self._judge(said)
        answers = self._refused if answer.principal is None else self._accepted
        answers[digest] = answer
        if len(answers) > _REMEMBERED:
            answers.popitem(last=False)
        return answer

    async def _guarded(self, token: str) -> dict[str, Any] | None:
        """Ask, and tell the circuit breaker how it went; None if it went wrong."""
        ok: bool | None = None
        try:
            said = await self._ask(token)
            ok = True
            return said
        except asyncio.CancelledError:
            ok = False  # out of time; at shutdown nobody asks any more
            raise
        except FetchError as error:
            ok = False
            self._discovery.forget()
            fields = {"issuer": self._issuer.issuer, "reason": str(error)}
            if error.status in (400, 401, 403):
                fields["cure"] = "check introspection.client_id and its secret or key"
            logger.warning("an issuer could not be asked about a token", extra={"fields": fields})
            return None
        finally:
            if ok is False:
                self._count("introspection_failed")
            if self._breaker.leave(ok):
                self._count("circuit_opened")

    async def _ask(self, token: str) -> dict[str, Any]:
        endpoint = self._settings.endpoint or await self._discovery.endpoint("introspection_endpoint")
        proof = self._proof.make()
        form = {"token": token, "token_type_hint": "access_token", **proof.form}
        try:
            said = (await self._http.post(endpoint, form, proof.headers)).body
        except FetchError as error:
            status = error.status or 0
            if not 400 <= status < 500 or status in _NOT_ABOUT_TOKEN or error.code in _ABOUT_CLIENT:
                raise
            if status in _NO_ENDPOINT:
                self._discovery.forget()
                fields = {"issuer": self._issuer.issuer, "status": status, "cure": "check introspection.endpoint"}
                logger.warning("an issuer has nothing to say of a token", extra={"fields": fields})
            said = {"active": False}
        self._count("introspected")
        return said

    def _judge(self, said: dict[str, Any]) -> _Answer:
        """Turn what the issuer said into an answer. Anything but a plain yes with good claims is a no."""
        try:
            # Identity: 1 and "true" are not a yes.
            if said.get("active") is not True:
                raise Refusal("token_inactive")
            kind = said.get("token_type", "Bearer")
            if not isinstance(kind, str) or kind.lower() not in ("bearer", "access_token"):
                raise Refusal("token_type")  # a refresh token is active too
            claims = said
            if "sub" not in said and isinstance(said.get("client_id"), str):
                claims = {**said, "sub": said["client_id"]}  # a client for itself, as RFC 9068 names it in JWTs
            now = self._now()
            check_claims(claims, self._issuer, self._audiences, now, iat_required=False)
            check_client(claims, self._issuer.clients)
            principal = self._principals.principal(claims)
            return _Answer(principal, "", self._monotonic() + min(_POSITIVE_FOR, expiry(claims) - now))
        except Refusal as refusal:
            return _Answer(None, refusal.reason, self._monotonic() + _NEGATIVE_FOR)
