"""The server process from start to exit: bind, load, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import click
import uvicorn

from inferflux_core.config import Loaded, check_bind
from inferflux_core.engine.client import EngineClient, EngineState
from inferflux_core.engine.loop import EngineSpec
from inferflux_core.engine.process import ProcessEngineClient
from inferflux_core.errors import ConfigError
from inferflux_core.models.manager import ModelManager, ServedModel
from inferflux_core.plugins import PluginRegistry
from inferflux_core.settings import Settings
from inferflux_core.telemetry.logging import configure_logging
from inferflux_core.telemetry.version import VERSION

logger = logging.getLogger("inferflux.server")


def run(loaded: Loaded, registry: PluginRegistry) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status.

    Raises:
        ConfigError: the address cannot be used, or not a single model can be loaded.
    """
    settings = loaded.settings
    configure_logging(settings.logging)
    check_bind(settings)
    with _bound(settings) as listener:
        if sys.platform == "win32":
            return asyncio.run(Server(settings, registry, listener).serve())
        import uvloop

        return uvloop.run(Server(settings, registry, listener).serve())


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
            listener.listen(2048)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(
                f"cannot listen on {host}:{port}: {reason}; stop what uses the port, or choose another with --port "
                f"(0 takes a free one)"
            ) from error
        yield listener


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handling: draining is ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """One server: its models, its HTTP side, and the order in which they start and stop.

    SIGTERM or SIGINT: /readyz says 503 at once and new generations are refused, running ones get `drain_timeout_s`, then
    everything ends and the exit status is 0. A second signal ends everything now.
    """

    def __init__(self, settings: Settings, registry: PluginRegistry, listener: socket.socket) -> None:
        self._settings = settings
        self._listener = listener
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
            return await self._serve(loading)
        finally:
            loading.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConfigError):
                await loading
            await self._models.stop()

    async def _serve(self, loading: asyncio.Task[None]) -> int:
        from inferflux_core.serving.app import create_app
        from inferflux_core.serving.pipeline import Pipeline
        from inferflux_core.serving.services import ServerState, Services
        from inferflux_core.telemetry.metrics import Metrics

        state, metrics = ServerState(), Metrics()
        pipeline = Pipeline(self._models, metrics, state)
        services = Services(pipeline=pipeline, models=self._models, settings=self._settings, metrics=metrics, state=state)
        metrics.observe_models(self._models.list)
        server = _Uvicorn(self._uvicorn_config(create_app(services)))
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

    def _uvicorn_config(self, app: Any) -> uvicorn.Config:
        return uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=2,
        )

    # --- what a person sees -------------------------------------------------------------------------------------------

    def _summary(self) -> str:
        host, port = self._listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        lines = [f"InferFlux {VERSION} is ready on {url}  (OpenAI API: {url}/v1)"]
        lines += [f"  {self._describe(model)}" for model in self._models.list()]
        engine = self._settings.engine
        lines.append(f"  scheduler {engine.scheduler}, prefix caching {'on' if engine.enable_prefix_caching else 'off'}")
        if self._settings.server.insecure_no_auth:
            lines.append("  no authentication: everyone who reaches this address may use the models")
        lines.append(f"  try: inferctl --url {url} chat" if port != 8080 else "  try: inferctl chat")
        return "\n".join(lines)

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
