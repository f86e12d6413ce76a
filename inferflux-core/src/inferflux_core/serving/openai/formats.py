"""What a request may ask its output to be, in the spellings of OpenAI, vLLM and llama-server: all mean an `OutputFormat`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from inferflux_core.errors import InvalidRequestError
from inferflux_core.models.structured.output_format import OutputFormat
from inferflux_core.serving.json_body import parse_object

_MAX_SCHEMA_DEPTH = 512  # of a schema that comes as text; whether it is too deep for a schema is judged where it is checked
_STRUCTURAL_TAG = "parts of an answer cannot be constrained by tags here; constrain all of it, or call tools"


def _object_or_text(value: Any) -> str | None:
    return "#text" if isinstance(value, str) else "#object" if isinstance(value, dict) else None


Schema = Annotated[
    Annotated[dict[str, Any], Tag("#object")] | Annotated[str, Tag("#text")],
    Discriminator(
        _object_or_text,
        custom_error_type="schema",
        custom_error_message="it should be a JSON schema, as an object or as JSON text",
    ),
]


def _object_or_boolean(value: Any) -> str | None:
    return "#boolean" if isinstance(value, bool) else "#object" if isinstance(value, dict) else None


PlainSchema = Annotated[
    Annotated[dict[str, Any], Tag("#object")] | Annotated[bool, Tag("#boolean")],
    Discriminator(
        _object_or_boolean,
        custom_error_type="schema",
        custom_error_message="it should be a JSON schema: an object or a boolean",
    ),
]
Choices = Annotated[list[str], Field(min_length=1, max_length=100_000, fail_fast=True)]


class JsonSchemaFormat(BaseModel):
    """OpenAI's `json_schema`. It is always enforced, whatever `strict` says."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] | None = None
    description: str | None = None
    definition: PlainSchema | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's `response_format`; `schema` beside `json_object` as llama-server takes it."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: str
    json_schema: JsonSchemaFormat | None = None
    definition: dict[str, Any] | None = Field(None, alias="schema")

    def format(self) -> OutputFormat | None:
        """None for text."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            if self.definition is not None:
                return OutputFormat(kind="json_schema", value=self.definition)
            return OutputFormat(kind="json_object")
        if self.type != "json_schema":
            reason = _STRUCTURAL_TAG if self.type == "structural_tag" else "use 'text', 'json_object' or 'json_schema'"
            raise InvalidRequestError(
                f"Invalid value for 'response_format.type': {self.type[:40]!r} is not supported; {reason}.",
                param="response_format.type",
                code="unsupported_value",
            )
        if self.json_schema is None and self.definition is not None:
            return OutputFormat(kind="json_schema", value=self.definition)
        path = "response_format.json_schema" + ("" if self.json_schema is None else ".schema")
        if self.json_schema is None or self.json_schema.definition is None:
            raise InvalidRequestError(f"Missing required parameter: {path!r}.", param=path)
        return OutputFormat(kind="json_schema", value=self.json_schema.definition)


class StructuredOutputs(BaseModel):
    """vLLM's `structured_outputs`: exactly one of the kinds.

    `disable_any_whitespace` has nothing to do: without a `whitespace_pattern` JSON has no more than single spaces here.
    """

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    schema_: Schema | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    whitespace_pattern: str | None = None
    disable_additional_properties: bool | None = None

    def format(self) -> OutputFormat:
        """Raises InvalidRequestError unless it is exactly one kind."""
        if self.structural_tag is not None:
            raise InvalidRequestError(
                f"Unsupported parameter: 'structured_outputs.structural_tag'; {_STRUCTURAL_TAG}.",
                param="structured_outputs.structural_tag",
                code="unsupported_parameter",
            )
        if self.disable_additional_properties:
            raise InvalidRequestError(
                "Unsupported parameter: 'structured_outputs.disable_additional_properties'; write "
                '"additionalProperties": false into the schema.',
                param="structured_outputs.disable_additional_properties",
                code="unsupported_parameter",
            )
        given: dict[str, OutputFormat] = {}
        white, within = self.whitespace_pattern, "structured_outputs."
        if self.schema_ is not None:
            given["json"] = _json(self.schema_, within + "json", white)
        if self.regex is not None:
            given["regex"] = OutputFormat(kind="regex", value=self.regex, param=within + "regex")
        if self.choice is not None:
            given["choice"] = OutputFormat(kind="choice", value=self.choice, param=within + "choice")
        if self.grammar is not None:
            given["grammar"] = OutputFormat(kind="grammar", value=self.grammar, param=within + "grammar")
        if self.json_object:
            given["json_object"] = OutputFormat(kind="json_object", param=within + "json_object", whitespace_pattern=white)
        if len(given) != 1:
            found = " and ".join(map(repr, given)) or "none"
            raise InvalidRequestError(
                "Invalid value for 'structured_outputs': it should have exactly one of 'json', 'regex', 'choice', 'grammar' "
                f"and 'json_object', but it has {found}.",
                param="structured_outputs",
            )
        return next(iter(given.values()))


def _json(schema: Mapping[str, Any] | str, param: str, whitespace_pattern: str | None = None) -> OutputFormat:
    if isinstance(schema, str):
        try:
            schema = parse_object(schema.encode(), _MAX_SCHEMA_DEPTH)
        except InvalidRequestError:
            raise InvalidRequestError(
                f"Invalid value for {param!r}: the text is not JSON of an object; send a JSON schema.",
                param=param,
                code="invalid_json_schema",
            ) from None
    return OutputFormat(kind="json_schema", value=schema, param=param, whitespace_pattern=whitespace_pattern)


class FormatFields(BaseModel):
    """The fields that constrain the output: at most one of them may be set.

    Attributes:
        response_format: OpenAI's.
        structured_outputs, guided_json, guided_regex, guided_choice, guided_grammar, guided_whitespace_pattern: vLLM's.
        grammar, json_schema: llama-server's.
    """

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None

    def output_format(self) -> OutputFormat | None:
        """What the output must be; None for anything.

        Raises:
            InvalidRequestError: there are two of the fields, or one that says nothing that can be held.
        """
        found: dict[str, OutputFormat] = {}
        for name, value, read in self._sources():
            if value is not None and value != "" and (read_format := read(value)) is not None:
                found[name] = read_format
        if len(found) > 1:
            first, second = list(found)[:2]
            raise InvalidRequestError(
                f"{first!r} and {second!r} both say what the output must be; send one of them.", param=second
            )
        return next(iter(found.values()), None)

    def _sources(self) -> list[tuple[str, Any, Callable[[Any], OutputFormat | None]]]:
        white = self.guided_whitespace_pattern
        return [
            ("response_format", self.response_format, ResponseFormat.format),
            ("structured_outputs", self.structured_outputs, StructuredOutputs.format),
            ("guided_json", self.guided_json, lambda value: _json(value, "guided_json", white)),
            ("guided_regex", self.guided_regex, _plain("regex", "guided_regex")),
            ("guided_choice", self.guided_choice, _plain("choice", "guided_choice")),
            ("guided_grammar", self.guided_grammar, _plain("grammar", "guided_grammar")),
            ("grammar", self.grammar, _plain("grammar", "grammar")),
            ("json_schema", self.json_schema, lambda value: _json(value, "json_schema")),
        ]


def _plain(kind: Literal["regex", "choice", "grammar"], param: str) -> Callable[[Any], OutputFormat]:
    return lambda value: OutputFormat(kind=kind, value=value, param=param)
