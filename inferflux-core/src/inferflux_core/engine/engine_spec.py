"""Everything an engine is made from, as names and plain values: what the engine process gets to read."""

from __future__ import annotations

from typing import Any

import msgspec

from inferflux_core.interfaces import EngineConfig, ModelFiles


class DraftSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A draft model, as `EngineSpec` has the model itself."""

    files: ModelFiles
    backend: str
    backend_settings: dict[str, Any] = {}


class SpeculativeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How to speculate.

    Attributes:
        method: a registered proposer, with its settings as in the configuration; None for none.
        num_speculative_tokens: most draft tokens of one sequence in one step.
    """

    method: str | None = None
    num_speculative_tokens: int = 32
    settings: dict[str, Any] = {}
    draft: DraftSpec | None = None


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an engine is made from, as names and plain values: what the engine process gets to read.

    Attributes:
        backend, scheduler: registered names, with their settings as in the configuration.
        structured_output: whether requests may have constraints, for which the vocabulary is read at load.
        grammar_cache_entries, grammar_cache_tenants: compiled grammars that are kept for each tenant, and for how many.
        blocked_plugins: distributions whose plugins are not loaded.
    """

    files: ModelFiles
    backend: str
    backend_settings: dict[str, Any] = {}
    scheduler: str = "fcfs"
    scheduler_settings: dict[str, Any] = {}
    config: EngineConfig = EngineConfig()
    speculative: SpeculativeSpec = SpeculativeSpec()
    structured_output: bool = False
    grammar_cache_entries: int = 128
    grammar_cache_tenants: int = 64
    blocked_plugins: tuple[str, ...] = ()
