"""Formats other than JSON schemas: patterns, choices, and grammars in Lark and GBNF."""

from __future__ import annotations

import random
import re

import pytest

from core.models.structured.byte_walk import Grammar
from inferflux_core.errors import InvalidRequestError
from inferflux_core.models.structured.format_grammar import grammar_of
from inferflux_core.models.structured.output_format import OutputFormat
from inferflux_core.settings import StructuredOutputSettings

LIMITS = StructuredOutputSettings()


def text_of(kind: str, value: object, limits: StructuredOutputSettings = LIMITS) -> str:
    return grammar_of(OutputFormat(kind=kind, value=value, param="guided"), limits)  # type: ignore[arg-type]  # as a client may


def judged(kind: str, value: object, *texts: str) -> list[bool]:
    grammar = Grammar(text_of(kind, value))
    return [grammar.accepts(text) for text in texts]


def refusal(kind: str, value: object, limits: StructuredOutputSettings = LIMITS) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        text_of(kind, value, limits)
    assert caught.value.param == "guided"
    return caught.value.message


def test_a_json_object_is_any_object() -> None:
    assert judged("json_object", None, '{"a": [1, {"b": null}]}', "{}", "[]", "1") == [True, True, False, False]


def test_a_schema_is_held() -> None:
    assert judged("json_schema", {"const": 3}, "3", "4") == [True, False]
    assert judged("json_schema", True, "3") == [True]


@pytest.mark.parametrize(
    ("pattern", "valid", "invalid"),
    [
        (r"\d{3}-\d{4}", "123-4567", "a123-4567"),
        (r"^(yes|no)$", "no", "nos"),
        ("a/b", "a/b", "a"),
        ("a|^b$", "b", "bb"),
        ("", "", "a"),
        (r"[^\s]+\n", "x\n", "x"),
    ],
)
def test_a_pattern_matches_the_whole_answer(pattern: str, valid: str, invalid: str) -> None:
    assert judged("regex", pattern, valid, invalid) == [True, False]


def test_choices_are_exact() -> None:
    choices = ["a", "ab", 'a "b" \\ c\n', "é<|end|>", "a"]
    assert judged("choice", choices, "a", "ab", 'a "b" \\ c\n', "é<|end|>", "abc", "") == [True, True, True, True, False, False]
    assert judged("choice", ["", "x"], "", "x", "xx") == [True, True, False]
    assert judged("choice", [""], "", "x") == [True, False]


JSON_GBNF = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws   # any
object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""

GRAMMARS: dict[str, tuple[str, list[str], list[str]]] = {
    "JSON in GBNF": (JSON_GBNF, ['{"a": [1, 2.5e3, "x\\n"], "b":{}}', '{ "a":\n  [ ] }'], ['{"a" 1}', "[]"]),
    "choice in GBNF": ('root ::= "yes"\n  | "no"\n', ["yes", "no"], ["ye", "yesno"]),
    "words that the next may go on with": ('root ::= [a-z]+ "x" root?', ["ax", "xx", "axbx"], ["a", "x"]),
    "expression in GBNF": (
        'root ::= e\ne ::= t (("+" | "-") t)*\nt ::= n | "(" e ")"\nn ::= [0-9]+',
        ["1+(2-33)", "(1)"],
        ["1+", "()"],
    ),
    "left recursion in GBNF": ('root ::= root "x" | "y"', ["y", "yxx"], ["x", ""]),
    "escapes in GBNF": ('root ::= "\\x41\\u00e9\\t" [^\\]a-c]{2}', ["Aé\tde"], ["Aé\ta]"]),
    "nothing in GBNF": ('root ::= ""', [""], ["x"]),
    "any character in GBNF": ("root ::= . .", ["é\n"], ["a"]),
    "Lark": ('start: "a" | B // comment\nB: /[0-9]+/\n', ["a", "12"], ["b"]),
    "Lark with a schema": ('start: "<" %json {"type": "integer", "minimum": 3} ">"', ["<3>"], ["<2>"]),
    "Lark that imports": ("%import common.INT\nstart: INT", ["12"], ["x"]),
    "quoted control tokens": ('start: "<|end|>"', ["<|end|>"], [""]),
}


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_grammar_means_what_it_says(name: str) -> None:
    text, valid, invalid = GRAMMARS[name]
    assert judged("grammar", text, *valid, *invalid) == [True] * len(valid) + [False] * len(invalid)


def test_answers_to_a_translated_grammar_are_of_it() -> None:
    grammar = Grammar(text_of("grammar", 'root ::= item+\nitem ::= [a-c]+ "0" [12]{2} ("[" item "]")? "}"\n'))
    for seed in range(20):
        answer = grammar.walk(random.Random(seed), soft=40)
        inner = ""
        while answer != inner:
            inner, answer = answer, re.sub(r"\[[a-c]+0[12]{2}\}\]", "", answer)
        assert re.fullmatch(r"([a-c]+0[12]{2}\})+", answer), answer


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('root ::= "a', "line 1, column 12: a string or set of characters does not end"),
        ("root ::= [a", "line 1, column 12: a string or set of characters does not end"),
        ('root ::= "a"\nb ::= c', "line 2, column 7: rule 'c' is not defined"),
        ('rot ::= "a"', "line 1, column 1: there is no rule 'root'"),
        ('root ::= "a"\nroot ::= "b"', "line 2, column 1: rule 'root' is defined twice"),
        ('root ::= "a"{3,2}', "line 1, column 13: a repetition needs bounds in order, of at most 20000"),
        ('root ::= "a"{x}', "line 1, column 13: malformed repetition"),
        ('root ::= ("a"', "line 1, column 14: expected ')'"),
        ("root ::= " + "(" * 101, "line 1, column 110: groups are nested deeper than 100"),
        ('root ::= "\\q"', "line 1, column 13: unknown escape 'q'"),
        ('root ::= "\\xg1"', "line 1, column 13: malformed hexadecimal escape"),
        ("root ::= [z-a]", "line 1, column 14: the ends of a range of characters are swapped"),
        ("root ::= <|im_end|>", "line 1, column 10: control tokens ('<...>') cannot be used; write texts in quotes"),
        ("root ::= !<[5]>", "line 1, column 10: control tokens ('<...>') cannot be used; write texts in quotes"),
        ("root ::= $", "line 1, column 10: unexpected '$'"),
        ("root ::= x\nx :=", "line 2, column 3: expected '::=' after the name of a rule"),
        ("start: <[151645]>", "line 1, column 8: control tokens ('<...>') cannot be used; write texts in quotes"),
        ("start: @other", "line 1, column 8: other grammars ('@...') cannot be used"),
        ('%llguidance {"no_forcing": true}\nstart: "a"', "line 1, column 1: '%llguidance' cannot be used here"),
        ("start: x\nx[max_tokens=3]: /a+/", "line 2, column 3: the attribute 'max_tokens' cannot be used here"),
        ("start: %json {", "line 1, column 14: this is not JSON"),
        ('start: "a', "line 1, column 8: a string or regular expression does not end"),
        ("start: `", "line 1, column 8: unexpected '`'"),
        ('{"grammars": []}', "line 1, column 1: a grammar is Lark or GBNF; for a JSON schema use 'response_format'"),
    ],
)
def test_a_grammar_that_cannot_be_used_says_where(text: str, where: str) -> None:
    assert refusal("grammar", text) == f"Invalid grammar for 'guided': {where}."


def test_a_schema_within_a_grammar_is_checked() -> None:
    message = refusal("grammar", 'start: %json {"type": "integer", "minimum": "3"}')
    assert message == "Invalid schema for 'guided': keyword 'minimum' at '#' is not a number."


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("regex", "(?=a)", "Invalid pattern for 'guided': it uses a look-around, which cannot be enforced."),
        ("regex", "a" * 300, "Invalid value for 'guided': it has 300 bytes; the most is 256."),
        ("regex", None, "Invalid value for 'guided': it is not what a regex needs."),
        ("choice", [], "Invalid value for 'guided': it should be a list of one text or more."),
        ("choice", ["a", 3], "Invalid value for 'guided': it should be a list of one text or more."),
        ("choice", ["a", "b", "c"], "Invalid value for 'guided': it has 3 choices; the most is 2."),
        ("choice", ["a" * 300], "Invalid value for 'guided': it has 300 bytes; the most is 256."),
        ("grammar", "#" * 300, "Invalid value for 'guided': it has 300 bytes; the most is 256."),
        ("json_schema", {"type": "x"}, "Invalid schema for 'guided': keyword 'type' at '#' names the unknown type 'x'."),
    ],
)
def test_what_a_format_cannot_be_is_refused(kind: str, value: object, message: str) -> None:
    assert refusal(kind, value, StructuredOutputSettings(max_bytes=256, max_enum=2)) == message
