"""What a model's template is given: variables that may be set, by whom, and who wins; tools, and what was called before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from inferflux_core.errors import InvalidRequestError
from inferflux_core.models.chat_format import ChatFormat
from inferflux_core.models.chat_template import ChatTemplate
from inferflux_core.models.prompts import ChatPrompt
from inferflux_core.models.reasoning.options import ReasoningOptions
from inferflux_core.models.tool_calls.calls import Function, ToolRequest
from inferflux_core.models.tool_calls.formats import tool_format

SOURCE = """\
{%- set mood = mood | default('calm') -%}
{%- for message in messages -%}<{{ message.role }}>{{ message.content }}{%- endfor -%}
{{- '[thinking]' if enable_thinking else '[no thinking]' }}{{ mood }}{{ bos_token }}{{ range(level or 0) | list }}"""
PRINTS_TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{# <tool_call> #}" + SOURCE
USER = {"role": "user", "content": "hi"}
NO_OPTIONS = ReasoningOptions()
REQUEST = ToolRequest(functions=(Function("f", "Does it."),), allowed=frozenset({"f"}))

Make = Callable[..., ChatFormat]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[ChatFormat] = []

    def one(source: str = SOURCE, tool_parser: str = "auto", **kwargs: Any) -> ChatFormat:
        template = ChatTemplate(source, bos_token="<s>", eos_token="</s>", special_tokens=frozenset())
        made.append(ChatFormat(template=template, source=source, tools=tool_format(tool_parser, source), kwargs=kwargs))
        return made[-1]

    yield one
    for chat in made:
        chat.template.close()


def test_variables_are_the_names_that_the_template_reads(make: Make) -> None:
    assert make().template.variables == {"mood", "message", "enable_thinking", "level"}


@pytest.mark.parametrize(
    "name", ["messages", "tools", "bos_token", "eos_token", "add_generation_prompt", "range", "x", "", "a b"]
)
def test_other_variables_are_not_for_requests(make: Make, name: str) -> None:
    with pytest.raises(InvalidRequestError, match="'enable_thinking', 'level', 'message', 'mood'") as caught:
        make().prompt(ChatPrompt([USER], template_kwargs={name: "x", "mood": "gay"}), None, NO_OPTIONS)
    assert caught.value.param == "chat_template_kwargs"
    assert repr(name) in caught.value.message


@pytest.mark.parametrize(
    ("configured", "options", "asked", "given"),
    [
        ({}, NO_OPTIONS, {}, {}),
        ({"mood": "grim"}, NO_OPTIONS, {}, {"mood": "grim"}),
        ({"mood": "grim"}, NO_OPTIONS, {"mood": "glad", "level": 2}, {"mood": "glad", "level": 2}),
        ({"enable_thinking": True}, ReasoningOptions(effort="none"), {}, {"enable_thinking": False}),
        ({}, ReasoningOptions(effort="none"), {"enable_thinking": True}, {"enable_thinking": True}),
    ],
)
def test_the_request_wins_over_its_options_and_these_over_the_configuration(
    make: Make, configured: dict[str, Any], options: ReasoningOptions, asked: dict[str, Any], given: dict[str, Any]
) -> None:
    prompt = make(**configured).prompt(ChatPrompt([USER], template_kwargs=asked), None, options)
    assert prompt.template_kwargs == given
    assert prompt.messages == [USER]


def test_tools_are_for_the_template_or_for_the_system_message(make: Make) -> None:
    printed = make(PRINTS_TOOLS).prompt(ChatPrompt([USER]), REQUEST, NO_OPTIONS)
    assert printed.messages == [USER]
    assert printed.tools is not None
    assert printed.tools[0]["function"]["name"] == "f"
    told = make().prompt(ChatPrompt([USER]), REQUEST, NO_OPTIONS)
    assert told.tools is None
    assert told.messages[1:] == [USER]
    assert told.messages[0]["role"] == "system"
    assert '"name": "f"' in told.messages[0]["content"]


def test_a_model_that_calls_nothing_refuses_tools(make: Make) -> None:
    chat = make(tool_parser="none")
    assert chat.tools is None
    assert chat.prompt(ChatPrompt([USER]), None, NO_OPTIONS).messages == [USER]
    with pytest.raises(InvalidRequestError, match="calls no tools") as caught:
        chat.prompt(ChatPrompt([USER]), REQUEST, NO_OPTIONS)
    assert (caught.value.param, caught.value.code) == ("tools", "unsupported_parameter")


def test_what_was_called_before_is_shown_also_when_nothing_can_be_called_now(make: Make) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    history = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "42"}]
    prompt = make().prompt(ChatPrompt(history), None, NO_OPTIONS)
    assert prompt.tools is None
    assert [message["role"] for message in prompt.messages] == ["user", "assistant", "user"]
    assert '"arguments": {"x": 1}' in prompt.messages[1]["content"]
    assert "42" in prompt.messages[2]["content"]
    printed = make(PRINTS_TOOLS).prompt(ChatPrompt(history), None, NO_OPTIONS)
    assert (printed.messages, printed.tools) == (history, None)
