"""The types of request fields that several endpoints share, with their ranges and what is said when they are wrong.

Types are strict: `true` is no integer and `"1"` no number. `null` is what OpenAI's clients send for "not set", so every
optional field takes it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

MAX_INT32 = 2**31 - 1
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_LOGIT_BIAS = 1024
MAX_PROMPTS = 256
_DIGITS = re.compile(r"\d{1,10}", re.ASCII)

Finite = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


def _token_key(key: Any) -> Any:
    if isinstance(key, str):
        if _DIGITS.fullmatch(key) is None:
            raise PydanticCustomError("token_key", "its keys must be token ids, written as strings of digits")
        return int(key)
    return key


def _clamp_bias(bias: float) -> float:
    return max(-100.0, min(100.0, bias))


def _few_enough(biases: Any) -> Any:
    if isinstance(biases, dict) and len(biases) > MAX_LOGIT_BIAS:
        raise PydanticCustomError(
            "too_long", "it should have at most {most} items, not {count}", {"most": MAX_LOGIT_BIAS, "count": len(biases)}
        )
    return biases


_TokenKey = Annotated[int, BeforeValidator(_token_key), Field(ge=0, le=MAX_INT32)]
LogitBias = Annotated[
    dict[_TokenKey, Annotated[Finite, AfterValidator(_clamp_bias)]],
    BeforeValidator(_few_enough),  # pydantic counts them after it has looked at each
    Field(max_length=MAX_LOGIT_BIAS, description="Token id to what is added to its logit, clamped to -100..100."),
]

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


def _stop_kind(value: Any) -> str | None:
    return "#text" if isinstance(value, str) else "#texts" if isinstance(value, list) else None


Stop = Annotated[
    Annotated[StopString, Tag("#text")]
    | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True), Tag("#texts")],
    Discriminator(
        _stop_kind,
        custom_error_type="stop",
        custom_error_message="it should be a string or an array of strings",
    ),
]


def _prompt_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "#text"
    if not isinstance(value, list):
        return None
    if value and isinstance(value[0], list):
        return "#token lists"
    if value and isinstance(value[0], int):
        return "#tokens"
    return "#texts"


CompletionPrompt = Annotated[
    Annotated[str, Tag("#text")]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("#texts")]
    | Annotated[TokenIds, Tag("#tokens")]
    | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("#token lists")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt",
        custom_error_message="it should be a string, an array of strings, an array of token ids or an array of such arrays",
    ),
]
