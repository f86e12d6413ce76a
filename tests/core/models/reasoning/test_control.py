"""What a request asks of thoughts, as the template and the engine are told."""

from __future__ import annotations

import time
from typing import Any

import pytest

from inferflux_core.engine.types import Thinking
from inferflux_core.models.reasoning.control import EFFORT_BUDGETS, template_kwargs, thinking
from inferflux_core.models.reasoning.formats import reasoning_format
from inferflux_core.models.reasoning.options import Effort, ReasoningOptions
from inferflux_core.testing.fake_backend import FakeTokenizer

QWEN = "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
DEEPSEEK = "{% if not thinking is defined %}{% set thinking = enable_thinking %}{% endif %}"
GPT_OSS = '{%- if reasoning_effort is not defined %}{%- set reasoning_effort = "medium" %}{%- endif %}{{ reasoning_effort }}'
HUNYUAN = "{% if reasoning_effort not in ['high', 'low', 'no_think'] %}{{ raise_exception('no') }}{% endif %}"
KIMI = "{% if thinking and thinking_effort not in ['low', 'high', 'max'] %}{{ raise_exception('no') }}{% endif %}"
EXTREME = "{% if reasoning_effort is defined and reasoning_effort == 'max' %}Do your best.{% endif %}"
COHERE = '{% set r = false if reasoning_effort | lower == "none" else true %}'
MODES = "{% if thinking_mode == 'disabled' %}</think>{% elif thinking_mode == \"enabled\" %}<think>{% endif %}"
SEED = "{% if thinking_budget is defined %}{{ thinking_budget }}{% endif %}"
NOTHING = (
    "{# enable_thinking, reasoning_effort #}thinking {{ message.thinking }}{{ 'enable_thinking' }}{{ message['thinking'] }}"
)


@pytest.mark.parametrize(
    ("template", "effort", "kwargs"),
    [
        (QWEN, None, {}),
        (QWEN, "none", {"enable_thinking": False}),
        (QWEN, "low", {"enable_thinking": True}),
        (DEEPSEEK, "none", {"enable_thinking": False, "thinking": False}),
        (DEEPSEEK, "max", {"enable_thinking": True, "thinking": True}),
        (GPT_OSS, "none", {"reasoning_effort": "low"}),
        (GPT_OSS, "minimal", {"reasoning_effort": "low"}),
        (GPT_OSS, "medium", {"reasoning_effort": "medium"}),
        (GPT_OSS, "xhigh", {"reasoning_effort": "high"}),
        (GPT_OSS, "max", {"reasoning_effort": "high"}),
        (HUNYUAN, "none", {"reasoning_effort": "no_think"}),
        (HUNYUAN, "minimal", {"reasoning_effort": "low"}),
        (HUNYUAN, "medium", {"reasoning_effort": "high"}),
        (KIMI, "none", {"thinking": False, "thinking_effort": "low"}),
        (KIMI, "xhigh", {"thinking": True, "thinking_effort": "max"}),
        (EXTREME, "medium", {"reasoning_effort": "medium"}),
        (EXTREME, "max", {"reasoning_effort": "max"}),
        (COHERE, "none", {"reasoning_effort": "none"}),
        (COHERE, "max", {"reasoning_effort": "high"}),
        (MODES, "none", {"thinking_mode": "disabled"}),
        (MODES, "low", {"thinking_mode": "enabled"}),
        (SEED, "none", {"thinking_budget": 0}),
        (SEED, "low", {}),
        (NOTHING, "none", {}),
        (NOTHING, "high", {}),
    ],
)
def test_effort_in_the_words_of_the_template(template: str, effort: Effort | None, kwargs: dict[str, Any]) -> None:
    assert template_kwargs(ReasoningOptions(effort=effort), template) == kwargs


@pytest.mark.parametrize(
    ("template", "budget", "kwargs"),
    [
        (SEED, 512, {"thinking_budget": 512}),
        (SEED, 0, {"thinking_budget": 0}),
        (QWEN, 0, {"enable_thinking": False}),
        (QWEN, 9, {}),
    ],
)
def test_budget_in_the_words_of_the_template(template: str, budget: int, kwargs: dict[str, Any]) -> None:
    assert template_kwargs(ReasoningOptions(budget=budget), template) == kwargs


@pytest.mark.parametrize(
    "template", ["{%" * 300_000, "{{" + "'" * 600_001, "{{" + "\\'" * 300_000 + "}}", "{{'" + "\\" * 600_000 + "}}"]
)
def test_hostile_templates_are_read_in_linear_time(template: str) -> None:
    begin = time.process_time()
    assert template_kwargs(ReasoningOptions(effort="none"), template) == {}
    assert time.process_time() - begin < 2


@pytest.mark.parametrize(
    ("template", "is_open", "options", "budget"),
    [
        (QWEN, False, ReasoningOptions(), None),
        (QWEN, False, ReasoningOptions(budget=7), 7),
        (QWEN, False, ReasoningOptions(budget=0), 0),
        (QWEN, False, ReasoningOptions(effort="low"), EFFORT_BUDGETS["low"]),
        (QWEN, False, ReasoningOptions(effort="low", budget=3), 3),
        (QWEN, False, ReasoningOptions(effort="max"), None),
        (QWEN, False, ReasoningOptions(effort="none"), None),  # the template sees to it
        (QWEN, True, ReasoningOptions(effort="none"), 0),  # it did not
        ("", True, ReasoningOptions(effort="none"), 0),
        ("", False, ReasoningOptions(effort="none"), 0),
        (GPT_OSS, False, ReasoningOptions(effort="low"), None),
    ],
)
def test_what_the_engine_is_told(template: str, is_open: bool, options: ReasoningOptions, budget: int | None) -> None:
    family = reasoning_format("think", None)
    end = list(b"\n</think>") if budget is not None else []
    told = Thinking(is_open=is_open, begin="<think>", end="</think>", budget=budget, end_token_ids=end)
    assert thinking(family, options, is_open, FakeTokenizer(), template) == told


def test_the_tokenizer_s_template_is_asked_where_no_other_is_given() -> None:
    class WithEfforts(FakeTokenizer):
        chat_template = GPT_OSS

    family = reasoning_format("think", None)
    told = [thinking(family, ReasoningOptions(effort="low"), False, t()) for t in (WithEfforts, FakeTokenizer)]
    assert [told and told.budget for told in told] == [None, EFFORT_BUDGETS["low"]]


def test_the_end_tag_is_one_token_where_it_is_a_control_token() -> None:
    class WithTags(FakeTokenizer):
        def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
            assert parse_special
            return super().encode(text.replace("</think>", "<|im_end|>"), add_special=add_special, parse_special=True)

    told = thinking(reasoning_format("think", None), ReasoningOptions(budget=1), True, WithTags(), "")
    assert told is not None
    assert told.end_token_ids == [ord("\n"), 259]


def test_a_model_without_thoughts_is_told_nothing() -> None:
    assert thinking(None, ReasoningOptions(effort="high", budget=5), False, FakeTokenizer(), QWEN) is None
