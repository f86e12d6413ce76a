"""How one model is talked with: its chat template, and how it writes calls of tools and thoughts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from inferflux_core.errors import InvalidRequestError
from inferflux_core.models.chat_template import ChatTemplate
from inferflux_core.models.prompts import ChatPrompt
from inferflux_core.models.reasoning.control import template_kwargs
from inferflux_core.models.reasoning.formats import ReasoningFormat
from inferflux_core.models.reasoning.options import ReasoningOptions
from inferflux_core.models.tool_calls.calls import ToolRequest
from inferflux_core.models.tool_calls.prompting import with_tools
from inferflux_core.models.tool_calls.tool_format import ToolFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """How one model reads conversations and writes answers.

    Attributes:
        source: text of the template.
        tools: how it writes calls; None if it calls nothing.
        reasoning: how it marks its thoughts; None if it has none.
        kwargs: variables of the template that the configuration sets.
    """

    template: ChatTemplate
    source: str
    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def prompt(self, prompt: ChatPrompt, tools: ToolRequest | None, reasoning: ReasoningOptions) -> ChatPrompt:
        """What the template is given: the messages with the tools, and all its variables.

        Of variables that are set twice the request's own count, then what it says of thoughts, then the configuration's.

        Raises:
            InvalidRequestError: the request sets a variable that the template does not know, or has tools for a model that
                can call none.
        """
        self.template.check_kwargs(prompt.template_kwargs)
        kwargs = {**self.kwargs, **template_kwargs(reasoning, self.source), **prompt.template_kwargs}
        prompt = replace(prompt, template_kwargs=kwargs)
        if self.tools is not None:
            called = any(message.get("tool_calls") or message.get("role") == "tool" for message in prompt.messages)
            return prompt if tools is None and not called else with_tools(prompt, tools, self.tools, self.source)
        if tools is not None:
            raise InvalidRequestError(
                f"Unsupported parameter: {tools.param!r}; this model calls no tools (tool_parser is 'none'). Remove it, or "
                f"choose another model.",
                param=tools.param,
                code="unsupported_parameter",
            )
        return prompt
