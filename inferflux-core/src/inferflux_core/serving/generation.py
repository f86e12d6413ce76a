"""What every protocol adapter gives to the pipeline and gets back. Nothing here knows a wire format."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from inferflux_core.access.admission import Judged
from inferflux_core.identity import Principal
from inferflux_core.models.prompts import ChatPrompt, Prompt
from inferflux_core.models.reasoning.options import ReasoningOptions
from inferflux_core.models.structured.output_format import OutputFormat
from inferflux_core.models.tool_calls.calls import CallDelta, ToolRequest


@dataclass(slots=True)
class Outcome:
    """What the audit log says of a generation, however it ended.

    Attributes:
        requested_model: as the client wrote it, cut; None for the default model.
        model, fingerprint: the model that was chosen; empty if none was.
        prompt_tokens, output_tokens, cached_tokens: counts so far.
        finish_reason: of the first choice; empty while it has not ended.
        parameters: digest of everything in the request but the prompts.
        content: what the configuration says to keep of the prompts.
    """

    requested_model: str | None = None
    model: str = ""
    fingerprint: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str = ""
    parameters: str = ""
    stream: bool = False
    content: Mapping[str, object] = field(default_factory=dict)


@dataclass(slots=True)
class RequestContext:
    """Rides with one request from the first check to the last metric.

    Attributes:
        request_id: echoed to the client as `x-request-id`, written in logs.
        endpoint: route template, e.g. `/v1/chat/completions`; a metrics label.
        arrival: `time.monotonic()` when the request came in.
        deadline: `time.monotonic()` after which the request ends with 504.
        principal: who asks.
        cache_tenant: whose prefixes in the KV cache are used and left behind; None means the principal's tenant's.
        judged: the decisions made about this request; the pipeline adds its own.
        reply_headers: what the pipeline adds to the head of the reply, such as x-ratelimit-*.
        outcome: what became of it, filled by the pipeline.
    """

    endpoint: str
    deadline: float
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    principal: Principal = field(default_factory=Principal)
    cache_tenant: str | None = None
    arrival: float = field(default_factory=time.monotonic)
    judged: list[Judged] = field(default_factory=list)
    reply_headers: dict[str, str] = field(default_factory=dict)
    outcome: Outcome = field(default_factory=Outcome)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One request of a client: every prompt is answered `n` times.

    Choice index = prompt index * n + choice of that prompt, as in /v1/completions.

    Attributes:
        model: name or alias; None means the default model.
        prompts: chat messages, text, or token ids.
        max_tokens: None means as many as the context holds (chat) or what the adapter chose.
        stop: stop strings; not part of the output.
        seed: None means a random one.
        priority: lower runs first; None means that of the principal.
        logprobs: number of alternatives per token; None reports nothing.
        format: what the answer must be; None for anything.
        tools: what the model may call; None for nothing, and then nothing that it writes is taken for a call.
        reasoning: how much to think, and whether to show it.
        num_speculative_tokens: most draft tokens of one step; None leaves it to the engine, 0 turns speculation off.
        prompt_param: wire name of the prompt for error messages.
    """

    model: str | None
    prompts: Sequence[Prompt]
    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    priority: int | None = None
    cache_salt: str = ""
    add_special_tokens: bool = True
    skip_special_tokens: bool = True
    format: OutputFormat | None = None
    tools: ToolRequest | None = None
    reasoning: ReasoningOptions = field(default_factory=ReasoningOptions)
    num_speculative_tokens: int | None = None
    prompt_param: str = "messages"


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token as the client sees it in logprobs: its text (U+FFFD for a part of a code point) and its exact bytes."""

    token: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """A drawn token and its most likely alternatives."""

    drawn: TokenText
    top: Sequence[TokenText]


@dataclass(slots=True)
class Usage:
    """Token counts of a whole request, all prompts and choices together."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Started:
    """First event: the request was accepted and its first output is at hand.

    Attributes:
        model: canonical name of the model that answers.
        system_fingerprint: changes when weights or backend change.
        prompt_texts: for each prompt its text, for `echo`.
    """

    model: str
    system_fingerprint: str
    prompt_texts: Sequence[str]


@dataclass(slots=True)
class Delta:
    """New text of one choice. Never ends inside a code point or inside what may become a stop string.

    Within one delta thoughts come before text, and text before calls.

    Attributes:
        tokens: entries of the tokens behind this delta when logprobs were asked for, thoughts and calls included; parallel
            in order, not in length.
        finish_reason: OpenAI's `stop`, `length` or `tool_calls` on the last delta of the choice.
        reasoning: new text of the model's thoughts, which is no part of `text`.
        calls: pieces of calls of tools, which are no part of `text` either.
    """

    index: int
    text: str
    tokens: list[TokenEntry] | None = None
    finish_reason: str | None = None
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Done:
    """Last event: every choice has ended."""

    usage: Usage


Event = Started | Delta | Done

__all__ = [
    "CallDelta",
    "ChatPrompt",
    "Delta",
    "Done",
    "Event",
    "GenerationRequest",
    "Outcome",
    "OutputFormat",
    "Principal",
    "Prompt",
    "ReasoningOptions",
    "RequestContext",
    "Started",
    "TokenEntry",
    "TokenText",
    "ToolRequest",
    "Usage",
]
