"""The half of the backend that computes, in the engine process: one forward pass a step over the paged cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inferflux_backend_torch.draw import Draw
from inferflux_backend_torch.inputs import StepInputs
from inferflux_backend_torch.loading import Loaded
from inferflux_backend_torch.permitted import permitted_words
from inferflux_backend_torch.sampler import DeviceSampler, Samples
from inferflux_backend_torch.steps import HostSteps, Steps
from inferflux_core.engine.types import (
    ModelRunnerOutput,
    PagedOps,
    Row,
    SamplingParams,
    SchedulerOutput,
    SequenceInit,
    TokenLogprobs,
)
from inferflux_core.interfaces import Capabilities, EngineConfig, GrammarMask, KVCacheSpec, ModelRunner, Ticket

_WARM_UP_TOKENS = 128
_WARM_UP_DRAFTS = 4
_MOST_DRAFTS = 256
# Logits of so many positions may always be in memory at once, else those of max_num_seqs: drafts do not add to them.
_LEAST_AT_ONCE = 64


@dataclass(slots=True)
class TorchTicket(Ticket):
    """A launched step.

    Attributes:
        rows: those that are sampled, in the order of the plan.
        logits: [R, V], of as many positions as fit into memory at once, until they have been sampled; None when nothing is.
        hidden: [N, H], hidden states of the positions after them, whose logits are made when they are sampled.
        elapsed: milliseconds that the forward pass took; waits for it.
        samples: of all positions, in parts.
    """

    rows: list[Row]
    logits: Tensor | None
    hidden: Tensor | None
    elapsed: Callable[[], float]
    samples: list[Samples] = field(default_factory=list)


class TorchRunner(ModelRunner):
    """Runs a model whose steps are done when `launch` returns: on a CPU, and on devices without kernels of our own."""

    def __init__(
        self, loaded: Loaded, config: EngineConfig, *, steps: Steps | None = None, draw: Draw | None = None, depth: int = 1
    ) -> None:
        """
        Args:
            steps, draw: how inputs are made and tokens drawn; by default on the host.
        """
        self.model_info = info = loaded.model_info
        self.kv_cache_spec = KVCacheSpec(layout="paged", block_size=loaded.cache.block_size, num_blocks=loaded.num_blocks)
        self.caps = Capabilities(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            depth=depth,
            max_draft=min(_MOST_DRAFTS, config.max_num_batched_tokens - 1),
            grammar=True,
        )
        self._at_once = max(config.max_num_seqs, _LEAST_AT_ONCE)
        self._model = loaded.model
        self._cache = loaded.cache
        self._steps: Steps = steps or HostSteps(config.max_num_seqs, info.max_model_len, loaded.cache.block_size, loaded.device)
        self._sampler = DeviceSampler(info.vocab_size, info.eos_token_ids, config.max_num_seqs, loaded.device, draw)

    def warm_up(self) -> None:
        """A chunk, some drafts and a single token in block 0, which nobody uses, drawn and greedy: libraries choose their
        kernels in it."""
        chunk = min(_WARM_UP_TOKENS, self.caps.max_num_batched_tokens, self.model_info.max_model_len)
        greedy = SamplingParams(max_tokens=1, temperature=0.0)
        drawn = SamplingParams(max_tokens=1, top_k=5, top_p=0.9, logprobs=1)
        drafts = min(_WARM_UP_DRAFTS, chunk - 1)
        for n, n_draft, params in ((chunk, 0, drawn), (1 + drafts, drafts, greedy), (1, 0, greedy)):
            tokens = [0] * n
            row = Row(slot=0, start=0, n=n, tokens=tokens, n_draft=n_draft, sample=True, kv=PagedOps())
            init = SequenceInit(slot=0, params=params, tokens=tokens, num_prompt_tokens=n)
            ticket = self.launch(SchedulerOutput(step=0, rows=[row], num_tokens=n, start=[init]))
            self.sample(ticket, None)
            self.collect(ticket)
        self._sampler.free(0)

    @torch.inference_mode()
    def launch(self, plan: SchedulerOutput) -> TorchTicket:
        for slot in plan.free:
            self._sampler.free(slot)
        for init in plan.start:
            self._sampler.start(init)
            self._steps.start(init.slot)
        rows = sorted(plan.rows, key=lambda row: row.n > 1)
        places = {row.slot: i for i, row in enumerate(rows)}
        wanted = [row for row in plan.rows if row.sample]
        logits, hidden, elapsed = self._compute(rows, [places[row.slot] for row in wanted])
        return TorchTicket(plan, wanted, logits if wanted else None, hidden, elapsed)

    def _compute(self, rows: Sequence[Row], sampled: Sequence[int]) -> tuple[Tensor | None, Tensor | None, Callable[[], float]]:
        """Logits of the sampled rows' positions, hidden states of those that come later, and how long that took."""
        began = time.perf_counter()
        logits, hidden = self._forward(self._steps.inputs(rows, sampled))
        milliseconds = (time.perf_counter() - began) * 1e3
        return logits, hidden, lambda: milliseconds

    def _forward(self, inputs: StepInputs) -> tuple[Tensor | None, Tensor | None]:
        hidden = self._model.forward(inputs, self._cache)
        now, later = hidden[: self._at_once], hidden[self._at_once :]
        return self._model.logits(now) if len(now) else None, later if len(later) else None

    @torch.inference_mode()
    def sample(self, ticket: Ticket, mask: GrammarMask | None) -> None:
        assert isinstance(ticket, TorchTicket)
        if ticket.logits is None:
            return
        slots = [row.slot for row in ticket.rows for _ in range(row.n_draft + 1)]
        positions = [p for row in ticket.rows for p in range(row.start + row.n - row.n_draft, row.start + row.n + 1)]
        permitted = permitted_words(mask, ticket.rows, self.model_info.vocab_size)
        drafts = _drafts(ticket.rows)
        first = 0
        for logits in self._logits(ticket):
            last = first + len(logits)
            some = {place - first: words for place, words in permitted.items() if first <= place < last}
            # A draft at the last place is for the next part, where its row counts as the first of its slot.
            own = {place - first: token for place, token in drafts.items() if first <= place < last - 1}
            ticket.samples.append(self._sampler.sample(logits, slots[first:last], positions[first:last], some, own))
            first = last

    def _logits(self, ticket: TorchTicket) -> Iterator[Tensor]:
        """All that are to be sampled, in parts that the ticket does not keep."""
        logits, hidden = ticket.logits, ticket.hidden
        ticket.logits = ticket.hidden = None
        assert logits is not None
        yield logits
        del logits
        if hidden is not None:
            for first in range(0, len(hidden), self._at_once):
                yield self._model.logits(hidden[first : first + self._at_once])

    def collect(self, ticket: Ticket) -> ModelRunnerOutput:
        assert isinstance(ticket, TorchTicket)
        sampled: list[int] = []
        entries: list[TokenLogprobs | None] = []
        for samples in ticket.samples:
            some, some_entries = samples.collect()
            sampled += some
            entries += some_entries
        tokens: list[list[int]] = []
        logprobs: list[list[TokenLogprobs] | None] = []
        first = 0
        for row in ticket.rows:
            kept = _verified(sampled[first : first + row.n_draft + 1], row)
            tokens.append(kept)
            with_logprobs = [entry for entry in entries[first : first + len(kept)] if entry is not None]
            logprobs.append(with_logprobs or None)
            first += row.n_draft + 1
        return ModelRunnerOutput(ticket.plan.step, tokens, logprobs, ticket.elapsed())

    def close(self) -> None:
        """Nothing to do: the memory goes with the objects."""


def _drafts(rows: Sequence[Row]) -> dict[int, int]:
    """Of each place that sampled rows have logits at, in order: the draft that is verified there; without those of no draft."""
    drafts: dict[int, int] = {}
    place = 0
    for row in rows:
        if row.n_draft:
            assert row.tokens is not None, "drafts are tokens that the host knows"
            drafts.update(enumerate(row.tokens[-row.n_draft :], place))
        place += row.n_draft + 1
    return drafts


def _verified(sampled: list[int], row: Row) -> list[int]:
    """Tokens sampled at a row's positions, up to the first that differs from its draft: those after it continue the draft."""
    if row.n_draft:
        assert row.tokens is not None, "drafts are tokens that the host knows"
        for i, draft in enumerate(row.tokens[-row.n_draft :]):
            if sampled[i] != draft:
                return sampled[: i + 1]
    return sampled
