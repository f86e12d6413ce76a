"""Request fields that are ignored: some on purpose, some because nobody here knows them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from pydantic import BaseModel

logger = logging.getLogger(__name__)

# Fields of OpenAI's and its peers' clients that change nothing about what is generated here.
IGNORED = frozenset(
    {
        "add_generation_prompt", "audio", "best_of", "continue_final_message", "guided_decoding_backend", "keep_alive",
        "metadata", "modalities", "moderation", "parallel_tool_calls", "prediction", "prompt_cache_key",
        "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "suffix", "ttl",
        "user", "verbosity", "web_search_options",
    }
)  # fmt: skip
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MOST_WARNINGS = 100


class UnknownFields:
    """Warns of each unknown field once, and of so many at most that a client cannot fill a disk with names."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def note(self, model: type[BaseModel], names: Iterable[str]) -> None:
        """Log the names that neither `model` nor `IGNORED` has. Safe to call from threads."""
        for name in names:
            if len(self._seen) >= _MOST_WARNINGS:
                return
            if name in model.model_fields or name in IGNORED or name in self._seen:
                continue
            if any(name == field.alias for field in model.model_fields.values()):
                continue
            if _PLAIN_NAME.fullmatch(name):
                self._seen.add(name)
                logger.warning("request field %r is not known and ignored; this is said once", name)
