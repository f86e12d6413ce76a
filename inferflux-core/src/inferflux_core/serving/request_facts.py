"""What can be told of a generation request without its prompts, and of its prompts without a model."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator

import msgspec

from inferflux_core.serving.generation import ChatPrompt, GenerationRequest, Prompt

# No tokenizer of a text model averages more bytes a token over a whole prompt: longer ones are refused unseen.
MAX_BYTES_PER_TOKEN = 32

_PARAMETERS = tuple(field.name for field in dataclasses.fields(GenerationRequest) if field.name != "prompts")


def parameter_digest(request: GenerationRequest) -> str:
    """A short digest of everything in a request but its prompts: equal for equal parameters, and it tells none of them."""
    values = msgspec.json.encode([getattr(request, name) for name in _PARAMETERS])
    return hashlib.blake2b(values, digest_size=8).hexdigest()


def prompt_texts(request: GenerationRequest) -> Iterator[str]:
    """The prompts as text, for an audit log that keeps them; token ids as numbers."""
    for prompt in request.prompts:
        if isinstance(prompt, ChatPrompt):
            for message in prompt.messages:
                yield f"{message.get('role')}: {message.get('content')}"
        else:
            yield prompt if isinstance(prompt, str) else " ".join(map(str, prompt))


def prompt_size(prompt: Prompt) -> int:
    """Characters of a prompt, tokens for token ids; a lower bound of what it is as text."""
    if isinstance(prompt, ChatPrompt):
        return sum(len(content) for message in prompt.messages if isinstance(content := message.get("content"), str))
    return len(prompt)
