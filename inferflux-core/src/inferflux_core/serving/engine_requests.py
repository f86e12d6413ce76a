"""A client's request as the sequences that the engine generates."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from inferflux_core.access.admission import Admitted
from inferflux_core.engine.types import Constraint, EngineRequest, SamplingParams
from inferflux_core.errors import ContextLengthExceededError, InvalidRequestError
from inferflux_core.interfaces import Tokenizer
from inferflux_core.serving.generation import GenerationRequest, RequestContext

_IDS = itertools.count()  # of this process's sequences


@dataclass(frozen=True, slots=True)
class TokenisedPrompt:
    """A prompt, and what its answer is held to.

    Attributes:
        opens_thoughts: it ends within the model's thoughts, so that the answer begins there.
    """

    token_ids: list[int]
    constraint: Constraint | None = None
    opens_thoughts: bool = False

    def __len__(self) -> int:
        return len(self.token_ids)


def engine_requests(
    context: RequestContext,
    request: GenerationRequest,
    admitted: Admitted,
    tokenizer: Tokenizer,
    max_model_len: int,
    prompts: Sequence[TokenisedPrompt],
) -> list[EngineRequest]:
    """One sequence for each choice of each prompt, in the order of choices.

    Raises:
        InvalidRequestError: a token id is not in the vocabulary.
        ContextLengthExceededError: a prompt and its answer are longer than the context.
    """
    seed = secrets.randbits(62) if request.seed is None else request.seed & 0xFFFFFFFFFFFFFFFF
    for token in (*request.logit_bias, *request.stop_token_ids):
        if not 0 <= token < tokenizer.vocab_size:
            raise InvalidRequestError(
                f"token id {token} is outside this model's vocabulary of {tokenizer.vocab_size}",
                param="logit_bias" if token in request.logit_bias else "stop_token_ids",
            )
    own = context.principal.priority
    prompt_tokens = sum(map(len, prompts))
    requests: list[EngineRequest] = []
    for prompt in prompts:
        max_tokens = admitted.max_tokens(_max_tokens(request, max_model_len, len(prompt)), prompt_tokens)
        for choice in range(request.n):
            params = SamplingParams(
                max_tokens=max_tokens,
                min_tokens=min(request.min_tokens, max_tokens),
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=request.top_k,
                min_p=request.min_p,
                repetition_penalty=request.repetition_penalty,
                frequency_penalty=request.frequency_penalty,
                presence_penalty=request.presence_penalty,
                logit_bias=dict(request.logit_bias),
                seed=(seed + choice) & 0xFFFFFFFFFFFFFFFF,
                stop_token_ids=frozenset(request.stop_token_ids),
                ignore_eos=request.ignore_eos,
                logprobs=request.logprobs,
            )
            requests.append(
                EngineRequest(
                    request_id=f"{next(_IDS):x}",
                    prompt_token_ids=prompt.token_ids,
                    params=params,
                    # Tenants never see each other's prefixes, not even in the time a first token takes.
                    cache_salt=f"{context.cache_tenant or context.principal.tenant}\0{request.cache_salt}",
                    tenant=context.principal.tenant,
                    # Lower runs first: a request may stand back behind its principal's priority, never in front of it.
                    priority=own if request.priority is None else max(own, request.priority),
                    arrival_time=context.arrival,
                    constraint=prompt.constraint,
                    num_speculative_tokens=request.num_speculative_tokens,
                )
            )
    return requests


def _max_tokens(request: GenerationRequest, limit: int, prompt_tokens: int) -> int:
    room = limit - prompt_tokens
    wanted = request.max_tokens if request.max_tokens is not None else max(1, room)
    if wanted > room:
        raise ContextLengthExceededError(
            f"This model's maximum context length is {limit} tokens. However, you requested {prompt_tokens + wanted} "
            f"tokens ({prompt_tokens} in the {'messages' if request.prompt_param == 'messages' else 'prompt'}, {wanted} in "
            f"the completion). Please reduce the length of either.",
            param=request.prompt_param,
        )
    return wanted
