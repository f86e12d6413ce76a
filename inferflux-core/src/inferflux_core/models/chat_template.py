"""Chat messages to a prompt, by the template that the model or the administrator gives; never one from a request.

There is no default template: guessing one gives a model that talks nonsense without telling anybody why.
"""

from __future__ import annotations

from typing import Any

from inferflux_core.errors import InvalidRequestError, ModelFileError
from inferflux_core.models.special_tokens import PRIVATE_USE, Prompt, Protection, Segment, SpecialTokens
from inferflux_core.models.template_renderer import Renderer, TemplateRefusedError

__all__ = ["ChatTemplate", "Prompt", "Segment"]

_MAX_SOURCE = 1 << 20  # characters; the longest published templates have some 20,000
_MAX_SPECIAL = 512  # characters of one control token; bounds what a placeholder may grow to
_MAX_MESSAGE = 200  # characters of a template's own error message
_OWN_NAMES = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")


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
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._reserved = frozenset(PRIVATE_USE.findall("".join([source, bos_token, eos_token, *special_tokens])))
        self._renderer = Renderer(source, seconds=seconds)

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
            kwargs: further variables, from the administrator's allow-list.

        Raises:
            InvalidRequestError: the template refused the messages, failed on them, or hit a limit.
            OverloadedError: earlier renders of this template take too long.
        """
        if taken := sorted(set(kwargs).intersection(_OWN_NAMES)):
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
