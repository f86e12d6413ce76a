"""How a model hears of its tools: by its chat template, or, where that has no word of tools, by us.

Templates without tools drop calls and results from the history without a word, or refuse the role `tool`. For them the
tools are described in the system message, earlier calls are put into the assistant's text, as the model would have written
them, and results into messages of the user, as Hermes 2 Pro began it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, Final

from inferflux_core.models.prompts import ChatPrompt
from inferflux_core.models.tool_calls.calls import Function, ToolRequest
from inferflux_core.models.tool_calls.formats import prints_tools
from inferflux_core.models.tool_calls.mistral import MistralFormat
from inferflux_core.models.tool_calls.tool_format import ToolFormat

_NO_PARAMETERS: Final = {"type": "object", "properties": {}}
_ALPHABET: Final = string.digits + string.ascii_letters
_SHORT_ID = re.compile(r"[0-9A-Za-z]{9}")
_NO_SYSTEM = re.compile(r"system role (?:is )?not supported", re.IGNORECASE)


def with_tools(prompt: ChatPrompt, request: ToolRequest | None, format: ToolFormat, template: str | None) -> ChatPrompt:
    """The prompt, as this model's chat template can show it, with its tools.

    Args:
        prompt: messages as `to_chat_prompt` makes them.
        request: None if nothing can be called, though it was called earlier in the conversation.
        template: the model's chat template.
    """
    if template is not None and prints_tools(template, format):
        messages = _with_short_ids(prompt.messages) if isinstance(format, MistralFormat) else prompt.messages
        tools = None if request is None else [_definition(f) for f in request.functions]
        return dataclasses.replace(prompt, messages=messages, tools=tools)
    messages = _rewritten(prompt.messages, format)
    if request is None:
        return dataclasses.replace(prompt, messages=messages, tools=None)
    takes_system = template is None or _takes_system(template)
    role = "system" if takes_system else "user"
    text = _instructions(request, format)
    if messages and messages[0]["role"] == role:
        content = messages[0]["content"]
        first = {**messages[0], "content": f"{content}\n\n{text}" if takes_system else f"{text}\n\n{content}"}
        messages = [first, *messages[1:]]
    else:
        messages = [{"role": role, "content": text}, *messages]
    return dataclasses.replace(prompt, messages=messages, tools=None)


def _takes_system(template: str) -> bool:
    """Whether a message of role `system` is shown. Templates that know only users and assistants taking turns refuse it."""
    return _NO_SYSTEM.search(template) is None and ("must alternate" not in template or "system" in template)


def _definition(function: Function) -> dict[str, Any]:
    """A function as OpenAI's clients write it, and chat templates expect it."""
    parameters = _NO_PARAMETERS if function.parameters is None else dict(function.parameters)
    described = {"name": function.name, "description": function.description, "parameters": parameters}
    return {"type": "function", "function": described}


def _instructions(request: ToolRequest, format: ToolFormat) -> str:
    """What tells a model of tools whose chat template does not."""
    definitions = "\n".join(json.dumps(_definition(function), ensure_ascii=False) for function in request.functions)
    example = format.call_text("function-name", {"argument-name": "value"})
    number = "one or more functions" if request.parallel else "one function"
    when = "Answer with a call" if request.must_call else f"You may call {number} to assist with the request"
    allowed = ""
    if len(request.callable) < len(request.functions):
        allowed = "Only these may be called now: " + ", ".join(function.name for function in request.callable) + ".\n"
    return (
        f"# Tools\n\n{when}. These are the functions:\n<tools>\n{definitions}\n</tools>\n{allowed}\n"
        f"To call a function, write its name and its arguments like this:\n{example}"
    )


def _rewritten(messages: Sequence[Mapping[str, Any]], format: ToolFormat) -> list[Mapping[str, Any]]:
    """The messages with calls and results as text. Results and what the user says next become one message, because many
    templates insist on users and assistants taking turns."""
    result: list[Mapping[str, Any]] = []
    joins = False  # the last message holds results
    for message in messages:
        if message["role"] in ("tool", "function"):
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
        elif message.get("tool_calls"):
            calls = (
                format.call_text(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]
            )
            kept = {key: value for key, value in message.items() if key != "tool_calls"}
            result.append({**kept, "content": "\n".join([*([message["content"]] if message["content"] else []), *calls])})
            joins = False
            continue
        elif message["role"] == "user" and joins:
            text = message["content"]
        else:
            result.append(message)
            joins = False
            continue
        if joins:
            result[-1] = {"role": "user", "content": f"{result[-1]['content']}\n{text}"}
        else:
            result.append({"role": "user", "content": text})
            joins = True
    return result


def _with_short_ids(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with ids of nine letters and digits, on which Mistral's templates insist; clients bring other ones."""
    result: list[Mapping[str, Any]] = []
    for number, message in enumerate(messages):
        changed = dict(message)
        if calls := message.get("tool_calls"):
            changed["tool_calls"] = [
                {**call, "id": _short_id(call.get("id") or f"{number}.{index}")} for index, call in enumerate(calls)
            ]
        if (answered := message.get("tool_call_id")) is not None:
            changed["tool_call_id"] = _short_id(answered)
        result.append(changed)
    return result


def _short_id(id: str) -> str:
    if _SHORT_ID.fullmatch(id):
        return id
    number = int.from_bytes(hashlib.blake2b(id.encode("utf-8", "replace"), digest_size=8).digest(), "big")
    return "".join(_ALPHABET[number // 62**place % 62] for place in range(9))
