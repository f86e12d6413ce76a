"""What a request may say of a model's thoughts, in the spellings of OpenAI, vLLM, llama-server and OpenRouter."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from inferflux_core.errors import InvalidRequestError
from inferflux_core.models.reasoning.options import Effort, ReasoningOptions
from inferflux_core.serving.openai.fields import MAX_INT32

MAX_TEMPLATE_KWARGS = 64
MAX_TEMPLATE_VALUE = 4096  # characters

Placement = Literal["auto", "deepseek", "parsed", "none", "raw", "hidden"]
Budget = Annotated[int, Field(ge=-1, le=MAX_INT32)]


def _scalar(value: Any) -> Any:
    if value is not None and not isinstance(value, str | int | float | bool):
        raise PydanticCustomError("scalar", "it should be a string, a number, a boolean or null")
    if isinstance(value, str) and len(value) > MAX_TEMPLATE_VALUE:
        raise PydanticCustomError("scalar", "it should have at most {most} characters", {"most": MAX_TEMPLATE_VALUE})
    return value


TemplateKwargs = Annotated[
    dict[str, Annotated[Any, BeforeValidator(_scalar)]],
    Field(max_length=MAX_TEMPLATE_KWARGS, description="Variables that the model's chat template knows."),
]


class Reasoning(BaseModel):
    """`reasoning` as responses and OpenRouter have it.

    Attributes:
        enabled: false asks for no thoughts, as the effort `none` does.
        max_tokens: as `thinking_budget_tokens`.
        exclude: think, but leave the thoughts out of the answer.
    """

    model_config = ConfigDict(strict=True, extra="ignore")

    effort: Effort | None = None
    enabled: bool | None = None
    max_tokens: Budget | None = None
    exclude: bool | None = None


class ReasoningFields(BaseModel):
    """How much to think, and whether to show it.

    Attributes:
        reasoning_effort: OpenAI's; `none` asks for no thoughts.
        thinking_budget_tokens, thinking_token_budget: most tokens of thoughts, as llama-server and vLLM name it; -1 is any
            number.
        include_reasoning: vLLM's; false leaves the thoughts out of the answer.
        reasoning_format: where the thoughts go, as llama-server and Groq say it. `none` and `raw`: they stay in the text,
            between the model's tags. `hidden`: nowhere. Otherwise they are told apart from it.
    """

    reasoning_effort: Effort | None = None
    reasoning: Reasoning | None = None
    thinking_budget_tokens: Budget | None = None
    thinking_token_budget: Budget | None = None
    include_reasoning: bool | None = None
    reasoning_format: Placement | None = None

    def reasoning_options(self) -> ReasoningOptions:
        """Raises InvalidRequestError if two names of one thing say different things."""
        within = self.reasoning or Reasoning()
        efforts: dict[str, Effort | None] = {
            "reasoning_effort": self.reasoning_effort,
            "reasoning.effort": within.effort,
            "reasoning.enabled": "none" if within.enabled is False else None,
        }
        budgets = {
            "thinking_budget_tokens": self.thinking_budget_tokens,
            "thinking_token_budget": self.thinking_token_budget,
            "reasoning.max_tokens": within.max_tokens,
        }
        budget = _same(budgets)
        return ReasoningOptions(
            effort=_same(efforts),
            budget=None if budget is None or budget < 0 else budget,
            include=self.include_reasoning is not False and within.exclude is not True and self.reasoning_format != "hidden",
            apart=self.reasoning_format not in ("none", "raw"),
        )


def _same(values: dict[str, Any]) -> Any:
    """The value that all those agree on that are set. Raises InvalidRequestError if they differ."""
    given = {name: value for name, value in values.items() if value is not None}
    if len(set(given.values())) > 1:
        first, second = list(given)[:2]
        raise InvalidRequestError(f"{first!r} and {second!r} are two names of one thing and differ; send one.", param=second)
    return next(iter(given.values()), None)
