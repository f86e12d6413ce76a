"""Numbers and strings of a branch, in the words that llguidance enforces exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, Final

from inferflux_core.models.structured.branch import Branch, lcm
from inferflux_core.models.structured.pattern_language import Language, TooComplexError
from inferflux_core.models.structured.pattern_syntax import (
    ANY,
    EMPTY,
    Chars,
    Either,
    Repeat,
    Sequence,
    Tree,
    complement,
    literal,
    parse,
    whole,
    write,
)
from inferflux_core.models.structured.schema_document import Refused
from inferflux_core.models.structured.schema_values import PatternBook, exact, type_of

Form = dict[str, Any]

# Where the schema sets no bound, numbers have one all the same: digits without end are what small models fall into. Integers
# stay exact in every JSON reader (RFC 8259), other numbers have up to 15 digits before the point and 9 after.
_MAX_INTEGER: Final = 2**53 - 1
_MAX_NUMBER: Final = 10**15
_FINEST: Final = Fraction(1, 10**9)
_NARROW: Final = Fraction(1, 1000)  # a range below this is given all the digits it may need
_MAX_BOUND: Final = 2**62  # llguidance counts in 64 bits
_MAX_FACTOR: Final = 2**31  # and the digits of a factor in 32
_MAX_LISTED: Final = 200
_BETWEEN: Final = 16  # pairs of integers between which numbers that are none are looked for
_MAX_COUNTED: Final = 50  # characters of a length that is held against patterns
_MAX_EXCLUDED: Final = 2000  # characters of strings that are excluded


def number_forms(branch: Branch) -> list[Form]:
    """Forms of the numbers, any of which will do; [] if none can be held."""
    if branch.fraction:
        return [] if branch.integer else _between_integers(branch)
    is_integer = branch.integer or (branch.multiple is not None and branch.multiple.denominator == 1)
    multiple = lcm(branch.multiple, Fraction(1)) if is_integer else branch.multiple
    gaps = sorted({exact(value) for value in branch.excluded if type_of(value) == "number"})
    edges = [gap for gap in gaps if _is_inside(gap, branch)]
    low, low_strict = branch.low, branch.low_strict
    forms = []
    for edge in [*edges, None]:
        high, high_strict = (branch.high, branch.high_strict) if edge is None else (edge, True)
        form = (
            _integers(low, low_strict, high, high_strict, multiple)
            if is_integer
            else _numbers(low, low_strict, high, high_strict, multiple)
        )
        forms += [] if form is None else [form]
        low, low_strict = edge, True
    return forms


def _between_integers(branch: Branch) -> list[Form]:
    """Numbers that are no integers: those between some that follow one another, near zero or the bounds."""
    if branch.multiple is not None or any(type_of(value) == "number" for value in branch.excluded):
        raise Refused("#", "type", "asks for numbers that are no integers, which cannot be enforced beside other keywords")
    if branch.low is not None:
        start = math.floor(branch.low)
    else:
        start = -_BETWEEN // 2 if branch.high is None else math.ceil(branch.high) - _BETWEEN
    forms = []
    for place in range(start, start + _BETWEEN):
        inside = branch.copy()
        inside.at_least(Fraction(place), strict=True)
        inside.at_most(Fraction(place + 1), strict=True)
        form = _numbers(inside.low, inside.low_strict, inside.high, inside.high_strict, None)
        forms += [] if form is None else [form]
    return forms


def _is_inside(value: Fraction, branch: Branch) -> bool:
    above = branch.low is None or value > branch.low or (value == branch.low and not branch.low_strict)
    return above and (branch.high is None or value < branch.high or (value == branch.high and not branch.high_strict))


def _integers(
    low: Fraction | None, low_strict: bool, high: Fraction | None, high_strict: bool, multiple: Fraction | None
) -> Form | None:
    step = 1 if multiple is None else int(multiple)
    first = None if low is None else -(-low // step) * step
    last = None if high is None else high // step * step
    if first is not None and low_strict and first == low:
        first += step
    if last is not None and high_strict and last == high:
        last -= step
    if first is None:
        first = min(-_MAX_INTEGER, -_MAX_BOUND if last is not None and last < -_MAX_INTEGER else -_MAX_INTEGER)
        first = -(-first // step) * step
    if last is None:
        last = (_MAX_BOUND if first > _MAX_INTEGER else _MAX_INTEGER) // step * step
    if first > last:
        return None
    if last - first < 8 * step:
        return _listed([first + place * step for place in range((last - first) // step + 1)])
    if max(abs(first), abs(last)) > _MAX_BOUND:
        first, last = max(first, -_MAX_BOUND // step * step + step), min(last, _MAX_BOUND // step * step)
        if first > last:
            raise Refused("#", "minimum" if first > 0 else "maximum", "is beyond 2^62, to which integers are held")
    low_number, high_number = _float_from(Fraction(first), up=True), _float_from(Fraction(last), up=False)
    form: Form = {"type": "integer", "minimum": _plain(low_number), "maximum": _plain(high_number)}
    if step > _MAX_FACTOR:
        start = max(first, -_MAX_LISTED // 2 * step)
        return _listed([start + place * step for place in range(min(_MAX_LISTED, (last - start) // step + 1))])
    if step > 1:
        form["multipleOf"] = step
    return form


def _numbers(
    low: Fraction | None, low_strict: bool, high: Fraction | None, high_strict: bool, multiple: Fraction | None
) -> Form | None:
    if low is not None and high is not None:
        if low > high or (low == high and (low_strict or high_strict)):
            return None
        if low == high:
            return _listed([low]) if multiple is None or (low / multiple).denominator == 1 else None
    if low is None and (high is None or high > -_MAX_NUMBER):
        low = Fraction(-_MAX_NUMBER)
    if high is None:
        high = Fraction(_MAX_NUMBER if low is None or low < _MAX_NUMBER else _MAX_BOUND)
    if low is None:
        low = Fraction(-_MAX_BOUND)
    if max(abs(low), abs(high)) > _MAX_BOUND:
        low, high = max(low, Fraction(-_MAX_BOUND)), min(high, Fraction(_MAX_BOUND))
        if low >= high:
            raise Refused("#", "minimum" if low > 0 else "maximum", "is beyond 2^62, to which numbers are held")
    form: Form = {"type": "number"}
    number = _float_from(low, up=True)
    form["exclusiveMinimum" if low_strict and exact(number) == low else "minimum"] = _plain(number)
    number = _float_from(high, up=False)
    form["exclusiveMaximum" if high_strict and exact(number) == high else "maximum"] = _plain(number)
    if multiple is not None:
        factor = _factor(multiple)
        if _first(low, low_strict, factor) > high:
            return None
        form["multipleOf"] = _plain(float(factor))
    elif high - low >= _NARROW:
        form["multipleOf"] = float(_FINEST)
    return form


def _first(low: Fraction, strict: bool, step: Fraction) -> Fraction:
    found = -(-low // step) * step
    return found + step if strict and found == low else found


def _factor(multiple: Fraction) -> Fraction:
    """The factor, or the smallest multiple of it that llguidance reads as it is meant: it scales a binary number by tens."""
    for times in range(1, 1001):
        candidate = multiple * times
        scaled, digits = float(candidate), 0
        if exact(scaled) != candidate:
            continue
        while scaled % 1 and digits < 20:
            scaled, digits = scaled * 10, digits + 1
        if digits < 20 and scaled < _MAX_FACTOR and Fraction(scaled) / 10**digits == candidate:
            return candidate
    raise Refused("#", "multipleOf", "has more digits than can be enforced")


def _listed(values: Iterable[Fraction | int]) -> Form:
    found = [number for value in values if (number := _number_of(Fraction(value))) is not None]
    if not found:
        raise Refused("#", "", "asks for numbers with more digits than can be enforced")
    return {"enum": found}


def _number_of(value: Fraction) -> int | float | None:
    """The number as JSON that llguidance writes out as it is; None if it would be rounded."""
    number = float(value)
    if exact(number) != value:
        return None
    return int(value) if value.denominator == 1 else number


def _float_from(value: Fraction, *, up: bool) -> float:
    """The nearest binary number whose digits are not below (`up`), or not above, the value."""
    try:
        number = float(value)
    except OverflowError:
        raise Refused("#", "minimum" if up else "maximum", "is beyond the range of numbers") from None
    while exact(number) < value if up else exact(number) > value:
        number = math.nextafter(number, math.inf if up else -math.inf)
    return number


def _plain(number: float) -> int | float:
    return int(number) if number == int(number) else number


def string_forms(branch: Branch, patterns: PatternBook) -> list[Form]:
    """The form of the strings."""
    form: Form = {"type": "string"}
    if branch.min_length:
        form["minLength"] = branch.min_length
    if branch.max_length is not None:
        form["maxLength"] = branch.max_length
    trees = [parse(pattern) for pattern, matches in dict.fromkeys(branch.patterns) if matches]
    excluded = [value for value in branch.excluded if isinstance(value, str)]
    if excluded:
        trees.append(whole(_others(excluded)))
    trees += [_opposite(pattern, patterns) for pattern, matches in dict.fromkeys(branch.patterns) if not matches]
    if not trees:
        return [form]
    if _is_impossible(trees, branch, patterns):
        return []
    form["pattern"] = write(trees[0])
    more = [{"type": "string", "pattern": write(tree)} for tree in trees[1:]]
    return [{"allOf": [form, *more]} if more else form]


def _is_impossible(trees: list[Tree], branch: Branch, patterns: PatternBook) -> bool:
    """Whether it is certain that no text matches all patterns and has the right length."""
    if len(trees) == 1 and branch.max_length is None and not branch.min_length:
        return False
    try:
        languages = [Language(tree) for tree in trees]
        if 0 < branch.min_length <= _MAX_COUNTED:
            languages.append(Language(whole(Repeat(ANY, branch.min_length, None))))
        shortest = patterns.common_text(languages)
    except TooComplexError:
        return False
    return shortest is None or (branch.max_length is not None and len(shortest) > branch.max_length)


def _opposite(pattern: str, patterns: PatternBook) -> Tree:
    """A pattern of the texts that this one does not match, whoever reads it."""
    try:
        tree = patterns.common_pattern([], [patterns.language(pattern, wide=True)])
    except TooComplexError:
        raise Refused("#", "pattern", "is too complex to be enforced where it must not match") from None
    if tree is None:
        raise Refused("#", "pattern", "matches every text, where it must not match")
    return whole(tree)


def _others(words: list[str]) -> Tree:
    """A pattern of all texts but these, as a whole match."""
    if sum(map(len, words)) > _MAX_EXCLUDED or max(map(len, words)) > 200:
        raise Refused("#", "not", "excludes more text than can be enforced")
    ways: list[Tree] = []
    prefixes = {word[:length] for word in words for length in range(len(word) + 1)}
    for prefix in sorted(prefixes):
        after = tuple((ord(word[len(prefix)]),) * 2 for word in words if word.startswith(prefix) and len(word) > len(prefix))
        ends = () if prefix in words else (EMPTY,)
        unlike = Sequence((Chars(complement(after)), Repeat(ANY, 0, None)))
        ways.append(Sequence((literal(prefix), Either((*ends, unlike)))))
    return Either(tuple(ways))
