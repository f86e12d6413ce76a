"""Bodies of the OpenAI-compatible requests: what is accepted, within which limits, and what it means for the pipeline.

Fields nobody knows are ignored, as OpenAI's clients expect. Fields that would change what is generated and that this
version cannot honour are refused: an answer without the constraint that was asked for would look like one with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from inferflux_core.errors import InvalidRequestError
from inferflux_core.serving.generation import GenerationRequest, Prompt, ReasoningOptions, ToolRequest
from inferflux_core.serving.openai.fields import MAX_INT32, CompletionPrompt, Finite, LogitBias, Stop, TokenId
from inferflux_core.serving.openai.formats import FormatFields
from inferflux_core.serving.openai.messages import Message, to_chat_prompt
from inferflux_core.serving.openai.reasoning import ReasoningFields, TemplateKwargs
from inferflux_core.serving.openai.tools import (
    FunctionCallChoice,
    Functions,
    ToolChoice,
    Tools,
    function_request,
    tool_request,
)
from inferflux_core.settings import ServerSettings

_TEMPLATE = "chat templates come from the model or the administrator, never from a request; remove it"

MAX_TOP_LOGPROBS = 20
MAX_SPECULATIVE_TOKENS = 256  # as the setting's
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's


SpeculativeTokens = Annotated[int, Field(ge=0, le=MAX_SPECULATIVE_TOKENS)]


class StreamOptions(BaseModel):
    """How to stream.

    Attributes:
        include_usage: end with a chunk that reports token counts.
    """

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None


class SamplingBody(FormatFields):
    """Fields that chat and text completions share."""

    model_config = ConfigDict(strict=True, extra="ignore")

    UNSUPPORTED: ClassVar[Mapping[str, str]] = {
        "bad_words": "words cannot be banned in this version; use logit_bias for single tokens",
        "allowed_token_ids": "the vocabulary cannot be restricted in this version; use logit_bias",
        "chat_template": _TEMPLATE,
    }

    model: str | None = Field(None, description="Name or alias of a model; by default the server's default model.")
    stream: bool | None = Field(None, description="Send the answer as server-sent events while it is generated.")
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = Field(None, description="Answers to each prompt; 1 by default.")
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT32)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INT32)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = Field(None, description="0 is greedy; 1 by default.")
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT32)] | None = Field(None, description="0 or -1 turn it off.")
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Finite, Field(gt=0, le=2)] | None = None
    repeat_penalty: Annotated[Finite, Field(gt=0, le=2)] | None = Field(None, description="As repetition_penalty.")
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Field(ge=-MAX_INT32, le=MAX_INT32)] | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    num_speculative_tokens: SpeculativeTokens | None = Field(
        None, description="Most tokens to guess in one step; 0 turns speculation off. What is generated does not change."
    )
    n_max: SpeculativeTokens | None = Field(
        None, alias="speculative.n_max", description="As num_speculative_tokens, in llama-server's spelling."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        for name, advice in cls.UNSUPPORTED.items():
            if isinstance(body, dict) and _is_set(body.get(name)):
                refuse_parameter(name, advice)
        return body

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("'stream_options' is only allowed when 'stream' is true.", param="stream_options")
        if None not in (self.repetition_penalty, self.repeat_penalty) and self.repetition_penalty != self.repeat_penalty:
            raise InvalidRequestError(
                "'repetition_penalty' and 'repeat_penalty' are two names of one parameter and differ; send one of them.",
                param="repeat_penalty",
            )
        if None not in (self.num_speculative_tokens, self.n_max) and self.num_speculative_tokens != self.n_max:
            raise InvalidRequestError(
                "'num_speculative_tokens' and 'speculative.n_max' are two names of one parameter and differ; send one of them.",
                param="speculative.n_max",
            )
        limit = self.output_limit
        if self.min_tokens is not None and limit is not None and self.min_tokens > limit:
            raise InvalidRequestError(
                f"'min_tokens' is {self.min_tokens}, more than the {limit} tokens that may be generated; lower it.",
                param="min_tokens",
            )
        return self

    @property
    def output_limit(self) -> int | None:
        """Most tokens to generate; None means as many as the context holds."""
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def choices(self, most: int) -> int:
        """The number of answers to each prompt.

        Args:
            most: server.max_choices.

        Raises:
            InvalidRequestError: more were asked for.
        """
        n = 1 if self.n is None else self.n
        if n > most:
            raise InvalidRequestError(
                f"Invalid value for 'n': at most {most} choices are allowed by this server (server.max_choices).", param="n"
            )
        return n

    def to_generation(
        self,
        *,
        prompts: Sequence[Prompt],
        max_choices: int,
        logprobs: int | None,
        prompt_param: str,
        tools: ToolRequest | None = None,
        reasoning: ReasoningOptions | None = None,
    ) -> GenerationRequest:
        """The pipeline's request; defaults are OpenAI's. Raises InvalidRequestError for too many choices or formats."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return GenerationRequest(
            model=self.model,
            prompts=prompts,
            n=self.choices(max_choices),
            max_tokens=self.output_limit,
            min_tokens=self.min_tokens or 0,
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=_or(self.repetition_penalty, _or(self.repeat_penalty, 1.0)),
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            seed=self.seed,
            stop=stop,
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            priority=self.priority,
            cache_salt=self.cache_salt or "",
            add_special_tokens=self.add_special_tokens is not False,
            skip_special_tokens=self.skip_special_tokens is not False,
            format=self.output_format(),
            tools=tools,
            reasoning=reasoning or ReasoningOptions(),
            num_speculative_tokens=self.n_max if self.num_speculative_tokens is None else self.num_speculative_tokens,
            prompt_param=prompt_param,
        )


class ChatBody(SamplingBody, ReasoningFields):
    """Body of `POST /v1/chat/completions`."""

    UNSUPPORTED: ClassVar[Mapping[str, str]] = {
        **SamplingBody.UNSUPPORTED,
        "continue_final_message": "a message cannot be continued in this version; remove it",
        "echo": "chat completions do not echo; remove it",
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INT32)] | None = Field(
        None, description="As max_tokens, and wins over it."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="Whether the answer may be several calls; true by default.")
    functions: Functions | None = Field(None, description="OpenAI's older name of tools.")
    function_call: FunctionCallChoice | None = Field(None, description="OpenAI's older name of tool_choice.")
    chat_template_kwargs: TemplateKwargs | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_no_generation_prompt(cls, body: Any) -> Any:
        if isinstance(body, dict) and body.get("add_generation_prompt") is False:
            refuse_parameter("add_generation_prompt", "the answer is always a new message; remove it")
        return body

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs")
        return self

    @property
    def output_limit(self) -> int | None:
        """`max_completion_tokens`, else its older name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def uses_functions(self) -> bool:
        """Whether the reply has OpenAI's older `function_call` instead of `tool_calls`."""
        return bool(self.functions)

    def tool_request(self) -> ToolRequest | None:
        """What may be called; None for nothing. Raises InvalidRequestError."""
        if self.tools and self.functions:
            raise InvalidRequestError("'functions' is an older name of 'tools'; send one of them.", param="functions")
        if self.functions or (self.function_call is not None and not self.tools):
            if self.tool_choice not in (None, "none", "auto"):
                raise InvalidRequestError(
                    "'tool_choice' is only allowed when 'tools' are there; send them.", param="tool_choice"
                )
            return function_request(self.functions, self.function_call)
        if self.function_call not in (None, "none", "auto"):
            raise InvalidRequestError(
                "'function_call' is only allowed when 'functions' are there; use 'tool_choice'.", param="function_call"
            )
        return tool_request(self.tools, self.tool_choice, parallel=self.parallel_tool_calls is not False)

    def generation(self, server: ServerSettings) -> GenerationRequest:
        """The pipeline's request."""
        return self.to_generation(
            prompts=[to_chat_prompt(self.messages, self.chat_template_kwargs)],
            max_choices=server.max_choices,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            prompt_param="messages",
            tools=self.tool_request(),
            reasoning=self.reasoning_options(),
        )


class CompletionBody(SamplingBody):
    """Body of `POST /v1/completions`.

    `max_tokens: 0` is refused even with `echo`: OpenAI has it for scoring a prompt, which needs the prompt's logprobs.
    """

    UNSUPPORTED: ClassVar[Mapping[str, str]] = {
        **SamplingBody.UNSUPPORTED,
        "suffix": "filling in the middle is not available in this version; remove it",
        "chat_template_kwargs": "text completions have no chat template; remove it",
    }

    prompt: CompletionPrompt
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _check_echo_and_best_of(self) -> Self:
        if self.echo and self.logprobs is not None:
            refuse_parameter("logprobs", "log-probabilities of the prompt are not available; turn 'echo' or 'logprobs' off")
        n = 1 if self.n is None else self.n
        if self.best_of is not None and self.best_of < n:
            raise InvalidRequestError(f"'best_of' is {self.best_of}, less than 'n', which is {n}.", param="best_of")
        if self.best_of is not None and self.best_of > n:
            refuse_parameter("best_of", "choosing among more candidates than are returned is not available; raise 'n' instead")
        return self

    @property
    def output_limit(self) -> int:
        """`max_tokens`, by default OpenAI's 16."""
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def generation(self, server: ServerSettings) -> GenerationRequest:
        """The pipeline's request."""
        return self.to_generation(
            prompts=self.prompts(), max_choices=server.max_choices, logprobs=self.logprobs, prompt_param="prompt"
        )

    def prompts(self) -> list[Prompt]:
        """The prompts, whichever of the four shapes they came in."""
        prompts: list[Prompt] = []
        token_ids: list[int] = []
        for item in [self.prompt] if isinstance(self.prompt, str) else self.prompt:
            if isinstance(item, int):
                token_ids.append(item)
            else:
                prompts.append(item)
        return [token_ids] if token_ids else prompts


def refuse_parameter(name: str, advice: str) -> None:
    """Refuse a field that this version cannot honour.

    Raises:
        InvalidRequestError: always, with code `unsupported_parameter`.
    """
    raise InvalidRequestError(f"Unsupported parameter: {name!r}; {advice}.", param=name, code="unsupported_parameter")


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value not in ("", [], {})


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
