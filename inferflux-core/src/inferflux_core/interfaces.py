"""What plugins implement.

Each class is one seam of `DESIGN`: a backend computes, a source finds model files, a scheduler decides who runs next. The
built-in parts implement the same classes and register through the same hooks (`hookspecs.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, Literal, Protocol, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict

from inferflux_core.engine.types import (
    ConstraintState,
    EngineOutput,
    EngineRequest,
    EngineStats,
    GrammarMask,
    KVOps,
    ModelRunnerOutput,
    SamplingParams,
    SchedulerOutput,
)

T = TypeVar("T")


class NoSettings(BaseModel):
    """Settings of a plugin that has none: any key is an error."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration(Generic[T]):
    """One named implementation that a plugin offers.

    Attributes:
        name: what administrators write in config.
        factory: makes the implementation; its first argument is an instance of `settings`. Heavy imports happen inside.
        settings: pydantic model of the plugin's settings, with `extra="forbid"`.
        summary: one line for `inferflux plugins`.
    """

    name: str
    factory: Callable[..., T]
    settings: type[BaseModel] = NoSettings
    summary: str = ""


# --- models -----------------------------------------------------------------------------------------------------------


class ModelFiles(msgspec.Struct, frozen=True, kw_only=True):
    """A model on local disk, as a source found it. Crosses to the engine process.

    Attributes:
        ref: what the administrator wrote, e.g. `hf:owner/repo:Q4_K_M`.
        format: `gguf`, `safetensors`, or a format that a third-party backend knows.
        paths: the files; the first is the one to open (the first shard of a split GGUF, config.json's folder for safetensors).
        revision: what identifies these weights: a commit, a digest, or "" for a plain path.
    """

    ref: str
    format: str
    paths: tuple[str, ...]
    revision: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceContext:
    """What a source may use to find or fetch files.

    Attributes:
        allowed_roots: folders that model paths must lie in after resolving links; None allows any path.
        cache_dir: where downloads go; None means the library's own default.
        token: hub token, or None.
        offline: never touch the network.
        show_progress: draw progress bars on standard error.
    """

    allowed_roots: tuple[Path, ...] | None = None
    cache_dir: Path | None = None
    token: str | None = None
    offline: bool = False
    show_progress: bool = False


class ModelSource(ABC):
    """Turns a model reference into files on disk. Called in the server process or by `inferflux pull`, in a thread."""

    @abstractmethod
    def matches(self, ref: str) -> bool:
        """Whether this source understands the reference. Looks at the text only. Exactly one source may match."""

    @abstractmethod
    def resolve(self, ref: str, context: SourceContext) -> ModelFiles:
        """Find or fetch the files. Idempotent; leaves nothing half-written behind.

        Raises:
            ModelFileError: not found, refused, or damaged; the message names the cause and the cure.
        """


class Tokenizer(ABC):
    """Text to token ids and back, in the server process. Thread-safe."""

    vocab_size: int
    eos_token_ids: frozenset[int]
    bos_token: str
    eos_token: str
    chat_template: str | None
    special_tokens: frozenset[str]  # texts that `encode(parse_special=True)` turns into control tokens

    @abstractmethod
    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of a text.

        Args:
            add_special: put the model's BOS (and EOS) around, if it wants them.
            parse_special: read the texts of control tokens as these tokens. False for anything a user wrote.
        """

    @abstractmethod
    def token_bytes(self, token_id: int, *, special: bool = False) -> bytes:
        """Bytes that a token adds to a text; may be part of a code point.

        Args:
            special: return the text of control tokens too, instead of b"".
        """

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Text of a token sequence; invalid UTF-8 becomes U+FFFD."""
        return b"".join(self.token_bytes(t, special=special) for t in token_ids).decode("utf-8", "replace")


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a loaded model is. Crosses to the server process.

    Attributes:
        max_model_len: most tokens (prompt and output) of one sequence as loaded.
        eos_token_ids: tokens that end a sequence.
        tasks: what it can be used for.
        details: free text for people: architecture, quantisation, device, which path serves it.
    """

    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]
    tasks: tuple[str, ...] = ("generate",)
    details: dict[str, str] = {}


# --- backends ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheSpec:
    """The cache a runner owns, for core to manage.

    Attributes:
        layout: `paged`: core hands out blocks. `sequence`: the library owns its cells by stream; core says copy and keep.
        block_size: tokens per block. For `sequence` it is only the granularity of prefix matching.
        num_blocks: paged: blocks in the pool.
        num_streams: sequence: streams, running and retained together; at least max_num_seqs.
        stream_tokens: sequence: most tokens of one stream.
        pool_tokens: sequence: cells shared by all streams; None when each stream has its own.
        can_trim: False when a part of a sequence cannot be removed (recurrent memory): only whole sequences are reused.
        min_copy_tokens: sequence: a copy between streams pays from this many tokens on.
    """

    layout: Literal["paged", "sequence"]
    block_size: int = 16
    num_blocks: int = 0
    num_streams: int = 0
    stream_tokens: int = 0
    pool_tokens: int | None = None
    can_trim: bool = True
    min_copy_tokens: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a runner can do.

    Attributes:
        max_num_seqs: most sequences in one step.
        max_num_batched_tokens: most tokens in one step.
        depth: steps in flight. 1 waits for each step. 2 launches the next step before it collects the last one, for devices
            that compute beside the host: see `ModelRunner`.
        prefill_tile: a prefill chunk of fewer tokens runs on slower kernels, the more so the deeper it is in its context.
        max_draft: most draft tokens of one row; 0 means that rows cannot be verified, which needs a cache that can be trimmed.
        grammar: whether `sample` applies a mask.
        logprobs: whether log-probabilities can be reported.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    depth: int = 1
    prefill_tile: int = 1
    max_draft: int = 0
    grammar: bool = False
    logprobs: bool = True


@dataclass(slots=True)
class Ticket:
    """A launched step. A runner may subclass it to carry what `sample` and `collect` need."""

    plan: SchedulerOutput


class ModelRunner(ABC):
    """The half of a backend that computes. Lives in the engine process; called by the engine thread only.

    Each step is launched, sampled and collected. The order of the calls depends on `caps.depth`:

        depth 1     launch 1, sample 1, collect 1, launch 2, sample 2, collect 2, ...
        depth 2     launch 1, sample 1, launch 2, collect 1, sample 2, launch 3, collect 2, sample 3, ...

    At depth 2 a decode row of step 2 may have `tokens=None`: its input is what `sample` of step 1 drew for the slot, so a
    step's work has to follow that of the step before it on the device. A sequence that ended in step 1 may still have a row
    in step 2, whose result is dropped; no block, stream or slot that a step uses belongs to another sequence before the step
    is collected. `close` comes when everything launched was collected, or failed.
    """

    model_info: ModelInfo
    kv_cache_spec: KVCacheSpec
    caps: Capabilities

    @abstractmethod
    def warm_up(self) -> None:
        """Touch what the first request would otherwise pay for. Leaves the cache empty."""

    @abstractmethod
    def launch(self, plan: SchedulerOutput) -> Ticket:
        """Apply the plan's cache operations and start its forward pass; may return before it is done."""

    @abstractmethod
    def sample(self, ticket: Ticket, mask: GrammarMask | None) -> None:
        """Draw the tokens of the rows that ask for one.

        Args:
            mask: which tokens the constrained rows may draw; None if there are no such rows. Only with `caps.grammar`.
        """

    @abstractmethod
    def collect(self, ticket: Ticket) -> ModelRunnerOutput:
        """Wait for this ticket, and no other, and return what it computed."""

    @abstractmethod
    def close(self) -> None:
        """Release the model. The runner is not used again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of one engine, resolved from settings. Units are tokens, sequences and milliseconds.

    Attributes:
        max_num_seqs: most sequences running at once.
        max_num_batched_tokens: most tokens in one step.
        max_model_len: most tokens of one sequence; None leaves it to the backend.
        enable_prefix_caching: share computed prefixes between requests of one cache salt.
        itl_target_ms: a step with running decodes should not take longer than this; None leaves chunks unlimited.
    """

    max_num_seqs: int = 16
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    enable_prefix_caching: bool = True
    itl_target_ms: float | None = 500.0


class Backend(ABC):
    """The cheap half of a backend, in the server process: no weights."""

    formats: ClassVar[tuple[str, ...]] = ()

    def supports(self, files: ModelFiles) -> bool:
        """Whether this backend can serve these files; used when config says `backend: auto`."""
        return files.format in self.formats

    @abstractmethod
    def validate(self, files: ModelFiles) -> None:
        """Check the files' headers in pure Python, before any native code sees them.

        Raises:
            ModelFileError: the files are damaged, forged or of an unknown kind.
        """

    @abstractmethod
    def tokenizer(self, files: ModelFiles) -> Tokenizer:
        """The model's tokenizer. Called after the engine process has loaded the same files without dying."""

    @abstractmethod
    def runner(self, files: ModelFiles, config: EngineConfig) -> ModelRunner:
        """Load the weights. Called in the engine process."""


# --- speculation ------------------------------------------------------------------------------------------------------


class KnownSequence(Protocol):
    """What a proposer sees of a running sequence. `tokens` grows at its end only, between two calls."""

    @property
    def request_id(self) -> str: ...
    @property
    def params(self) -> SamplingParams: ...
    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def num_prompt_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a proposer could guess of a sequence now.

    Attributes:
        max_tokens: most tokens that it would propose; at least 1.
        kind: which of its kinds of guess that is, below `Proposer.num_kinds`. How many tokens hold is measured by kind.
    """

    max_tokens: int
    kind: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftModel:
    """A second, smaller model in the engine process.

    Attributes:
        name: as the administrator wrote it.
    """

    name: str
    runner: ModelRunner
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposerContext:
    """What a proposer is made from.

    Attributes:
        target: the model that drafts are for, as the administrator wrote it.
        model_info: of the target.
        tokenizer: makes the target's tokenizer.
        load_draft: loads the draft model that the configuration names; raises ConfigError if it names none.
    """

    target: str
    config: EngineConfig
    model_info: ModelInfo
    tokenizer: Callable[[], Tokenizer]
    load_draft: Callable[[], DraftModel]


class Proposer(ABC):
    """Guesses the next tokens of running sequences, which the model then verifies in one step. Engine thread only.

    A guess changes what a step costs and never what it draws. Who gets how many is decided by what was accepted before
    (`engine.speculation`), so a proposer need not be modest. Experimental, like `Scheduler`.
    """

    num_kinds: int = 1

    def prior(self, kind: int) -> float:
        """Share of its tokens that are expected to hold before anything was measured; 0 to 1."""
        return 0.5

    @abstractmethod
    def outlook(self, sequence: KnownSequence) -> Outlook | None:
        """What it could propose after `sequence.tokens`; None for nothing. Cheap: asked of each decode in each step."""

    @abstractmethod
    def propose(self, wanted: Sequence[tuple[KnownSequence, int]]) -> list[Sequence[int]]:
        """Draft tokens for some sequences, at most as many as are wanted of each: parallel to `wanted`, empty for none."""

    def forget(self, request_id: str) -> None:  # noqa: B027  # most keep nothing
        """The sequence ended."""

    def close(self) -> None:  # noqa: B027  # most hold nothing
        """Release what it holds."""


# --- scheduling -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class KVStats:
    """Occupancy of the cache: `used` counts tokens (or cells) held by running sequences, of `capacity`."""

    used: int
    capacity: int

    @property
    def usage(self) -> float:
        return self.used / self.capacity if self.capacity else 0.0


class Scheduler(ABC):
    """Decides, step by step, which tokens are computed. Engine thread only.

    Experimental: derive from `inferflux_core.engine.scheduler.TokenBudgetScheduler`, which leaves two questions open,
    `pop_waiting()` (who is next) and `pick_victim()` (who makes room).
    """

    @abstractmethod
    def add_request(self, request: EngineRequest, constraint: ConstraintState | None = None) -> None:
        """Queue a request. Its id must not be in use.

        Args:
            constraint: what its output must be; None for anything.
        """

    @abstractmethod
    def abort(self, request_ids: Sequence[str]) -> list[str]:
        """End requests now, wherever they are; frees what they hold when no step in flight uses it. Returns those that were
        alive."""

    @abstractmethod
    def schedule(self) -> SchedulerOutput | None:
        """Plan the next step; None when nothing can be computed.

        With a runner of depth 2 it is called once more before the last plan's output is taken in. Room and slots that a plan
        not taken in yet uses must not be given to others.
        """

    def wants_last(self) -> bool:
        """Whether the step in flight should be taken in before the next one is planned, since a plan with its tokens known
        is worth more than one made ahead. Asked with runners of depth 2 only."""
        return False

    @abstractmethod
    def update_from_output(self, plan: SchedulerOutput, output: ModelRunnerOutput) -> list[EngineOutput]:
        """Take in what the oldest step not taken in yet computed: append, stop, free. Returns what to tell the server."""

    @abstractmethod
    def take_started(self) -> list[str]:
        """Requests that were first scheduled since the last call."""

    @abstractmethod
    def has_requests(self) -> bool:
        """Whether anything runs or waits."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """Gauges and counters."""


__all__ = [
    "Backend",
    "Capabilities",
    "DraftModel",
    "EngineConfig",
    "GrammarMask",
    "KVCacheSpec",
    "KVOps",
    "KVStats",
    "KnownSequence",
    "ModelFiles",
    "ModelInfo",
    "ModelRunner",
    "ModelSource",
    "NoSettings",
    "Outlook",
    "Proposer",
    "ProposerContext",
    "Registration",
    "Scheduler",
    "SourceContext",
    "Ticket",
    "Tokenizer",
]
