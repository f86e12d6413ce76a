"""Which format a template asks for, and what a model reads of its tools."""

from __future__ import annotations

from typing import Any

import pytest

from core.models.tool_calls.tool_case import format_named, tool_request
from inferflux_core.errors import ConfigError
from inferflux_core.models.chat_template import ChatTemplate
from inferflux_core.models.prompts import ChatPrompt
from inferflux_core.models.tool_calls.formats import TOOL_FORMATS, prints_tools, tool_format
from inferflux_core.models.tool_calls.prompting import with_tools
from inferflux_core.models.tool_calls.tool_format import ToolFormat
from llamacpp.demo_model import demo_files

QWEN = """{%- if tools %}{{- 'Here are <tools>' }}{%- for tool in tools %}{{ tool | tojson }}{%- endfor %}{%- endif %}
{%- for m in messages %}
{%- for tool_call in m.tool_calls or [] %}{{- '\\n<tool_call>\\n{"name": "' + tool_call.name }}{%- endfor %}{%- endfor %}"""
QWEN_CODER = "{% if tools %}{{ '<tool_call>\\n<function=example>\\n<parameter=x>' }}{% endif %}"
LLAMA = """{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{{- '<|start_header_id|>system' }}{{- 'Respond in the format {"name": function name, "parameters": dictionary}' }}"""
MISTRAL_V3 = "{%- if tools is not none %}{%- endif %}{{- '[TOOL_CALLS] [' }}{%- for call in m.tool_calls %}{%- endfor %}"
MISTRAL_NEMO = '{%- if tools %}{%- endif %}{{- "[TOOL_CALLS][" }}'
MISTRAL_V13 = "{%- if tools %}{%- endif %}{{- '[TOOL_CALLS]' + tool['function']['name'] + '[ARGS]' + arguments }}"
MISTRAL_BARE = "{%- if tools %}{%- endif %}{{- '[TOOL_CALLS]' + tool.function.name + arguments }}"
FUNCTION_GEMMA = "{%- for tool in tools %}<start_function_declaration>{%- endfor %}{{ '<start_function_call>call:' + name }}"
GEMMA_4 = "{%- for tool in tools %}<|tool>{%- endfor %}{{ '<|tool_call>call:' + name + '{' }}<start_of_turn>"
GEMMA_3 = "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + role }}{% endfor %}"
ALTERNATING = "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}"
CHATML = (
    "{# tools are not printed #}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|> \"tools\"' }}\n{% endfor %}"
)
TEMPLATES = {
    "Qwen": (QWEN, "hermes", True),
    "Qwen Coder": (QWEN_CODER, "hermes", False),
    "Llama": (LLAMA, "llama3", True),
    "Mistral v3": (MISTRAL_V3, "mistral", True),
    "Mistral v13": (MISTRAL_V13, "mistral", True),
    "FunctionGemma": (FUNCTION_GEMMA, "gemma", True),
    "Gemma 4": (GEMMA_4, "gemma", True),
    "Gemma 3": (GEMMA_3, "gemma", False),
    "ChatML": (CHATML, "hermes", False),
    "an unknown convention": ("{{ tools }}<|tool_call|>", "hermes", False),
    "not Jinja": ("{% if tools", "hermes", False),
}


def detected(template: str) -> ToolFormat:
    found = tool_format("auto", template)
    assert found is not None
    return found


@pytest.mark.parametrize(("template", "name", "prints"), TEMPLATES.values(), ids=TEMPLATES)
def test_the_template_tells_the_format(template, name, prints):
    format = detected(template)
    assert format.name == name
    assert prints_tools(template, format) == prints


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (MISTRAL_V3, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]'),
        (MISTRAL_NEMO, '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]'),
        (MISTRAL_V13, '[TOOL_CALLS]f[ARGS]{"a": 1}'),
        (MISTRAL_BARE, '[TOOL_CALLS]f{"a": 1}'),
        (FUNCTION_GEMMA, '<start_function_call>call:f{"a": 1}<end_function_call>'),
        (GEMMA_4, '<|tool_call>call:f{"a": 1}<tool_call|>'),
        (GEMMA_3, '{"name": "f", "parameters": {"a": 1}}'),
        (LLAMA, '{"name": "f", "parameters": {"a": 1}}'),
        (CHATML, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'),
    ],
)
def test_the_template_tells_the_generation_of_a_family(template, text):
    assert detected(template).call_text("f", {"a": 1}) == text


def test_administrators_choose_by_name():
    for name in set(TOOL_FORMATS) - {"auto", "none"}:
        format = tool_format(name, CHATML)
        assert format is not None
        assert format.name == name
    assert tool_format("none", QWEN) is None
    assert tool_format("auto", None) is None
    assert tool_format("hermes", None) is None
    json_format = tool_format("json", "{{ tools }}")
    assert json_format is not None
    assert prints_tools("{{ tools }}", json_format)
    for silent in (QWEN, "{# tools #}", "{{ 'tools' }}", "{{ message.tools }}", "tools {{ my_tools }}"):
        assert not prints_tools(silent, json_format)
    with pytest.raises(ConfigError, match=r"tool_parser 'pythonic' does not exist; choose one of auto, none, hermes, "):
        tool_format("pythonic", QWEN)


def test_hostile_templates_are_searched_in_linear_time():
    for unit in ("{% ", "{{", "'", "{% '", "\"'", "{{ \\", "tools", "[TOOL_CALLS]' + "):
        assert detected(unit * (1 << 18)).name in ("hermes", "mistral")
        prints_tools(unit * (1 << 18), detected(unit))


HISTORY: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "get", "arguments": {"city": "Köln"}}},
            {"id": None, "type": "function", "function": {"name": "ping", "arguments": "broken"}},
        ],
    },
    {"role": "tool", "content": "Sunny", "tool_call_id": "call_1"},
    {"role": "tool", "content": "ok", "tool_call_id": "call_2"},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Welcome."},
    {"role": "user", "content": "Bye."},
]


def test_templates_that_print_tools_get_them():
    prompt = ChatPrompt(HISTORY, template_kwargs={"enable_thinking": False})
    shown = with_tools(prompt, tool_request(allowed=frozenset({"ping"})), detected(QWEN), QWEN)
    assert shown.messages == HISTORY
    assert shown.template_kwargs == {"enable_thinking": False}
    assert shown.tools is not None
    assert [tool["function"]["name"] for tool in shown.tools] == ["get", "get_x", "calc", "ping"]
    nothing = {"name": "ping", "description": "", "parameters": {"type": "object", "properties": {}}}
    assert shown.tools[3] == {"type": "function", "function": nothing}


def test_templates_without_tools_are_told_in_text():
    format = detected(CHATML)
    shown = with_tools(ChatPrompt(HISTORY), tool_request(), format, CHATML)
    assert shown.tools is None
    roles = [message["role"] for message in shown.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    system, _, assistant, results = [message["content"] for message in shown.messages[:4]]
    assert system.startswith("Be brief.\n\n# Tools\n\nYou may call one or more functions")
    assert '{"type": "function", "function": {"name": "get", "description": "Gets.", "parameters": {' in system
    assert system.endswith(format.call_text("function-name", {"argument-name": "value"}))
    calls = [format.call_text("get", {"city": "Köln"}), format.call_text("ping", "broken")]
    assert assistant == "\n".join(["Let me see.", *calls])
    assert results == "<tool_response>\nSunny\n</tool_response>\n<tool_response>\nok\n</tool_response>\nThanks."
    assert HISTORY[0]["content"] == "Be brief."  # the caller's messages are left alone


def test_what_is_asked_of_the_model_is_in_its_instructions():
    changes = {"must_call": True, "parallel": False, "allowed": frozenset({"ping", "get"})}
    shown = with_tools(ChatPrompt(HISTORY[1:2]), tool_request(**changes), detected(CHATML), CHATML + "system")
    assert [message["role"] for message in shown.messages] == ["system", "user"]
    assert "Answer with a call" in shown.messages[0]["content"]
    assert "Only these may be called now: get, ping.\n" in shown.messages[0]["content"]


@pytest.mark.parametrize("template", [ALTERNATING, GEMMA_3 + "{{ raise_exception('System role not supported') }}"])
def test_templates_without_a_system_message_get_the_tools_from_the_user(template):
    shown = with_tools(ChatPrompt(HISTORY[1:2]), tool_request(), detected(template), template)
    assert [message["role"] for message in shown.messages] == ["user"]
    assert shown.messages[0]["content"].startswith("# Tools\n\n")
    assert shown.messages[0]["content"].endswith("\n\nWeather?")


def test_mistral_templates_get_ids_that_they_accept():
    shown = with_tools(ChatPrompt(HISTORY), tool_request(), detected(MISTRAL_V3), MISTRAL_V3)
    calls = shown.messages[2]["tool_calls"]
    ids = [call["id"] for call in calls]
    assert all(len(id) == 9 and id.isalnum() for id in ids)
    assert len(set(ids)) == 2
    assert shown.messages[3]["tool_call_id"] == ids[0]
    kept = [{"role": "tool", "content": "", "tool_call_id": "a1B2c3D4e"}]
    assert with_tools(ChatPrompt(kept), tool_request(), detected(MISTRAL_V3), MISTRAL_V3).messages == kept
    assert HISTORY[2]["tool_calls"][0]["id"] == "call_1"


@pytest.mark.parametrize("case", ["hermes", "llama3", "mistral", "mistral-v13", "gemma-4", "json"])
def test_calls_of_the_history_are_what_the_parser_reads(case):
    format = format_named(case)
    shown = with_tools(ChatPrompt(HISTORY[1:5]), tool_request(), format, None)
    parser = format.parser(tool_request())
    first = shown.messages[2]["content"].removeprefix("Let me see.\n").removesuffix(format.call_text("ping", "broken"))
    deltas = parser.push(first.rstrip())
    assert [(delta.name, delta.arguments) for delta in deltas if not isinstance(delta, str)] == [("get", '{"city": "Köln"}')]


def test_the_demo_models_template_shows_tools_calls_and_results():
    llamacpp = pytest.importorskip("inferflux_backend_llamacpp.backend")
    tokenizer = llamacpp.LlamaCppBackend(llamacpp.LlamaCppSettings()).tokenizer(demo_files())
    template = tokenizer.chat_template
    shown = with_tools(ChatPrompt(HISTORY), tool_request(), detected(template), template)
    chat = ChatTemplate(
        template,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        special_tokens=tokenizer.special_tokens,
    )
    try:
        text = "".join(segment.text for segment in chat.render([dict(message) for message in shown.messages]))
    finally:
        chat.close()
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert '<tool_call>\n{"name": "get", "arguments": {"city": "Köln"}}\n</tool_call>' in text
    assert "<|im_start|>user\n<tool_response>\nSunny\n</tool_response>\n" in text
    assert text.endswith("Bye.<|im_end|>\n<|im_start|>assistant\n")
