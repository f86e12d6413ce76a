"""The ONE generation path. (being written by the lead)"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from inferflux_core.serving.generation import Event, GenerationRequest, RequestContext


class Pipeline:
    def generate(self, context: RequestContext, request: GenerationRequest) -> AsyncGenerator[Event, None]: ...
