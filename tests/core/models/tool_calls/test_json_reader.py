"""JSON in pieces: as strict as Python's own parser, and the same however it is cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferflux_core.models.tool_calls.json_reader import MAX_DEPTH, JsonReader, NotJsonError, StringDecoder

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(max_size=3), VALUES, max_size=4)
LAYOUTS = st.sampled_from(({}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}))
FRAGMENTS = [
    '{"a":1,',
    '{"b":[',
    '"x\\u00e9',
    '\\"',
    '"',
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "1",
    "-",
    ".5",
    "e3",
    "true",
    "nul",
    " ",
    "\n",
    "\\",
]


def copied(text: str, cuts: list[int]) -> tuple[str, int, bool]:
    """What is copied of a text cut at these places, where reading stopped, and whether the value had ended."""
    reader, into, at = JsonReader(), list[str](), 0
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    for begin, end in zip([0, *ends], ends, strict=False):
        if reader.ended or begin == end:
            continue
        try:
            at = begin + reader.copy(text[begin:end], 0, 0, into)
        except NotJsonError as error:
            return "".join(into), begin + error.at, False
    return "".join(into), at, reader.ended


@given(OBJECTS, LAYOUTS, st.lists(st.integers(0, 60)), st.sampled_from(["", "}", " x", '"']))
def test_json_is_copied_up_to_its_last_bracket(value, layout, cuts, rest):
    text = json.dumps(value, **layout)
    assert copied(text + rest, cuts) == (text, len(text), True)


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=9).map("".join), st.lists(st.integers(0, 30)))
@settings(max_examples=300)
def test_where_it_goes_wrong_does_not_depend_on_the_pieces(text, cuts):
    whole = copied(text, [])
    assert copied(text, cuts) == whole
    assert copied(text, list(range(len(text)))) == whole
    if whole[2]:
        json.loads(text[: whole[1]], strict=False)


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=9).map("".join))
@settings(max_examples=300)
def test_what_python_reads_is_read(text):
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        assert copied(text, [])[1:] != (len(text), True)
    else:
        assert copied(text, [])[2] == isinstance(value, dict | list)


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ('{"a" 1}', 5),
        ('{"a":1,}', 7),
        ("[1,]", 3),
        ("[1 2]", 3),
        ("[01]", 3),
        ("[1.]", 3),
        ("[tru]", 4),
        ("[True]", 5),
        ("[1}", 2),
        ('["\\x"]', 3),
        ('["\\u12g4"]', 6),
        ('["\\u123"]', 7),
        ("{1:2}", 1),
        ('{"a":1 "b"', 7),
        ("7", 0),
        ('"a"', 0),
        ("[" * (MAX_DEPTH + 1), MAX_DEPTH),
    ],
)
def test_bad_json_is_told_at_its_character(text, at):
    assert copied(text, [])[1:] == (at, False)
    assert copied(text, []) == copied(text, list(range(len(text))))


def test_control_characters_in_strings_become_escapes():
    text, _, ended = copied('{"a\n":\n"b\n\t\x01\x1f"}', [])
    assert (text, ended) == ('{"a\\n":\n"b\\n\\t\\u0001\\u001f"}', True)
    assert json.loads(text) == {"a\n": "b\n\t\x01\x1f"}


@given(
    st.lists(st.sampled_from(["x", "é", "\\n", "\\/", '\\"', "\\u0041", "\\ud83d", "\\ude00", "\\\\"])).map("".join), st.data()
)
def test_a_decoded_string_is_what_python_makes_of_it(raw, data):
    decoder, text, at = StringDecoder(), "", 0
    while at < len(raw):
        end = data.draw(st.integers(at + 1, len(raw)))
        text += decoder.push(raw[at:end])
        at = end
    text += decoder.finish()
    expected = json.loads(f'"{raw}"')
    assert text == "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in expected)
