"""What a request asks of thoughts, in the words of the model's template and of the engine."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from inferflux_core.engine.types import Thinking
from inferflux_core.interfaces import Tokenizer
from inferflux_core.models.reasoning.formats import ReasoningFormat
from inferflux_core.models.reasoning.options import Effort, ReasoningOptions

EFFORT_BUDGETS: dict[Effort, int] = {"none": 0, "minimal": 512, "low": 1024, "medium": 8192, "high": 24576}
"""Most tokens of thoughts for an effort that the template cannot tell the model of; the greater efforts have no limit."""

_EFFORTS: tuple[Effort, ...] = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_EFFORT_NAMES = ("reasoning_effort", "thinking_effort", "reasoning_strength")
_SWITCH_NAMES = ("enable_thinking", "thinking")
_NO_EFFORT = ("none", "no_think")  # what templates call it
_USUAL = frozenset({"low", "medium", "high"})
_BLOCK_ENDS = {"{{": "}}", "{%": "%}", "{#": "#}"}
_BLOCK = re.compile(r"\{[{%#]")
_STRING = re.compile(r"""'(?:[^'\\]|\\.)*(?:'|\\?\Z)|"(?:[^"\\]|\\.)*(?:"|\\?\Z)""", re.DOTALL)
_NAME = re.compile(r"(?<![\w.])[A-Za-z_]\w*")


def template_kwargs(options: ReasoningOptions, template: str) -> dict[str, Any]:
    """Variables that tell a chat template how much its model shall think; empty if the request leaves it to the model.

    No effort, or a budget of 0, turns thoughts off (`enable_thinking`, `thinking`, `thinking_mode`), and any other turns
    them on. The effort itself is given where the template has a variable for it, as the nearest of the values that the
    template knows; between two equally near it is the greater. Only variables that the template uses are set.
    """
    names, strings = _vocabulary(template)
    off = options.effort == "none" or options.budget == 0
    effort: Effort | None = "none" if off else options.effort
    kwargs: dict[str, Any] = {}
    if effort is not None:
        kwargs |= {name: not off for name in _SWITCH_NAMES if name in names}
        kwargs |= {name: _nearest(effort, strings) for name in _EFFORT_NAMES if name in names}
        if "thinking_mode" in names and {"enabled", "disabled"} <= strings:
            kwargs["thinking_mode"] = "disabled" if off else "enabled"
    if "thinking_budget" in names and (off or options.budget is not None):
        kwargs["thinking_budget"] = 0 if off else options.budget
    return kwargs


def thinking(
    family: ReasoningFormat | None,
    options: ReasoningOptions,
    is_open: bool,
    tokenizer: Tokenizer,
    template: str | None = None,
) -> Thinking | None:
    """The thoughts as the engine has to know them, for a grammar that begins after them or for a budget.

    A sequence needs it only where it has a grammar or where the budget is not None. The budget is the request's own. An
    effort stands for one of `EFFORT_BUDGETS` where the template has no variable for efforts; no effort, where the prompt
    opens thoughts all the same or the template has no variable to turn them off.

    Args:
        family: None for a model that has no thoughts; then effort and budget mean nothing, and there is nothing to know.
        is_open: the prompt ends within thoughts.
        template: source of the chat template; None means the tokenizer's own.
    """
    if family is None:
        return None
    budget = options.budget
    if budget is None and options.effort is not None:
        source = (tokenizer.chat_template if template is None else template) or ""
        if not _heard(options.effort, source, is_open):
            budget = EFFORT_BUDGETS.get(options.effort)
    end = [] if budget is None else tokenizer.encode(family.closing, add_special=False, parse_special=True)
    return Thinking(is_open=is_open, begin=family.begin, end=family.end, budget=budget, end_token_ids=end)


def _heard(effort: Effort, template: str, is_open: bool) -> bool:
    """Whether the template itself tells the model of the effort, as far as can be seen."""
    if effort == "none":
        return not is_open and bool(template_kwargs(ReasoningOptions(effort=effort), template))
    names, _ = _vocabulary(template)
    return not names.isdisjoint(_EFFORT_NAMES)


def _nearest(effort: Effort, strings: frozenset[str]) -> str:
    """The value for an effort among those that a template knows.

    A template that names `low` and `high` lists its values, and may refuse others; one that names fewer treats some of them
    in its own way, and takes the usual ones.
    """
    known = {str(value) for value in _EFFORTS if value in strings and value != "none"}
    if not {"low", "high"} <= known:
        known |= _USUAL
    if effort == "none":
        return next((value for value in _NO_EFFORT if value in strings), min(known, key=_rank))
    return min(known, key=lambda value: (abs(_rank(value) - _rank(effort)), -_rank(value)))


def _rank(value: str) -> int:
    return [str(effort) for effort in _EFFORTS].index(value)


@lru_cache(maxsize=64)
def _vocabulary(template: str) -> tuple[frozenset[str], frozenset[str]]:
    """The names and the string literals in a Jinja template's code. Attributes (`message.thinking`) are no names."""
    names: set[str] = set()
    strings: set[str] = set()
    at = 0
    while (block := _BLOCK.search(template, at)) is not None:
        end = template.find(_BLOCK_ENDS[block.group()], block.end())
        if end < 0:
            break
        if block.group() != "{#":
            code = template[block.end() : end]
            strings.update(text[1:-1] for text in _STRING.findall(code))
            names.update(_NAME.findall(_STRING.sub(" ", code)))
        at = end + 2
    return frozenset(names), frozenset(strings)
