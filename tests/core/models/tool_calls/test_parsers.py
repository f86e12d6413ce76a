"""Content and calls out of an answer's text, whatever the pieces that it comes in."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core.models.tool_calls.tool_case import TEMPLATES, Call, format_named, parsed, tool_request

GET = Call(0, "get", '{"a": 1}')


@pytest.mark.parametrize(
    ("case", "text", "expected"),
    [
        ("hermes", '<tool_call>\n{"name": "get", "arguments": {"a": 1}}\n</tool_call>', [GET]),
        ("hermes", 'Well. <tool_call>{"name": "get", "arguments": {"a": 1}}</tool_call>\n\nNow?', ["Well.", GET, "Now?"]),
        (
            "hermes",
            '<tool_call>{"arguments": {"a": 1}, "name": "get"}</tool_call>\n<tool_call>{"name": "ping"}</tool_call>',
            [GET, Call(1, "ping", "{}")],
        ),
        ("hermes", '<tool_call>[{"name": "get", "arguments": {"a": 1}}, {"name": "ping", "arguments": null}]</tool_call>',
         [GET, Call(1, "ping", "{}")]),
        ("hermes", '<tool_call>{"why": {"name": "calc"}, "name": "get", "parameters": {"a": 1}, "name": "x"}', [GET]),
        ("hermes", '<tool_call>{"name": "get", "arguments": "{\\"a\\": 1}"}</tool_call>', [GET]),
        ("hermes", '<tool_call>{"name": "g\\u0065t", "arguments": {"a": 1}}', [GET]),
        ("hermes", '<tool_call>{"name": "get", "arguments": {"name": "calc", "t": "</tool_call>"}}</tool_call>',
         [Call(0, "get", '{"name": "calc", "t": "</tool_call>"}')]),
        ("hermes", '<tool_call>{"name": "get", "arguments": {"t": "\\ud83d\\ude00 a\nb"}}',
         [Call(0, "get", '{"t": "\\ud83d\\ude00 a\\nb"}')]),
        ("hermes", '<tool_call>{"name": "calc", "arguments": {"n": 1' + "0" * 5000 + "}}",
         [Call(0, "calc", '{"n": 1' + "0" * 5000 + "}")]),
        ("llama3", '{"name": "get", "parameters": {"a": 1}}', [GET]),
        ("llama3", '{"name": "ping", "parameters": null}', [Call(0, "ping", "{}")]),
        ("llama3", '{"parameters": null, "name": "ping"}', [Call(0, "ping", "{}")]),
        ("hermes", '<tool_call>{"name": "get", "arguments": "Paris <tool_call>{"name": "ping"}',
         ['<tool_call>{"name": "get", "arguments": "Paris', Call(0, "ping", "{}")]),
        ("llama3", '\n<|python_tag|>{"type": "function", "name": "get", "parameters": {"a": 1}}', [GET]),
        ("llama3", '{"name": "get", "parameters": {"a": 1}}; {"name": "ping", "parameters": {}}\n'
         '{"name": "ping", "arguments": {}}',
         [GET, Call(1, "ping", "{}"), Call(2, "ping", "{}")]),
        ("mistral", '[TOOL_CALLS] [{"name": "get", "arguments": {"a": 1}}, {"name": "ping", "arguments": {}}]',
         [GET, Call(1, "ping", "{}")]),
        ("mistral", '[TOOL_CALLS]get[ARGS]{"a": 1}[TOOL_CALLS]ping[CALL_ID]a1B2[ARGS] {}', [GET, Call(1, "ping", "{}")]),
        ("mistral-v13", 'So:[TOOL_CALLS]get{"a": 1}', ["So:", GET]),
        ("gemma", '```json\n{"name": "get", "parameters": {"a": 1}}\n```', [GET]),
        ("gemma-function", "<start_function_call>call:get{a:<escape>1,}\"<escape>,b:[1,{c:true}],d:None}<end_function_call>",
         [Call(0, "get", '{"a":"1,}\\"","b":[1,{"c":true}],"d":null}')]),
        ("gemma-4", '<|tool_call>call:get{"a": 1}<tool_call|>'
         '<|tool_call>call:calc{a:New York,b:"c, \\"d",<|"|>e<|"|>:[]}<tool_call|>',
         [GET, Call(1, "calc", '{"a":"New York","b":"c, \\"d","e":[]}')]),
        ("json", '[{"name": "get", "arguments": {"a": 1}}, {"name": "ping", "arguments": {}}]', [GET, Call(1, "ping", "{}")]),
        ("json", '{"name": "get", "arguments": {"a": 1}} Done.', [GET, "Done."]),
    ],
)  # fmt: skip
def test_calls_are_found(case, text, expected):
    assert parsed(case, text) == expected
    assert parsed(case, *text) == expected


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("hermes", " \n"),
        ("hermes", " The <tool_call> mark\n "),
        ("hermes", '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call> '),
        ("hermes", '<tool_call>{"name": "get", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "get", "arguments": "Paris"}</tool_call>'),
        ("hermes", '<tool_call>{"name": 7, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "get" "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {"a": 1'),
        ("hermes", '<tool_call>{"x": ' + "[" * 5000),
        ("hermes", "a < b <tool"),
        ("hermes", '{"name": "get", "arguments": {}}'),
        ("llama3", 'Sure: {"name": "get", "parameters": {}}'),
        ("llama3", '{"answer": {"name": "get", "parameters": {}}}'),
        ("llama3", '{"name": "get"}'),
        ("llama3", "<|python_tag|>print(1)"),
        ("llama3", '{"name": "Paris'),
        ("mistral", '[TOOL_CALLS]nobody[ARGS]{"a": 1}'),
        ("mistral", "[TOOL_CALLS] [1, 2]"),
        ("mistral", "[TOOL_CALLS]" + "x" * 5000 + "{}"),
        ("mistral", "[TOOL_CALLS]get" + " " * 600 + "{}"),
        ("gemma", "```python\nprint(1)\n```"),
        ("gemma-function", "<start_function_call>call:nobody{a:1}<end_function_call>"),
        ("gemma-4", "<|tool_call>get{}<tool_call|>"),
        ("json", "[1, 2]"),
        ("json", "{}"),
    ],
)
def test_what_is_no_call_is_content_unchanged(case, text):
    assert parsed(case, text) == [text]
    assert parsed(case, *text) == [text]


@pytest.mark.parametrize(
    ("case", "text", "expected"),
    [
        ("hermes", '<tool_call>{"name": "get"', [Call(0, "get", "", True)]),
        ("hermes", '<tool_call>{"name": "get", "arguments": {"a": "b', [Call(0, "get", '{"a": "b', True)]),
        ("hermes", '<tool_call>{"name": "get", "arguments": "{\\"a\\": ', [Call(0, "get", '{"a": ', True)]),
        ("hermes", '<tool_call>{"name": "get", "arguments": "{\\"a\\": x"}', [Call(0, "get", '{"a": x', True)]),
        ("hermes", '<tool_call>{"name": "get", "arguments": {"a": x}} more', [Call(0, "get", '{"a": x', True), "}} more"]),
        ("hermes", '<tool_call>{"name": "get", "arguments": {"a": 1}', [GET]),
        ("hermes", '<tool_call>{"name": "get", "arguments": {"a": 1}}\n</tool_', [GET]),
        ("hermes", 'x <tool_call>{"name": "get", "arguments": {"a": 1}}</tool_call> <tool_call>{"na',
         ["x", GET, '<tool_call>{"na']),
        ("llama3", '{"name": "get", "parameters": {"a": 1}}; {"name"', [GET, '; {"name"']),
        ("mistral", '[TOOL_CALLS] [{"name": "get", "arguments": {"a": 1}}, ', [GET]),
        ("mistral-v13", "[TOOL_CALLS]get[ARGS]{", [Call(0, "get", "{", True)]),
        ("hermes", '<tool_call>{"name": "get", "arguments": "{x\\"a\\": 1}"}', [Call(0, "get", '{x"a": 1}', True)]),
        ("hermes", '<tool_call>{"name": "get", "arguments": "{} x"}', [Call(0, "get", "{} x", True)]),
        ("gemma-4", '<|tool_call>call:get{a:<|"|>x<|', [Call(0, "get", '{"a":"x', True)]),
        ("gemma-4", "<|tool_call>call:get{a:[1}", [Call(0, "get", '{"a":[1', True), "}"]),
        ("gemma-4", "<|tool_call>call:get{a,b:1}", [Call(0, "get", "{a", True), ",b:1}"]),
        ("gemma-4", "<|tool_call>call:get{a:Par", [Call(0, "get", '{"a":Par', True)]),
        ("gemma-4", '<|tool_call>call:get{a:"\\x"}', [Call(0, "get", '{"a":"\\x', True), '"}']),
    ],
)  # fmt: skip
def test_answers_that_end_or_break_within_a_call(case, text, expected):
    assert parsed(case, text) == expected
    assert parsed(case, *text) == expected


PIECES = {
    "hermes": ["<tool_call>", "</tool_call>", "<to", '{"name": "get", "arguments": ', '{"arguments": ', '"{\\"a\\"', "\\u00e9"],
    "llama3": ["<|python_tag|>", ";", '{"name": "ping", "parameters": ', '{"type": "function", ', '"{}"}', "{"],
    "mistral": ["[TOOL_CALLS]", " [", '{"name": "get", "arguments": ', "]", "get", "[ARGS]", "[CALL_ID]", "ab1"],
    "gemma-function": ["<start_function_call>", "call:", "get{", "<escape>", "<esc", "a:", "<end_function_call>", "True"],
    "gemma-4": ["<|tool_call>", "call:calc{", '<|"|>', "<|", '"a": ', "a:", "<tool_call|>", "\\"],
    "json": ["```", "json", "[", "]", '{"name": "calc", ', '"arguments": ', "`"],
}  # fmt: skip
COMMON = ['{"a": 1}', "{}", "}", "{", '"b', '"', ":", ",", " ", "\n", "1", "null", "\\", "x", "é", ', "name": "ping"']


@pytest.mark.parametrize("case", PIECES)
@given(data=st.data())
@settings(max_examples=120)
def test_any_split_gives_the_same(case, data):
    call = format_named(case).call_text("get", {"t": 'é\n"}', "n": [1, {}]})
    fragments = st.sampled_from(PIECES[case] + COMMON) | st.sampled_from([call, call[:-9], call[9:]])
    text = "".join(data.draw(st.lists(fragments, max_size=14)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    parallel = data.draw(st.booleans())
    whole = parsed(case, text, parallel=parallel)
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parsed(case, *pieces, parallel=parallel) == whole
    assert parsed(case, *text, parallel=parallel) == whole
    for item in whole:
        if isinstance(item, Call) and not item.incomplete:
            assert isinstance(json.loads(item.arguments), dict)
    if not any(isinstance(item, Call) for item in whole):
        assert whole == ([text] if text else [])


@given(st.text())
@example("<tool_call> \ud800")
def test_text_without_calls_is_content(text):
    for case in TEMPLATES:
        assert parsed(case, text) == ([text] if text else [])


@pytest.mark.parametrize("case", ["hermes", "llama3", "mistral", "mistral-v13", "gemma-4", "json"])
def test_one_call_at_most_when_calls_are_not_parallel(case):
    two = format_named(case).call_text("get", {"a": 1}) * 2 + " bye"
    parser = format_named(case).parser(tool_request(parallel=False))
    states = []
    for character in two:
        states.append(parser.is_complete)
        parser.push(character)
    assert parser.is_complete
    assert (parser.finish(), parser.num_calls) == ([], 1)
    assert parsed(case, two, parallel=False) == [GET]
    assert two[: states.index(True)].rstrip().endswith("}")  # as soon as its last brace is there


def test_pieces_go_out_as_they_come():
    parser = format_named("hermes").parser(tool_request())
    seen = [
        parser.push(piece) for piece in ["Hi", " <tool", '_call>{"name": "get", ', '"arguments"', ": ", '{"a', '": "b\\u', "00"]
    ]
    assert [seen[0], seen[1], seen[2], seen[3], seen[4]] == [["Hi"], [], [], [], []]
    assert [(delta.name, delta.arguments) for delta in seen[5]] == [("get", '{"a')]
    assert [delta.arguments for piece in seen[6:] for delta in piece] == ['": "b\\u', "00"]


def test_names_that_may_not_be_called_are_content():
    text = '<tool_call>{"name": "get", "arguments": {}}</tool_call>'
    assert parsed("hermes", text, allowed=frozenset({"ping"})) == [text]


@pytest.mark.parametrize(("case", "pattern"), [("hermes", "call_[0-9A-Za-z]{24}"), ("mistral-v13", "[0-9A-Za-z]{9}")])
def test_ids_are_of_the_familys_form_and_all_different(case, pattern):
    parser = format_named(case).parser(tool_request())
    deltas = parser.push(format_named(case).call_text("ping", {}) * 50)
    ids = {delta.id for delta in deltas if not isinstance(delta, str)}
    assert len(ids) == 50
    assert all(re.fullmatch(pattern, id) for id in ids)


CALL = '<tool_call>{"name": "get", "arguments": '


@pytest.mark.parametrize(
    ("case", "unit", "head"),
    [
        ("hermes", "<tool_call>", ""),
        ("hermes", '<tool_call>{"a":"', ""),
        ("hermes", '":":","', "<tool_call>{"),
        ("hermes", CALL + "{}}", ""),
        ("hermes", '"x", ', CALL + '{"a": ['),
        ("hermes", '{"b": [1]}, ', CALL + '{"a": ['),
        ("hermes", '\\"', CALL + '"{\\"a'),
        ("hermes", "\\u00e9", CALL + '{"a": "'),
        ("hermes", " ", "x"),
        ("llama3", '{"name": "ping", "parameters": {}};', ""),
        ("json", '{"name": "ping", "parameters": {}},', "["),
        ("mistral", "[TOOL_CALLS]", ""),
        ("mistral", " ", "[TOOL_CALLS]get"),
        ("gemma-function", "1,", "<start_function_call>call:get{a:["),
        ("gemma-function", "<escape>,", "<start_function_call>call:get{a:["),
        ("gemma-4", "a:{", "<|tool_call>call:get{"),
    ],
)
def test_time_is_linear_in_hostile_text(case, unit, head):
    def seconds(size):
        text = head + unit * (size // len(unit))
        parser = format_named(case).parser(tool_request())
        began = time.process_time()
        parser.push(text)
        parser.finish()
        return time.process_time() - began

    small = min(seconds(16_000) for _ in range(3))
    assert small < 0.1
    assert min(seconds(64_000) for _ in range(2)) < 8 * small + 0.02


def test_a_megabyte_of_arguments_and_thousands_of_calls():
    text = "x" * 1_000_000
    assert parsed("hermes", f'{CALL}{{"a": "{text}"}}}}') == [Call(0, "get", f'{{"a": "{text}"}}')]
    assert len(parsed("hermes", *[f"{CALL}{{}}}}</tool_call>\n"] * 3000)) == 3000
