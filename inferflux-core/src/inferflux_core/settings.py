"""Every setting, with its unit and the reason for its default. How they are read and merged is in `config.py`.

The reference page (`docs/settings.md`) is generated from these classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator


class Group(BaseModel):
    """Base of all settings groups: unknown keys are errors, and values are never changed after start-up."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerSettings(Group):
    """The HTTP server."""

    host: str = Field("127.0.0.1", description="Address to listen on. Anything but loopback needs an auth provider.")
    port: int = Field(8080, ge=0, le=65535, description="TCP port; 0 lets the system choose a free one.")
    insecure_no_auth: bool = Field(
        False, description="Allow listening beyond loopback without authentication. Off, so that no model is open by accident."
    )
    max_body_bytes: int = Field(
        10 * 1024 * 1024, ge=1024, description="Largest request body in bytes; a larger one gets 413 while it is being read."
    )
    max_json_depth: int = Field(64, ge=4, le=512, description="Deepest nesting of a JSON body; a deeper one gets 400.")
    max_choices: int = Field(8, ge=1, le=128, description="Largest `n` of a request. Each choice is a sequence of its own.")
    drain_timeout_s: float = Field(
        30.0, ge=0, description="Seconds that running requests get to finish after SIGTERM before they are aborted."
    )
    sse_ping_seconds: float = Field(
        15.0, ge=0, description="Seconds of silence in a stream after which a comment line keeps it alive; 0 turns it off."
    )
    request_timeout_s: float = Field(
        600.0, gt=0, description="Seconds from arrival to the last token; then the request ends with 504."
    )
    slow_reader_timeout_s: float = Field(
        30.0, gt=0, description="Seconds a client may take to read what was sent before its stream is aborted."
    )


class ModelSettings(Group):
    """One served model."""

    source: str = Field(description="`demo`, a path, or `hf:owner/repo[:file-or-quantisation][@revision]`.")
    name: str | None = Field(None, description="Name clients use; by default made from the source.")
    aliases: tuple[str, ...] = Field((), description="Further names that lead to this model.")
    default: bool = Field(False, description="Serve requests that name no model; by default the first model does.")
    backend: str = Field("auto", description="Name of a backend, or `auto` for the one that supports the files.")
    chat_template: Path | None = Field(None, description="Jinja file to use instead of the model's own chat template.")
    max_model_len: int | None = Field(None, ge=16, description="Overrides engine.max_model_len for this model.")
    max_num_seqs: int | None = Field(None, ge=1, description="Overrides engine.max_num_seqs for this model.")
    backend_settings: dict[str, Any] = Field(
        default_factory=dict, description="Overrides single keys of backends.<name> for this model."
    )


class EngineSettings(Group):
    """Scheduling, the same for every model unless the model overrides it."""

    scheduler: str = Field("fcfs", description="`fcfs`, `priority`, `fair`, or a plugin's scheduler.")
    scheduler_settings: dict[str, Any] = Field(default_factory=dict, description="Settings of that scheduler.")
    max_num_seqs: int = Field(16, ge=1, description="Most sequences running at once; each has a share of the KV cache.")
    max_num_batched_tokens: int = Field(
        2048, ge=16, description="Most tokens computed in one step; also the largest prefill chunk when nobody decodes."
    )
    max_model_len: int | None = Field(
        None, ge=16, description="Most tokens of a sequence, prompt and output; by default what model and memory allow."
    )
    enable_prefix_caching: bool = Field(True, description="Reuse the KV cache of equal prompt beginnings within one tenant.")
    itl_target_ms: float | None = Field(
        500.0,
        gt=0,
        description="While sequences decode, prefill chunks are cut so that a step is predicted to stay below this many "
        "milliseconds; null never cuts. Lower keeps text flowing evenly, higher wins throughput: on two cores 250 cost 7% "
        "of it beside prompts of 1,250 tokens.",
    )
    max_waiting_requests: int = Field(
        512, ge=0, description="Requests that may wait for a slot; one more gets 503 with Retry-After."
    )
    max_waiting_tokens: int = Field(
        1_000_000, ge=0, description="Prompt tokens that may wait; one request more gets 503 with Retry-After."
    )
    load_timeout_s: float = Field(600.0, gt=0, description="Seconds an engine process may take to load its model.")
    heartbeat_timeout_s: float = Field(
        15.0, gt=0, description="Seconds without a sign of life after which an engine process is replaced."
    )
    step_timeout_s: float = Field(
        300.0, gt=0, description="Seconds one step may take before the engine process counts as hung and is replaced."
    )
    restart_backoff_max_s: float = Field(
        30.0, gt=0, description="Longest pause between restarts of a dying engine process; the first is 0.5 s."
    )


class HubSettings(Group):
    """Where `hf:` models come from and where they are kept."""

    cache_dir: Path | None = Field(None, description="Folder for downloads; by default the hub client's own (HF_HOME).")
    token: SecretStr | None = Field(None, description="Access token for gated models; HF_TOKEN works as well.")
    offline: bool = Field(False, description="Never touch the network; only what is in the cache can be served.")


class PluginSettings(Group):
    """Which installed plugins are loaded."""

    blocked: tuple[str, ...] = Field((), description="Distributions whose plugins are not even imported.")


class LoggingSettings(Group):
    """Logs go to standard error. Prompt and output text never appear in them."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level to write.")
    format: Literal["text", "json"] = Field("text", description="`text` for people, `json` for machines: one object a line.")


class MetricsSettings(Group):
    """Prometheus metrics."""

    enabled: bool = Field(True, description="Serve `GET /metrics` on the server's port.")


class Settings(Group):
    """All of InferFlux. With no file at all it serves the demo model on 127.0.0.1:8080."""

    server: ServerSettings = Field(default_factory=ServerSettings)
    models: tuple[ModelSettings, ...] = Field((ModelSettings(source="demo"),), min_length=1, description="The models to serve.")
    model_roots: tuple[Path, ...] | None = Field(
        None, description="Folders that model paths must lie in, links resolved; null allows any path named in this file."
    )
    engine: EngineSettings = Field(default_factory=EngineSettings)
    backends: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Settings of each backend by its name; see the backend's own page."
    )
    hub: HubSettings = Field(default_factory=HubSettings)
    plugins: PluginSettings = Field(default_factory=PluginSettings)
    logging: LoggingSettings = Field(default_factory=LoggingSettings)
    metrics: MetricsSettings = Field(default_factory=MetricsSettings)

    @model_validator(mode="after")
    def _room_for_prefill(self) -> Settings:
        """Every running sequence takes a token of each step; what is left must let new ones in."""
        engine = self.engine
        most = max(model.max_num_seqs or engine.max_num_seqs for model in self.models)
        if engine.max_num_batched_tokens < 2 * most:
            raise ValueError(
                f"engine.max_num_batched_tokens is {engine.max_num_batched_tokens}, less than twice max_num_seqs ({most}): "
                f"decoding sequences would leave no room for new prompts; raise it to {2 * most} or lower max_num_seqs"
            )
        return self
