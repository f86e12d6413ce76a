"""What a client may ask an answer to be: the one type to which every surface maps its own spellings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFormat:
    """A format of the whole answer.

    Attributes:
        kind: `json_object`: any JSON object. `json_schema`: what a schema describes. `regex`: a whole match of a pattern.
            `choice`: one of several texts. `grammar`: a context-free grammar, in GBNF (llama.cpp) or Lark (llguidance).
        value: None, the schema, the pattern, the texts, or the grammar.
        param: wire name of the field that is wrong when it is refused.
        whitespace_pattern: json kinds: regular expression of what may stand between tokens of JSON; None for one space
            after `:` and `,`, as Python and most training texts write it, which leaves models no room to wander.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    value: Mapping[str, Any] | bool | Sequence[str] | str | None = None
    param: str = "response_format"
    whitespace_pattern: str | None = None
