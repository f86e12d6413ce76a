"""Chat messages to a prompt, by the template that the model or the administrator gives; never one from a request.

There is no default template: guessing one gives a model that talks nonsense without telling anybody why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inferflux_core.errors import InvalidRequestError, ModelFileError
from inferflux_core.models.special_tokens import PRIVATE_USE, Prompt, Protection, Segment, SpecialTokens
from inferflux_core.models.template_renderer import Renderer, TemplateRefusedError

__all__ = ["ChatTemplate", "Prompt", "Segment"]

_MAX_SOURCE = 1 << 20  # characters; the longest published templates have some 20,000
_MAX_SPECIAL = 512  # characters of one control token; bounds what a placeholder may grow to
_MAX_MESSAGE = 200  # characters of a template's own error message
OWN_NAMES = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")
"""Variables that every template is given, and that nobody else may set."""


class ChatTemplate:
    """A compiled chat template. Thread-safe; blocks for about a third of a millisecond a render, so call it in a thread.

    The template runs in a process of its own under limits of time, memory and output (see `template_worker`). Control
    tokens that a user spells out come back as untrusted segments: encode those with `parse_special=False`, and all others
    with `parse_special=True`.

    Args:
        source: the Jinja template.
        bos_token: text of the token that begins a sequence, for the template to use.
        eos_token: text of the token that ends one.
        special_tokens: texts that the tokenizer reads as control tokens.
        seconds: CPU time that one render may take.

    Attributes:
        variables: what requests may set: the names that the template reads and that are not given to it anyway.

    Raises:
        ModelFileError: the template does not compile, or its process cannot be started.
    """

    def __init__(
        self, source: str, *, bos_token: str, eos_token: str, special_tokens: frozenset[str], seconds: float = 1.0
    ) -> None:
        if len(source) > _MAX_SOURCE:
            raise ModelFileError(f"the chat template has {len(source)} characters, more than {_MAX_SOURCE}; use another one")
        if (longest := max(map(len, special_tokens), default=0)) > _MAX_SPECIAL:
            raise ModelFileError(
                f"the vocabulary has a control token of {longest} characters, more than {_MAX_SPECIAL}; it is damaged"
            )
        self._special = SpecialTokens(special_tokens)
        self._source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._reserved = frozenset(PRIVATE_USE.findall("".join([source, bos_token, eos_token, *special_tokens])))
        self._renderer = Renderer(source, seconds=seconds)
        # After the line above, which compiled it under limits: what follows does no more than that did.
        self.variables = _variables(source)

    def check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """Raises InvalidRequestError if a request sets variables that are not its own to set, or that the template ignores."""
        if unknown := sorted(set(kwargs) - self.variables):
            known = ", ".join(map(repr, sorted(self.variables))) or "none"
            raise InvalidRequestError(
                f"chat_template_kwargs cannot set {', '.join(repr(name[:64]) for name in unknown[:8])}; variables of this "
                f"model's chat template that a request may set: {known[:500]}",
                param="chat_template_kwargs",
            )

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> Prompt:
        """The prompt for these messages. All values are JSON values.

        Args:
            add_generation_prompt: end with the beginning of the assistant's turn.
            tools: function definitions as OpenAI writes them.
            kwargs: further variables.

        Raises:
            InvalidRequestError: the template refused the messages, failed on them, or hit a limit.
            OverloadedError: earlier renders of this template take too long.
        """
        if taken := sorted(set(kwargs).intersection(OWN_NAMES)):
            raise InvalidRequestError(
                f"chat_template_kwargs cannot set {', '.join(taken)}; remove it", param="chat_template_kwargs"
            )
        protection = Protection(self._special, self._reserved)
        try:
            messages, tools, kwargs = protection.protect([messages, tools, kwargs])
            rendered = self._renderer.render(
                {
                    **self._tokens,
                    **kwargs,
                    "messages": messages,
                    "tools": tools,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except TemplateRefusedError as refusal:
            message = protection.restore(str(refusal))[:_MAX_MESSAGE]
            raise InvalidRequestError(message, param="messages") from None
        except RecursionError:
            raise InvalidRequestError("the messages are nested too deeply; flatten them", param="messages") from None
        return protection.segments(rendered)

    def close(self) -> None:
        """End the template's process. The template is not used again."""
        self._renderer.close()


def _variables(source: str) -> frozenset[str]:
    """Names that a template reads, its own loop variables included, which it does no harm to set."""
    from jinja2 import TemplateError, nodes

    from inferflux_core.models.template_worker import environment

    jinja = environment()
    try:
        names = {node.name for node in jinja.parse(source).find_all(nodes.Name) if node.ctx == "load"}
    except (TemplateError, RecursionError):  # too deep for this process's stack, say
        return frozenset()
    return frozenset(names.difference(jinja.globals, OWN_NAMES))
