"""What a scheduler counts since its start."""

from __future__ import annotations

from dataclasses import dataclass

from inferflux_core.engine.drafting import Drafting
from inferflux_core.engine.types import EngineStats


@dataclass(slots=True)
class EngineCounters:
    """The monotonic half of `EngineStats`, field by field as there."""

    num_steps: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    recomputed_prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    step_tokens: int = 0
    schedule_seconds: float = 0.0
    model_seconds: float = 0.0

    def stats(self, num_running: int, num_waiting: int, kv_cache_usage: float, drafting: Drafting) -> EngineStats:
        """A snapshot of the counters, together with the gauges of this moment."""
        drafts = drafting.counters
        return EngineStats(
            num_running=num_running,
            num_waiting=num_waiting,
            kv_cache_usage=kv_cache_usage,
            num_steps=self.num_steps,
            num_preemptions=self.num_preemptions,
            prompt_tokens=self.prompt_tokens,
            cached_prompt_tokens=self.cached_prompt_tokens,
            recomputed_prompt_tokens=self.recomputed_prompt_tokens,
            generation_tokens=self.generation_tokens,
            prefix_cache_queries=self.prefix_cache_queries,
            prefix_cache_hits=self.prefix_cache_hits,
            step_tokens=self.step_tokens,
            schedule_seconds=self.schedule_seconds,
            model_seconds=self.model_seconds,
            spec_drafts=drafts.drafts,
            spec_draft_tokens=drafts.draft_tokens,
            spec_accepted_tokens=drafts.accepted_tokens,
            spec_draft_tokens_per_pos=drafts.draft_tokens_per_pos[:],
            spec_accepted_tokens_per_pos=drafts.accepted_tokens_per_pos[:],
            forced_tokens=drafting.forced_tokens,
            draft_seconds=drafts.draft_seconds,
        )
