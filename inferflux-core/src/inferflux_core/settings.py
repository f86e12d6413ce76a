"""Every setting, with its unit and the reason for its default. How they are read and merged is in `config.py`.

The reference page (`docs/settings.md`) is generated from these classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator


class Group(BaseModel):
    """Base of all settings groups: unknown keys are errors, and values are never changed after start-up."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TlsSettings(Group):
    """TLS of the server's port. A certificate that cannot be used stops the start; it never falls back to plain HTTP."""

    certificate: Path = Field(description="PEM file: the server's certificate, then those between it and the root.")
    key: Path = Field(description="PEM file of the certificate's private key; readable by this user only.")
    client_ca: Path | None = Field(
        None, description="PEM file of the authorities whose client certificates are asked for and required (mutual TLS)."
    )
    min_version: Literal["1.2", "1.3"] = Field("1.2", description="Oldest TLS version to speak.")


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
    max_tools: int = Field(512, ge=1, le=10_000, description="Most tools of a request.")
    reasoning_field: Literal["both", "reasoning_content", "reasoning", "none"] = Field(
        "both", description="Under which name replies carry a model's thoughts; clients differ in which one they read."
    )
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
    header_timeout_s: float = Field(
        10.0, gt=0, description="Seconds from the first byte of a request to the end of its head; then 408 and the end."
    )
    body_timeout_s: float = Field(
        30.0, gt=0, description="Longest silence within a request body, and time for its first bytes; then 408 and the end."
    )
    min_body_bytes_per_s: int = Field(
        1024, ge=0, description="Slowest body in bytes per second, on average once body_timeout_s has passed; 0 allows any."
    )
    idle_timeout_s: float = Field(75.0, gt=0, description="Seconds a connection may wait for its first or next request.")
    max_header_bytes: int = Field(32 * 1024, ge=1024, description="Largest head of a request in bytes; a larger one gets 431.")
    max_headers: int = Field(100, ge=8, description="Most header lines of a request; more get 431.")
    max_connections: int = Field(4096, ge=1, description="Most connections at once; one more is answered 503 and closed.")
    max_connections_per_client: int = Field(
        1024, ge=1, description="Most connections at once from one address, trusted proxies excepted."
    )
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="Names in the `Host` header that this server answers to, such as `llm.example.com` or `*.example.com`; "
        "beyond these and its own address nothing. Empty: loopback names on loopback, any name elsewhere.",
    )
    allowed_origins: tuple[str, ...] = Field(
        (),
        description="Web origins, such as `https://chat.example.com`, whose pages may call this server. Requests with another "
        "`Origin` get 403, and no page may read a reply across origins (no CORS) unless listed.",
    )
    trusted_proxies: tuple[str, ...] = Field(
        (), description="Addresses or networks of proxies whose `X-Forwarded-For` is believed; empty believes none."
    )
    public_url: str | None = Field(
        None, description="URL at which clients reach this server, for OAuth metadata; never taken from a request."
    )
    tls: TlsSettings | None = Field(None, description="Certificate and key; null serves plain HTTP.")


class SpeculativeSettings(Group):
    """Speculative decoding: guessed tokens are verified several in one step. What is generated does not change."""

    method: str | None = Field(
        None,
        description="`ngram` copies what followed the same words before, `draft_model` asks a smaller model, or a plugin's "
        "proposer; null speculates on nothing but what a grammar leaves no choice about.",
    )
    num_speculative_tokens: int = Field(
        32,
        ge=1,
        le=256,
        description="Most draft tokens of one sequence in one step. How many pay is measured while running, and may be none.",
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="Settings of that proposer.")
    model: str | None = Field(
        None, description="Draft model of `draft_model`, as a model's `source`; it needs the same vocabulary as the target."
    )
    backend: str = Field("auto", description="Backend of the draft model, or `auto` for the one that supports its files.")
    backend_settings: dict[str, Any] = Field(
        default_factory=dict, description="Overrides single keys of backends.<name> for the draft model."
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
    speculative: SpeculativeSettings | None = Field(None, description="Replaces engine.speculative for this model.")
    tool_parser: str = Field(
        "auto",
        description="How the model writes calls of tools: `hermes`, `llama3`, `mistral`, `gemma`, `json`, or `auto` to tell by "
        "its chat template; `none` lets it call none.",
    )
    reasoning_parser: str = Field(
        "auto",
        description="Which tags the model puts around its thoughts; `auto` tells by its chat template, `none` shows them as "
        "part of the answer.",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Variables for the chat template; requests may override those that allow it."
    )


class StructuredOutputSettings(Group):
    """Limits of what a request may ask its output to be. What goes beyond them gets 400."""

    enabled: bool = Field(
        True, description="Offer structured output and enforced tool calls; false saves about 30 MB for each model."
    )
    compile_timeout_s: float = Field(2.0, gt=0, description="CPU seconds one schema or grammar may take to compile.")
    max_bytes: int = Field(64 * 1024, ge=256, description="Longest schema, grammar, pattern or list of choices in bytes.")
    max_depth: int = Field(32, ge=2, le=128, description="Deepest nesting of a schema.")
    max_enum: int = Field(1000, ge=1, description="Most values of one `enum`, and most choices.")
    cache_entries: int = Field(128, ge=1, description="Compiled grammars kept for each tenant; the oldest goes first.")
    cache_tenants: int = Field(64, ge=1, description="Tenants whose compiled grammars are kept.")


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
    speculative: SpeculativeSettings = Field(default_factory=SpeculativeSettings, description="Speculative decoding.")


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


MOST = 10**12
"""Largest limit: beyond it nothing is limited, and doubles stop counting by ones."""


class Limits(Group):
    """How much one key, tenant or model may use. Null does not limit."""

    rpm: int | None = Field(None, ge=1, le=MOST, description="Requests a minute; also how many may come at once.")
    tpm: int | None = Field(None, ge=1, le=MOST, description="Tokens a minute, prompt and output; also how many at once.")
    concurrency: int | None = Field(
        None, ge=1, le=MOST, description="Answers being generated at one time; a request for several takes as many."
    )
    daily_tokens: int | None = Field(None, ge=1, le=MOST, description="Tokens a day (UTC), prompt and output.")
    max_tokens: int | None = Field(
        None, ge=1, le=MOST, description="Most output tokens of one choice; asking for more gets these."
    )


class AuthSettings(Group):
    """Who may call. Without a provider everyone who reaches the server may use the models, and nobody the admin API."""

    providers: tuple[str, ...] = Field(
        (), description="Names of auth providers, asked in this order whose a credential is: `api_keys`, `oidc`."
    )
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict, description="Settings of each provider by its name.")
    max_failures_per_minute: int = Field(
        20, ge=1, description="Failed authentications of one client address a minute; then 429 for what is not good."
    )


class PolicySettings(Group):
    """Role-based access control with a Casbin policy file that administrators edit."""

    file: Path | None = Field(
        None, description="Policy file (CSV). Null: what a credential's scopes and model list allow is allowed."
    )
    tests: Path | None = Field(
        None, description="Cases that a policy must pass before it is taken; by default `tests.csv` beside it, if there is one."
    )
    reload_interval_s: float = Field(1.0, gt=0, description="Seconds between looks at the file for a change.")


class LimitTable(Group):
    """The quotas that are not a credential's own. `*` in a table stands for all names that it does not hold, each by itself."""

    default: Limits = Field(default_factory=Limits, description="Of each key or user that has no limits of its own.")
    tenants: dict[str, Limits] = Field(default_factory=dict, description="Of a whole tenant, by its name; `*` for others.")
    models: dict[str, Limits] = Field(default_factory=dict, description="Of all use of a model, by its name; `*` for others.")

    # A quota under a name that nobody can have limits nobody, and would be believed to.

    @field_validator("tenants")
    @classmethod
    def _names_of_tenants(cls, table: dict[str, Limits]) -> dict[str, Limits]:
        from inferflux_core.identity import TENANT  # which needs this module

        for name in table:
            if name != "*" and TENANT.fullmatch(name) is None:
                raise ValueError(
                    f"{name[:128]!r} is not a tenant; use letters, digits and '._-', at most 64, or '*' for all others"
                )
        return table

    @field_validator("models")
    @classmethod
    def _names_of_models(cls, table: dict[str, Limits]) -> dict[str, Limits]:
        for name in table:
            if not name or ("*" in name and name != "*"):
                raise ValueError(f"{name[:128]!r} is not a model's name; there are no patterns here, but '*' for all others")
        return table


class LimitSettings(LimitTable):
    """Quotas. Those of a key come on top of those of its tenant and of the model; the tightest counts."""

    store: Literal["memory", "redis"] = Field("memory", description="`redis` shares the counts among replicas.")
    redis_url: SecretStr | None = Field(None, description="`redis://host:port/db` or `rediss://...`.")
    redis_prefix: str = Field("inferflux", description="Begins the name of every Redis key.")
    replicas: int = Field(1, ge=1, description="Servers that share the limits; each takes its part while Redis is away.")
    on_store_error: Literal["local", "deny", "allow"] = Field(
        "local", description="While Redis is away: count here with each limit divided by `replicas`, answer 503, or allow."
    )


class AuditSettings(Group):
    """The audit log: one JSON object a line, each chained to the one before by a keyed hash."""

    enabled: bool | None = Field(None, description="Null: on when there is an auth provider.")
    file: Path | None = Field(None, description="The log; by default `audit.jsonl` in the state folder.")
    checkpoint_file: Path | None = Field(
        None, description="Signed checkpoints, best on another disk; by default `audit-checkpoints.jsonl` in the state folder."
    )
    checkpoint_records: int = Field(1000, ge=1, description="A checkpoint after so many records,")
    checkpoint_interval_s: float = Field(60.0, gt=0, description="or after so many seconds with any record.")
    fsync: Literal["never", "interval", "each"] = Field(
        "interval",
        description="When records are forced to disk: at the system's leisure, every 100 ms, or before the response ends.",
    )
    required: bool = Field(False, description="Answer 503 to new requests while the log cannot be written.")
    on_full: Literal["block", "drop", "reject"] = Field(
        "block", description="While the queue is full: requests wait, their records are dropped and counted, or they get 503."
    )
    queue_size: int = Field(10_000, ge=1, description="Records that may wait to be written.")
    max_file_bytes: int = Field(256 * 1024 * 1024, ge=4096, description="Size at which a new file is begun.")
    content: Literal["none", "hash", "redacted", "full"] = Field(
        "none",
        description="What is kept of prompts: nothing, a keyed hash, the text with what looks like a credential, an address or "
        "a number of a person blacked out, or the text.",
    )


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
    structured_output: StructuredOutputSettings = Field(default_factory=StructuredOutputSettings)
    hub: HubSettings = Field(default_factory=HubSettings)
    plugins: PluginSettings = Field(default_factory=PluginSettings)
    logging: LoggingSettings = Field(default_factory=LoggingSettings)
    metrics: MetricsSettings = Field(default_factory=MetricsSettings)
    state_dir: Path | None = Field(
        None,
        description="Folder of this server's own files: keys, audit log, secrets of both. By default "
        "`$XDG_STATE_HOME/inferflux` or `~/.local/state/inferflux`. Only this user may read it.",
    )
    auth: AuthSettings = Field(default_factory=AuthSettings)
    policy: PolicySettings = Field(default_factory=PolicySettings)
    limits: LimitSettings = Field(default_factory=LimitSettings)
    audit: AuditSettings = Field(default_factory=AuditSettings)

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
