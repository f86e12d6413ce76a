"""The half of the backend that computes, in the engine process: one forward pass a step over the paged cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inferflux_backend_torch.loading import Loaded
from inferflux_backend_torch.sampler import DeviceSampler, Draw, Samples
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


@dataclass(slots=True)
class TorchTicket(Ticket):
    """A launched step.

    Attributes:
        rows: those that are sampled, in the order of the plan.
        logits: [R, V], until they have been sampled; None when nothing is.
        elapsed: milliseconds that the forward pass took; waits for it.
    """

    rows: list[Row]
    logits: Tensor | None
    elapsed: Callable[[], float]
    samples: Samples | None = None


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
            max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens, depth=depth
        )
        self._model = loaded.model
        self._cache = loaded.cache
        self._steps: Steps = steps or HostSteps(config.max_num_seqs, info.max_model_len, loaded.cache.block_size, loaded.device)
        self._sampler = DeviceSampler(info.vocab_size, info.eos_token_ids, config.max_num_seqs, loaded.device, draw)

    def warm_up(self) -> None:
        """A chunk and a single token in block 0, which nobody uses, drawn and greedy: libraries choose their kernels in it."""
        chunk = min(_WARM_UP_TOKENS, self.caps.max_num_batched_tokens, self.model_info.max_model_len)
        greedy = SamplingParams(max_tokens=1, temperature=0.0)
        drawn = SamplingParams(max_tokens=1, top_k=5, top_p=0.9, logprobs=1)
        for n, params in ((chunk, drawn), (1, greedy)):
            tokens = [0] * n
            row = Row(slot=0, start=0, n=n, tokens=tokens, n_draft=0, sample=True, kv=PagedOps())
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
        logits, elapsed = self._compute(rows, [places[row.slot] for row in wanted])
        return TorchTicket(plan, wanted, logits if wanted else None, elapsed)

    def _compute(self, rows: Sequence[Row], sampled: Sequence[int]) -> tuple[Tensor, Callable[[], float]]:
        """Logits of the sampled rows, and how long that took."""
        began = time.perf_counter()
        hidden = self._model.forward(self._steps.inputs(rows, sampled), self._cache)
        logits = self._model.logits(hidden) if sampled else hidden
        milliseconds = (time.perf_counter() - began) * 1e3
        return logits, lambda: milliseconds

    def sample(self, ticket: Ticket, mask: GrammarMask | None) -> None:
        assert isinstance(ticket, TorchTicket)
        if ticket.logits is not None:
            slots, positions = [row.slot for row in ticket.rows], [row.start + row.n for row in ticket.rows]
            ticket.samples = self._sampler.sample(ticket.logits, slots, positions)
            ticket.logits = None

    def collect(self, ticket: Ticket) -> ModelRunnerOutput:
        assert isinstance(ticket, TorchTicket)
        tokens: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        if ticket.samples is not None:
            tokens, logprobs = ticket.samples.collect()
        return ModelRunnerOutput(
            ticket.plan.step,
            [[token] for token in tokens],
            [None if entry is None else [entry] for entry in logprobs],
            ticket.elapsed(),
        )

    def close(self) -> None:
        """Nothing to do: the memory goes with the objects."""
