"""What can be told of a generation request without its prompts, and of its prompts without a model."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from inferflux_core.serving.generation import ChatPrompt, GenerationRequest, Prompt, ToolRequest

# No tokenizer of a text model averages more bytes a token over a whole prompt: longer ones are refused unseen.
MAX_BYTES_PER_TOKEN = 32

_json = msgspec.json.Encoder().encode
_PARAMETERS = tuple(field.name for field in dataclasses.fields(GenerationRequest) if field.name != "prompts")


def parameter_digest(request: GenerationRequest) -> str:
    """A short digest of everything in a request but its prompts: equal for equal parameters, and it tells none of them."""
    values = [getattr(request, name) for name in _PARAMETERS if name != "logit_bias"]
    # Sets have no order of their own, and Python's changes with each start of the server.
    text = msgspec.json.encode([*values, sorted(request.logit_bias.items())], order="deterministic")
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def prompt_texts(request: GenerationRequest) -> Iterator[str]:
    """The prompts as text, for an audit log that keeps them; token ids as numbers, and calls and tools as JSON."""
    for prompt in request.prompts:
        if isinstance(prompt, ChatPrompt):
            for message in prompt.messages:
                name = f" {message['name']}" if message.get("name") else ""
                calls = f" {_json(message['tool_calls']).decode()}" if message.get("tool_calls") else ""
                yield f"{message.get('role')}{name}: {message.get('content')}{calls}"
        else:
            yield prompt if isinstance(prompt, str) else " ".join(map(str, prompt))
    if request.tools is not None:
        yield f"tools: {_json(request.tools.functions).decode()}"


def prompt_size(prompt: Prompt, tools: ToolRequest | None = None) -> int:
    """Characters of a prompt, tokens for token ids; about a lower bound of what it is as text, with all that it tells.

    Args:
        tools: what the model is told of besides.
    """
    if not isinstance(prompt, ChatPrompt):
        return len(prompt)
    size = sum(map(_message_size, prompt.messages))
    size += sum(len(value) for value in prompt.template_kwargs.values() if isinstance(value, str))
    if tools is not None:
        size += sum(len(_json([f.name, f.description, f.parameters])) for f in tools.functions)
    return size


def _message_size(message: Mapping[str, Any]) -> int:
    texts = (message.get(key) for key in ("content", "name", "tool_call_id", "reasoning_content"))
    size = sum(len(text) for text in texts if isinstance(text, str))
    return size + (len(_json(calls)) if (calls := message.get("tool_calls")) else 0)
