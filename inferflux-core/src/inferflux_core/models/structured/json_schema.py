"""JSON schemas, rewritten into what llguidance enforces exactly.

Whatever comes out of the grammar is valid under the schema that was sent (draft 2020-12, and the older spellings of tuples and
dependencies). It may be less than all that is valid: keywords that a grammar cannot hold in full are narrowed to what it can.
What cannot be held at all is refused by name, and never left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from inferflux_core.errors import InvalidRequestError
from inferflux_core.models.structured.array_form import array_forms
from inferflux_core.models.structured.branch import TYPES, Branch, Demand, Key, State, key, state
from inferflux_core.models.structured.expander import Expander
from inferflux_core.models.structured.form_pruning import Form, pruned
from inferflux_core.models.structured.object_form import object_forms
from inferflux_core.models.structured.pattern_syntax import PatternError, parse, ranges_of, union
from inferflux_core.models.structured.scalar_form import number_forms, string_forms
from inferflux_core.models.structured.schema_document import Refused, RefusedWithin, SchemaDocument
from inferflux_core.settings import StructuredOutputSettings

_MAX_STATES: Final = 3000  # places of the rewritten schema
_ANY_DEPTH: Final = 6  # nesting of values about which the schema says nothing: a small model would nest forever
_ESCAPES: Final = 'nrbtf\\"'  # of strings. With \u a model could spell a declared property as if it were another
_NOTHING: Final = "describes nothing: no value can satisfy all of it"
_WHITESPACE: Final = union(((9, 10),), ((13, 13),), ((32, 32),))


def checked_schema(schema: Any, *, param: str, limits: StructuredOutputSettings) -> dict[str, Any]:
    """The schema as llguidance is to read it, for `%json` in a grammar. It holds its own options under `x-guidance`.

    Args:
        schema: as the client sent it: an object or a boolean of JSON.
        param: wire name of the field it came in.

    Raises:
        InvalidRequestError: it is malformed, beyond the limits, contradicts itself, or cannot be enforced.
    """
    return _checked(schema, param, limits, None)


def schema_grammar(schema: Any, *, param: str, limits: StructuredOutputSettings, whitespace_pattern: str | None = None) -> str:
    """The grammar (Lark) of all JSON texts that a schema describes.

    Args:
        whitespace_pattern: regular expression of what may stand between tokens; None for a space after `:` and `,`.

    Raises:
        InvalidRequestError: as `checked_schema`, or the pattern matches more than whitespace.
    """
    checked = _checked(schema, param, limits, whitespace_pattern)
    return f"start: %json {json.dumps(checked, ensure_ascii=False)}\n"


def rewritten(schema: Any, limits: StructuredOutputSettings, whitespace_pattern: str | None = None) -> dict[str, Any]:
    """As `checked_schema`, but raises Refused."""
    try:
        form = _Rewriter(SchemaDocument(schema, limits)).rewrite()
    except RecursionError:
        raise Refused("#", "", "is nested too deeply") from None
    options: dict[str, Any] = {"json_allowed_escapes": _ESCAPES}
    if whitespace_pattern is None:
        options |= {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    else:
        options |= {"whitespace_pattern": whitespace_pattern, "item_separator": ",", "key_separator": ":"}
    return {"x-guidance": options, **form}


def _checked(schema: Any, param: str, limits: StructuredOutputSettings, whitespace: str | None) -> dict[str, Any]:
    if whitespace is not None:
        _check_whitespace(whitespace, param)
    try:
        return rewritten(schema, limits, whitespace)
    except Refused as refusal:
        raise refusal.error(param) from None


def _check_whitespace(pattern: str, param: str) -> None:
    reason = ""
    try:
        tree = parse(pattern)
        if union(ranges_of(tree), _WHITESPACE) != _WHITESPACE:
            reason = "it matches more than the whitespace of JSON (space, tab, line feed, carriage return)"
    except PatternError as error:
        reason = str(error)
    if reason or len(pattern) > 200:
        raise InvalidRequestError(
            f"Invalid whitespace pattern for {param!r}: {reason or 'it is longer than 200 characters'}.",
            param=param,
            code="invalid_grammar",
        )


class _Rewriter:
    """Gives every place of a schema a form; places with the same demands share one."""

    def __init__(self, document: SchemaDocument) -> None:
        self._document = document
        self._expander = Expander(document)
        self._names: dict[Key, str] = {}
        self._forms: dict[str, Form | bool] = {}  # missing while it is being made
        self._states: list[State] = []  # keeps schemas alive: keys tell them by identity
        self._lost: list[Refused] = []

    def rewrite(self) -> dict[str, Any]:
        root = self._child(state((Demand(self._document.root),)))
        form = pruned(root, self._forms)
        if form is None:
            if self._lost:
                raise self._lost[0]
            raise Refused("#", "", _NOTHING)
        return form

    def _child(self, of: State) -> Form | bool:
        """A reference to the form of these demands; False if nothing meets them."""
        if any(demand.schema is not demand.holds and isinstance(demand.schema, bool) for demand in of):
            return False
        if not of:
            return self._anything(_ANY_DEPTH)
        name = self._names.get(key(of))
        if name is None:
            if len(self._names) >= _MAX_STATES:
                raise Refused("#", "", f"has more than {_MAX_STATES} places")
            name = self._names[key(of)] = f"s{len(self._names)}"
            self._states.append(of)
            try:
                self._forms[name] = self._form(of)
            except Refused as refusal:
                raise RefusedWithin(refusal.pointer, refusal.keyword, refusal.reason) from None
        return False if self._forms.get(name) is False else {"$ref": f"#/$defs/{name}"}

    def _anything(self, depth: int) -> Form:
        name = f"any{depth}"
        if name not in self._forms:
            free = Branch()
            forms: list[Any] = [{"type": ["null", "boolean"]}, *number_forms(free), {"type": "string"}]
            if depth:
                inner = self._anything(depth - 1)
                forms += [{"type": "array", "items": inner}, {"type": "object", "additionalProperties": inner}]
            self._forms[name] = {"anyOf": forms}
        return {"$ref": f"#/$defs/{name}"}

    def _form(self, of: State) -> Form | bool:
        values = self._expander.values(of)
        if values is not None:
            return self._enum(values)
        branches, lost = self._expander.branches(of)
        forms: list[Form] = []
        for branch in branches:
            forms += self._branch_forms(branch, self._document.pointer(of[0].schema))
        unique = list({json.dumps(form, sort_keys=True): form for form in forms}.values())
        self._lost += lost
        if not unique:
            return False
        return unique[0] if len(unique) == 1 else {"anyOf": unique}

    def _enum(self, values: list[Any]) -> Form | bool:
        writable = [value for value in values if is_writable(value)]
        if values and not writable:
            self._lost.append(
                Refused("#", "enum", "has values that cannot be written (control characters, or too many digits)")
            )
        return {"enum": writable} if writable else False

    def _branch_forms(self, branch: Branch, pointer: str) -> list[Form]:
        if branch.values is not None:
            form = self._enum(list(branch.values))
            return [form] if isinstance(form, dict) else []
        found: list[Form] = []
        for name in TYPES:
            if name in branch.types:
                try:
                    found += self._type_forms(name, branch)
                except RefusedWithin:
                    raise
                except Refused as refusal:
                    where = pointer if refusal.pointer == "#" else refusal.pointer
                    self._lost.append(Refused(where, refusal.keyword, refusal.reason))
        return found

    def _type_forms(self, name: str, branch: Branch) -> list[Form]:
        match name:
            case "null":
                return [] if None in branch.excluded else [{"type": "null"}]
            case "boolean":
                kept = [value for value in (True, False) if not any(value is other for other in branch.excluded)]
                return [{"type": "boolean"}] if len(kept) == 2 else [{"enum": kept}] if kept else []
            case "number":
                return list(number_forms(branch))
            case "string":
                return list(string_forms(branch, self._expander.patterns))
        branch = self._without_excluded(branch.copy(), name)
        if name == "array":
            return array_forms(branch, self._expander, self._child) if branch.prune() and name in branch.types else []
        return object_forms(branch, self._expander, self._child) if branch.prune() and name in branch.types else []

    def _without_excluded(self, branch: Branch, name: str) -> Branch:
        for value in branch.excluded:
            if isinstance(value, list) and name == "array":
                if value:
                    raise Refused("#", "not", "excludes a list of values, which cannot be enforced")
                branch.limit("min_items", None, 1)
            if isinstance(value, Mapping) and name == "object":
                if value:
                    raise Refused("#", "not", "excludes an object of values, which cannot be enforced")
                branch.limit("min_properties", None, 1)
        return branch


def is_writable(value: Any) -> bool:
    """Whether llguidance writes this value out as it is: it has neither `\\u` escapes nor integers beyond binary numbers."""
    match value:
        case None | bool():
            return True
        case int():
            return abs(value) <= 2**53
        case float():
            return value == 0 or 1e-15 <= abs(value) <= 2**53
        case str():
            return all((char >= " " and char != "\x7f") or char in "\n\r\t\b\f" for char in value)
        case Mapping():
            return all(map(is_writable, value.values()))
    return all(map(is_writable, value))
