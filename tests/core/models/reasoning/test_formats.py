"""Families of reasoning tags: which one a template is of, and whether a prompt opens thoughts."""

from __future__ import annotations

import jinja2
import pytest

from inferflux_core.errors import ConfigError
from inferflux_core.models.reasoning.formats import REASONING_FORMATS, opens_thoughts, reasoning_format

QWEN = """{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content.split('</think>')[-1] }}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""
OPENING = """{{ messages[0].content }}<|assistant|>{% if thinking %}<think>
{% else %}<think></think>{% endif %}"""
ONLY_END = "{{ messages[0].content }}<|assistant|>{{ '<think>' if enable_thinking else '</think>' }}"


def rendered(template: str, **variables: object) -> str:
    messages = [{"role": "user", "content": "Hello"}]
    return str(jinja2.Template(template).render(messages=messages, add_generation_prompt=True, **variables))


@pytest.mark.parametrize(
    ("name", "tags", "template"),
    [
        ("seed_oss", ("<seed:think>", "</seed:think>"), "{% set b = '<seed:think>' %}{% set e = '</seed:think>' %}"),
        ("hy_v3", ("<think:opensource>", "</think:opensource>"), "{% set K = ':opensource' %}{{ '</think{}>'.format(K) }}"),
        ("minimax_m3", ("<mm:think>", "</mm:think>"), "</mm:think>"),
        ("kimi_vl", ("◁think▷", "◁/think▷"), "◁think▷x◁/think▷"),
        ("mistral", ("[THINK]", "[/THINK]"), "[SYSTEM_PROMPT][THINK]x[/THINK]"),
        ("cohere", ("<|START_THINKING|>", "<|END_THINKING|>"), "<|START_THINKING|><|END_THINKING|>"),
        ("gemma4", ("<|channel>thought", "<channel|>"), "{{ '<|channel>thought\\n<channel|>' }}"),
        ("granite_text", ("Here is my thought process:", "Here is my response:"), "after 'Here is my response:' for each"),
        ("apriel", ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"), "'\\n[BEGIN FINAL RESPONSE]\\n'"),
        ("granite", ("<think>", "</think>"), "between <think></think> and write between <response></response>"),
        ("think", ("<think>", "</think>"), QWEN),
        ("think", ("<think>", "</think>"), ONLY_END),
    ],
)
def test_the_template_tells_the_family(name: str, tags: tuple[str, str], template: str) -> None:
    family = reasoning_format("auto", template)
    assert family is not None
    assert (family.name, family.begin, family.end) == (name, *tags)
    assert family.closing.endswith(family.end)
    assert reasoning_format(name, None) is family
    assert reasoning_format("none", template) is None


@pytest.mark.parametrize("template", [None, "", "{{ messages[0].content }}", "Think. <response></response>"])
def test_a_template_without_tags_is_of_no_family(template: str | None) -> None:
    assert reasoning_format("auto", template) is None


def test_names() -> None:
    assert {name for name in REASONING_FORMATS if reasoning_format(name, None) is None} == set()
    assert reasoning_format("deepseek_r1", None) is reasoning_format("think", None)
    assert reasoning_format("ernie45", None) is reasoning_format("granite", None)
    message = f"unknown reasoning_parser 'thinker'. There are: auto, none, {', '.join(REASONING_FORMATS)}"
    with pytest.raises(ConfigError) as caught:
        reasoning_format("thinker", QWEN)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("template", "variables", "opens"),
    [
        (QWEN, {}, False),
        (QWEN, {"enable_thinking": False}, False),
        (OPENING, {"thinking": True}, True),
        (OPENING, {"thinking": False}, False),
        (ONLY_END, {"enable_thinking": True}, True),
        (ONLY_END, {"enable_thinking": False}, False),
    ],
)
def test_whether_a_prompt_opens_thoughts(template: str, variables: dict[str, bool], opens: bool) -> None:
    family = reasoning_format("auto", template)
    assert family is not None
    assert opens_thoughts(family, rendered(template, **variables)) is opens


@pytest.mark.parametrize(
    ("tail", "opens"),
    [("", False), ("<think>", True), ("<think> \r\n\t", True), ("<think>\n\n</think>\n\n", False), ("<think>Let", False)],
)
def test_the_tail_of_a_prompt(tail: str, opens: bool) -> None:
    family = reasoning_format("think", None)
    assert family is not None
    assert opens_thoughts(family, tail) is opens
