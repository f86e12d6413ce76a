"""The ONE generation path: every protocol adapter calls `Pipeline.generate`, so that no surface can skip a check.

Find a model that the principal may use, count the request, render and tokenise, check the lengths, reserve the tokens,
submit, detokenise, stop, settle. Whatever ends a request early (a client that went away, a deadline, a stop string) ends in
the same abort of its engine requests, and gives back what it had reserved.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence

from inferflux_core.access.admission import Admitted
from inferflux_core.access.services import AccessServices
from inferflux_core.engine.client import EngineClient, OutputStream
from inferflux_core.engine.types import EngineOutput, EngineRequest, FinishReason
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
from inferflux_core.models.chat_format import ChatFormat
from inferflux_core.models.manager import ModelManager, ServedModel
from inferflux_core.models.output_parser import OutputParser
from inferflux_core.models.reasoning.formats import opens_thoughts
from inferflux_core.models.reasoning.splitter import ThoughtSplitter
from inferflux_core.serving.choice import Choice, joined
from inferflux_core.serving.engine_requests import TokenisedPrompt, engine_requests
from inferflux_core.serving.generation import (
    ChatPrompt,
    Delta,
    Done,
    Event,
    GenerationRequest,
    Outcome,
    Prompt,
    RequestContext,
    Started,
    Usage,
)
from inferflux_core.serving.grammars import RequestGrammars
from inferflux_core.serving.observer import Observer
from inferflux_core.serving.request_facts import MAX_BYTES_PER_TOKEN, parameter_digest, prompt_size, prompt_texts
from inferflux_core.serving.services import ServerState
from inferflux_core.settings import StructuredOutputSettings
from inferflux_core.telemetry.metrics import Metrics

_TAIL_TOKENS = 32  # of a prompt: more than any tag that may end it


class Pipeline:
    """Answers requests with the loaded models.

    Args:
        grammars: makes what answers are held to; without it none is held to anything, and requests for that are refused.
    """

    def __init__(
        self,
        models: ModelManager,
        access: AccessServices,
        metrics: Metrics,
        state: ServerState,
        grammars: RequestGrammars | None = None,
    ) -> None:
        self._models = models
        self._grammars = grammars or RequestGrammars(StructuredOutputSettings(enabled=False), None)
        self._access = access
        self._metrics = metrics
        self._state = state
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
            chat = model.chat if isinstance(request.prompts[0], ChatPrompt) else None
            grammar = await self._grammar(context, request, chat, tokenizer)
            prompts = [await self._prompt(model, chat, request, prompt, grammar) for prompt in request.prompts]
            sequences = engine_requests(context, request, admitted, tokenizer, model.max_model_len or 0, prompts)
            await self._reserve(context, admitted, prompts, sequences)
            used_tokens = outcome.prompt_tokens = sum(map(len, prompts))
            choices = {}
            for index, sequence in enumerate(sequences):
                is_open = prompts[index // request.n].opens_thoughts
                choices[sequence.request_id] = _choice(index, sequence.request_id, request, chat, tokenizer, is_open)
            try:
                events = self._run(context, request, engine, sequences, choices, prompts, observer)
                async with contextlib.aclosing(events):
                    async for event in events:
                        yield event
            except UnavailableError:
                if not any(choice.num_generated for choice in choices.values()):
                    used_tokens = 0  # the server's fault, and nothing was delivered
                raise
            finally:
                observer.num_generated = outcome.output_tokens = sum(choice.num_generated for choice in choices.values())
                observer.num_reasoning = sum(choice.num_reasoning for choice in choices.values())
                observer.num_calls = sum(choice.num_calls for choice in choices.values())
                outcome.cached_tokens = sum(choice.num_cached for choice in list(choices.values())[:: request.n])
                outcome.finish_reason = next(iter(choices.values())).finish_reason or ""
        finally:
            await admitted.settle(used_tokens + outcome.output_tokens)

    async def _reserve(
        self,
        context: RequestContext,
        admitted: Admitted,
        prompts: Sequence[TokenisedPrompt],
        requests: Sequence[EngineRequest],
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
        sequences: list[EngineRequest],
        choices: dict[str, Choice],
        prompts: Sequence[TokenisedPrompt],
        observer: Observer,
    ) -> AsyncGenerator[Event, None]:
        stream = OutputStream()
        deadline = asyncio.get_running_loop().call_later(
            _seconds_left(context),
            stream.fail,
            RequestTimeoutError("The request took too long and was ended. Ask for fewer tokens or retry later."),
        )
        try:
            self._submit(engine, sequences, stream)
            remaining = len(choices)
            outputs = await stream.get()
            outcome = context.outcome
            tokenizer = choices[sequences[0].request_id].tokenizer
            yield Started(outcome.model, outcome.fingerprint, self._prompt_texts(request, prompts, tokenizer))
            while True:
                observer.outputs_arrived(stream)
                for delta in self._deltas(engine, request, choices, outputs):
                    remaining -= delta.finish_reason is not None
                    if delta.text or delta.tokens or delta.finish_reason is not None or delta.reasoning or delta.calls:
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

    async def _grammar(
        self, context: RequestContext, request: GenerationRequest, chat: ChatFormat | None, tokenizer: Tokenizer
    ) -> str:
        """As `RequestGrammars.of`; the checks of others, for which it may wait, are no reason to miss the deadline."""
        tenant = context.cache_tenant or context.principal.tenant
        try:
            async with asyncio.timeout(_seconds_left(context)):
                return await self._grammars.of(request, chat, tokenizer, tenant)
        except TimeoutError:
            raise RequestTimeoutError(
                "The request took too long and was ended before its schema or grammar was checked. Please retry later."
            ) from None

    async def _prompt(
        self, model: ServedModel, chat: ChatFormat | None, request: GenerationRequest, prompt: Prompt, grammar: str
    ) -> TokenisedPrompt:
        limit = model.max_model_len or 0
        size = prompt_size(prompt, request.tools)
        if size > limit * MAX_BYTES_PER_TOKEN:
            raise ContextLengthExceededError(
                f"This model's maximum context length is {limit} tokens. Your input of {size} characters is longer than "
                f"that in any wording. Please shorten it.",
                param=request.prompt_param,
            )
        if isinstance(prompt, ChatPrompt):
            told = (model, prompt, request.tools, request.reasoning)
            if request.tools is None:
                prompt = self._models.chat_prompt(*told)
            else:  # hundreds of tools take milliseconds
                prompt = await asyncio.to_thread(self._models.chat_prompt, *told)
        ids = await self._models.tokenize(model, prompt, request.add_special_tokens, False)
        if not ids:
            raise InvalidRequestError("The prompt is empty: it has no tokens.", param=request.prompt_param)
        tokenizer, is_open = model.ready_tokenizer(), False
        if chat is not None and chat.reasoning is not None:
            is_open = opens_thoughts(chat.reasoning, tokenizer.decode(ids[-_TAIL_TOKENS:], special=True))
        constraint = self._grammars.constraint(request, grammar, chat, tokenizer, is_open)
        return TokenisedPrompt(list(ids), constraint, is_open)

    # --- during and after ---------------------------------------------------------------------------------------------

    @staticmethod
    def _deltas(
        engine: EngineClient, request: GenerationRequest, choices: dict[str, Choice], outputs: list[EngineOutput]
    ) -> list[Delta]:
        """What the outputs bring, one delta a choice however many steps they came from, unless the order of things that are
        told apart would suffer."""
        deltas: list[Delta] = []
        last: dict[int, Delta] = {}
        for output in outputs:
            choice = choices[output.request_id]
            if choice.finish_reason is not None:
                continue  # already ended, by a stop string or a call; what becomes of its sequence is nobody's concern
            if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                raise _failure(request, output)
            delta = choice.take(output)
            if choice.finish_reason is not None and output.finish_reason is None:
                engine.abort([choice.request_id])
            earlier = last.get(choice.index)
            if earlier is None or not joined(earlier, delta):
                deltas.append(delta)
                last[choice.index] = delta
        return deltas

    @staticmethod
    def _prompt_texts(request: GenerationRequest, prompts: Sequence[TokenisedPrompt], tokenizer: Tokenizer) -> list[str]:
        return [
            prompt if isinstance(prompt, str) else tokenizer.decode(tokenised.token_ids) if isinstance(prompt, list) else ""
            for prompt, tokenised in zip(request.prompts, prompts, strict=True)
        ]

    @staticmethod
    def _usage(request: GenerationRequest, prompts: Sequence[TokenisedPrompt], choices: Sequence[Choice]) -> Usage:
        return Usage(
            prompt_tokens=sum(map(len, prompts)),
            completion_tokens=sum(choice.num_generated for choice in choices),
            cached_tokens=sum(choice.num_cached for choice in choices[:: request.n]),
            reasoning_tokens=sum(choice.num_reasoning for choice in choices),
        )


def _seconds_left(context: RequestContext) -> float:
    return max(0.0, context.deadline - time.monotonic())


def _choice(
    index: int, request_id: str, request: GenerationRequest, chat: ChatFormat | None, tokenizer: Tokenizer, is_open: bool
) -> Choice:
    """One choice. Text completions are text, whatever is in it.

    Args:
        is_open: its prompt ends within thoughts.
    """
    family = None if chat is None else chat.reasoning
    calls = None if chat is None or request.tools is None else chat.tools
    parser = OutputParser(
        tokenizer,
        stop=request.stop,
        skip_special_tokens=request.skip_special_tokens,
        splitter=None if family is None else ThoughtSplitter(family, is_open),
        tools=None if calls is None or request.tools is None else calls.parser(request.tools),
        markers=() if calls is None else calls.markers,
    )
    tags = None if family is None or request.reasoning.apart else (family.begin, family.end)
    return Choice(index, request_id, tokenizer, parser, shows_thoughts=request.reasoning.include, tags=tags)


def _failure(request: GenerationRequest, output: EngineOutput) -> RequestError:
    """Why the engine ended a sequence: the request's own constraint, which it tells, or something nobody expected."""
    if output.error is None:
        return RequestError("The engine refused the request. Please report this with the request id.")
    param = None if request.format is None else request.format.param
    if param is None and request.tools is not None:
        param = request.tools.param
    return InvalidRequestError(output.error, param=param, code="constraint_failed")
