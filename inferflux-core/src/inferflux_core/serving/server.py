"""The server process from start to exit: bind, load, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

import click
import uvicorn

from inferflux_core.config import Loaded, check_bind
from inferflux_core.effective import as_json, effective_values
from inferflux_core.engine.client import EngineClient, EngineState
from inferflux_core.engine.engine_spec import EngineSpec
from inferflux_core.engine.process import ProcessEngineClient
from inferflux_core.errors import ConfigError
from inferflux_core.models.manager import ModelManager, ServedModel
from inferflux_core.plugins import PluginRegistry
from inferflux_core.serving.edge import check_edge
from inferflux_core.settings import Settings
from inferflux_core.telemetry.logging import configure_logging
from inferflux_core.telemetry.version import VERSION

if TYPE_CHECKING:
    from inferflux_core.access.services import AccessServices
    from inferflux_core.serving.grammars import RequestGrammars
    from inferflux_core.telemetry.metrics import Metrics

logger = logging.getLogger("inferflux.server")

BACKLOG = 2048  # connections that wait to be accepted
SPARE_FILES = 256  # besides one for each connection: models, logs, keys, engines


def run(loaded: Loaded, registry: PluginRegistry) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status.

    Raises:
        ConfigError: the address cannot be used, or not a single model can be loaded.
    """
    settings = loaded.settings
    configure_logging(settings.logging)
    check_bind(settings)
    tls = check_edge(settings.server)
    _make_room_for_connections(settings.server.max_connections)
    with _bound(settings) as listener:
        if sys.platform == "win32":
            return asyncio.run(Server(loaded, registry, listener, tls).serve())
        import uvloop

        return uvloop.run(Server(loaded, registry, listener, tls).serve())


def _make_room_for_connections(wanted: int) -> None:
    """Raise this process's own limit of open files, as far as it may: at that limit nobody can connect any more."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + SPARE_FILES:
        soft = wanted + SPARE_FILES if hard == resource.RLIM_INFINITY else min(wanted + SPARE_FILES, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted + SPARE_FILES:
            logger.warning(
                "only %d files may be open at once, too few for server.max_connections %d; raise the limit (ulimit -n, "
                "LimitNOFILE=) or lower the setting",
                soft,
                wanted,
            )


@contextlib.contextmanager
def _bound(settings: Settings) -> Iterator[socket.socket]:
    """The listening socket, taken before anything slow happens."""
    host, port = settings.server.host, settings.server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    with contextlib.closing(listener):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(BACKLOG)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(
                f"cannot listen on {host}:{port}: {reason}; stop what uses the port, or choose another with --port "
                f"(0 takes a free one)"
            ) from error
        yield listener


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handling: draining is ours."""

    def __init__(self, config: uvicorn.Config, handshake_timeout_s: float) -> None:
        super().__init__(config)
        self._handshake_timeout_s = handshake_timeout_s

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, for sockets that are there and an application without lifespan. A TLS handshake gets no more time
        than the head of a request: while it lasts the connection is not counted by anybody."""
        assert sockets is not None
        config, loop = self.config, asyncio.get_running_loop()
        timeout = self._handshake_timeout_s if config.ssl is not None else None
        self.servers = [
            await loop.create_server(self._protocol, sock=sock, ssl=config.ssl, backlog=BACKLOG, ssl_handshake_timeout=timeout)
            for sock in sockets
        ]
        self.started = True

    def _protocol(self) -> asyncio.Protocol:
        make: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        return make(config=self.config, server_state=self.server_state, app_state={})


class Server:
    """One server: its models, its HTTP side, and the order in which they start and stop.

    SIGTERM or SIGINT: /readyz says 503 at once and new generations are refused, running ones get `drain_timeout_s`, then
    everything ends and the exit status is 0. A second signal ends everything now.
    """

    def __init__(
        self, loaded: Loaded, registry: PluginRegistry, listener: socket.socket, tls: ssl.SSLContext | None = None
    ) -> None:
        self._loaded = loaded
        self._settings = settings = loaded.settings
        self._registry = registry
        self._listener = listener
        self._tls = tls
        self._models = ModelManager(settings, registry, self._make_engine)
        self._signals = 0
        self._signalled = asyncio.Event()
        self._now = asyncio.Event()

    def _make_engine(self, name: str, spec: EngineSpec) -> EngineClient:
        return ProcessEngineClient(name, spec, self._settings.engine)

    async def serve(self) -> int:
        """Until a signal; returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        loading = asyncio.create_task(self._models.load())
        try:
            # The web framework takes a while to import; meanwhile the engine processes load.
            await asyncio.to_thread(importlib.import_module, "inferflux_core.serving.app")
            async with self._access() as (access, metrics):
                from inferflux_core.serving.admin.routing import restore_routing

                await restore_routing(access.store, self._models)
                async with self._grammars(metrics) as grammars:
                    return await self._serve(loading, access, metrics, grammars)
        finally:
            loading.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConfigError):
                await loading
            await self._models.stop()

    @contextlib.asynccontextmanager
    async def _access(self) -> AsyncIterator[tuple[AccessServices, Metrics]]:
        """Access control, started before anybody can connect and stopped after everybody has left."""
        from inferflux_core.access.audit.events import AuditEvent
        from inferflux_core.access.services import AccessServices
        from inferflux_core.telemetry.metrics import Metrics

        metrics = Metrics()
        access = AccessServices.open(self._settings, metrics, self._registry)
        await access.start()
        loop = asyncio.get_running_loop()
        reloads: set[asyncio.Task[None]] = set()

        def on_hangup() -> None:
            task = asyncio.create_task(access.reload_policy())
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        if hasattr(signal, "SIGHUP"):
            loop.add_signal_handler(signal.SIGHUP, on_hangup)
        try:
            await access.audit.record(AuditEvent(event="server.start", fields={"version": VERSION}), important=True)
            yield access, metrics
        finally:
            if hasattr(signal, "SIGHUP"):
                loop.remove_signal_handler(signal.SIGHUP)
            await access.close()

    @contextlib.asynccontextmanager
    async def _grammars(self, metrics: Metrics) -> AsyncIterator[RequestGrammars]:
        """What answers are held to; the process that checks grammars starts before anybody can connect."""
        from inferflux_core.models.structured.checker import GrammarChecker
        from inferflux_core.serving.grammars import RequestGrammars

        settings = self._settings.structured_output
        if not settings.enabled:
            yield RequestGrammars(settings, None)
            return
        checker = GrammarChecker(settings, on_compiled=metrics.grammar_compiled)
        await checker.start()
        try:
            yield RequestGrammars(settings, checker)
        finally:
            await checker.close()

    async def _serve(
        self, loading: asyncio.Task[None], access: AccessServices, metrics: Metrics, grammars: RequestGrammars
    ) -> int:
        from inferflux_core.serving.app import create_app
        from inferflux_core.serving.pipeline import Pipeline
        from inferflux_core.serving.services import ServerState, Services

        state = ServerState()
        pipeline = Pipeline(self._models, access, metrics, state, grammars)
        services = Services(
            pipeline=pipeline,
            models=self._models,
            access=access,
            settings=self._settings,
            metrics=metrics,
            state=state,
            configuration=lambda: as_json(self._loaded, effective_values(self._loaded, self._registry)),
        )
        server = _Uvicorn(self._uvicorn_config(create_app(services), metrics), self._settings.server.header_timeout_s)
        http = asyncio.create_task(server.serve([self._listener]))
        signalled = asyncio.create_task(self._signalled.wait())
        await asyncio.wait([loading, http, signalled], return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and not loading.cancelled() and (error := loading.exception()) is not None:
            server.should_exit = True
            await http
            raise error
        if not signalled.done():
            click.echo(self._summary(), err=True)
            await asyncio.wait([http, signalled], return_when=asyncio.FIRST_COMPLETED)
        state.draining = True
        await self._drain(pipeline)
        server.should_exit = True
        server.force_exit = self._now.is_set()
        signalled.cancel()
        await http
        return 0

    async def _drain(self, pipeline: Any) -> None:
        seconds = self._settings.server.drain_timeout_s
        logger.info("draining: waiting up to %.0f s for running requests; signal again to end now", seconds)
        idle = asyncio.create_task(pipeline.wait_until_idle())
        now = asyncio.create_task(self._now.wait())
        await asyncio.wait([idle, now], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        now.cancel()
        # What still runs gets its error from the engines' end, and a moment to be sent.
        await self._models.stop()

    def _on_signal(self) -> None:
        self._signals += 1
        (self._signalled if self._signals == 1 else self._now).set()

    def _uvicorn_config(self, app: Any, metrics: Metrics) -> uvicorn.Config:
        from inferflux_core.serving.connections import Connections
        from inferflux_core.serving.exchange import UNMATCHED
        from inferflux_core.serving.protocol import edge_protocol

        settings, tls = self._settings.server, self._tls
        connections = Connections(settings, lambda status, code: metrics.request_refused(UNMATCHED, status, code))
        return uvicorn.Config(
            app,
            http=edge_protocol(connections),
            ssl_context_factory=None if tls is None else lambda _config, _default: tls,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=2,
        )

    # --- what a person sees -------------------------------------------------------------------------------------------

    def _summary(self) -> str:
        host, port = self._listener.getsockname()[:2]
        scheme = "http" if self._tls is None else "https"
        url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
        lines = [f"InferFlux {VERSION} is ready on {url}  (OpenAI API: {url}/v1)"]
        lines += [f"  {self._describe(model)}" for model in self._models.list()]
        engine = self._settings.engine
        lines.append(f"  scheduler {engine.scheduler}, prefix caching {'on' if engine.enable_prefix_caching else 'off'}")
        lines.append(f"  {self._describe_access()}")
        lines.append(f"  try: inferctl --url {url} chat" if port != 8080 else "  try: inferctl chat")
        return "\n".join(lines)

    def _describe_access(self) -> str:
        settings = self._settings
        if not settings.auth.providers:
            return "no authentication: everyone who reaches this address may use the models; nobody may administer them"
        policy = "scopes and model lists only" if settings.policy.file is None else f"policy {settings.policy.file.name}"
        audit = "off" if settings.audit.enabled is False else "on"
        return f"access by {', '.join(settings.auth.providers)}; {policy}; audit log {audit}"

    @staticmethod
    def _describe(model: ServedModel) -> str:
        names = ", ".join((model.name, *model.aliases)) + (" (default)" if model.is_default else "")
        if model.state == EngineState.FAILED:
            return f"model {names}: failed: {model.last_error}"
        facts = [model.details.get(key, "none") for key in ("architecture", "quantization")]
        facts = [fact for fact in facts if fact != "none"]
        facts.append(f"{model.backend} backend")
        facts.append(f"{model.max_model_len:,} tokens a sequence")
        facts.append(f"loaded in {model.load_seconds or 0:.1f} s")
        return f"model {names}: {', '.join(facts)}"
