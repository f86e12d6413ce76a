"""Settings of the fake backend, apart from it so that registering imports nothing heavy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from inferflux_core.settings import Group


class FakeSettings(Group):
    """A model that needs no weights: what it costs and how its cache is laid out."""

    layout: Literal["paged", "sequence"] = Field("paged", description="Which of core's KV cache managers to exercise.")
    block_size: int = Field(16, ge=1, description="Tokens per KV block.")
    num_blocks: int = Field(4096, ge=1, description="Blocks in the paged pool.")
    num_streams: int | None = Field(None, ge=1, description="Streams of the sequence layout; by default max_num_seqs.")
    pool_tokens: int | None = Field(None, ge=16, description="Cells that the streams share; by default each has its own.")
    max_model_len: int = Field(4096, ge=16, description="Longest sequence in tokens.")
    can_trim: bool = Field(True, description="Whether a part of a stream can be removed.")
    max_draft: int = Field(64, ge=0, description="Most draft tokens of one row; 0 if rows cannot be verified.")
    depth: Literal[1, 2] = Field(1, description="Steps in flight; 2 launches a step before the one before it is collected.")
    step_ms: float = Field(0.0, ge=0, description="Milliseconds each step takes, whatever it computes.")
    token_ms: float = Field(0.0, ge=0, description="Milliseconds each token of a step adds.")
    load_s: float = Field(0.0, ge=0, description="Seconds loading takes.")
    crash_token: int | None = Field(
        None, description="Token id that kills the engine process when computed: a stand-in for native code that crashes."
    )
    hang_token: int | None = Field(None, description="Token id that makes the step hang: a stand-in for a wedged device.")
