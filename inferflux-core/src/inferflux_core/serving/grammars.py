"""What a request asks of its answer, as one grammar: checked here, held by the engine."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Protocol

import msgspec

from inferflux_core.engine.types import Constraint
from inferflux_core.errors import InvalidRequestError
from inferflux_core.interfaces import Tokenizer
from inferflux_core.models.chat_format import ChatFormat
from inferflux_core.models.reasoning.control import thinking
from inferflux_core.models.structured.format_grammar import grammar_of
from inferflux_core.models.structured.json_schema import checked_schema
from inferflux_core.models.tool_calls.calls import ToolRequest
from inferflux_core.serving.generation import GenerationRequest, OutputFormat
from inferflux_core.settings import StructuredOutputSettings

_MAX_KEPT = 256  # grammars
_MAX_KEPT_CHARACTERS = 64 * 1024  # of each: longer ones are made anew


class Checker(Protocol):
    """Compiles grammars where it can hurt nobody: `GrammarChecker`."""

    async def check(self, grammar: str, *, tenant: str, param: str) -> None:
        """Raises InvalidRequestError if an engine could not hold a sequence to it, OverloadedError if too many wait."""


class RequestGrammars:
    """Makes the grammars of requests.

    Args:
        checker: compiles each new grammar before an engine sees it; None where structured output is turned off.
    """

    def __init__(self, settings: StructuredOutputSettings, checker: Checker | None) -> None:
        self._settings = settings
        self._checker = checker
        self._made: OrderedDict[bytes, str] = OrderedDict()  # digest of tenant and demand -> grammar that passed its check

    async def of(self, request: GenerationRequest, chat: ChatFormat | None, tokenizer: Tokenizer, tenant: str) -> str:
        """The grammar of the answer; "" if it may be anything.

        Args:
            chat: how the model is talked with; None if the request is no conversation.
            tenant: whose cached grammars may be used: how long a schema takes must not tell what others use.

        Raises:
            InvalidRequestError: what is asked cannot be held, and why.
            OverloadedError: too many grammars wait to be checked.
        """
        tools = _constrained_tools(request, chat)
        if request.format is None and tools is None:
            return ""
        if self._checker is None:
            raise _turned_off(request)
        # A format is the answer's; an answer that has to be a call is not one.
        answer = None if tools is not None and tools.must_call else request.format
        # What calls look like depends on their format, the template, and on which of the marks are tokens of their own.
        look = None
        if tools is not None and chat is not None and chat.tools is not None:
            look = [chat.tools.name, chat.source, control_tokens(tokenizer, chat.tools.markers)]
        demand = msgspec.json.encode([tenant, look, answer, tools])
        key = hashlib.blake2b(demand, digest_size=16).digest()
        grammar = self._made.pop(key, None)
        if grammar is None:
            grammar = await asyncio.to_thread(self._make, answer, tools, chat, tokenizer)
            param = tools.param if tools is not None else answer.param if answer is not None else ""
            await self._checker.check(grammar, tenant=tenant, param=param)
        if len(grammar) <= _MAX_KEPT_CHARACTERS:
            self._made[key] = grammar
            if len(self._made) > _MAX_KEPT:
                self._made.popitem(last=False)
        return grammar

    def constraint(
        self, request: GenerationRequest, grammar: str, chat: ChatFormat | None, tokenizer: Tokenizer, is_open: bool
    ) -> Constraint | None:
        """What the engine is to hold a sequence to: a grammar, a budget of thoughts, both, or nothing.

        Args:
            is_open: the prompt ends within thoughts.

        Raises:
            InvalidRequestError: the request has a budget, and structured output, which would hold it, is turned off.
        """
        thoughts = None
        if chat is not None:
            thoughts = thinking(chat.reasoning, request.reasoning, is_open, tokenizer, chat.source)
        if grammar and not is_open and request.reasoning.is_off:
            thoughts = None  # the grammar begins at once, and the tag that begins thoughts cannot be drawn
        if not grammar and (thoughts is None or thoughts.budget is None):
            return None
        if self._checker is None:
            if request.reasoning.budget is None:
                return None  # an effort is a wish
            raise _unsupported("thinking_budget_tokens")
        return Constraint(grammar=grammar, thinking=thoughts)

    def _make(
        self, answer: OutputFormat | None, tools: ToolRequest | None, chat: ChatFormat | None, tokenizer: Tokenizer
    ) -> str:
        if tools is None:
            assert answer is not None
            return grammar_of(answer, self._settings)
        assert chat is not None
        assert chat.tools is not None
        special = control_tokens(tokenizer, chat.tools.markers)
        if answer is None:
            return chat.tools.grammar(tools, self._schemas(tools), special)
        # Whether to call stays the model's choice, so no more functions than usual are held to their schemas.
        calls = chat.tools.grammar(replace(tools, must_call=True), self._schemas(tools), special)
        return either(calls, grammar_of(answer, self._settings))

    def _schemas(self, tools: ToolRequest) -> dict[str, dict[str, Any]]:
        """Checked schemas of the functions whose arguments are held to them."""
        within = ".function.parameters" if tools.param == "tools" else ".parameters"
        return {
            function.name: checked_schema(
                {"type": "object", **function.parameters}, param=f"{tools.param}[{index}]{within}", limits=self._settings
            )
            for index, function in enumerate(tools.functions)
            if function.parameters is not None and function.name in tools.allowed and (tools.must_call or function.strict)
        }


def _constrained_tools(request: GenerationRequest, chat: ChatFormat | None) -> ToolRequest | None:
    """The tools, if the answer has to be held to a grammar because of them. Beside a format it has to be: either of the two."""
    tools = request.tools
    if tools is None or chat is None or chat.tools is None:
        return None
    return tools if request.format is not None or chat.tools.constrains(tools) else None


def _turned_off(request: GenerationRequest) -> InvalidRequestError:
    if request.format is not None:
        return _unsupported(request.format.param)
    assert request.tools is not None
    if request.tools.param == "functions":
        return _unsupported("function_call")
    # Strict functions are the one reason that lies not in the choice.
    held = request.tools.must_call or len(request.tools.callable) < len(request.tools.functions)
    return _unsupported("tool_choice" if held else "tools")


def _unsupported(param: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"Unsupported parameter: {param!r} cannot be enforced, because structured output is turned off on this server "
        f"(structured_output.enabled); remove it, or what of it needs to be enforced.",
        param=param,
        code="unsupported_parameter",
    )


def either(*grammars: str) -> str:
    """A grammar of what any of these allow, each Lark or llguidance's JSON of one grammar."""
    parts: list[dict[str, Any]] = []
    for grammar in grammars:
        own: dict[str, Any] = {"lark_grammar": grammar}
        if grammar.lstrip().startswith("{"):
            own = json.loads(grammar)["grammars"][0]
        parts.append({**own, "name": f"g{len(parts)}"})
    start = {"lark_grammar": "start: " + " | ".join(f"@{part['name']}" for part in parts)}
    return json.dumps({"grammars": [start, *parts]})


def control_tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, int]:
    """The ids of those texts that are control tokens of the vocabulary."""
    found: dict[str, int] = {}
    for text in texts:
        if text in tokenizer.special_tokens:
            ids = tokenizer.encode(text, add_special=False, parse_special=True)
            if len(ids) == 1:
                found[text] = ids[0]
    return found
