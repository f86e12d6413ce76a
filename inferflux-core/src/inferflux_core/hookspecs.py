"""The hooks a plugin package may implement.

A plugin is an importable module named by an entry point in the group `inferflux`. Its hooks only register; they run once at
start-up and must import nothing heavy. Installing a plugin activates nothing: what it registers is chosen by name in config.
The docstring of each hook is a complete small plugin, which the test suite runs.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from inferflux_core.identity import AuthProvider
from inferflux_core.interfaces import Backend, ModelSource, Proposer, Registration, Scheduler

PROJECT = "inferflux"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def inferflux_backends() -> Iterable[Registration[Backend]]:  # type: ignore[empty-body]  # pluggy specs have no body
    """Backends, which compute. `factory(settings)` returns a `Backend`.

    Example, a backend that answers without a model:

        from inferflux_core.hookspecs import hookimpl
        from inferflux_core.interfaces import Registration


        def make(settings):
            from inferflux_core.testing.fake_backend import FakeBackend

            return FakeBackend()


        @hookimpl
        def inferflux_backends():
            return [Registration(name="echo", factory=make, summary="answers without a model")]
    """


@hookspec
def inferflux_schedulers() -> Iterable[Registration[Scheduler]]:  # type: ignore[empty-body]  # pluggy specs have no body
    """Schedulers, which decide who runs next. `factory(settings, context)` returns a `Scheduler`; the context is a
    `inferflux_core.engine.scheduler.SchedulerContext`.

    Example, shortest prompt first:

        from inferflux_core.engine.scheduler import TokenBudgetScheduler
        from inferflux_core.hookspecs import hookimpl
        from inferflux_core.interfaces import Registration


        class ShortestPromptFirst(TokenBudgetScheduler):
            def pop_waiting(self):
                shortest = min(self.waiting.values(), key=lambda r: (len(r.tokens), r.arrival_time))
                return self.waiting.pop(shortest.request_id)


        @hookimpl
        def inferflux_schedulers():
            return [
                Registration(
                    name="shortest",
                    factory=lambda settings, context: ShortestPromptFirst(context),
                    summary="shortest prompt first",
                )
            ]
    """


@hookspec
def inferflux_proposers() -> Iterable[Registration[Proposer]]:  # type: ignore[empty-body]  # pluggy specs have no body
    """Proposers, which guess the next tokens for speculative decoding. `factory(settings, context)` returns a `Proposer`; the
    context is a `ProposerContext`. Chosen by `speculative.method`.

    Example, the last token once more:

        from inferflux_core.hookspecs import hookimpl
        from inferflux_core.interfaces import Outlook, Proposer, Registration


        class Stammer(Proposer):
            def outlook(self, sequence):
                return Outlook(max_tokens=4)

            def propose(self, wanted):
                return [[sequence.tokens[-1]] * count for sequence, count in wanted]


        @hookimpl
        def inferflux_proposers():
            return [Registration(name="stammer", factory=lambda settings, context: Stammer(), summary="repeats itself")]
    """


@hookspec
def inferflux_model_sources() -> Iterable[Registration[ModelSource]]:  # type: ignore[empty-body]  # pluggy: no body
    """Model sources, which turn a reference such as `hf:owner/repo` into files. `factory(settings)` returns a `ModelSource`.

    Example, models on a file share under a short prefix:

        from pathlib import Path

        from inferflux_core.errors import ModelFileError
        from inferflux_core.hookspecs import hookimpl
        from inferflux_core.interfaces import ModelFiles, ModelSource, Registration


        class Share(ModelSource):
            def matches(self, ref):
                return ref.startswith("share:")

            def resolve(self, ref, context):
                path = Path("/srv/models") / f"{ref.removeprefix('share:')}.gguf"
                if not path.is_file():
                    raise ModelFileError(f"no model {ref!r} on the share; run `ls /srv/models` to see what there is")
                return ModelFiles(ref=ref, format="gguf", paths=(str(path),))


        @hookimpl
        def inferflux_model_sources():
            return [Registration(name="share", factory=lambda settings: Share(), summary="models on the file share")]
    """


@hookspec
def inferflux_auth_providers() -> Iterable[Registration[AuthProvider]]:  # type: ignore[empty-body]  # pluggy: no body
    """Auth providers, which turn credentials into principals. `factory(settings, context)` returns an `AuthProvider`; the
    context is an `inferflux_core.identity.AuthContext`. Chosen by `auth.providers`.

    Example, tickets of a house of its own:

        import hmac

        from inferflux_core.errors import AuthenticationError
        from inferflux_core.hookspecs import hookimpl
        from inferflux_core.identity import AuthProvider, Principal
        from inferflux_core.interfaces import Registration


        class Tickets(AuthProvider):
            def claims(self, credential):
                return credential.startswith("ticket-")

            async def authenticate(self, credential, address):
                if not hmac.compare_digest(credential.encode(), b"ticket-for-the-show"):
                    raise AuthenticationError("unknown_ticket")
                return Principal(subject="user:house|guest", tenant="guests", method="tickets", roles=frozenset({"user"}))


        @hookimpl
        def inferflux_auth_providers():
            return [Registration(name="tickets", factory=lambda settings, context: Tickets(), summary="tickets of the house")]
    """
