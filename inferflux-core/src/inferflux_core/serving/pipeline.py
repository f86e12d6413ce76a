"""The ONE generation path: every protocol adapter calls `Pipeline.generate`, so that no surface can skip a check.

Find a model that the principal may use, count the request, render and tokenise, check the lengths, reserve the tokens,
submit, detokenise, stop, settle. Whatever ends a request early (a client that went away, a deadline, a stop string) ends in
the same abort of its engine requests, and gives back what it had reserved.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import AsyncGenerator, Sequence

from inferflux_core.access.admission import Admitted
from inferflux_core.access.services import AccessServices
from inferflux_core.engine.client import EngineClient, OutputStream
from inferflux_core.engine.types import EngineOutput, EngineRequest, FinishReason, SamplingParams, TokenLogprobs
from inferflux_core.errors import (
    ContextLengthExceededError,
    DrainingError,
    InvalidRequestError,
    OverloadedError,
    RequestError,
    RequestTimeoutError,
    UnavailableError,
)
from inferflux_core.interfaces import Tokenizer
from inferflux_core.models.detokenizer import Detokenizer
from inferflux_core.models.manager import ModelManager, ServedModel
from inferflux_core.serving.generation import (
    Delta,
    Done,
    Event,
    GenerationRequest,
    Outcome,
    Prompt,
    RequestContext,
    Started,
    TokenEntry,
    TokenText,
    Usage,
)
from inferflux_core.serving.observer import Observer
from inferflux_core.serving.request_facts import MAX_BYTES_PER_TOKEN, parameter_digest, prompt_size, prompt_texts
from inferflux_core.serving.services import ServerState
from inferflux_core.telemetry.metrics import Metrics


class _Choice:
    """One choice on its way: its detokenizer and what it has generated."""

    __slots__ = ("detokenizer", "finish_reason", "index", "num_cached", "num_generated", "request_id", "tokenizer")

    def __init__(self, index: int, request_id: str, request: GenerationRequest, tokenizer: Tokenizer) -> None:
        self.index = index
        self.request_id = request_id
        self.tokenizer = tokenizer
        self.detokenizer = Detokenizer(tokenizer, request.stop, request.skip_special_tokens)
        self.finish_reason: str | None = None
        self.num_generated = 0
        self.num_cached = 0

    def take(self, output: EngineOutput) -> Delta:
        """Text of an engine output; with a finish reason, also when it was a stop string that ended the choice."""
        text = self.detokenizer.push(output.token_ids)
        self.num_generated = output.num_generated
        self.num_cached = output.num_cached_tokens
        if self.detokenizer.stopped:
            self.finish_reason = FinishReason.STOP
        elif output.finish_reason is not None:
            text += self.detokenizer.finish()
            self.finish_reason = FinishReason.STOP if self.detokenizer.stopped else output.finish_reason
        tokens = None
        if output.logprobs is not None:
            tokens = [self._entry(t, lp) for t, lp in zip(output.token_ids, output.logprobs, strict=True)]
        return Delta(self.index, text, tokens, self.finish_reason)

    def _entry(self, token: int, logprobs: TokenLogprobs) -> TokenEntry:
        return TokenEntry(self._text(token, logprobs.logprob), [self._text(other, logprob) for other, logprob in logprobs.top])

    def _text(self, token: int, logprob: float) -> TokenText:
        data = self.tokenizer.token_bytes(token, special=True)
        return TokenText(data.decode("utf-8", "replace"), data, logprob)


class Pipeline:
    """Answers requests with the loaded models."""

    def __init__(self, models: ModelManager, access: AccessServices, metrics: Metrics, state: ServerState) -> None:
        self._models = models
        self._access = access
        self._metrics = metrics
        self._state = state
        self._ids = itertools.count()
        self._idle = asyncio.Event()
        self._idle.set()
        self._running = 0

    async def wait_until_idle(self) -> None:
        """Returns when no request is being answered."""
        await self._idle.wait()

    async def generate(self, context: RequestContext, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Answer a request: `Started`, then `Delta`s, then `Done`.

        Raises:
            RequestError: before the first event when nothing was generated; later when the engine failed under it.
        """
        self._running += 1
        self._idle.clear()
        observer = Observer(context, request.model, self._metrics)
        try:
            # Closed here and not by the garbage collector, so that a client that leaves stops its generation at once.
            async with contextlib.aclosing(self._answer(context, request, observer)) as events:
                async for event in events:
                    yield event
        except RequestError as error:
            observer.failed(error)
            raise
        finally:
            observer.closed()
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _answer(
        self, context: RequestContext, request: GenerationRequest, observer: Observer
    ) -> AsyncGenerator[Event, None]:
        if self._state.draining:
            raise DrainingError("The server is shutting down. Please retry; another server may answer.")
        principal, outcome = context.principal, context.outcome
        outcome.requested_model = request.model
        model = self._access.admission.find(principal, self._models, request.model, "generate", context.judged)
        observer.model = outcome.model = model.name
        outcome.fingerprint = model.fingerprint
        answers = len(request.prompts) * request.n
        admitted = await self._access.admission.admit(principal, model.name, answers)
        context.reply_headers |= admitted.headers
        used_tokens = 0
        try:
            await self._models.wait_ready(model, context.deadline)
            engine = model.ready_engine()
            tokenizer = model.ready_tokenizer()
            await self._describe(request, outcome)
            prompts = [await self._tokenize(model, request, prompt) for prompt in request.prompts]
            engine_requests = self._engine_requests(context, request, admitted, model, prompts)
            await self._reserve(context, admitted, prompts, engine_requests)
            used_tokens = outcome.prompt_tokens = sum(map(len, prompts))
            choices = {r.request_id: _Choice(i, r.request_id, request, tokenizer) for i, r in enumerate(engine_requests)}
            try:
                events = self._run(context, request, engine, engine_requests, choices, prompts, observer)
                async with contextlib.aclosing(events):
                    async for event in events:
                        yield event
            except UnavailableError:
                if not any(choice.num_generated for choice in choices.values()):
                    used_tokens = 0  # the server's fault, and nothing was delivered
                raise
            finally:
                observer.num_generated = outcome.output_tokens = sum(choice.num_generated for choice in choices.values())
                outcome.cached_tokens = sum(choice.num_cached for choice in list(choices.values())[:: request.n])
                outcome.finish_reason = next(iter(choices.values())).finish_reason or ""
        finally:
            await admitted.settle(used_tokens + outcome.output_tokens)

    async def _reserve(
        self, context: RequestContext, admitted: Admitted, prompts: Sequence[list[int]], requests: Sequence[EngineRequest]
    ) -> None:
        await admitted.reserve(sum(map(len, prompts)), max(r.params.max_tokens for r in requests))
        context.reply_headers |= admitted.headers

    async def _describe(self, request: GenerationRequest, outcome: Outcome) -> None:
        """For the audit log, if there is one: a digest of the parameters, and what it keeps of the prompts."""
        audit = self._access.audit
        if not audit.enabled:
            return
        outcome.parameters = parameter_digest(request)
        if audit.keeps_content:
            # Looking for what is to be blacked out in a long prompt takes a while.
            outcome.content = await asyncio.to_thread(lambda: audit.content("\n".join(prompt_texts(request))))

    async def _run(
        self,
        context: RequestContext,
        request: GenerationRequest,
        engine: EngineClient,
        engine_requests: list[EngineRequest],
        choices: dict[str, _Choice],
        prompts: Sequence[list[int]],
        observer: Observer,
    ) -> AsyncGenerator[Event, None]:
        stream = OutputStream()
        deadline = asyncio.get_running_loop().call_later(
            max(0.0, context.deadline - time.monotonic()),
            stream.fail,
            RequestTimeoutError("The request took too long and was ended. Ask for fewer tokens or retry later."),
        )
        try:
            self._submit(engine, engine_requests, stream)
            remaining = len(choices)
            outputs = await stream.get()
            tokenizer = next(iter(choices.values())).tokenizer
            outcome = context.outcome
            yield Started(outcome.model, outcome.fingerprint, self._prompt_texts(request, prompts, tokenizer))
            while True:
                observer.outputs_arrived(stream)
                for delta in self._deltas(engine, choices, outputs):
                    remaining -= delta.finish_reason is not None
                    if delta.text or delta.tokens or delta.finish_reason is not None:
                        yield delta
                if not remaining:
                    break
                outputs = await stream.get()
            observer.done(next(iter(choices.values())).finish_reason or "stop")
            yield Done(self._usage(request, prompts, list(choices.values())))
        finally:
            deadline.cancel()
            engine.abort(list(choices))
            for output in stream.take():
                # Made for a client that did not read it, or left: it was used all the same.
                choices[output.request_id].num_generated = output.num_generated

    def _submit(self, engine: EngineClient, requests: list[EngineRequest], stream: OutputStream) -> None:
        try:
            engine.submit(requests, stream)
        except OverloadedError:
            self._metrics.queue_rejection("full")
            raise

    # --- before -------------------------------------------------------------------------------------------------------

    async def _tokenize(self, model: ServedModel, request: GenerationRequest, prompt: Prompt) -> list[int]:
        limit = model.max_model_len or 0
        size = prompt_size(prompt)
        if size > limit * MAX_BYTES_PER_TOKEN:
            raise ContextLengthExceededError(
                f"This model's maximum context length is {limit} tokens. Your input of {size} characters is longer than "
                f"that in any wording. Please shorten it.",
                param=request.prompt_param,
            )
        ids = await self._models.tokenize(model, prompt, request.add_special_tokens, False)
        if not ids:
            raise InvalidRequestError("The prompt is empty: it has no tokens.", param=request.prompt_param)
        return list(ids)

    def _engine_requests(
        self,
        context: RequestContext,
        request: GenerationRequest,
        admitted: Admitted,
        model: ServedModel,
        prompts: Sequence[list[int]],
    ) -> list[EngineRequest]:
        seed = secrets.randbits(62) if request.seed is None else request.seed & 0xFFFFFFFFFFFFFFFF
        tokenizer = model.ready_tokenizer()
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
            max_tokens = admitted.max_tokens(self._max_tokens(request, model, len(prompt)), prompt_tokens)
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
                        request_id=f"{next(self._ids):x}",
                        prompt_token_ids=prompt,
                        params=params,
                        # Tenants never see each other's prefixes, not even in the time a first token takes.
                        cache_salt=f"{context.cache_tenant or context.principal.tenant}\0{request.cache_salt}",
                        tenant=context.principal.tenant,
                        # Lower runs first: a request may stand back behind its principal's priority, never in front of it.
                        priority=own if request.priority is None else max(own, request.priority),
                        arrival_time=context.arrival,
                    )
                )
        return requests

    @staticmethod
    def _max_tokens(request: GenerationRequest, model: ServedModel, prompt_tokens: int) -> int:
        limit = model.max_model_len or 0
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

    # --- during and after ---------------------------------------------------------------------------------------------

    @staticmethod
    def _deltas(engine: EngineClient, choices: dict[str, _Choice], outputs: list[EngineOutput]) -> list[Delta]:
        """What the outputs bring, one delta a choice however many steps they came from."""
        deltas: dict[int, Delta] = {}
        for output in outputs:
            if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                raise RequestError("The engine refused the request. Please report this with the request id.")
            choice = choices[output.request_id]
            if choice.finish_reason is not None:
                continue  # already ended by a stop string
            delta = choice.take(output)
            if choice.finish_reason is not None and output.finish_reason is None:
                engine.abort([choice.request_id])
            earlier = deltas.get(choice.index)
            if earlier is None:
                deltas[choice.index] = delta
            else:
                earlier.text += delta.text
                earlier.finish_reason = delta.finish_reason
                if delta.tokens is not None:
                    earlier.tokens = (earlier.tokens or []) + delta.tokens
        return list(deltas.values())

    @staticmethod
    def _prompt_texts(request: GenerationRequest, prompts: Sequence[list[int]], tokenizer: Tokenizer) -> list[str]:
        return [
            prompt if isinstance(prompt, str) else tokenizer.decode(ids) if isinstance(prompt, list) else ""
            for prompt, ids in zip(request.prompts, prompts, strict=True)
        ]

    @staticmethod
    def _usage(request: GenerationRequest, prompts: Sequence[list[int]], choices: Sequence[_Choice]) -> Usage:
        return Usage(
            prompt_tokens=sum(map(len, prompts)),
            completion_tokens=sum(choice.num_generated for choice in choices),
            cached_tokens=sum(choice.num_cached for choice in choices[:: request.n]),
        )
