"""The last step of a rewritten schema: what no finite text satisfies goes, and what is used once moves to its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

Form = dict[str, Any]

_PREFIX: Final = "#/$defs/"
_SMALL: Final = 60  # characters of a form that is repeated rather than referred to


def pruned(root: Form | bool, forms: Mapping[str, Form | bool]) -> Form | None:
    """One schema with its `$defs`; None if nothing satisfies it.

    Args:
        root: a reference, or False.
        forms: name -> form, with references to one another.
    """
    alive = _alive(forms)
    if root is False or not _lives(root, alive):
        return None
    kept = {name: _clean(form, alive) for name, form in forms.items() if name in alive}
    return _inlined(root, kept)


def _alive(forms: Mapping[str, Form | bool]) -> set[str]:
    """Names of the forms that a finite value satisfies: least fixed point."""
    alive: set[str] = set()
    todo = dict(forms)
    growing = True
    while growing:
        more = {name for name, form in todo.items() if _lives(form, alive)}
        alive |= more
        todo = {name: form for name, form in todo.items() if name not in more}
        growing = bool(more) and bool(todo)
    return alive


def _lives(form: Any, alive: set[str]) -> bool:
    if isinstance(form, bool):
        return form
    if "$ref" in form:
        return str(form["$ref"]).removeprefix(_PREFIX) in alive
    if "anyOf" in form:
        return any(_lives(part, alive) for part in form["anyOf"])
    if form.get("type") == "object":
        if not all(_lives(form["properties"][name], alive) for name in form.get("required", ())):
            return False
        if form.get("minProperties", 0) > len(form.get("required", ())):
            others = (form["additionalProperties"], *form.get("patternProperties", {}).values())
            return any(_lives(part, alive) for part in others)
    if form.get("type") == "array":
        least: int = form.get("minItems", 0)
        return _lives_long(form, alive) >= least
    return True


def _lives_long(form: Form, alive: set[str]) -> float:
    """Most items of an array."""
    prefix = form.get("prefixItems", [])
    for place, part in enumerate(prefix):
        if not _lives(part, alive):
            return place
    return float("inf") if _lives(form["items"], alive) else len(prefix)


def _clean(form: Any, alive: set[str]) -> Any:
    """The same form without the parts that nothing satisfies. It does live itself."""
    if isinstance(form, bool) or "$ref" in form:
        return form
    if "anyOf" in form:
        parts = [_clean(part, alive) for part in form["anyOf"] if _lives(part, alive)]
        return parts[0] if len(parts) == 1 else {"anyOf": parts}
    if form.get("type") == "object":
        clean = dict(form)
        for keyword in ("properties", "patternProperties"):
            if keyword in form:
                clean[keyword] = {name: _or_false(part, alive) for name, part in form[keyword].items()}
        clean["additionalProperties"] = _or_false(form["additionalProperties"], alive)
        return clean
    if form.get("type") == "array":
        clean = dict(form)
        most = _lives_long(form, alive)
        if most < form.get("maxItems", float("inf")):
            clean["maxItems"] = int(most)
        if "prefixItems" in form:
            clean["prefixItems"] = [part for part in form["prefixItems"] if most > 0][: int(min(most, 10**9))]
        clean["items"] = _or_false(form["items"], alive)
        return clean
    return form


def _or_false(form: Form | bool, alive: set[str]) -> Form | bool:
    return form if _lives(form, alive) else False


def _parts(form: Any) -> Iterator[Any]:
    """The forms right within."""
    if isinstance(form, dict):
        yield from form.get("anyOf", ())
        yield from form.get("prefixItems", ())
        for keyword in ("properties", "patternProperties"):
            yield from form.get(keyword, {}).values()
        for keyword in ("items", "additionalProperties"):
            if isinstance(form.get(keyword), dict):
                yield form[keyword]


def _references(form: Any) -> Iterator[str]:
    todo = [form]
    while todo:
        part = todo.pop()
        if isinstance(part, dict) and "$ref" in part:
            yield part["$ref"].removeprefix(_PREFIX)
        else:
            todo += list(_parts(part))


def _inlined(root: Form | bool, forms: Mapping[str, Form]) -> Form:
    uses = Counter(_references(root))
    reached: dict[str, None] = {}
    todo = list(uses)
    while todo:
        name = todo.pop()
        if name in reached:
            continue
        reached[name] = None
        for other in _references(forms[name]):
            uses[other] += 1
            todo.append(other)
    start = next(_references(root))
    finite = _without_cycles(reached, forms)
    moving = {name for name in finite if (uses[name] == 1 and name != start) or _is_small(forms[name])}
    body = _moved(forms[start], forms, moving)
    kept = {
        name: _moved(forms[name], forms, moving) for name in reached if name not in moving and (name != start or uses[name] > 1)
    }
    return {**body, "$defs": kept} if kept else body


def _is_small(form: Form) -> bool:
    return not any(True for _ in _references(form)) and len(str(form)) <= _SMALL


def _without_cycles(names: Iterable[str], forms: Mapping[str, Form]) -> set[str]:
    """Forms from which no reference leads back to themselves, or to a form of which that is so."""
    waits = {name: set(_references(forms[name])) for name in names}
    users: dict[str, list[str]] = {}
    for name, others in waits.items():
        for other in others:
            users.setdefault(other, []).append(name)
    done: set[str] = set()
    todo = [name for name, others in waits.items() if not others]
    while todo:
        name = todo.pop()
        done.add(name)
        for user in users.get(name, ()):
            waits[user].discard(name)
            if not waits[user] and user not in done:
                todo.append(user)
    return done


def _moved(form: Any, forms: Mapping[str, Form], moving: set[str]) -> Any:
    if not isinstance(form, dict):
        return form
    if "$ref" in form:
        name = form["$ref"].removeprefix(_PREFIX)
        return _moved(forms[name], forms, moving) if name in moving else form
    made = dict(form)
    for keyword in ("anyOf", "prefixItems"):
        if keyword in form:
            made[keyword] = [_moved(part, forms, moving) for part in form[keyword]]
    for keyword in ("properties", "patternProperties"):
        if keyword in form:
            made[keyword] = {name: _moved(part, forms, moving) for name, part in form[keyword].items()}
    for keyword in ("items", "additionalProperties"):
        if isinstance(form.get(keyword), dict):
            made[keyword] = _moved(form[keyword], forms, moving)
    return made
